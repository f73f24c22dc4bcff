"""Private names of other packages are used in the compatibility modules only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.engine.deepspeed import compat

ROOT = Path(__file__).parents[2]
COMPATIBILITY_MODULES = {
    "trainer/dependencies/torch_compat.py",
    "trainer/engine/deepspeed/compat.py",
}
DOCUMENTED = {"os._exit"}
"""Public in spite of the underscore."""
PUBLIC_DEEPSPEED = {"deepspeed", "deepspeed.pipe", "deepspeed.utils"}
"""Modules of DeepSpeed whose functions are documented."""
FILES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
    for package in ("trainer", "pipelines")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _defined(trees: Iterator[ast.Module]) -> set[str]:
    """Names of functions, classes, variables and attributes that the files define."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if _is_self(node.value) else set()
    return names


OWN = _defined(FILES[name] for name in FILES if name not in COMPATIBILITY_MODULES)
INTERNALS = {
    name
    for kind, names in [*compat.OBJECT_ATTRIBUTES.items(), *compat.PARAMETER_ATTRIBUTES.items()]
    for name in names
    if "Engine" not in str(kind) and "Pipeline" not in str(kind)
}
INTERNALS -= OWN | {"optimizer"}
"""Undocumented attributes of DeepSpeed's optimizers and parameters, most without an underscore.

Without those whose name Convoy uses for something else.
"""


def private_uses(tree: ast.Module) -> list[str]:
    """Return the uses of other packages' private names in one file."""
    return [f"line {line}: {text}" for line, text in _uses(tree)]


def _uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            is_own = _is_self(node.value) and node.attr in OWN
            is_private = _is_private(node.attr) and not is_own and text not in DOCUMENTED
            if is_private or node.attr in INTERNALS:
                yield node.lineno, text
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if not _may_be_imported(alias.name):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if not _may_be_imported(node.module or "", alias.name):
                    yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "setattr", "hasattr", "delattr", "set_attribute"):
                name = node.args[1]
                known = name.value if isinstance(name, ast.Constant) else ""
                if _is_private(known) or known in INTERNALS:
                    yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            key = node.slice.value
            if isinstance(key, str) and _is_private(key) and key not in OWN:  # or an annotation
                yield node.lineno, ast.unparse(node)


def _may_be_imported(module: str, name: str = "") -> bool:
    package, *_ = parts = [*module.split("."), name]
    if package in ("trainer", "pipelines"):
        return True
    if package == "deepspeed" and module not in PUBLIC_DEEPSPEED:
        return False
    return not any(_is_private(part) for part in parts)


@pytest.mark.parametrize("name", [name for name in FILES if name not in COMPATIBILITY_MODULES])
def test_a_file_uses_no_private_name_of_another_package(name: str) -> None:
    assert private_uses(FILES[name]) == []


@pytest.mark.parametrize(
    "line",
    [
        "engine._INSTRUCTION_MAP",
        "self._engine._config",
        "self._wrapped_by_deepspeed",
        "optimizer.optimizer.fp32_partitioned_groups_flat",
        "import torch._dynamo",
        "from torch import _dynamo",
        "from torch._utils import _flatten_dense_tensors",
        "from deepspeed.runtime.zero import stage_1_and_2",
        "getattr(parameter, '_hp_mapping', None)",
        "hasattr(optimizer, 'fp32_partitioned_groups_flat')",
        "setattr(torch, '_foreach_add_', None)",
        "weights.meta['_metrics']",
        "os._wrap_close",
    ],
)
def test_each_kind_of_private_use_is_found(line: str) -> None:
    assert len(private_uses(ast.parse(line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "os._exit(1)",
        "self._engine.optimizer.param_groups",
        "from trainer.data import _native",
        "from deepspeed.pipe import PipelineModule",
        "getattr(error, 'strerror', None)",
        "parts['name'], type(self).__name__",
    ],
)
def test_public_and_own_names_are_allowed(line: str) -> None:
    assert private_uses(ast.parse(line)) == []
