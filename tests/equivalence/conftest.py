"""Fixture shared by the tests of the reference grid.

They run in one worker, so that each set of processes is started once.
"""

import pytest
from reference_grid import Trainings


@pytest.fixture(scope="session")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("topologies"))
