"""The reference grid on GPUs: `make test-gpu`; skipped on machines without GPUs."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from reference_grid import Trainings, cells_that_load, deviation, run_cells
from support.helpers import RunText, started

RECIPE = "digits-resnet8"
GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(not GPUS, reason="no GPU")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [ranks for ranks in (1, 2, 4) if ranks <= max(GPUS, 1)])
def test_every_topology_matches_the_reference_loop_on_gpus(
    ranks: int, trainings: Trainings
) -> None:
    results = trainings.on(ranks)
    assert results
    assert not [d for d in map(deviation, results) if d]


@pytest.mark.timeout(3600)
def test_resume_on_another_topology_matches_the_reference_loop_on_gpus(
    trainings: Trainings, tmp_path: Path
) -> None:
    counts = [ranks for ranks in (1, 2, 4) if ranks <= GPUS]
    for ranks in counts:
        trainings.on(ranks)
    loading = [cell for cell in cells_that_load(trainings.saving) if Path(cell["load"]).exists()]
    assert loading
    for ranks in counts:
        for result in run_cells(loading, ranks, tmp_path):
            assert not deviation(result)
            assert len(result["losses"]) == 10


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_gpus_reaches_90_percent_in_every_precision(
    digits: Path, convoy_ok: RunText, tmp_path: Path, precision: str
) -> None:
    settings = [
        f"data.train={digits}/train",
        f"data.val={digits}/val",
        f"train.output_dir={tmp_path}",
        f"precision={precision}",
    ]
    convoy_ok(
        "train",
        RECIPE,
        "--procs",
        GPUS,
        *settings,
        "parallel.zero_stage=1",
        "train.epochs=8",
        env=_library_environment(),
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["top1"] > 0.9


def test_run_stopped_on_gpus_resumes_on_cpu(
    digits: Path, convoy_ok: RunText, tmp_path: Path
) -> None:
    settings = [
        f"data.train={digits}/train",
        f"data.val={digits}/val",
        f"train.output_dir={tmp_path}",
        "train.log_every_steps=1",
    ]
    settings += ["precision=bf16", "parallel.zero_stage=1"]
    with started(RECIPE, settings, _library_environment(), procs=GPUS) as process:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143
    output = convoy_ok(
        "train",
        RECIPE,
        "--procs",
        2,
        *settings,
        env=_library_environment() | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert "resuming from" in output
    assert json.loads((tmp_path / "result.json").read_text())["top1"] > 0.9


def test_more_ranks_than_gpus_are_rejected(
    digits: Path, convoy_refuses: RunText, tmp_path: Path
) -> None:
    settings = [f"data.train={digits}/train", "data.val=null", f"train.output_dir={tmp_path}"]
    stderr = convoy_refuses(
        "train", RECIPE, "--procs", GPUS + 1, *settings, env=_library_environment()
    )
    assert f"{GPUS + 1} ranks on a machine with {GPUS} GPUs" in stderr
    assert len(stderr.splitlines()) == 1


def _library_environment() -> dict[str, str]:
    """Return the variables with which Python and the GPU driver find their libraries."""
    return {
        name: os.environ[name]
        for name in ("PYTHONPATH", "LD_LIBRARY_PATH", "HOME")
        if name in os.environ
    }
