"""Programs that exist only as Go modules, built once per version in the user's cache."""

import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path


def go_program(package: str, version: str, name: str) -> Path | str:
    """Return the program of ``package``, or the reason why it cannot be built.

    ``name``: the name used in the cache and in messages.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convoy"
    cache = base / f"{name}-{version}"
    program = cache / re.sub(r"/v\d+$", "", package).rpartition("/")[2]  # as go install names it
    if program.exists():
        return program
    if shutil.which("go") is None:
        return f"Go is not installed, so {name} cannot be built"
    # another process may build it too: the first rename wins
    build = cache.with_name(f"{cache.name}.{os.getpid()}")
    environment = os.environ | {
        "GOBIN": str(build),
        "CGO_ENABLED": "0",
        "GOFLAGS": "",
        "GOGC": "400",
    }
    # the flags of tools/cluster/build.sh: no debug information, and the standard library is
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
        build.rename(cache)
    shutil.rmtree(build, ignore_errors=True)
    return program
