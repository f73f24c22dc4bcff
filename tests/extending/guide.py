"""Follows an "Add a ..." guide of docs/how-to in a copy of the packages, as a reader would."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def follow_guide(page: str, tree: Path) -> str:
    """Apply the guide ``docs/how-to/{page}.md`` to a copy of the packages in ``tree``.

    A fenced block with a title is a file to add; a ``diff`` block is a change to an existing file.
    Checks that the guide adds one file and changes at most one line. Returns the added file's path.
    """
    for package in ("trainer", "pipelines", "convoy_entry"):
        shutil.copytree(
            ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    blocks = _BLOCK.findall((ROOT / "docs/how-to" / f"{page}.md").read_text())
    added = [(path, code) for language, path, code in blocks if language != "diff"]
    changed = [(path, diff) for language, path, diff in blocks if language == "diff"]
    assert len(added) == 1, f"{page}.md adds {len(added)} files instead of one"
    lines = [line for _, diff in changed for line in diff.splitlines() if line.startswith("+")]
    assert len(lines) <= 1, f"{page}.md changes {len(lines)} lines instead of at most one"
    path, code = added[0]
    assert not (tree / path).exists(), f"{page}.md: {path} exists already"
    (tree / path).write_text(code)
    for name, diff in changed:
        _apply(tree / name, diff)
    return path


def _apply(path: Path, diff: str) -> None:
    """Replace the block's context and ``-`` lines, found once in the file, by its ``+`` lines."""
    lines = diff.splitlines()
    old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name}: the guide's context is not found exactly once"
    path.write_text(text.replace(old, new))


def run_python(tree: Path, *arguments: object, timeout: float = 300) -> str:
    """Run Python with the packages of ``tree`` and return its stdout."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
