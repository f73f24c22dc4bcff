"""Training with real ranks, object store and MLflow server, compared with plain torch."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
import pytest
import torch
import torch.nn.functional as F
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from support.helpers import Run, RunText, ranks_of, started

from trainer.config.schema import load_config
from trainer.data.index import open_index
from trainer.data.sampler import epoch_order
from trainer.models import build_model

RECIPE = "digits-resnet8"
MEAN, STD = 0.3, 0.38  # those of the recipe


@pytest.fixture(scope="session")
def remote_digits(digits_folder: Path, bucket: str, service_env: dict[str, str]) -> str:
    """URL of the digits in the object store."""
    from support.helpers import run_convoy

    url = f"{bucket}/digits"
    done = run_convoy("pack", digits_folder, url, "--shards", 5, env=service_env)
    assert done.returncode == 0, done.stderr
    return url


def _history(client: MlflowClient, run_id: str, key: str) -> dict[int, float]:
    return {m.step: m.value for m in client.get_metric_history(run_id, key)}


def _split(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Return pixels, labels and keys of the source files, in key order."""
    files = sorted((folder / split).rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - MEAN) / STD
    return (
        images.float().contiguous(),
        torch.tensor([int(f.parent.name) for f in files]),
        [f"{f.parent.name}/{f.stem}" for f in files],
    )


def _top1_and_top5(weights: Path, folder: Path) -> tuple[float, float]:
    """Return top1 and top5 on the validation files, computed with plain torch."""
    model = build_model("resnet8", 10).eval()
    model.load_state_dict(load_file(weights))
    images, labels, _ = _split(folder, "val")
    with torch.no_grad():
        top = model(images).topk(5).indices
    hits = torch.stack([top[:, 0] == labels, (top == labels[:, None]).any(1)])
    top1, top5 = hits.double().mean(1).tolist()
    return top1, top5


def test_training_on_remote_shards_logs_and_registers_the_model(
    convoy_ok: RunText,
    service_env: dict[str, str],
    client: MlflowClient,
    remote_digits: str,
    digits_folder: Path,
    tmp_path: Path,
) -> None:
    settings = [
        f"data.train={remote_digits}/train",
        f"data.val={remote_digits}/val",
        "train.epochs=3",
        "tracking.register_as=digits",
    ]
    settings += ["batch.eval_size=32", f"train.output_dir={tmp_path}/out"]
    shown = convoy_ok("train", RECIPE, "--procs", 2, *settings, env=service_env)
    assert "registered digits version 1 as champion" in shown
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert (result["steps"], result["ranks"], result["val_samples"]) == (30, 2, 151)

    # MLflow's record of the run
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    flat = load_config(RECIPE, settings).flat()
    assert {key: run.data.params[key] for key in flat} == {
        key: str(value) for key, value in flat.items()
    }
    losses, rates = (_history(client, run.info.run_id, key) for key in ("loss", "learning_rate"))
    assert list(losses) == list(rates) == list(range(1, 31))
    peak = 0.2 * 64 / 256
    assert [rates[s] for s in range(1, 11)] == pytest.approx([peak * s / 10 for s in range(1, 11)])
    assert [rates[s] for s in range(11, 31)] == pytest.approx(
        [peak / 2 * (1 + np.cos(np.pi * s / 20)) for s in range(20)]
    )
    for key in ("top1", "top5"):
        assert list(_history(client, run.info.run_id, key)) == [10, 20, 30]
    logged = set(run.data.metrics)
    assert {
        "images_per_second",
        "data_wait_fraction",
        "epoch",
        "system/cpu_utilization_percentage",
    } <= logged
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.data.tags["mlflow.source.git.commit"] == head.stdout.strip()
    digests = {i.tags[0].value: i.dataset.digest for i in run.inputs.dataset_inputs}
    assert verified_digest(remote_digits, "train", service_env).startswith(digests["training"])
    assert verified_digest(remote_digits, "val", service_env).startswith(digests["eval"])
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"recipe.yaml", "config.json", "environment.txt"} <= artifacts

    # the reported accuracy is right, and the registered model reproduces it in a process without
    # this project
    top1, top5 = _top1_and_top5(tmp_path / "out/model.safetensors", digits_folder)
    assert (result["top1"], result["top5"]) == pytest.approx((top1, top5), abs=1e-9)
    version = client.get_model_version_by_alias("digits", "champion")
    assert (version.version, version.run_id) == ("1", run.info.run_id)
    downloaded = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    assert not [
        p for p in downloaded.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin")
    ]
    assert _fresh_process_top1(digits_folder, service_env, tmp_path) == pytest.approx(
        top1, abs=1e-9
    )
    (tmp_path / "tmp").mkdir()
    env = service_env | {"TMPDIR": str(tmp_path / "tmp")}
    convoy_ok(
        "weights",
        "export",
        "models:/digits@champion",
        tmp_path / "digits.onnx",
        "--format",
        "onnx",
        env=env,
    )
    images, labels, _ = _split(digits_folder, "val")
    (logits,) = onnxruntime.InferenceSession(tmp_path / "digits.onnx").run(
        None, {"images": images.numpy()}
    )
    assert float((logits.argmax(1) == labels.numpy()).mean()) == pytest.approx(top1, abs=1e-9)
    measured = json.loads(
        convoy_ok("evaluate", "models:/digits@champion", f"{remote_digits}/val", "--json", env=env)
    )
    assert measured["top1"] == pytest.approx(top1, abs=1e-9)
    assert not [
        p for p in (tmp_path / "tmp").iterdir() if not p.name.startswith("torchinductor")
    ], "downloaded models are removed"


