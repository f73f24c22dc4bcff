"""Measurements on networks, trained or not.

They are forward and backward passes through the trainer's own modules and loss.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines.studies.experiments.data import prepare
from pipelines.studies.framework.runner import Runs
from pipelines.studies.framework.study import Training
from trainer.config.schema import RunConfig, load_config
from trainer.data.index import open_index
from trainer.data.loader import eval_loader
from trainer.export.exported_model import Predictor
from trainer.models import build_model
from trainer.models.layers import normalize
from trainer.training.loss import count_correct, weighted_loss


def untrained(config: RunConfig, num_classes: int = 10) -> nn.Sequential:
    """Return the network with the initial weights that the trainer gives it."""
    options = config.model.model_dump(exclude={"name", "num_classes", "init"}, exclude_none=True)
    torch.manual_seed(config.train.seed)
    return build_model(config.model.name, num_classes, config.data.image_size, **options)


def trained(runs: Runs, training: Training) -> nn.Module:
    """Return the network with the final weights of a training, in evaluation mode."""
    folder = runs.run_of(training).folder
    return Predictor(folder / "model.safetensors", folder / "model.json").model


def batches(split: Path, config: RunConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images float32 [N, 3, H, W] and labels int64 [N] of a packed split.

    They are the same as in the trainer's evaluation.
    """
    index, store = open_index(str(split))
    for batch in eval_loader(config, index, store, 1, 0):
        yield (
            normalize(torch.from_numpy(batch.pixels), config.data.mean, config.data.std),
            torch.from_numpy(batch.labels),
        )


def some_images(runs: Runs, count: int) -> tuple[Tensor, Tensor]:
    """Return the first ``count``, at most 256, training images and labels.

    They are from the data of quick runs, which all studies can share.
    """
    split = prepare(runs.folder / "data", 4096, 2000) / "train"
    config = load_config("study", [f"data.train={split}"])
    images, labels = next(batches(split, config))
    return images[:count].contiguous(memory_format=torch.channels_last), labels[:count]


@torch.inference_mode()
def top1(runs: Runs, training: Training, split: str) -> float:
    """Return the top-1 of a training's network on a full split, percent."""
    model = trained(runs, training)
    right = seen = 0
    for images, labels in batches(runs.data(training) / split, runs.run_of(training).config()):
        counts = count_correct(model(images), labels)
        right, seen = right + int(counts[0]), seen + int(counts[2])
    return 100 * right / seen


@torch.inference_mode()
def mirrored_top1(runs: Runs, training: Training) -> float:
    """Return the top-1 on the test split with two views per image, percent.

    The probabilities of an image and its mirror image are averaged.
    """
    model = trained(runs, training)
    right = seen = 0
    for images, labels in batches(runs.data(training) / "val", runs.run_of(training).config()):
        both = model(images).softmax(1) + model(images.flip(3)).softmax(1)
        right, seen = right + int((both.argmax(1) == labels).sum()), seen + len(labels)
    return 100 * right / seen


def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the norm of the loss's gradient in the weights of each layer, in training mode.

    Layers are convolutions and fully connected layers, in their order.
    """
    model.train()
    model.zero_grad()
    weighted_loss(model(images), labels, torch.ones(len(images)), len(images), 1).backward()  # type: ignore[no-untyped-call]
    return {
        name: float(layer.weight.grad.norm())
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.grad is not None
    }


def output_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the gradients of the images' mean loss in the layers' outputs, in training mode.

    Layers are convolutions and fully connected layers, the last layer first. The weights keep their
    gradients in ``grad``.
    """
    found: list[Tensor] = []

    def keep(_layer: nn.Module, _inputs: object, output: Tensor) -> None:
        output.register_hook(found.append)  # type: ignore[no-untyped-call]

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        gradient_norms(model, images, labels)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def gradients_at_blocks(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the norm of the loss's gradient in each top-level layer's output, a mean over images.

    Layers are in their order, in training mode. The gradient is what reaches the layer from above,
    whatever the layer's own weights are.
    """
    model.train()
    kept: dict[str, Tensor] = {}
    value = images
    for name, layer in model.named_children():
        value = layer(value)
        if name.startswith("stage"):
            value.retain_grad()
            kept[name] = value
            value = value * 1.0  # the next layer may overwrite its input
    weighted_loss(value, labels, torch.ones(len(images)), len(images), 1).backward()  # type: ignore[no-untyped-call]
    norms = {}
    for name, output in kept.items():
        assert output.grad is not None
        norms[name] = float(output.grad.flatten(1).norm(dim=1).mean()) * len(images)
    return norms


def receptive_field(layers: nn.Module, channels: int, side: int) -> int:
    """Return the side in pixels of the square of inputs on which the output's middle pixel depends.

    It is measured: the gradient of the pixel in these inputs is not zero. ``layers``: convolutions
    that keep the size of [1, channels, side, side].
    """
    image = torch.rand(1, channels, side, side, dtype=torch.float64, requires_grad=True)
    out = layers.double()(image)
    out[..., side // 2, side // 2].sum().backward()
    assert image.grad is not None
    seen = image.grad.abs().sum((0, 1)) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    assert len(rows) == len(columns), "filters are square"
    return int(rows[-1] - rows[0]) + 1


def parameter_share(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> int:
    """Return the number of parameters in layers of a kind."""
    return sum(
        p.numel()
        for layer in model.modules()
        if isinstance(layer, kind)
        for p in layer.parameters(recurse=False)
    )


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
