"""The real command, as several tests run it."""

import os
import subprocess
import sys
from collections.abc import Callable

Run = Callable[..., subprocess.CompletedProcess]

_FROM_OUTSIDE = ("AWS_", "MLFLOW_", "CONVOY_")


def run_convoy(*arguments: object, env: dict[str, str] | None = None, timeout: float = 240) -> subprocess.CompletedProcess:
    """The ``convoy`` command as a user runs it; ``env``: variables beside those of a plain shell."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(_FROM_OUTSIDE)}
    environment = plain | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"} | (env or {})
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