def verified_digest(url: str, split: str, env: dict[str, str]) -> str:
    """Return the digest that ``convoy verify`` computes, without its prefix."""
    from support.helpers import run_convoy

    return json.loads(run_convoy("verify", f"{url}/{split}", "--json", env=env).stdout)["splits"][
        0
    ]["digest"].split(":")[1]


def _fresh_process_top1(folder: Path, env: dict[str, str], cwd: Path) -> float:
    code = """
import sys, pathlib, mlflow, pandas as pd
model = mlflow.pyfunc.load_model("models:/digits@champion")
assert model.metadata.signature is not None and model.metadata.saved_input_example_info is not None
files = sorted(pathlib.Path(sys.argv[1]).rglob("*.png"))
probabilities = model.predict(pd.DataFrame({"image": [f.read_bytes() for f in files]}))
assert probabilities.shape == (len(files), 10) and abs(probabilities.sum(1) - 1).max() < 1e-5
print(sum(int(p.argmax() == int(f.parent.name)) for p, f in zip(probabilities, files)) / len(files))
"""
    only_mlflow = {
        "MLFLOW_TRACKING_URI": env["MLFLOW_TRACKING_URI"],
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "val")],
        env=only_mlflow | {"PATH": "/usr/bin:/bin"}, cwd=cwd, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def test_ranks_and_accumulation_match_a_reference_loop(
    convoy_ok: RunText,
    service_env: dict[str, str],
    client: MlflowClient,
    digits: Path,
    digits_folder: Path,
    tmp_path: Path,
) -> None:
    """Losses of every step and the final weights.

    600 samples are not divisible by 70, so the last batch of an epoch is short.
    """
    settings = [
        f"data.train={digits}/train",
        "data.val=null",
        "batch.global_size=70",
        "batch.micro_size=7",
        "train.epochs=2",
    ]
    settings += [
        "augment.crop=none",
        "data.shuffle_window=150",
        f"train.output_dir={tmp_path}/out",
        "schedule.warmup_epochs=1",
    ]
    # a low learning rate (at 0.05 rounding errors grow tenfold in two steps), and the kernels of
    # the reference loop
    settings += ["optimizer.base_lr=0.005", "train.channels_last=false"]
    convoy_ok("train", RECIPE, "--procs", 2, *settings, env=service_env)
    result = json.loads((tmp_path / "out/result.json").read_text())
    torch.set_num_threads(1)  # as in each rank: more threads sum in another order
    losses, model = _reference_loop(
        digits, digits_folder, 70 // 7, epochs=2, global_size=70, window=150
    )
    got = _history(client, result["mlflow_run_id"], "loss")
    assert list(got.values()) == pytest.approx(losses, rel=1e-5)
    trained = load_file(tmp_path / "out/model.safetensors")
    for name, value in model.state_dict().items():
        if value.is_floating_point() and "running" not in name:
            assert torch.allclose(trained[name], value, rtol=1e-4, atol=1e-6), name


