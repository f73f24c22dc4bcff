"""Conversion of state dicts between Convoy's names and those of other libraries.

A state dict maps names to tensors. The naming *schemes* are ``convoy`` (the names of the layers),
``torchvision`` and ``timm``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from trainer.errors import UserError
from trainer.models.registry import ModelSpec, get_model_spec, list_models

StateDictAdapter = Literal["convoy", "torchvision", "timm"]
State = dict[str, Tensor]


def schemes_of(name: str) -> list[StateDictAdapter]:
    """Return the schemes that have names for this model's weights."""
    return ["convoy", *get_model_spec(name).libraries]


def key_map(scheme: StateDictAdapter, variant: ModelSpec, model: nn.Sequential) -> dict[str, str]:
    """Return the mapping from the model's state dict names to those in ``scheme``.

    Raises UserError if that library does not have the model.
    """
    own = list(model.state_dict())
    if scheme == "convoy":
        return {name: name for name in own}
    if scheme not in schemes_of(variant.name):
        known = ", ".join(v.name for v in list_models() if scheme in schemes_of(v.name))
        raise UserError(f"{scheme} has no {variant.name}; Convoy's models that it has: {known}")
    return variant.libraries[scheme].key_map(model)


def substitute(
    substitutions: Sequence[tuple[str, str]],
) -> Callable[[nn.Sequential], dict[str, str]]:
    """Return a ``LibraryWeights.key_map`` that applies regular expressions and replacements.

    They apply in their order, so a new name may match a later expression.
    """

    def key_map(model: nn.Sequential) -> dict[str, str]:
        names = {}
        for own in model.state_dict():
            names[own] = own
            for pattern, replacement in substitutions:
                names[own] = re.sub(pattern, replacement, names[own])
        return names

    return key_map


def number_layers(model: nn.Sequential) -> dict[str, str]:
    """Return torchvision's names for AlexNet and VGG, such as ``features.0.weight``.

    torchvision numbers the layers before and after the average pooling.
    """
    prefixes, part, number = {}, "features", 0
    for name, _ in model.named_children():
        if name in ("avgpool", "flatten"):
            part, number = "classifier", 0
            continue
        prefixes[name] = f"{part}.{number}."
        number += 1
    return {
        name: prefixes[name.partition(".")[0]] + name.partition(".")[2]
        for name in model.state_dict()
    }


def head_names(model: nn.Sequential) -> list[str]:
    """Return the names of weights whose shape depends on ``num_classes``.

    These include the auxiliary heads' weights.
    """
    last = ("head.weight", "head.bias", "head.fc.weight", "head.fc.bias")
    return [name for name in model.state_dict() if name in last or re.match(r"aux\d\.fc2\.", name)]


def auxiliary_names(model: nn.Sequential) -> list[str]:
    """Return the names of weights that only training uses."""
    return [name for name in model.state_dict() if re.match(r"aux\d\.", name)]


def detect(
    state: Mapping[str, Tensor], variant: ModelSpec, model: nn.Sequential
) -> StateDictAdapter:
    """Return the scheme with the most names of ``state`` that belong to the model."""
    return max(
        schemes_of(variant.name),
        key=lambda scheme: len(set(key_map(scheme, variant, model).values()) & set(state)),
    )


def export_state(scheme: StateDictAdapter, name: str, model: nn.Sequential) -> State:
    """Return the model's weights with another library's names and shapes."""
    spec = get_model_spec(name)
    names = key_map(scheme, spec, model)
    state = {names[own]: value.detach() for own, value in model.state_dict().items()}
    for key, kernel in _convolutions(scheme, spec, model).items():
        state[key] = state[key].unflatten(1, (-1, kernel, kernel))
    return state


def to_native_state_dict(
    state: Mapping[str, Tensor], scheme: StateDictAdapter, variant: ModelSpec, model: nn.Sequential
) -> State:
    """Convert a state dict to the model's own names. Unknown names are unchanged."""
    own = {theirs: name for name, theirs in key_map(scheme, variant, model).items()}
    convolved = _convolutions(scheme, variant, model)
    return {
        own.get(key, key): value.flatten(1) if key in convolved else value
        for key, value in state.items()
    }


def _convolutions(
    scheme: StateDictAdapter, spec: ModelSpec, model: nn.Sequential
) -> Mapping[str, int]:
    return {} if scheme == "convoy" else spec.libraries[scheme].convolutions(model)
