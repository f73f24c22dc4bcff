"""Finds recipe files and parses their YAML strictly, reporting each problem as one clear line."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError

RECIPES = Path(__file__).parent / "recipes"

_MAX_BYTES = 2**20  # limit for a recipe file; shipped recipes are about 1 KiB
# Limits after alias expansion: a few lines of aliases can expand to gigabytes.
_MAX_NODES, _MAX_DEPTH = 10_000, 16


def find_recipe(recipe: str) -> Path:
    """Returns the path of a recipe file. Raises UserError that lists the nearest shipped names."""
    path = Path(recipe)
    try:
        if path.is_file():
            return path
        is_folder = path.is_dir()
    except (OSError, ValueError) as error:  # the name is too long or contains a NUL
        raise UserError(f"recipe {recipe[:200]!r} is not a file: {error}") from None
    shipped = {p.stem: p for p in sorted(RECIPES.glob("*.yaml"))}
    if recipe in shipped:
        return shipped[recipe]
    if is_folder:
        raise UserError(f"recipe {recipe!r} is a folder; name a recipe file in it")
    if "://" in recipe:
        raise UserError(f"recipe {recipe!r} is a URL; download it and pass the local file")
    nearest = difflib.get_close_matches(path.stem, shipped, n=3, cutoff=0.4) or list(shipped)
    raise UserError(
        f"recipe {recipe!r} is neither a file nor a shipped recipe; nearest: {', '.join(nearest)}"
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """Returns the keys and values of a recipe file. Raises UserError."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UserError(f"{path} is not a recipe: it has more than {_MAX_BYTES:,} bytes")
        values = parse_yaml(content.decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {_yaml_fault(error)}") from None
    if values is None:
        raise UserError(f"{path} is empty; a recipe must contain keys and values")
    if not isinstance(values, dict):
        raise UserError(
            f"{path} must contain keys and values, but contains a {type(values).__name__}"
        )
    return values


def _yaml_fault(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """Describes the error and its position.

    The line itself is not quoted, because it may contain a password.
    """
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())[:500]


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Sets the ``key=value`` pairs in ``values``.

    Returns one line for each pair that cannot be set.
    """
    faults = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            faults.append(f"{override[:200]!r} is not of the form key=value")
            continue
        try:
            _assign(values, key.split("."), parse_yaml(text))
        except (yaml.YAMLError, TypeError) as error:
            faults.append(f"{key}: {text[:200]!r} cannot be used: {str(error).splitlines()[0]}")
    return faults


def parse_yaml(text: str) -> Any:
    """Parses a YAML document into a value in which no two containers are the same object.

    Raises yaml.YAMLError if the text is not YAML or is too large, including after alias expansion.
    """
    try:
        return _copy(yaml.load(text, _Loader), [_MAX_NODES])
    except RecursionError:
        raise yaml.YAMLError(f"more than {_MAX_DEPTH} nested levels") from None
    # PyYAML raises these for values such as `!!bool maybe`.
    except (ValueError, LookupError, AttributeError) as error:
        raise yaml.YAMLError(f"a value does not match its tag: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 loader without the features that surprise in a recipe.

    Floats need no dot (``1e-4``); dates and merge keys are plain text; numbers that YAML 1.1 reads
    as octal or sexagesimal and duplicate keys are errors.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error(key, "a key must be text, not a list or a mapping")
            if key.tag != "tag:yaml.org,2002:str":
                raise _error(key, f"the key {key.value!r} is not text; put it in quotes")
            if key.value in seen:
                raise _error(key, f"the key {key.value!r} is duplicated")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = str(node.value)
        if ":" in text or re.match(r"[-+]?0[\d_]", text):
            raise _error(
                node,
                f"{text!r} is octal or sexagesimal in YAML; write a plain number, or use quotes",
            )
        try:
            if node.tag.endswith("int"):
                return int(super().construct_yaml_int(node))
            return float(super().construct_yaml_float(node))
        except ValueError as error:  # for example 0b_, or a number of 5,000 digits
            raise _error(node, f"{text[:50]!r} is not a number: {error}") from None


def _error(node: yaml.Node, text: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in ("timestamp", "merge")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$"
        r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _copy(value: Any, left: list[int], depth: int = 0) -> Any:
    """Copies nested values. ``left`` holds the number of nodes that may still be copied."""
    left[0] -= 1
    if left[0] < 0:
        raise yaml.YAMLError(f"more than {_MAX_NODES:,} values after alias expansion")
    if depth > _MAX_DEPTH:
        raise yaml.YAMLError(f"more than {_MAX_DEPTH} nested levels")
    if isinstance(value, Mapping):
        return {key: _copy(item, left, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item, left, depth + 1) for item in value]
    return value


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise TypeError(f"{key} is a value, not a section with keys")
    values[keys[-1]] = value
