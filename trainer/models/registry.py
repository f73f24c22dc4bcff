"""Registry of all models by name."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trainer.errors import UserError


@dataclass(frozen=True)
class ModelSpec:
    """An entry of the registry: a name, the builder of the family and the variant's arguments."""

    name: str
    year: int
    """Year of the paper that introduced the network, or of the competition that it won."""
    family: str
    builder: Callable[..., nn.Sequential]
    """Takes ``num_classes`` and ``arguments``.

    Its keyword-only parameters are the options that a recipe may set.
    """
    smallest_input: Mapping[str, int]
    """Smallest input side in pixels, by stem, that leaves every layer at least one pixel."""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> list[str]:
        parameters = inspect.signature(self.builder).parameters.values()
        return sorted(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    @property
    def default_stem(self) -> str:
        stem = (
            self.arguments.get("stem") or inspect.signature(self.builder).parameters["stem"].default
        )
        return str(stem)


_VARIANTS: dict[str, ModelSpec] = {}


def register(variant: ModelSpec) -> None:
    assert variant.name not in _VARIANTS, variant.name
    _VARIANTS[variant.name] = variant


def list_models() -> list[ModelSpec]:
    """Return every model, by family and size as registered."""
    return list(_VARIANTS.values())


def get_model_spec(name: str) -> ModelSpec:
    """Return the spec of a model. Raises UserError that lists the nearest names."""
    if name not in _VARIANTS:
        nearest = difflib.get_close_matches(name.lower(), _VARIANTS, n=3, cutoff=0.3) or list(
            _VARIANTS
        )
        raise UserError(f"model.name: there is no model {name!r}; nearest: {', '.join(nearest)}")
    return _VARIANTS[name]


def build_model(
    name: str, num_classes: int, image_size: int | None = None, **options: Any
) -> nn.Sequential:
    """Build a model. Options that are None keep the model's default.

    The result is an ordered list of layers that can be split between any two. It maps images [N, 3,
    H, W] to logits [N, num_classes]. In training, GoogLeNet returns a tuple of those and its
    auxiliary heads' logits.

    Raises UserError for an unknown name, for options that the family does not have, and for an
    ``image_size`` (pixels) that is too small for the model.
    """
    variant = get_model_spec(name)
    given = {key: value for key, value in options.items() if value is not None}
    faults = [
        f"model.{key}: {name} has no such option; those of the {variant.family} family: "
        f"{', '.join(variant.options)}"
        for key in given
        if key not in variant.options
    ]
    if faults:
        raise UserError(*faults)
    model = variant.builder(num_classes, **{**variant.arguments, **given})
    stem = given.get("stem", variant.default_stem)
    smallest = variant.smallest_input[stem]
    if image_size is not None and image_size < smallest:
        small = variant.smallest_input["small"]
        hint = f", or {small} with model.stem=small" if small < smallest else ""
        raise UserError(
            f"data.image_size: {image_size} is too small for {name}, which needs at least "
            f"{smallest} pixels{hint}"
        )
    return model
