"""The reference grid: parallel configurations, and sets of processes that train many of them.

One set of processes trains many cells, because starting torch takes seconds.
"""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from grid_options import OPTIMIZERS, OPTIONS, PRESETS, SWITCHES, Cell, is_plain, option_of
from sklearn.datasets import load_digits

from trainer.config.schema import RunConfig
from trainer.engine.deepspeed.config import validate_parallelism
from trainer.errors import UserError

HERE = Path(__file__).parent
MATRIX = os.environ.get("CONVOY_MATRIX")
"""Folder for the report of `make matrix`, which trains all valid cells; None: train a subset."""
NETWORKS = ("no batch norm", "batch norm", "auxiliary heads")
GLOBAL = 16
SEED = 12
"""Seed of the covering set, chosen because the resulting set is small."""
KEYS = ("ranks", "stages", "accumulation", "zero", "precision", "network")


def allowed_cells() -> list[Cell]:
    """Return all valid cells with default options.

    They are ranks x stages x accumulation steps x ZeRO stage x precision x network, without the
    combinations that ``validate_parallelism`` rejects.
    """
    everything = itertools.product(
        (1, 2, 4), (1, 2, 4), (1, 2, 4), (0, 1, 2, 3), ("fp32", "bf16", "fp16"), NETWORKS
    )
    cells = [dict(zip(KEYS, values, strict=True)) for values in everything]
    return [c for c in cells if c["stages"] <= c["ranks"] and not refusal(c)]


def _config(cell: Cell) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": "resnet8"},
            "data": {"train": "none"},
            "train": {"max_steps": 1},
            "precision": cell["precision"],
            "optimizer": {"name": option_of(cell, "optimizer")},
            "parallel": {"pipeline_stages": cell["stages"], "zero_stage": cell["zero"]},
        }
    )


def refusal(cell: Cell) -> str | None:
    try:
        validate_parallelism(_config(cell))
    except UserError as error:
        return str(error)
    return None


def covering() -> list[Cell]:
    """Return cells that cover every valid pair of values of all keys and options.

    They also cover clipping with every combination of stages, ZeRO stage and precision. They are
    chosen greedily, cheap ones first.
    """
    cores = [cell | {"optimizer": name} for cell in allowed_cells() for name in OPTIMIZERS]
    cores = [core for core in cores if not refusal(core)]
    groups = [
        *itertools.combinations((*KEYS, *OPTIONS), 2),
        ("stages", "zero", "precision", "clip"),
    ]
    found = {one for core in cores for group in groups for one in _tuples(core, group)}
    uncovered = {one for one in found if len(one) == 2 or dict(one)["clip"]}
    random = Random(SEED)
    targets = sorted(uncovered, key=repr)
    random.shuffle(targets)
    chosen = []
    for target in map(dict, targets):
        if tuple(target.items()) not in uncovered:
            continue
        matching = [
            core
            for core in cores
            if all(core.get(key, value) == value for key, value in target.items())
        ]
        candidates = [
            _completed(core, target, groups, uncovered, random)
            for core in random.sample(matching, min(40, len(matching)))
        ]
        best = max(
            candidates, key=lambda cell: len(_covered(cell, groups) & uncovered) / _seconds(cell)
        )
        uncovered -= _covered(best, groups)
        chosen.append(best)
    return [
        {key: value for key, value in cell.items() if key in KEYS or value not in (False, "sgd")}
        for cell in chosen
    ]


Tuple = tuple[tuple[str, Any], ...]


def _tuples(core: Cell, group: tuple[str, ...]) -> Iterator[Tuple]:
    """Yield the possible values of a group of keys in a cell whose switches are not set yet."""
    for values in itertools.product(
        *([core[key]] if key in core else (False, True) for key in group)
    ):
        yield tuple(zip(group, values, strict=True))


def _covered(cell: Cell, groups: Sequence[tuple[str, ...]]) -> set[Tuple]:
    return {
        tuple((key, cell[key]) for key in group)
        for group in groups
        if all(key in cell for key in group)
    }


def _completed(
    core: Cell,
    target: Cell,
    groups: Sequence[tuple[str, ...]],
    uncovered: set[Tuple],
    random: Random,
) -> Cell:
    """Set each unset switch to the value that covers more uncovered pairs."""
    cell = core | target
    for switch in random.sample(list(SWITCHES), len(SWITCHES)):
        if switch not in cell:
            touched = [group for group in groups if switch in group]
            gains = {
                value: len(_covered(cell | {switch: value}, touched) & uncovered)
                for value in (False, True)
            }
            cell[switch] = (
                random.choice((False, True))
                if gains[False] == gains[True]
                else max(gains, key=lambda v: gains[v])
            )
    return cell


