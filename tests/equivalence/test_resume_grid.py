"""A checkpoint resumes on every topology and matches the reference loop.

Resumed on its own topology, a run is bit-equal to an uninterrupted one.
"""

from pathlib import Path

import pytest
from reference_grid import Trainings, cells_that_load, deviation, run_cells


@pytest.mark.timeout(3600)
def test_resume_on_another_topology_matches_the_reference_loop(
    trainings: Trainings, tmp_path: Path
) -> None:
    uninterrupted = {
        result["save"]: result
        for ranks in (1, 2, 4)
        for result in trainings.on(ranks)
        if "save" in result
    }
    assert not [d for d in map(deviation, uninterrupted.values()) if d]
    loading = cells_that_load(trainings.saving)
    for ranks in (1, 2, 4):
        for result in run_cells(loading, ranks, tmp_path):
            assert not deviation(result)
            assert len(result["losses"]) == 10
            same = uninterrupted[result["load"]]
            if all(result[key] == same[key] for key in ("ranks", "stages", "zero")):
                assert result["losses"] == same["losses"][10:], "bit for bit"
                assert result["digest"] == same["digest"], "bit for bit"
