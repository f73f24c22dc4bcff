"""Files that an earlier version wrote (``make_fixture.py``) are read with the same results."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from make_fixture import FIXTURE, MIDDLE, SETTINGS, write_images
from safetensors.torch import load_file
from support.helpers import RunText

from trainer.data.index import open_index

EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


@pytest.mark.parametrize(("split", "samples"), [("train", 120), ("val", 40)])
def test_dataset_of_earlier_version_opens_and_verifies(
    split: str, samples: int, convoy_ok: RunText
) -> None:
    index, _ = open_index(str(FIXTURE / "data" / split))
    assert (index.samples, index.classes) == (samples, [str(number) for number in range(10)])
    (report,) = json.loads(convoy_ok("verify", FIXTURE / "data" / split, "--json"))["splits"]
    assert report["digest"] == index.digest


def test_resume_from_earlier_version_matches_its_final_weights(
    convoy_ok: RunText, tmp_path: Path
) -> None:
    """Bit-equal on a CPU of the same type; on others, kernels sum in a different order."""
    shutil.copytree(FIXTURE / "checkpoints", tmp_path / "out/checkpoints")
    settings = [f"data.train={FIXTURE}/data/train", f"data.val={FIXTURE}/data/val"]
    given = {
        setting.partition("=")[0]: setting
        for setting in [*SETTINGS, *settings, f"train.output_dir={tmp_path}/out"]
    }
    output = convoy_ok("train", "digits-resnet8", *given.values(), "--procs", 2)
    assert f"step-{MIDDLE:09d}" in output
    assert "augmentations use version 1 of the random streams" in output
    result = json.loads((tmp_path / "out/result.json").read_text())
    got = load_file(tmp_path / "out/model.safetensors")
    want = load_file(FIXTURE / "model.safetensors")
    assert got.keys() == want.keys()
    same = (torch.backends.cpu.get_cpu_capability(), torch.__version__) == (
        EXPECTED["cpu"],
        EXPECTED["torch"],
    )
    for name, value in want.items():
        if (
            same and "running" not in name
        ):  # running statistics are averaged over ranks in any order
            assert torch.equal(got[name], value), name
        else:
            assert torch.allclose(got[name], value, rtol=1e-2, atol=1e-3), name
    assert result["loss"] == pytest.approx(EXPECTED["loss"], rel=1e-6 if same else 1e-2)
    last = max((tmp_path / "out/checkpoints").glob("step-*/checkpoint.json"))
    assert json.loads(last.read_text())["random_streams"] == 1
    assert result["top1"] == pytest.approx(EXPECTED["top1"], abs=0 if same else 0.05)


def test_registered_model_of_earlier_version_predicts_the_same(tmp_path: Path) -> None:
    """Load it in a separate process, as a server would."""
    with tarfile.open(FIXTURE / "registered_model.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    write_images(tmp_path / "images")
    code = """
import json, pathlib, sys, mlflow, numpy, pandas
model = mlflow.pyfunc.load_model("registered_model")
files = sorted(pathlib.Path("images/val").rglob("*.png"), key=lambda file: file.name)
images = pandas.DataFrame({"image": [file.read_bytes() for file in files]})
print(json.dumps(numpy.asarray(model.predict(images)).tolist()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.allclose(
        json.loads(done.stdout.splitlines()[-1]), EXPECTED["predictions"], rtol=1e-4, atol=1e-6
    )