def _reference_loop(
    digits: Path, folder: Path, micro_batches: int, epochs: int, global_size: int, window: int
) -> tuple[list[float], torch.nn.Module]:
    """Train in one process with torch's optimizer; return losses by step and the model.

    The loss is the mean over the global batch's samples without padding; micro-batches run one
    after another.
    """
    index, _ = open_index(str(digits / "train"))
    images, labels, keys = _split(folder, "train")
    position = {key: i for i, key in enumerate(keys)}
    torch.manual_seed(0)
    model = build_model("resnet8", 10)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps, losses = -(-600 // global_size), []
    peak, total = 0.005 * global_size / 256, epochs * -(-600 // global_size)
    for epoch in range(epochs):
        order = epoch_order(index.sizes, 0, epoch, global_size, window)
        for step in range(steps):
            number = epoch * steps + step
            after = number - steps
            rate = (
                peak * (number + 1) / steps
                if after < 0
                else peak / 2 * (1 + np.cos(np.pi * after / (total - steps)))
            )
            optimizer.param_groups[0]["lr"] = float(rate)
            optimizer.zero_grad()
            samples = torch.tensor([position[index.key(int(s))] for s in order.samples[step]])
            weights = torch.from_numpy(order.weights[step])
            loss = torch.zeros(())
            for part in range(micro_batches):
                chosen = slice(part, None, micro_batches)
                each = F.cross_entropy(
                    model(images[samples[chosen]]), labels[samples[chosen]], reduction="none"
                )
                loss = loss + (each * weights[chosen]).sum() / weights.sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, model


def test_two_ranks_train_max_steps_on_one_shard(
    convoy_ok: RunText, digits_folder: Path, tmp_path: Path
) -> None:
    convoy_ok("pack", digits_folder / "val", tmp_path / "data", "--shards", 1)
    settings = [
        f"data.train={tmp_path}/data/train",
        f"data.val={tmp_path}/data/train",
        "batch.global_size=32",
    ]
    settings += [
        "train.epochs=null",
        "train.max_steps=7",
        f"train.output_dir={tmp_path}/out",
        "batch.eval_size=7",
    ]
    (tmp_path / "tmp").mkdir()
    convoy_ok("train", RECIPE, "--procs", 2, *settings, env={"TMPDIR": str(tmp_path / "tmp")})
    left = [p for p in (tmp_path / "tmp").iterdir() if not p.name.startswith("torchinductor")]
    assert not left, "only torch's cache remains"
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert (result["steps"], result["val_samples"]) == (7, 151)
    top1, top5 = _top1_and_top5(tmp_path / "out/model.safetensors", digits_folder)
    assert (result["top1"], result["top5"]) == pytest.approx((top1, top5), abs=1e-9)


def test_training_continues_without_tracking_server_and_sync_delivers_all(
    convoy: Run,
    convoy_ok: RunText,
    service_env: dict[str, str],
    client: MlflowClient,
    digits: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    settings = [
        f"data.train={digits}/train",
        f"data.val={digits}/val",
        "train.epochs=2",
        f"train.output_dir={out}",
    ]
    done = convoy("train", RECIPE, *settings, env={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be reached") == 1, "reported once"
    assert "Traceback" not in done.stderr
    assert (out / "tracking.jsonl").exists()
    shown = convoy_ok("sync", out / "tracking.jsonl", env=service_env)
    run_id = json.loads((out / "result.json").read_text())["mlflow_run_id"]
    assert run_id in shown
    assert list(_history(client, run_id, "loss")) == list(range(1, 21))
    assert list(_history(client, run_id, "top1")) == [10, 20]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert not (out / "tracking.jsonl").exists()
    # the model can be registered later
    assert "registered late version 1 as champion" in convoy_ok(
        "register", out, "late", env=service_env
    )


def test_unreachable_registry_exits_with_144_and_keeps_the_weights(
    convoy: Run, digits: Path, tmp_path: Path
) -> None:
    settings = [
        f"data.train={digits}/train",
        "data.val=null",
        "train.max_steps=2",
        f"train.output_dir={tmp_path}/out",
    ]
    done = convoy(
        "train",
        RECIPE,
        *settings,
        "tracking.register_as=x",
        env={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
    )
    assert done.returncode == 144
    assert "so no new version of x was registered" in done.stderr
    assert (tmp_path / "out/model.safetensors").exists()


def test_invalid_registered_name_is_rejected_before_anything_changes(
    convoy_ok: RunText,
    convoy_refuses: RunText,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with checkpoint.resume=never; on two ranks, with a database created by the check."""
    monkeypatch.chdir(tmp_path)  # MLflow stores artifacts of a SQLite database in this folder
    settings = [
        f"data.train={digits}/train",
        "data.val=null",
        "train.max_steps=2",
        f"train.output_dir={tmp_path}/out",
    ]
    convoy_ok("train", RECIPE, *settings)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert any("step-" in str(path) for path in before)
    bad = [
        f"tracking.uri=sqlite:///{tmp_path}/new.db",
        "tracking.register_as='a:b'",
        "checkpoint.resume=never",
    ]
    (line,) = convoy_refuses("train", RECIPE, "--procs", 2, *settings, *bad).splitlines()
    assert line.count("tracking.register_as: 'a:b' is invalid") == 1
    assert {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == before
    assert MlflowClient(f"sqlite:///{tmp_path}/new.db").search_registered_models() == []


def test_model_version_becomes_champion_if_not_worse(
    convoy_ok: RunText,
    service_env: dict[str, str],
    client: MlflowClient,
    digits: Path,
    tmp_path: Path,
) -> None:
    from trainer.export.model_registry import register

    out = tmp_path / "out"
    settings = [
        f"data.train={digits}/train",
        f"data.val={digits}/val",
        "train.max_steps=2",
        f"train.output_dir={out}",
    ]
    convoy_ok("train", RECIPE, *settings, env=service_env)
    run_id = json.loads((out / "result.json").read_text())["mlflow_run_id"]
    picture, others = io.BytesIO(), iter((0.9, 0.8, 0.7, 0.6))
    Image.new("RGB", (8, 8)).save(picture, "PNG")

    def added(top1: float, data: str) -> tuple[str, dict[str, str]]:
        uri, top5 = service_env["MLFLOW_TRACKING_URI"], next(others)  # each model is different
        got = register(uri, run_id, "ladder", out, picture.getvalue(), top1, top5, data)
        return got.alias, dict(client.get_registered_model("ladder").aliases)

    assert added(0.5, "a") == ("champion", {"champion": "1"})
    assert added(0.4, "a") == ("challenger", {"champion": "1", "challenger": "2"})
    assert added(0.5, "a") == ("champion", {"champion": "3"})
    assert added(0.9, "other data") == ("challenger", {"champion": "3", "challenger": "4"})
    convoy_ok("promote", "ladder", "4", env=service_env)
    assert client.get_model_version_by_alias("ladder", "champion").version == "4"


# --- errors during training -------------------------------------------------------------------


def test_killed_rank_0_ends_the_run_with_144(digits: Path, tmp_path: Path) -> None:
    """test_pods.py kills another rank."""
    settings = [
        f"data.train={digits}/train",
        "data.val=null",
        "train.epochs=10000",
        f"train.output_dir={tmp_path}/out",
    ]
    with started(RECIPE, [*settings, "train.log_every_steps=1"], {}) as process:
        ranks = ranks_of(process)
        ranks[0].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 144, stderr
        assert time.monotonic() - killed < 30
    assert not [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_sample_that_cannot_be_decoded_is_named(
    convoy_refuses: RunText, convoy_ok: RunText, jpeg_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for path in sorted(jpeg_folder.rglob("*.JPEG")):
        target = source / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.stem == "017":  # corrupt in the middle, which packing detects only with --decode
            file = io.BytesIO()
            Image.open(path).save(file, "PNG")
            content = bytearray(file.getvalue())
            content[len(content) // 2] ^= 0xFF
            target.write_bytes(content)
        else:
            target.write_bytes(path.read_bytes())
    convoy_ok("pack", source, tmp_path / "data", "--shards", 2)
    assert "flower/017" in convoy_refuses("verify", tmp_path / "data")
    settings = [
        f"data.train={tmp_path}/data/train",
        "data.val=null",
        "data.image_size=16",
        "batch.global_size=8",
        "batch.micro_size=4",
    ]
    stderr = convoy_refuses(
        "train", RECIPE, "--procs", 2, *settings, f"train.output_dir={tmp_path}/out"
    )
    named = [line for line in stderr.splitlines() if "flower/017" in line]
    assert len(named) == 1
    assert "cannot be decoded" in named[0]
    assert ".tar: sample" in named[0]


def test_skipped_bad_sample_is_reported_and_counted(
    convoy: Run,
    convoy_ok: RunText,
    service_env: dict[str, str],
    client: MlflowClient,
    digits_folder: Path,
    tmp_path: Path,
) -> None:
    """With a cache, growing images and two pipeline stages, which must both skip the sample."""
    convoy_ok("pack", digits_folder, tmp_path / "data", "--shards", 5)
    settings = [
        f"data.train={tmp_path}/data/train",
        "data.val=null",
        "data.check=sha256",
        f"train.output_dir={tmp_path}/out",
    ]
    index, _ = open_index(f"{tmp_path}/data/train")
    shard = index.shards[2]
    with (tmp_path / "data/train" / shard.name).open("r+b") as file:
        file.seek(shard.offsets[7] + 512)
        file.write(b"spoiled!" * 8)
    done = convoy("train", RECIPE, *settings)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert f"{shard.name}: its SHA-256 is" in done.stderr
    settings += [
        "data.check=size",
        "data.bad_samples=skip",
        "data.max_bad_samples=3",
        f"data.cache_dir={tmp_path}/cache",
    ]
    settings += [
        "data.image_size=16",
        "data.initial_size=8",
        "data.grow_until=2",
        "data.size_step=4",
        "train.epochs=3",
    ]
    shown = convoy_ok(
        "train", RECIPE, "--procs", 2, *settings, "parallel.pipeline_stages=2", env=service_env
    )
    assert shown.count("bad sample skipped: ") == 3, "once per epoch"
    assert f"sample {shard.keys[7]} at byte" in shown
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert (result["steps"], result["bad_samples"]) == (30, 3)
    assert max(_history(client, result["mlflow_run_id"], "bad_samples").values()) == 3
    assert (
        sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
        > index.bytes * 0.9
    )
    settings = [*settings, "data.max_bad_samples=1", f"train.output_dir={tmp_path}/again"]
    done = convoy("train", RECIPE, "--procs", 2, *settings)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "data.max_bad_samples: 2 samples could not be decoded" in done.stderr


def test_nan_loss_ends_the_run_with_code_2(
    convoy_refuses: RunText, digits: Path, tmp_path: Path
) -> None:
    settings = [
        f"data.train={digits}/train",
        "data.val=null",
        "optimizer.base_lr=1e30",
        f"train.output_dir={tmp_path}/out",
    ]
    stderr = convoy_refuses("train", RECIPE, "--procs", 2, *settings)
    assert stderr.count("training diverged") == 1
    assert not (tmp_path / "out/model.safetensors").exists()
    stderr = convoy_refuses("train", RECIPE, *settings, "precision=bf16")
    assert stderr.count("training diverged") == 1
    assert "fp16" not in stderr


def test_repeated_fp16_overflow_ends_the_run_with_code_2(
    convoy_refuses: RunText, digits: Path, tmp_path: Path
) -> None:
    settings = [
        f"data.train={digits}/train",
        "data.val=null",
        "precision=fp16",
        "parallel.zero_stage=1",
        "optimizer.base_lr=1e6",
    ]
    settings += [
        "train.max_skipped_steps=3",
        "schedule.warmup_epochs=0",
        "model.width=4",
        f"train.output_dir={tmp_path}/out",
    ]
    stderr = convoy_refuses("train", RECIPE, "--procs", 2, *settings)
    assert stderr.count("the gradients overflowed fp16 3 times in a row") == 1
    keys = stderr.split("its samples: ")[1].split(" and ")[0].split(", ")
    sources = {f"{label}/{number:04d}" for number, label in enumerate(load_digits().target[:600])}
    assert len(keys) == 16
    assert set(keys) <= sources
