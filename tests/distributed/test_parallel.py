"""Every way to spread a training over ranks follows one plain loop in fp32: the same algorithm at every scale.

``make test`` trains a set of cells in which each pair of values occurs; ``make matrix`` trains them all.
"""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import RunConfig
from trainer.engine.deepspeed_config import check_engine
from trainer.engine.pipeline_parallel import layer_costs, split
from trainer.errors import UserError
from trainer.models import build_model
from trainer.models.catalogue import forward_costs

HERE = Path(__file__).parent
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
    return [c for c in cells if c["stages"] <= c["ranks"] and not _refusal(c)]


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


def _refusal(cell: Cell) -> str | None:
    try:
        check_engine(_config(cell))
    except UserError as error:
        return str(error)
    return None


def covering(cells: list[Cell]) -> list[Cell]:
    """Cells in which every pair of values occurs that occurs at all, chosen greedily."""
    pairs = {id(c): {((a, c[a]), (b, c[b])) for a, b in itertools.combinations(KEYS, 2)} for c in cells}
    wanted = set().union(*pairs.values())
    chosen = []
    while wanted:
        best = max(cells, key=lambda c: len(pairs[id(c)] & wanted))
        wanted -= pairs[id(best)]
        chosen.append(best)
    return chosen


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
    """Train them in one set of processes."""
    file = folder / f"cells{ranks}.json"
    micro = {id(c): GLOBAL // (ranks // int(c["stages"]) * int(c["accumulation"])) for c in cells}
    file.write_text(json.dumps([c | {"micro": micro[id(c)]} for c in cells]))
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
    limits = {"first5": first, "all20": last, "weights": weights, "averages": weights, "running": running}
    if all(result[figure] <= limit for figure, limit in limits.items()):
        return None
    return f"{ {k: v for k, v in result.items() if k != 'losses'} }"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_topology_follows_the_plain_loop(ranks: int, tmp_path: Path) -> None:
    report = os.environ.get("CONVOY_MATRIX")
    cells = (allowed_cells() if report else covering(allowed_cells())) + optional_cells()
    started = time.monotonic()
    results = run_cells([c for c in cells if c["ranks"] == ranks], ranks, tmp_path)
    assert results
    if report:
        judged = [result | {"deviation": deviation(result)} for result in results]
        content = json.dumps({"results": judged, "seconds": time.monotonic() - started})
        Path(report).mkdir(parents=True, exist_ok=True)
        (Path(report) / f"ranks{ranks}.json").write_text(content)
    assert not [d for d in map(deviation, results) if d]
    for result in results:
        if "options" not in result:
            assert result["losses"][-2] < result["losses"][0], "and it learns"


def test_what_does_not_learn_or_cannot_work_is_refused() -> None:
    def refused(**values: object) -> str:
        return _refusal({"stages": 1, "zero": 0, "precision": "fp32"} | values) or ""

    assert "does not learn with precision fp16" in refused(precision="fp16")
    assert "does not go with pipeline stages" in refused(stages=2, zero=2)
    assert "does not go with pipeline stages" in refused(stages=2, zero=3, precision="fp16")
    assert not refused(stages=2, zero=1, precision="fp16")


# --- how layers are split ---------------------------------------------------------------------------------------------


def _all_splits(costs: list[int], stages: int) -> Iterator[list[int]]:
    for cuts in itertools.combinations(range(1, len(costs)), stages - 1):
        yield [sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)])]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.data())
def test_no_split_has_a_cheaper_costliest_stage(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    parts = split({str(i): cost for i, cost in enumerate(costs)}, stages)
    assert [int(name) for part in parts for name in part] == list(range(len(costs)))
    assert all(parts)
    assert max(sum(costs[int(name)] for name in part) for part in parts) == min(map(max, _all_splits(costs, stages)))


@pytest.mark.parametrize("name", ["alexnet2012", "vgg11", "googlenet2014", "resnet18"])
def test_costs_hold_the_networks_multiply_adds(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, 1000)
    multiply_adds, _ = forward_costs(model, 224)
    costs = layer_costs(model, 224)
    assert list(costs) == [child for child, _ in model.named_children()]
    assert 1 <= sum(costs.values()) / multiply_adds < 1.03


def test_splits_that_are_none_are_refused() -> None:
    costs = {"a": 1, "b": 2, "c": 3}
    assert split(costs, 2, ["b"]) == [["a"], ["b", "c"]]
    for stages, given_split, told in (
        (4, None, "4 is more than the 3 layers"),
        (2, ["a"], "'a' is no layer that a stage can begin with; those: b, c"),
        (3, ["c", "b"], "must name 2 layers in their order"),
        (3, ["b"], "must name 2 layers"),
    ):
        with pytest.raises(UserError, match=told):
            split(costs, stages, given_split)
