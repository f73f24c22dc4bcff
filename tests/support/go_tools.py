"""Programs that exist as Go modules only, built once a version in the user's cache."""

import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path


def go_program(package: str, version: str, name: str) -> Path | str:
    """The program of ``package``; a sentence where it cannot be built. ``name``: ours for it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convoy"
    cache = base / f"{name}-{version}"
    program = cache / re.sub(r"/v\d+$", "", package).rpartition("/")[2]  # as go install names it
    if program.exists():
        return program
    if shutil.which("go") is None:
        return f"Go is not installed, so {name} cannot be built"
    own = cache.with_name(
        f"{cache.name}.{os.getpid()}"
    )  # another process may build it too: the first rename wins
    environment = os.environ | {"GOBIN": str(own), "CGO_ENABLED": "0", "GOFLAGS": "", "GOGC": "400"}
    # as tools/cluster/build.sh: without what only debuggers need, and the standard library is
    # compiled once for both
    command = [
        "go",
        "install",
        "-trimpath",
        "-gcflags=all=-dwarf=false",
        "-ldflags=-s -w",
        f"{package}@{version}",
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=570, check=False
    )
    if done.returncode:
        return f"{name} cannot be built: {' '.join(done.stderr.split())[-300:]}"
    with suppress(OSError):
        own.rename(cache)
    shutil.rmtree(own, ignore_errors=True)
    return program
