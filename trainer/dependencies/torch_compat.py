"""The only file that uses private names of torch and torchvision."""

from typing import Any

import torch
from torch import Tensor

from trainer.dependencies.required_attributes import missing_in, require_attributes

Tensors = tuple[Tensor, ...] | list[Tensor]

FUNCTIONS = ("_foreach_add_", "_foreach_lerp_")
STORAGE_ATTRIBUTES = ("_cdata",)


def check_torch() -> None:
    """Check that torch has every attribute that is used here. Raises UserError."""
    require_attributes("torch", torch, FUNCTIONS)
    require_attributes("torch", torch.empty(0).untyped_storage(), STORAGE_ATTRIBUTES)


def add_each(tensors: Tensors, others: Tensors, alpha: float) -> None:
    """Add ``alpha * other`` to each tensor in place.

    torch's public functions take one tensor each, which is one kernel launch per tensor.
    """
    torch._foreach_add_(tensors, others, alpha=alpha)


def interpolate_each(tensors: Tensors, ends: Tensors, weight: float) -> None:
    """Move each tensor towards its end in place, by ``weight`` of their distance.

    torch's public functions take one tensor each, which is one kernel launch per tensor.
    """
    torch._foreach_lerp_(tensors, ends, weight)


def storage_id(tensor: Tensor) -> int:
    """Return a number that only tensors with the same storage share, while one of them is alive.

    The public ``data_ptr`` is 0 for every storage on the meta device.
    """
    return int(tensor.untyped_storage()._cdata)


def published_accuracy(weights: Any) -> tuple[float, float]:
    """Return the ImageNet top-1 and top-5 accuracy in % that torchvision publishes for ``weights``.

    torchvision's only public form of them is the text of its documentation. Raises UserError if
    this version of torchvision keeps them elsewhere.
    """
    try:
        metrics = weights.meta["_metrics"]["ImageNet-1K"]
        return metrics["acc@1"], metrics["acc@5"]
    except KeyError as error:
        raise missing_in("torchvision", f"{weights}.meta has no key {error}") from None
