"""The recipe keys of the networks' options, which are read from source, against the builders."""

import inspect
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest

from trainer.config import model_options
from trainer.config.schema import ModelConfig, load_config
from trainer.errors import UserError
from trainer.models import list_models

FAMILY = "from pkg.models import net\n"
BUILDER = "def net(num_classes, *, {}):\n    pass\n"


def test_the_options_are_those_of_the_builders() -> None:
    options = model_options.model_options()
    builders = {spec.builder for spec in list_models()}
    parameters = [
        parameter
        for builder in builders
        for parameter in inspect.signature(builder).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    assert {parameter.name for parameter in parameters} == options.keys()
    assert options.keys() == ModelConfig.model_fields.keys() - {"name", "num_classes", "init"}
    for parameter in parameters:
        kinds = get_args(parameter.annotation)
        kind = parameter.annotation if get_origin(parameter.annotation) is Annotated else kinds[0]
        assert kind == options[parameter.name], parameter.name


def test_options_are_recipe_keys() -> None:
    config = load_config("digits-resnet8", ["model.width=8", "model.stem=small"])
    assert config.model.model_dump(exclude_none=True) == {
        "name": "resnet8",
        "width": 8,
        "stem": "small",
    }
    with pytest.raises(UserError, match=r"model\.stemm: unknown key; did you mean model\.stem\?"):
        load_config("digits-resnet8", ["model.stemm=small"])
    with pytest.raises(UserError, match=r"'large' is invalid: .* 'imagenet' or 'small'"):
        load_config("digits-resnet8", ["model.stem=large"])


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("size=1", "line 1: option size has no type"),
        ("size: int = 1", "give it a description"),
        ("size: Sizes = 1", "'Sizes' is not defined; its type may use only the names of"),
    ],
)
def test_an_option_that_cannot_be_read_is_named(
    parameter: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__init__.py").write_text(FAMILY)
    (tmp_path / "net.py").write_text(BUILDER.format(parameter))
    monkeypatch.setattr(model_options, "_MODELS", tmp_path)
    with pytest.raises(TypeError, match=message):
        model_options.model_options()


def test_families_cannot_give_an_option_two_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__init__.py").write_text("from pkg.models import net, other\n")
    (tmp_path / "net.py").write_text(BUILDER.format("width: Width | None = None"))
    other = BUILDER.replace("net(", "other(").format('width: Annotated[int, Doc("Units.")] = 1')
    (tmp_path / "other.py").write_text(other)
    monkeypatch.setattr(model_options, "_MODELS", tmp_path)
    with pytest.raises(TypeError, match=r"models/other\.py: option width has another type"):
        model_options.model_options()