def _seconds(cell: Cell) -> float:
    """Estimate the relative time that a cell and its reference take."""
    network = 6.0 if cell["network"] == "auxiliary heads" else 1.0
    bits = {"fp16": 1.5, "bf16": 6.0 if cell["stages"] == 1 else 2.0}.get(cell["precision"], 1.0)
    return network * bits * (2.0 if cell["zero"] == 3 else 1.0) * cell["ranks"] ** 0.8


def cells_of_presets() -> list[Cell]:
    """Return every preset on every topology with every ZeRO stage and precision.

    The network is that with batch norm, at two accumulation steps.
    """
    bases = [c for c in allowed_cells() if c["network"] == "batch norm" and c["accumulation"] == 2]
    cells = [
        base | preset | {"preset": name, "kind": "preset"}
        for name, preset in PRESETS.items()
        for base in bases
    ]
    return [cell for cell in cells if not refusal(cell)]


def growing_cells() -> list[Cell]:
    """Return fp16 cells whose loss scale doubles every few steps, and is reduced on overflow."""
    topologies = [(1, 1, 1, 1), (2, 1, 2, 2), (2, 1, 1, 3), (2, 2, 2, 1)]
    topologies = topologies if MATRIX else [topologies[0], topologies[-1]]
    plain = [dict(zip(KEYS, (*t, "fp16", "no batch norm"), strict=True)) for t in topologies]
    return [cell | {"window": 4, "clip": cell["zero"] != 2} for cell in plain]


def uneven_cells() -> list[Cell]:
    """Return cells whose first stage has only decayed weights, and whose second has both kinds."""
    base = dict(zip(KEYS, (2, 2, 2, 1, "fp32", "batch norm"), strict=True)) | {
        "split": ["bn"],
        "spare": True,
        "clip": True,
    }
    return [base, base | {"precision": "bf16", "zero": 0}]


def compiled_cells() -> list[Cell]:
    """Return one cell with torch.compile and stages, only for `make matrix` and with a compiler.

    Compilation takes long.
    """
    cell = dict(zip(KEYS, (2, 2, 2, 0, "fp32", "batch norm"), strict=True)) | {
        "compile": True,
        "clip": True,
    }
    return [cell] if MATRIX and shutil.which("g++") else []


CELLS_PER_PROCESS = 24
"""``grid_runner.py`` destroys the process groups of each engine with pipeline stages, but about 15
polling threads of each stay until the process ends: something in DeepSpeed keeps the groups. With
1,400 threads per rank nothing else runs.
"""


def run_cells(cells: list[Cell], ranks: int, folder: Path) -> list[dict]:
    """Train the cells with ``ranks`` ranks, in as few sets of processes as possible."""
    cells = [cell for cell in cells if cell["ranks"] == ranks]
    digits = load_digits()  # once, because it would take each rank seconds
    np.savez(folder / "digits.npz", images=digits.images, target=digits.target)
    results = []
    for first in range(0, len(cells), CELLS_PER_PROCESS):
        results += _run_set(cells[first : first + CELLS_PER_PROCESS], ranks, folder, first)
    return results


