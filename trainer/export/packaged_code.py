"""The code that a registered model needs to predict, as a package whose name no program has for its
own.
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
    """The package's folder, for MLflow's ``code_paths``, and the file that it runs to load the
    model, for the block's time.

    The package holds what ``pyfunc_model.py`` imports, directly or not, and nothing else. Its name
    ends in a hash of its content: models of different versions of Convoy can be loaded into one
    program.
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
        sys.path.append(folder)  # MLflow runs the file before it logs the model
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
    """The files of this package that ``pyfunc_model.py`` imports, directly or not, in a fixed
    order.
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
    """Names below ``trainer`` that a file imports: modules, and names in them that may be modules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == _ROOT.name}


def _files_of(module: str) -> list[Path]:
    """A module's file (compiled too) and the packages above it; none for a name that is no module."""
    parts = module.split(".")[1:]
    base = _ROOT.joinpath(*parts)
    if base.is_dir():
        own = [base / "__init__.py"]
    else:
        own = [
            path
            for path in (base.with_suffix(".py"), *sorted(base.parent.glob(f"{base.name}.*.so")))
            if path.is_file()
        ]
    if not own:
        return []
    return own + [_ROOT.joinpath(*parts[:depth], "__init__.py") for depth in range(len(parts))]
