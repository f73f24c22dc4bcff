"""Every network by name."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trainer.errors import UserError


@dataclass(frozen=True)
class Variant:
    """A row of the table: a name, the builder of its family and what sets this variant apart."""

    name: str
    year: int
    builder: Callable[..., nn.Sequential]
    arguments: dict[str, Any] = field(default_factory=dict)
    smallest_input: int = 1
    """Least side of the input that leaves a pixel at the end, pixels."""


_VARIANTS: dict[str, Variant] = {}


def register(variant: Variant) -> None:
    assert variant.name not in _VARIANTS, variant.name
    _VARIANTS[variant.name] = variant


def variants() -> list[Variant]:
    """Every variant, by family and size as registered."""
    return list(_VARIANTS.values())


def find_variant(name: str) -> Variant:
    """Raises UserError with the nearest names."""
    if name not in _VARIANTS:
        nearest = difflib.get_close_matches(name, _VARIANTS, n=3, cutoff=0.3) or list(_VARIANTS)
        raise UserError(f"model.name: there is no model {name!r}; nearest: {', '.join(nearest)}")
    return _VARIANTS[name]


def build_model(name: str, num_classes: int, image_size: int | None = None, **options: Any) -> nn.Sequential:
    """Build a network; options that are None keep the network's own value.

    Raises UserError for an unknown name and for an ``image_size`` (pixels) that is too small for the network.
    """
    variant = find_variant(name)
    if image_size is not None and image_size < variant.smallest_input:
        raise UserError(
            f"data.image_size: {image_size} is too small for {name}, which needs at least {variant.smallest_input} pixels"
        )
    given = {key: value for key, value in options.items() if value is not None}
    return variant.builder(**variant.arguments, num_classes=num_classes, **given)
