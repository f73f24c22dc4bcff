"""Runs that are stopped by real signals and resumed, compared with an uninterrupted run."""

import json
import random
import re
import signal
from pathlib import Path

import psutil
import pytest
import torch
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from support.helpers import RunText, ranks_of, run_convoy, started, until

from trainer.data.storage.store import open_store

RECIPE = "digits-resnet8"
STEPS = 60
Losses = dict[int, float]


def _settings(digits: Path, out: Path) -> list[str]:
    given = {
        "data.train": f"{digits}/train",
        "data.val": f"{digits}/val",
        "batch.global_size": 60,
        "batch.micro_size": 5,
        "model.width": 4,
        "ema": 0.9,
        "train.epochs": STEPS // 10,
        "train.log_every_steps": 1,
        "train.output_dir": out,
        "tracking.experiment": out.parent.name,
        "name": out.name,
    }
    return [f"{key}={value}" for key, value in given.items()]


def _only_run(client: MlflowClient, experiment: str, name: str) -> MlflowRun:
    found = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([found.experiment_id], f"attributes.run_name = '{name}'")
    return run


def _losses(client: MlflowClient, run: MlflowRun) -> Losses:
    """Return the losses by step; each step is logged once, in order."""
    history = client.get_metric_history(run.info.run_id, "loss")
    steps = [metric.step for metric in history]
    assert steps == sorted(set(steps))
    return {metric.step: metric.value for metric in history}


@pytest.fixture(scope="session")
def uninterrupted(
    digits: Path, service_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "uninterrupted"
    done = run_convoy("train", RECIPE, "--procs", 2, *_settings(digits, out), env=service_env)
    assert done.returncode == 0, done.stderr
    return out


def _assert_bit_equal(out: Path, other: Path) -> None:
    """Batch norm statistics may differ by rounding: a checkpoint averages them over ranks."""
    one, two = load_file(out / "model.safetensors"), load_file(other / "model.safetensors")
    assert one.keys() == two.keys()
    statistics = {name for name in one if "running" in name}
    assert [name for name in one.keys() - statistics if not torch.equal(one[name], two[name])] == []
    assert [
        name
        for name in statistics
        if not torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-7)
    ] == []


def test_resume_after_sigterm_matches_uninterrupted_run(
    digits: Path,
    convoy_ok: RunText,
    service_env: dict[str, str],
    client: MlflowClient,
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "stopped"
    settings = _settings(digits, out)
    with started(RECIPE, settings, service_env) as process:
        process.send_signal(signal.SIGTERM)
        output, stderr = process.communicate(timeout=60)
        assert process.returncode == 143, stderr
    assert "stop signal received: checkpoint of step" in output
    (kept,) = (out / "checkpoints").iterdir()
    step = int(kept.name.removeprefix("step-"))
    assert 0 < step < STEPS
    stopped = _only_run(client, tmp_path.name, "stopped")
    assert stopped.info.status == "KILLED"
    assert list(_losses(client, stopped)) == list(range(1, step + 1))

    output = convoy_ok("train", RECIPE, "--procs", 2, *settings, env=service_env)
    assert f"resuming from {kept}" in output
    finished = _only_run(client, tmp_path.name, "stopped")
    assert (finished.info.run_id, finished.info.status) == (stopped.info.run_id, "FINISHED")
    expected = _only_run(client, uninterrupted.parent.name, "uninterrupted")
    assert _losses(client, finished) == _losses(client, expected)
    _assert_bit_equal(out, uninterrupted)
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, uninterrupted)]
    for key in ("steps", "top1", "top5", "val_samples", "images"):
        assert results[0][key] == results[1][key], key


def _consumed(out: Path, ranks: int) -> dict[tuple[int, int], list[str]]:
    """Return the keys that the ranks of the last run logged, by epoch and step."""
    files = sorted((out / "samples").glob(f"from-*-of-{ranks}.jsonl"))
    assert len(files) == ranks
    consumed: dict[tuple[int, int], list[str]] = {}
    for file in files:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            consumed.setdefault((line["epoch"], line["step"]), []).extend(line["keys"])
    return {step: sorted(keys) for step, keys in consumed.items()}


