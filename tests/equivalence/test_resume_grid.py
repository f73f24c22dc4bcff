"""A checkpoint of one topology goes on on any other, follows the same plain loop, and on its own is
bit-equal to no stop at all.
"""

from pathlib import Path

import pytest
from reference_grid import Trainings, cells_that_load, deviation, run_cells


@pytest.mark.timeout(3600)
def test_any_topology_goes_on_from_any_other(trainings: Trainings, tmp_path: Path) -> None:
    whole = {
        result["save"]: result
        for ranks in (1, 2, 4)
        for result in trainings.on(ranks)
        if "save" in result
    }
    assert not [d for d in map(deviation, whole.values()) if d]
    loading = cells_that_load(trainings.saving)
    for ranks in (1, 2, 4):
        for result in run_cells(loading, ranks, tmp_path):
            assert not deviation(result)
            assert len(result["losses"]) == 10
            same = whole[result["load"]]
            if all(result[key] == same[key] for key in ("ranks", "stages", "zero")):
                assert result["losses"] == same["losses"][10:], "bit for bit"
                assert result["digest"] == same["digest"], "bit for bit"