def _run_set(cells: list[Cell], ranks: int, folder: Path, number: int) -> list[dict]:
    """Train some cells in one set of processes."""
    file = folder / f"cells{ranks}-{number}.json"
    micro = {id(c): GLOBAL // (ranks // int(c["stages"]) * int(c["accumulation"])) for c in cells}
    file.write_text(json.dumps([c | {"micro": micro[id(c)]} for c in cells]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, str(HERE / "grid_runner.py"), str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-12000:]
    return json.loads(file.with_suffix(".out").read_text())


def deviation(result: dict) -> str | None:
    """Return the result if it differs too much from the reference loop, else None."""
    first, last, weights = (
        (1e-5, 1e-4, 1e-4) if result["precision"] == "fp32" else (2e-2, 2e-2, 2e-2)
    )
    # Adam divides by the size of a gradient, even if the gradient is only rounding error
    if option_of(result, "optimizer") in ("adamw", "lamb"):
        first, last, weights = 10 * first, 10 * last, 10 * weights
    # without synchronization, each rank's statistics are of other samples, and they are averaged
    running = 10 * weights if option_of(result, "sync") else math.inf
    # relative to the update: weights hardly change at these learning rates, so the relative error
    # of the weights alone would not detect wrong 16-bit updates
    update = 0.01 if result["precision"] == "fp32" else 0.1
    if result["network"] == "no batch norm":
        update = update / 2
    elif not is_plain(result) and result["precision"] == "fp32":
        update = 2 * update
    norms5, norms20 = (1e-3, 0.05) if result["precision"] == "fp32" else (0.15, 0.25)
    if option_of(result, "optimizer") in ("adamw", "lamb"):
        norms5 = 10 * norms5 if result["precision"] == "fp32" else norms5
        update = 10 * update if result["precision"] == "fp32" else 2.5 * update
    limits = {
        "first5": first,
        "all20": last,
        "weights": weights,
        "update": update,
        "averages": weights,
        "running": running,
    }
    limits |= {"norms5": norms5, "norms20": norms20}
    limits["skipped"] = 5 if result["precision"] == "fp16" else 0  # while the loss scale is reduced
    if all(result[name] <= limit for name, limit in limits.items()):
        return None
    return f"{ {k: v for k, v in result.items() if k != 'losses'} }"


# --- checkpoint and resume --------------------------------------------------------------------

MICRO = 4
"""Micro-batch size: four micro-batches per step, on one, two or four replicas of the model."""


def _resumed(
    ranks: int,
    stages: int,
    zero: int,
    precision: str = "fp32",
    network: str = "batch norm",
    **options: object,
) -> Cell:
    cell: Cell = {
        "ranks": ranks,
        "stages": stages,
        "zero": zero,
        "precision": precision,
        "network": network,
    }
    return cell | {
        "accumulation": GLOBAL // MICRO // (ranks // stages),
        "ema": True,
        "clip": True,
        **options,
    }


_ADAMW = {"optimizer": "adamw"}
_FP32 = [
    _resumed(1, 1, 0),
    _resumed(2, 1, 1),
    _resumed(2, 1, 3),
    _resumed(2, 2, 0),
    _resumed(4, 2, 1),
]
_OTHERS = [
    *(_resumed(2, 1, 3, "fp16"), _resumed(2, 2, 1, "fp16")),
    *(_resumed(1, 1, 0, "bf16"), _resumed(2, 1, 1, "bf16")),
    *(_resumed(1, 1, 0, **_ADAMW), _resumed(2, 1, 3, **_ADAMW)),
    *(_resumed(1, 1, 0, network="auxiliary heads"), _resumed(2, 2, 1, network="auxiliary heads")),
]
_MORE = [
    *(
        _resumed(1, 1, 2),
        _resumed(2, 1, 0),
        _resumed(2, 1, 2),
        _resumed(4, 1, 3),
        _resumed(4, 4, 0),
        _resumed(4, 4, 1),
    ),
    *(_resumed(1, 1, 1, "fp16"), _resumed(2, 1, 2, **_ADAMW)),
]


def cells_that_save(folder: Path) -> list[Cell]:
    """Return cells that save a checkpoint at step 10, each in its own folder below ``folder``."""
    topologies = [*_FP32, *_OTHERS, *(_MORE if MATRIX else [])]
    return [
        cell | {"save": str(folder / f"saved{number}")} for number, cell in enumerate(topologies)
    ]


def cells_that_load(saving: list[Cell]) -> list[Cell]:
    """Return cells that resume from each checkpoint: the same training on other topologies.

    `make matrix` resumes each checkpoint on all of them. Otherwise each is resumed on the next one,
    and two fp32 checkpoints also on their own topology.
    """
    loading = []
    for number, cell in enumerate(saving):
        topologies = [
            other
            for other in saving
            if all(
                option_of(other, key) == option_of(cell, key)
                for key in ("network", "precision", *OPTIONS)
            )
        ]
        if not MATRIX:
            # two ranks at ZeRO 3, and four ranks in two stages at ZeRO 1
            itself = [cell] if number in (2, 4) else []
            following = topologies[(topologies.index(cell) + 1) % len(topologies)]
            topologies = [*itself, following]
        loading += [
            {key: value for key, value in other.items() if key != "save"} | {"load": cell["save"]}
            for other in topologies
        ]
    return loading


class Trainings:
    """All trainings of the grid.

    Those on the same number of ranks run in one set of processes, on first access.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saving = cells_that_save(folder)
        grid = (
            [*(cell | {"kind": "plain"} for cell in allowed_cells()), *cells_of_presets()]
            if MATRIX
            else []
        )
        self._cells = [
            *grid,
            *covering(),
            *growing_cells(),
            *uneven_cells(),
            *compiled_cells(),
            *self.saving,
        ]
        self._results: dict[int, list[dict]] = {}

    def on(self, ranks: int) -> list[dict]:
        if ranks not in self._results:
            started = time.monotonic()
            results = self._results[ranks] = run_cells(self._cells, ranks, self.folder)
            if MATRIX:
                checked = [
                    {"kind": "other"} | result | {"deviation": deviation(result)}
                    for result in results
                ]
                Path(MATRIX).mkdir(parents=True, exist_ok=True)
                report = {"results": checked, "seconds": time.monotonic() - started}
                (Path(MATRIX) / f"ranks{ranks}.json").write_text(json.dumps(report))
        return self._results[ranks]
