"""Ways to spread a training over ranks, and sets of processes that train by many of them: starting torch costs seconds."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from trainer.config import RunConfig
from trainer.engine.deepspeed_config import check_engine
from trainer.errors import UserError

HERE = Path(__file__).parent
MATRIX = os.environ.get("CONVOY_MATRIX")
"""Where `make matrix` wants its report, of all that is allowed; else a part of it is trained."""
NETWORKS = ("no batch norm", "batch norm", "auxiliary heads")
GLOBAL = 16
KEYS = ("ranks", "stages", "accumulation", "zero", "precision", "network")

MIXED = {"train.label_smoothing": 0.1, "augment.mixup": 0.2, "augment.cutmix": 1.0}
SYNCHRONIZED = {"train.sync_batch_norm": True}
COMPILED = {"train.compile": True}
RECOMPUTED = {"train.activation_checkpointing": True}

Cell = dict[str, Any]


def allowed_cells() -> list[Cell]:
    """Ranks x stages x accumulation x ZeRO x precision x network, without what is refused."""
    everything = itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4), (0, 1, 2, 3), ("fp32", "bf16", "fp16"), NETWORKS)
    cells = [dict(zip(KEYS, values, strict=True)) for values in everything]
    return [c for c in cells if c["stages"] <= c["ranks"] and not refusal(c)]


def _config(cell: Cell) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": "resnet8"},
            "data": {"train": "none"},
            "train": {"max_steps": 1},
            "precision": cell["precision"],
            "parallel": {"pipeline_stages": cell["stages"], "zero_stage": cell["zero"]},
        }
    )


def refusal(cell: Cell) -> str | None:
    try:
        check_engine(_config(cell))
    except UserError as error:
        return str(error)
    return None


def covering(cells: list[Cell]) -> list[Cell]:
    """Cells in which every pair of values occurs that occurs at all, chosen greedily, cheap ones first."""
    pairs = {id(c): {((a, c[a]), (b, c[b])) for a, b in itertools.combinations(KEYS, 2)} for c in cells}
    wanted = set().union(*pairs.values())
    chosen = []
    while wanted:
        best = max(cells, key=lambda c: len(pairs[id(c)] & wanted) / _seconds(c))
        wanted -= pairs[id(best)]
        chosen.append(best)
    return chosen


def _seconds(cell: Cell) -> float:
    """About what a cell takes."""
    return (1.5 if cell["network"] == "auxiliary heads" else 0.2) * (8 if cell["precision"] == "fp16" else 1) * cell["ranks"] ** 0.5


def optional_cells() -> list[Cell]:
    """Some ways to spread a training with options on that the matrix leaves off."""
    rows: list[tuple] = [
        (1, 1, 2, 0, "fp32", "batch norm", MIXED),
        (2, 1, 1, 0, "fp32", "batch norm", MIXED),
        (2, 1, 2, 1, "bf16", "batch norm", MIXED),
        (2, 2, 2, 0, "fp32", "auxiliary heads", MIXED),
        (2, 1, 2, 0, "fp32", "batch norm", SYNCHRONIZED),
        (2, 1, 4, 2, "bf16", "batch norm", SYNCHRONIZED),
        (1, 1, 2, 0, "fp32", "auxiliary heads", RECOMPUTED),
        *([(1, 1, 2, 0, "fp32", "batch norm", COMPILED)] if shutil.which("g++") else []),
        (2, 1, 2, 3, "fp16", "batch norm", RECOMPUTED),
        (2, 2, 2, 0, "fp32", "auxiliary heads", RECOMPUTED),
        (4, 2, 2, 1, "fp32", "batch norm", SYNCHRONIZED | MIXED | RECOMPUTED),
    ]
    return [dict(zip((*KEYS, "options"), row, strict=True)) for row in rows]


def run_cells(cells: list[Cell], ranks: int, folder: Path) -> list[dict]:
    """Train those of so many ranks in one set of processes."""
    cells = [cell for cell in cells if cell["ranks"] == ranks]
    file = folder / f"cells{ranks}.json"
    micro = {id(c): GLOBAL // (ranks // int(c["stages"]) * int(c["accumulation"])) for c in cells}
    file.write_text(json.dumps([c | {"micro": micro[id(c)]} for c in cells]))
    digits = load_digits()  # here alone: each rank would need seconds for it
    np.savez(folder / "digits.npz", images=digits.images, target=digits.target)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(HERE / "cells.py"), str(file)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.with_suffix(".out").read_text())


def deviation(result: dict) -> str | None:
    """What is too far from the plain loop, if anything is."""
    first, last, weights = (1e-5, 1e-4, 1e-4) if result["precision"] == "fp32" else (2e-2, 2e-2, 2e-2)
    if "optimizer.name" in result.get("options", {}):  # Adam divides by a gradient's size, where that is all rounding too
        first, last, weights = 10 * first, 10 * last, 10 * weights
    # apart from that, each rank saw other samples and they are averaged
    running = weights if "train.sync_batch_norm" in result.get("options", {}) else math.inf
    way = 0.01 if result["precision"] == "fp32" else 0.1  # at such rates weights hardly move: 16 bits must move them alike too
    limits = {"first5": first, "all20": last, "weights": weights, "way": way, "averages": weights, "running": running}
    limits["skipped"] = 5 if result["precision"] == "fp16" else 0  # while the loss scale comes down
    if all(result[figure] <= limit for figure, limit in limits.items()):
        return None
    return f"{ {k: v for k, v in result.items() if k != 'losses'} }"


# --- trainings that are stopped and go on -----------------------------------------------------------------------------

MICRO = 4
"""Four micro-batches a step, on one, two or four copies of the model."""


def _resumed(ranks: int, stages: int, zero: int, precision: str = "fp32", network: str = "batch norm", **options: object) -> Cell:
    cell: Cell = {"ranks": ranks, "stages": stages, "zero": zero, "precision": precision, "network": network}
    return cell | {"accumulation": GLOBAL // MICRO // (ranks // stages), "options": {"ema": 0.9, **options}}


_ADAMW = {"optimizer.name": "adamw"}
_FP32 = [_resumed(1, 1, 0), _resumed(2, 1, 1), _resumed(2, 1, 3), _resumed(2, 2, 0), _resumed(4, 2, 1)]
_OTHERS = [
    *(_resumed(2, 1, 3, "fp16"), _resumed(2, 2, 1, "fp16")),
    *(_resumed(1, 1, 0, "bf16"), _resumed(2, 1, 1, "bf16")),
    *(_resumed(1, 1, 0, **_ADAMW), _resumed(2, 1, 3, **_ADAMW)),
    *(_resumed(1, 1, 0, network="auxiliary heads"), _resumed(2, 2, 1, network="auxiliary heads")),
]
_MORE = [
    *(_resumed(1, 1, 2), _resumed(2, 1, 0), _resumed(2, 1, 2), _resumed(4, 1, 3), _resumed(4, 4, 0), _resumed(4, 4, 1)),
    *(_resumed(1, 1, 1, "fp16"), _resumed(2, 1, 2, **_ADAMW)),
]


def cells_that_save(folder: Path) -> list[Cell]:
    """Each leaves a checkpoint of its step 10 in a folder of its own below ``folder``."""
    topologies = [*_FP32, *_OTHERS, *(_MORE if MATRIX else [])]
    return [cell | {"save": str(folder / f"saved{number}")} for number, cell in enumerate(topologies)]


def cells_that_load(saving: list[Cell]) -> list[Cell]:
    """Those that go on from each checkpoint: the same training, spread in any way. Without the matrix it is the next one, and
    in plain fp32 itself too."""
    loading = []
    for number, cell in enumerate(saving):
        kin = [other for other in saving if all(other[key] == cell[key] for key in ("options", "network", "precision"))]
        if not MATRIX:
            itself = [cell] if number < len(_FP32) else []
            kin = [*itself, kin[(kin.index(cell) + 1) % len(kin)]]
        loading += [{key: value for key, value in other.items() if key != "save"} | {"load": cell["save"]} for other in kin]
    return loading


class Trainings:
    """All trainings, those on so many ranks in one set of processes, run when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saving = cells_that_save(folder)
        self._cells = [*(allowed_cells() if MATRIX else covering(allowed_cells())), *optional_cells(), *self.saving]
        self._results: dict[int, list[dict]] = {}

    def on(self, ranks: int) -> list[dict]:
        if ranks not in self._results:
            started = time.monotonic()
            results = self._results[ranks] = run_cells(self._cells, ranks, self.folder)
            if MATRIX:
                judged = [result | {"deviation": deviation(result)} for result in results]
                Path(MATRIX).mkdir(parents=True, exist_ok=True)
                report = {"results": judged, "seconds": time.monotonic() - started}
                (Path(MATRIX) / f"ranks{ranks}.json").write_text(json.dumps(report))
        return self._results[ranks]
