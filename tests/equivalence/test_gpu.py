"""The same algorithm on GPUs: `make test-gpu`, on a machine that has some; skipped elsewhere."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from reference_grid import Trainings, cells_that_load, deviation, run_cells
from support.helpers import Run, started

RECIPE = "digits-resnet8"
GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(not GPUS, reason="no GPU")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [ranks for ranks in (1, 2, 4) if ranks <= max(GPUS, 1)])
def test_every_topology_follows_the_plain_loop_on_gpus(ranks: int, trainings: Trainings) -> None:
    results = trainings.on(ranks)
    assert results
    assert not [d for d in map(deviation, results) if d]


@pytest.mark.timeout(3600)
def test_any_topology_goes_on_from_any_other_on_gpus(trainings: Trainings, tmp_path: Path) -> None:
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
def test_it_learns_in_every_precision(
    digits: Path, convoy_ok: Run, tmp_path: Path, precision: str
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
        env=_libraries(),
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["top1"] > 0.9


def test_a_stopped_training_goes_on_without_a_gpu(
    digits: Path, convoy_ok: Run, tmp_path: Path
) -> None:
    settings = [
        f"data.train={digits}/train",
        f"data.val={digits}/val",
        f"train.output_dir={tmp_path}",
        "train.log_every_steps=1",
    ]
    settings += ["precision=bf16", "parallel.zero_stage=1"]
    with started(RECIPE, settings, _libraries(), procs=GPUS) as process:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143
    said = convoy_ok(
        "train", RECIPE, "--procs", 2, *settings, env=_libraries() | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert "goes on from" in said
    assert json.loads((tmp_path / "result.json").read_text())["top1"] > 0.9


def test_more_ranks_than_gpus_are_refused(
    digits: Path, convoy_refuses: Run, tmp_path: Path
) -> None:
    settings = [f"data.train={digits}/train", "data.val=null", f"train.output_dir={tmp_path}"]
    told = convoy_refuses("train", RECIPE, "--procs", GPUS + 1, *settings, env=_libraries())
    assert f"{GPUS + 1} ranks on a machine with {GPUS} GPUs" in told
    assert len(told.splitlines()) == 1


def _libraries() -> dict[str, str]:
    """Where the environment says that Python and the driver find theirs."""
    return {
        name: os.environ[name]
        for name in ("PYTHONPATH", "LD_LIBRARY_PATH", "HOME")
        if name in os.environ
    }