def _ordered(convoy_ok: RunText, digits: Path) -> dict[tuple[int, int], list[str]]:
    """Return the keys of an entire run by epoch and step, as ``convoy order`` prints them."""
    expected = {}
    for epoch in range(STEPS // 10):
        options = ["--epoch", epoch, "--world-size", 1, "--rank", 0, "--batch-size", 60, "--json"]
        for line in map(json.loads, convoy_ok("order", digits / "train", *options).splitlines()):
            expected[epoch, line["step"]] = sorted(line["keys"])
    return expected


def test_killed_run_resumed_on_fewer_ranks_consumes_exactly_the_remaining_samples(
    digits: Path, convoy_ok: RunText, service_env: dict[str, str], client: MlflowClient,
    bucket: str, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Three ranks are killed at a random step; two resume from a copy of their checkpoints in the
    object store, then one from the folder.
    """
    out, other, url = tmp_path / "killed", tmp_path / "other", f"{bucket}/{tmp_path.name}"
    keys = ["checkpoint.every_steps=3", "checkpoint.keep=2", "data.log_keys=true"]
    last = random.Random(str(tmp_path)).randrange(STEPS // 3, STEPS - 10)
    with started(RECIPE, [*_settings(digits, out), *keys], service_env, procs=3) as process:
        (log,) = (out / "samples").glob("from-0-rank-0-of-3.jsonl")
        until(lambda: len(log.read_text().splitlines()) >= last)
        for rank in [*ranks_of(process, 3), psutil.Process(process.pid)]:
            rank.kill()
        process.communicate(timeout=60)
    expected = _ordered(convoy_ok, digits)
    before = _consumed(out, 3)
    assert len(before) >= last
    for step in sorted(before)[:-2]:  # some ranks may not have written the last two
        assert before[step] == expected[step]
    for name, value in service_env.items():
        monkeypatch.setenv(name, value)
    store = open_store(url)
    for file in (out / "checkpoints").rglob("*.*"):
        store.write(str(file.relative_to(out / "checkpoints")), file.read_bytes())

    last_settings = [
        *_settings(digits, other),
        *keys,
        f"checkpoint.url={out}/checkpoints",
        "tracking.uri=null",
    ]
    runs = [(out, 2, url, [*_settings(digits, out), *keys, f"checkpoint.url={url}"], service_env)]
    runs += [(other, 1, f"{out}/checkpoints", last_settings, {})]
    for folder, ranks, place, settings, environment in runs:
        output = convoy_ok("train", RECIPE, "--procs", ranks, *settings, env=environment)
        first = int(re.findall(rf"resuming from {place}/step-(\d+)", output)[0])
        assert 0 < first <= len(before)
        assert _consumed(folder, ranks) == {
            step: keys for step, keys in expected.items() if step >= divmod(first, 10)
        }
    run = _only_run(client, tmp_path.name, "killed")
    losses = _losses(client, _only_run(client, uninterrupted.parent.name, "uninterrupted"))
    assert _losses(client, run) == pytest.approx(losses, rel=2e-2)
    assert run.info.status == "FINISHED"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, uninterrupted))
    for name, value in theirs.items():
        if "num_batches" not in name:  # each rank counts its own
            assert torch.allclose(ours[name], value, rtol=0.05, atol=0.02), name


def test_ranks_do_not_outlive_a_killed_launcher(digits: Path, tmp_path: Path) -> None:
    settings = [
        *_settings(digits, tmp_path / "out"),
        "train.epochs=10000",
        "data.val=null",
        "checkpoint.keep=1",
    ]
    with started(RECIPE, settings, {}) as process:
        ranks = ranks_of(process)
        process.kill()
        ended, alive = psutil.wait_procs(ranks, timeout=30)
        assert len(ended) == 2, alive
        process.communicate(timeout=60)
    assert list((tmp_path / "out/checkpoints").glob("*/checkpoint.json")), (
        "the ranks wrote a checkpoint before they exited"
    )


def test_checkpoint_of_another_recipe_is_rejected_unless_resume_is_never(
    digits: Path, convoy_ok: RunText, convoy_refuses: RunText, tmp_path: Path
) -> None:
    settings = [
        f"data.train={digits}/train",
        "data.val=null",
        "train.max_steps=2",
        f"train.output_dir={tmp_path}/out",
    ]
    convoy_ok("train", RECIPE, *settings)
    stderr = convoy_refuses("train", RECIPE, "--procs", 2, *settings, "model.name=resnet20")
    difference = "model.name is 'resnet8' in the checkpoint and 'resnet20' in the recipe"
    assert stderr.count(f"belongs to a different recipe: {difference}") == 1
    assert len(stderr.splitlines()) == 1
    output = convoy_ok("train", RECIPE, *settings, "model.name=resnet20", "checkpoint.resume=never")
    assert "resuming" not in output
    output = convoy_ok("train", RECIPE, *settings, "model.name=resnet20")
    assert "resuming from" in output


def test_checkpoint_url_without_permission_is_rejected(
    digits: Path, convoy_refuses: RunText, service_env: dict[str, str], bucket: str, tmp_path: Path
) -> None:
    settings = [
        f"data.train={digits}/train",
        "data.val=null",
        "train.max_steps=2",
        f"train.output_dir={tmp_path}/out",
    ]
    wrong = service_env | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    stderr = convoy_refuses(
        "train", RECIPE, "--procs", 2, *settings, f"checkpoint.url={bucket}/x", env=wrong
    )
    assert "permission denied" in stderr
    assert len(stderr.splitlines()) == 1
