"""Packages the code that a registered model needs to predict, under a unique package name.

The name cannot clash with a package of the program that loads the model.
"""

import ast
import hashlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_SERVING = "export/pyfunc_model.py"
_PREFIX = "convoy_model_"
_ABSOLUTE_IMPORT = re.compile(r"^(\s*(?:from|import)\s+)trainer\b", re.MULTILINE)


@contextmanager
def packaged_code() -> Iterator[tuple[Path, Path]]:
    """Yields the package's folder and the file that loads the model; both exist within the block.

    The folder is for MLflow's ``code_paths``; MLflow runs the file to load the model. The package
    contains only what ``pyfunc_model.py`` imports, directly or indirectly. Its name ends in a hash
    of its content, so that models of different versions of Convoy can be loaded into one program.
    """
    sources = _needed()
    name = _PREFIX + _digest(sources)
    with tempfile.TemporaryDirectory(prefix="convoy-code-") as folder:
        for path in sources:
            target = Path(folder, name, path.relative_to(_ROOT))
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".py":
                target.write_text(_renamed(path, name), encoding="utf-8")
            else:
                shutil.copyfile(path, target)
        serving = Path(folder, Path(_SERVING).name)
        serving.write_text(_renamed(_ROOT / _SERVING, name), encoding="utf-8")
        sys.path.append(folder)  # MLflow runs the file before logging the model
        try:
            yield Path(folder, name), serving
        finally:
            sys.path.remove(folder)


def _renamed(path: Path, name: str) -> str:
    return _ABSOLUTE_IMPORT.sub(rf"\g<1>{name}", path.read_text(encoding="utf-8"))


def _digest(sources: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sources:
        digest.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _needed() -> list[Path]:
    """Returns the files that ``pyfunc_model.py`` imports, directly or indirectly.

    The order is fixed.
    """
    found: set[Path] = set()
    waiting = [_ROOT / _SERVING]
    while waiting:
        for name in _imported(waiting.pop()):
            new = set(_files_of(name)) - found
            found |= new
            waiting += [path for path in new if path.suffix == ".py"]
    return sorted(found)


def _imported(path: Path) -> set[str]:
    """Returns the names below ``trainer`` that a file imports.

    These are modules, and names in modules that may be modules.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == _ROOT.name}


def _files_of(module: str) -> list[Path]:
    """Returns a module's files (compiled ones too) and its parent packages' ``__init__.py``.

    Returns an empty list for a name that is not a module.
    """
    parts = module.split(".")[1:]
    base = _ROOT.joinpath(*parts)
    if base.is_dir():
        files = [base / "__init__.py"]
    else:
        files = [
            path
            for path in (base.with_suffix(".py"), *sorted(base.parent.glob(f"{base.name}.*.so")))
            if path.is_file()
        ]
    if not files:
        return []
    return files + [_ROOT.joinpath(*parts[:depth], "__init__.py") for depth in range(len(parts))]
