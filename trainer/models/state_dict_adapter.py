"""Conversion of state dicts between Convoy's names and those of other libraries.

A state dict maps names to tensors. The naming *schemes* are ``convoy`` (the names of the layers),
``torchvision`` and ``timm``.
"""

import re
from collections.abc import Mapping
from typing import Literal, cast

from torch import Tensor, nn

from trainer.errors import UserError
from trainer.models.registry import ModelSpec, get_model_spec, list_models

StateDictAdapter = Literal["convoy", "torchvision", "timm"]
State = dict[str, Tensor]

_SUBSTITUTIONS = {  # order matters: a new name may match an earlier pattern
    "resnet": [
        (r"^conv\.", "conv1."),
        (r"^bn\.", "bn1."),
        (r"^stage(\d)_(\d+)\.", r"layer\1.\2."),
        (r"\.shortcut\.conv\.", ".downsample.0."),
        (r"\.shortcut\.bn\.", ".downsample.1."),
        (r"^head\.", "fc."),
    ],
    "googlenet": [
        (r"\.reduce3\.", ".branch2.0."),
        (r"\.branch3\.", ".branch2.1."),
        (r"\.reduce5\.", ".branch3.0."),
        (r"\.branch5\.", ".branch3.1."),
        (r"\.project\.", ".branch4.1."),
        (r"^head\.fc\.", "fc."),
    ],
}
_TIMM_VGG = {
    "classifier.0.": "pre_logits.fc1.",
    "classifier.3.": "pre_logits.fc2.",
    "classifier.6.": "head.fc.",
}
_TORCHVISION = re.compile(r"alexnet|googlenet|resnet(18|34|50|101|152)|vgg(11|13|16|19)(_bn)?")
_TIMM = re.compile(r"resnet(18|34|50|101|152)|vgg(11|13|16|19)(_bn)?")


def schemes_of(name: str) -> list[StateDictAdapter]:
    """Return the schemes that have names for this model's weights."""
    schemes: list[StateDictAdapter] = ["convoy"]
    if _TORCHVISION.fullmatch(name):
        schemes.append("torchvision")
    if _TIMM.fullmatch(name):
        schemes.append("timm")
    return schemes


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
    if variant.family in _SUBSTITUTIONS:
        return {name: _substituted(name, variant.family) for name in own}
    prefixes = _numbered(model)
    names = {name: prefixes[name.partition(".")[0]] + name.partition(".")[2] for name in own}
    if scheme == "timm":
        for name, theirs in names.items():
            for ours, timms in _TIMM_VGG.items():
                names[name] = (
                    theirs.replace(ours, timms) if theirs.startswith(ours) else names[name]
                )
    return names


def _substituted(name: str, family: str) -> str:
    for pattern, replacement in _SUBSTITUTIONS[family]:
        name = re.sub(pattern, replacement, name)
    return name


def _numbered(model: nn.Sequential) -> dict[str, str]:
    """Return the prefix of each layer in torchvision's AlexNet and VGG, such as ``features.0.``.

    torchvision numbers the layers before and after the average pooling.
    """
    prefixes, part, number = {}, "features", 0
    for name, _ in model.named_children():
        if name in ("avgpool", "flatten"):
            part, number = "classifier", 0
            continue
        prefixes[name] = f"{part}.{number}."
        number += 1
    return prefixes


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
    names = key_map(scheme, get_model_spec(name), model)
    state = {names[own]: value.detach() for own, value in model.state_dict().items()}
    # timm's fully connected layers are convolutions over the full image
    if scheme == "timm" and name.startswith("vgg"):
        side = cast(nn.AdaptiveAvgPool2d, model.get_submodule("avgpool")).output_size
        assert isinstance(side, int)
        for key, kernel in (("pre_logits.fc1.weight", side), ("pre_logits.fc2.weight", 1)):
            state[key] = state[key].unflatten(1, (-1, kernel, kernel))
    return state


def to_native_state_dict(
    state: Mapping[str, Tensor], scheme: StateDictAdapter, variant: ModelSpec, model: nn.Sequential
) -> State:
    """Convert a state dict to the model's own names. Unknown names are unchanged."""
    own = {theirs: name for name, theirs in key_map(scheme, variant, model).items()}
    convolved = ("pre_logits.fc1.weight", "pre_logits.fc2.weight") if scheme == "timm" else ()
    return {
        own.get(key, key): value.flatten(1) if key in convolved else value
        for key, value in state.items()
    }
