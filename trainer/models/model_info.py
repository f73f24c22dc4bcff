"""Size and cost of each model, computed from the model itself, and published results."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.dependencies.torch_compat import check_torch, published_accuracy, storage_id
from trainer.models.registry import build_model, get_model_spec
from trainer.models.state_dict_adapter import auxiliary_names, schemes_of


@dataclass(frozen=True)
class ModelInfo:
    """A row of ``convoy models``. Errors and accuracies are in percent, or None if unpublished."""

    name: str
    family: str
    year: int
    layers: int
    """Weight layers: convolutions and fully connected layers on the longest path of an image."""
    parameters: int
    """Parameters that evaluation uses."""
    auxiliary_parameters: int
    """Parameters of the auxiliary heads, which training uses in addition."""
    num_classes: int
    image_size: int
    multiply_adds: int
    """Multiply-adds of convolutions and fully connected layers to evaluate one image."""
    activation_bytes: int
    """Bytes saved for the backward pass of one image in training, in fp32.

    This includes inputs and excludes weights.
    """
    top5_error: float | None
    top5_source: str | None
    cifar10_error: float | None
    cifar10_source: str | None
    torchvision_weights: str | None
    torchvision_top1: float | None
    torchvision_top5: float | None


def model_info(name: str, image_size: int | None = None) -> ModelInfo:
    """Return the size, cost and published results of one model.

    The model is built on the meta device, without data, so this takes milliseconds.

    ``image_size`` is in pixels. The default is ImageNet's 224, or CIFAR-10's 32 for the models made
    for CIFAR-10, which get its 10 classes instead of 1,000. Raises UserError if ``image_size`` is
    too small.
    """
    variant = get_model_spec(name)
    num_classes, usual_size = (1000, 224) if variant.default_stem == "imagenet" else (10, 32)
    image_size = image_size or usual_size
    with torch.device("meta"):
        model = build_model(name, num_classes, image_size)
    auxiliary = set(auxiliary_names(model))
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    of_heads = sum(size for key, size in sizes.items() if key in auxiliary)
    top5, cifar10 = variant.top5_error, variant.cifar10_error
    weights, weights_top1, weights_top5 = _torchvision(name)
    return ModelInfo(
        name,
        variant.family,
        variant.year,
        weight_layers(model),
        sum(sizes.values()) - of_heads,
        of_heads,
        num_classes,
        image_size,
        *forward_costs(model, image_size),
        top5.percent if top5 else None,
        top5.source if top5 else None,
        cifar10.percent if cifar10 else None,
        cifar10.source if cifar10 else None,
        weights,
        weights_top1,
        weights_top5,
    )


def weight_layers(layer: nn.Module) -> int:
    """Count convolutions and fully connected layers on the longest path.

    Projections in shortcuts and auxiliary heads are not on it.
    """
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return 1
    own = getattr(layer, "weight_layers", None)
    return own if own is not None else sum(weight_layers(child) for child in layer.children())


IMAGES_TRACED = 3


class _BatchNormStandIn(torch.autograd.Function):
    """Stand-in that saves the same as batch norm, which is its input.

    torch's own batch norm takes milliseconds per layer on the meta device.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)


def forward_costs(model: nn.Module, image_size: int) -> tuple[int, int]:
    """Return the multiply-adds to evaluate an image, and the bytes saved for backward in training.

    Bytes are those that autograd saves per image. The model must be on the meta device.
    Multiply-adds are those of convolutions and fully connected layers outside auxiliary heads,
    without biases.
    """
    counts = []

    def count(layer: nn.Conv2d | nn.Linear, _: Any, output: Tensor) -> None:
        counts.append(output[0].numel() * layer.weight[0].numel())

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not name.startswith("aux"):
            layer.register_forward_hook(count)
    kept, _ = saved_activation_bytes(
        model, torch.empty(IMAGES_TRACED, 3, image_size, image_size, device="meta")
    )
    return sum(counts), kept


def saved_activation_bytes(model: nn.Module, value: Any) -> tuple[int, Any]:
    """Return the bytes per image that autograd saves for the backward pass, and the output.

    This works for a model or a part of one, on the meta device. ``value`` is the input, of
    IMAGES_TRACED images, without data. Each storage that the forward pass saves counts once.
    Weights and the few statistics per channel of batch norm do not count.
    """
    check_torch()
    weights = {storage_id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] == (IMAGES_TRACED,) and storage_id(tensor) not in weights:
            # keeps a reference, so that no other storage reuses the address
            saved[storage_id(tensor)] = tensor
        return tensor

    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.forward = _BatchNormStandIn.apply  # type: ignore[method-assign]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.train()(value)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) // IMAGES_TRACED, out


def _torchvision(name: str) -> tuple[str | None, float | None, float | None]:
    """Return torchvision's first published weights and their ImageNet top-1 and top-5 accuracy.

    The accuracies are torchvision's own figures, in percent.
    """
    if "torchvision" not in schemes_of(name):
        return None, None, None
    from torchvision.models import get_model_weights

    weights: Any = next(iter(get_model_weights(name)))
    return weights.name, *published_accuracy(weights)
