"""The options of the networks, read from the builders' signatures without importing torch.

An option is a keyword-only parameter of a family's builder, and a recipe key below ``model.``. Its
annotation gives its type, its bounds and, as ``Doc``, its description. An annotation may use the
names of this module, which are the types that several families share, and nothing else: it is read
from the source, because importing the builders imports torch, which takes seconds.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field
from typing_extensions import Doc

from trainer.config.field_types import Decay

Width = Annotated[
    int,
    Field(ge=1, le=2**16),
    Doc(
        "Channels of the first stage; default: the network's own. The same applies to every option "
        "below."
    ),
]
Stem = Annotated[
    Literal["imagenet", "small"],
    Doc(
        "Input layers: `imagenet` downsamples with large strides, for photographs; `small` does "
        "not downsample, for small images."
    ),
]
Activation = Annotated[Literal["relu", "tanh"], Doc("Activation function.")]
BatchNorm = Annotated[bool, Doc("Whether batch norm follows each convolution.")]
Dropout = Annotated[Decay, Doc("Dropout probability of the inputs of fully connected layers.")]
HeadKind = Annotated[
    Literal["tower", "average"],
    Doc(
        "Classifier head after the convolutions: `tower` is three fully connected layers; "
        "`average` is global average pooling and one fully connected layer, as in GoogLeNet."
    ),
]

_MODELS = Path(__file__).parents[1] / "models"


def model_options() -> dict[str, Any]:
    """Return the type of each option of any family, by name, in the order of the families.

    The families are the modules that ``trainer/models/__init__.py`` imports. A family's builder is
    the function with the name of its module. Raises TypeError, which names the file and the option,
    if an annotation cannot be read or if two families give one option different types.
    """
    options: dict[str, Any] = {}
    for family in _families():
        for name, annotation in _builder_options(_MODELS / f"{family}.py"):
            if options.setdefault(name, annotation) != annotation:
                raise TypeError(
                    f"trainer/models/{family}.py: option {name} has another type or description "
                    "than in the families before; give it another name or the same type"
                )
    return options


def _families() -> list[str]:
    path = _MODELS / "__init__.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith(".models"):
            return [alias.name for alias in node.names]
    raise TypeError(f"{path}: imports no family")


def _builder_options(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name and type of each keyword-only parameter of the builder in ``path``."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == path.stem:
            for parameter in node.args.kwonlyargs:
                yield parameter.arg, _evaluate(parameter, path)
            return
    raise TypeError(f"{path}: has no function {path.stem}, which would be the family's builder")


def _evaluate(parameter: ast.arg, path: Path) -> Any:
    """Return the type of an option, without None."""
    where = f"{path}, line {parameter.lineno}: option {parameter.arg}"
    if parameter.annotation is None:
        raise TypeError(f"{where} has no type")
    try:
        code = compile(ast.Expression(parameter.annotation), str(path), "eval")
        annotation = eval(code, dict(globals()))
    except NameError as error:
        raise TypeError(
            f"{where}: {error}; its type may use only the names of {Path(__file__).name}"
        ) from None
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is not Annotated:
        raise TypeError(f"{where}: give it a description, as Annotated[..., Doc(...)]")
    return annotation
