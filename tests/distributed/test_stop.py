"""Runs that are stopped and go on: by the real command, with real signals, against one that nothing disturbed."""

import json
import signal
from pathlib import Path

import psutil
import pytest
import torch
from helpers import Run, ranks_of, run_convoy, started
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

RECIPE = "digits-resnet8"
STEPS = 60
Losses = dict[int, float]


def _settings(digits: Path, out: Path) -> list[str]:
    given = {
        "data.train": f"{digits}/train",
        "data.val": f"{digits}/val",
        "batch.global_size": 60,
        "batch.micro_size": 10,
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
    """Each step stands once, and in order."""
    history = client.get_metric_history(run.info.run_id, "loss")
    steps = [metric.step for metric in history]
    assert steps == sorted(set(steps))
    return {metric.step: metric.value for metric in history}


@pytest.fixture(scope="session")
def undisturbed(digits: Path, service_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "whole"
    done = run_convoy("train", RECIPE, "--procs", 2, *_settings(digits, out), env=service_env)
    assert done.returncode == 0, done.stderr
    return out


def _assert_same_bits(out: Path, other: Path) -> None:
    """Batch norm's statistics but for rounding: at a checkpoint each rank's become the mean of all."""
    one, two = load_file(out / "model.safetensors"), load_file(other / "model.safetensors")
    assert one.keys() == two.keys()
    statistics = {name for name in one if "running" in name}
    assert [name for name in one.keys() - statistics if not torch.equal(one[name], two[name])] == []
    assert [name for name in statistics if not torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-7)] == []


def test_sigterm_leaves_a_checkpoint_and_the_run_goes_on_as_if_it_had_not_come(
    digits: Path, convoy_ok: Run, service_env: dict[str, str], client: MlflowClient, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    settings = _settings(digits, out)
    with started(RECIPE, settings, service_env) as process:
        process.send_signal(signal.SIGTERM)
        said, told = process.communicate(timeout=60)
        assert process.returncode == 143, told
    assert "told to stop: checkpoint of step" in said
    (kept,) = (out / "checkpoints").iterdir()
    step = int(kept.name.removeprefix("step-"))
    assert 0 < step < STEPS
    stopped = _only_run(client, tmp_path.name, "stopped")
    assert stopped.info.status == "KILLED"
    assert list(_losses(client, stopped)) == list(range(1, step + 1))

    said = convoy_ok("train", RECIPE, "--procs", 2, *settings, env=service_env)
    assert f"goes on from {kept}" in said
    finished = _only_run(client, tmp_path.name, "stopped")
    assert (finished.info.run_id, finished.info.status) == (stopped.info.run_id, "FINISHED")
    whole = _only_run(client, undisturbed.parent.name, "whole")
    assert _losses(client, finished) == _losses(client, whole)
    _assert_same_bits(out, undisturbed)
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, undisturbed)]
    for key in ("steps", "top1", "top5", "val_samples", "images"):
        assert results[0][key] == results[1][key], key


def test_a_killed_run_goes_on_from_the_object_store_on_other_ranks(
    digits: Path, convoy_ok: Run, service_env: dict[str, str], client: MlflowClient, bucket: str, undisturbed: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "killed"
    url = f"{bucket}/{tmp_path.name}"
    settings = [*_settings(digits, out), f"checkpoint.url={url}", "checkpoint.every_steps=3", "checkpoint.keep=2"]
    with started(RECIPE, settings, service_env) as process:
        assert process.stdout
        for line in process.stdout:  # an epoch's end: there is a checkpoint
            if line.startswith("epoch 2"):
                break
        for rank in [*ranks_of(process), psutil.Process(process.pid)]:
            rank.kill()
        process.communicate(timeout=60)
    said = convoy_ok("train", RECIPE, "--procs", 3, *settings, env=service_env)
    assert f"goes on from {url}/step-" in said
    run = _only_run(client, tmp_path.name, "killed")
    whole = _losses(client, _only_run(client, undisturbed.parent.name, "whole"))
    assert _losses(client, run) == pytest.approx(whole, rel=2e-2)
    assert run.info.status == "FINISHED"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, undisturbed))
    for name, value in theirs.items():
        if "num_batches" not in name:  # each rank counts its own
            assert torch.allclose(ours[name], value, rtol=0.05, atol=0.02), name


def test_ranks_do_not_outlive_a_killed_launcher(digits: Path, tmp_path: Path) -> None:
    settings = [*_settings(digits, tmp_path / "out"), "train.epochs=10000", "data.val=null", "checkpoint.keep=1"]
    with started(RECIPE, settings, {}) as process:
        ranks = ranks_of(process)
        process.kill()
        gone, alive = psutil.wait_procs(ranks, timeout=30)
        assert len(gone) == 2, alive
        process.communicate(timeout=60)
    assert list((tmp_path / "out/checkpoints").glob("*/checkpoint.json")), "they ended in order"


def test_a_checkpoint_of_another_recipe_is_refused_and_never_begins_anew(
    digits: Path, convoy_ok: Run, convoy_refuses: Run, tmp_path: Path
) -> None:
    settings = [f"data.train={digits}/train", "data.val=null", "train.max_steps=2", f"train.output_dir={tmp_path}/out"]
    convoy_ok("train", RECIPE, *settings)
    told = convoy_refuses("train", RECIPE, "--procs", 2, *settings, "model.name=resnet20")
    assert told.count("is of another recipe: model.name is 'resnet8' there and 'resnet20' here") == 1
    assert len(told.splitlines()) == 1
    said = convoy_ok("train", RECIPE, *settings, "model.name=resnet20", "checkpoint.resume=never")
    assert "goes on" not in said
    again = convoy_ok("train", RECIPE, *settings, "model.name=resnet20")
    assert "goes on from" in again


def test_a_checkpoint_url_without_permission_is_refused(
    digits: Path, convoy_refuses: Run, service_env: dict[str, str], bucket: str, tmp_path: Path
) -> None:
    settings = [f"data.train={digits}/train", "data.val=null", "train.max_steps=2", f"train.output_dir={tmp_path}/out"]
    wrong = service_env | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    told = convoy_refuses("train", RECIPE, "--procs", 2, *settings, f"checkpoint.url={bucket}/x", env=wrong)
    assert "permission denied" in told
    assert len(told.splitlines()) == 1
