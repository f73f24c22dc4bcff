"""Writes ``fixture/``: files of Convoy 0.1.0 that later versions must read.

Run it only with the version whose files are needed: ``python
tests/compatibility/make_fixture.py``. The fixture contains a packed dataset, a checkpoint of a run
on two ranks (fp16, ZeRO 1, EMA) after half of its steps, the final weights and loss of that run
resumed from the checkpoint, and a registered model with its predictions. The registered model
excludes the native decoder, which is specific to a machine type.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

FIXTURE = Path(__file__).parent / "fixture"
STEPS, MIDDLE = 12, 6
SETTINGS = [
    *("data.train=data/train", "data.val=data/val", "data.shuffle_window=32"),
    *(
        "model.width=4",
        "batch.global_size=30",
        "batch.micro_size=5",
        "precision=fp16",
        "parallel.zero_stage=1",
        "ema=0.9",
    ),
    *(
        "augment.crop=none",
        "augment.padding=1",
        "augment.flip=true",
        "augment.mixup=0.2",
        "optimizer.clip_grad_norm=2.0",
    ),
    *(
        "train.epochs=3",
        "schedule.warmup_epochs=1",
        "train.log_every_steps=1",
        f"checkpoint.every_steps={MIDDLE}",
    ),
    *("checkpoint.keep=10", "name=compatibility"),
]
"""Overrides of the recipe digits-resnet8, with the keys of version 0.1.0."""


def convoy(folder: Path, *arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments], cwd=folder, env=environment, check=True
    )


def write_images(folder: Path) -> None:
    digits = load_digits()
    for number in range(160):
        path = (
            folder
            / ("train" if number < 120 else "val")
            / str(digits.target[number])
            / f"{number:03d}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * (255 / 16)).astype(np.uint8)).save(path)


def predictions(folder: Path, registered: Path) -> list[list[float]]:
    """Return the registered model's predictions for the validation images, sorted by name."""
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model(str(registered))
    files = sorted((folder / "images/val").rglob("*.png"), key=lambda file: file.name)
    return np.asarray(
        model.predict(pd.DataFrame({"image": [file.read_bytes() for file in files]}))
    ).tolist()


def main() -> None:
    import torch

    shutil.rmtree(FIXTURE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images")
        convoy(folder, "pack", "images", "data", "--shards", "2")
        run = ["train", "digits-resnet8", *SETTINGS, "--procs", "2"]
        convoy(folder, *run, "train.output_dir=first")
        step = f"step-{MIDDLE:09d}"
        shutil.copytree(folder / "first/checkpoints" / step, FIXTURE / "checkpoints" / step)
        shutil.copytree(FIXTURE / "checkpoints", folder / "second/checkpoints")
        registered = ["tracking.uri=sqlite:///mlflow.db", "tracking.register_as=compatibility"]
        convoy(folder, *run, "train.output_dir=second", *registered)
        shutil.copytree(folder / "data", FIXTURE / "data")
        for file in ("model.safetensors", "model.json"):
            shutil.copy(folder / "second" / file, FIXTURE / file)
        (model,) = (path.parent for path in (folder / "mlruns").rglob("MLmodel"))
        (model / "MLmodel").write_text(
            re.sub(f"{tempfile.gettempdir()}/[^/]*", ".", (model / "MLmodel").read_text())
        )
        with tarfile.open(FIXTURE / "registered_model.tar", "w") as tar:
            tar.add(
                model,
                "registered_model",
                filter=lambda member: None if member.name.endswith(".so") else member,
            )
        result = json.loads((folder / "second/result.json").read_text())
        expected = {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "top1": result["top1"],
            "loss": result["loss"],
            "predictions": predictions(folder, model),
        }
        (FIXTURE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
