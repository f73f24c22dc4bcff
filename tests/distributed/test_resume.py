"""A checkpoint of one topology goes on on any other, follows the same plain loop, and on its own is bit-equal to no stop at all."""

import os
from pathlib import Path

import pytest
from test_parallel import GLOBAL, Cell, deviation, run_cells

MATRIX = "CONVOY_MATRIX" in os.environ
MICRO = 4  # four micro-batches a step, on one, two or four copies of the model


def _topology(ranks: int, stages: int, zero: int, precision: str = "fp32", network: str = "batch norm", **options: object) -> Cell:
    cell: Cell = {"ranks": ranks, "stages": stages, "zero": zero, "precision": precision, "network": network}
    return cell | {"accumulation": GLOBAL // MICRO // (ranks // stages), "options": {"ema": 0.9, **options}}


ADAMW = {"optimizer.name": "adamw"}
TOPOLOGIES = [
    _topology(1, 1, 0),
    _topology(2, 1, 1),
    _topology(2, 1, 3),
    _topology(2, 2, 0),
    _topology(4, 2, 1),
]
MORE = [_topology(1, 1, 2), _topology(2, 1, 0), _topology(2, 1, 2), _topology(4, 1, 3), _topology(4, 4, 0), _topology(4, 4, 1)]
SIXTEEN_BIT = [
    _topology(1, 1, 1, "fp16"),
    _topology(2, 1, 3, "fp16"),
    _topology(2, 2, 1, "fp16"),
    _topology(1, 1, 0, "bf16"),
    _topology(2, 1, 1, "bf16"),
]
OTHER_RULES = [
    _topology(1, 1, 0, **ADAMW),
    _topology(2, 1, 2, **ADAMW),
    _topology(2, 1, 3, **ADAMW),
    _topology(1, 1, 0, network="auxiliary heads"),
    _topology(2, 2, 1, network="auxiliary heads"),
]


def _goes_on(saved: Cell, topologies: list[Cell]) -> list[Cell]:
    """Those that go on from one's checkpoint: the same training, spread in any way. Without the matrix it is the next one, and
    itself where it is one of the fp32 ones or the last of its kin."""
    kin = [t for t in topologies if all(t[key] == saved[key] for key in ("options", "network", "precision"))]
    if MATRIX:
        return kin
    place = kin.index(saved)
    itself = [saved] if saved in TOPOLOGIES or place == len(kin) - 1 else []
    return [*itself, kin[(place + 1) % len(kin)]]


@pytest.mark.timeout(3600)
def test_any_topology_goes_on_from_any_other(tmp_path: Path) -> None:
    topologies = [*TOPOLOGIES, *SIXTEEN_BIT, *OTHER_RULES, *(MORE if MATRIX else [])]
    folders = [str(tmp_path / f"saved{number}") for number in range(len(topologies))]
    whole = {}
    for ranks in (1, 2, 4):
        cells = [t | {"save": f} for t, f in zip(topologies, folders, strict=True) if t["ranks"] == ranks]
        whole |= {result["save"]: result for result in run_cells(cells, ranks, tmp_path)}
    assert not [d for d in map(deviation, whole.values()) if d]
    loads = [t | {"load": f} for saved, f in zip(topologies, folders, strict=True) for t in _goes_on(saved, topologies)]
    for ranks in (1, 2, 4):
        for result in run_cells([cell for cell in loads if cell["ranks"] == ranks], ranks, tmp_path):
            assert not deviation(result)
            assert len(result["losses"]) == 10
            same = whole[result["load"]]
            if all(result[key] == same[key] for key in ("ranks", "stages", "zero")):
                assert result["losses"] == same["losses"][10:], "bit for bit"
                assert result["digest"] == same["digest"], "bit for bit"
