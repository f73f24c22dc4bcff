"""Registry of all models by name."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from trainer.errors import UserError

Library = Literal["torchvision", "timm"]


@dataclass(frozen=True)
class PublishedError:
    """An error that a paper published, in percent, with its source."""

    percent: float
    source: str


def _no_convolutions(model: nn.Sequential) -> dict[str, int]:
    return {}


@dataclass(frozen=True)
class LibraryWeights:
    """How another library names and shapes the weights of the network that has the same name."""

    key_map: Callable[[nn.Sequential], dict[str, str]]
    """Takes the model; returns the library's name for each name in the model's state dict."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The value of each option that the library's network corresponds to.

    With another value the weights would fit but mean something else, or have no name.
    """
    convolutions: Callable[[nn.Sequential], Mapping[str, int]] = _no_convolutions
    """Takes the model; returns the library's names for weights of fully connected layers that are
    convolutions there, with the side of their kernel.
    """
    half_range: bool = False
    """Whether the published weights expect pixels from -1 to 1 instead of ImageNet's mean and
    deviation.
    """


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
    top5_error: PublishedError | None = None
    """Published top-5 error on ImageNet; None for a variant that no paper measured."""
    cifar10_error: PublishedError | None = None
    """Published top-1 error on CIFAR-10's test set."""
    libraries: Mapping[Library, LibraryWeights] = field(default_factory=dict)
    """The libraries that have this network under this name."""

    @property
    def options(self) -> list[str]:
        parameters = inspect.signature(self.builder).parameters.values()
        return sorted(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    @property
    def default_stem(self) -> str:
        """The stem without the option ``stem``; ``imagenet`` for a family without this option."""
        parameter = inspect.signature(self.builder).parameters.get("stem")
        default = parameter.default if parameter is not None else "imagenet"
        return str(self.arguments.get("stem") or default)


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
        small = variant.smallest_input.get("small", smallest)
        hint = f", or {small} with model.stem=small" if small < smallest else ""
        raise UserError(
            f"data.image_size: {image_size} is too small for {name}, which needs at least "
            f"{smallest} pixels{hint}"
        )
    return model
