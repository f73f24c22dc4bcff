"""Transfer of batches to the device: pinned memory, copies, mixing."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.transforms.mixup import Mix


def apply_mix(images: Tensor, mix: Mix | None) -> Tensor:
    """Mix each image with the one at the same position in the reversed batch.

    ``images`` [N, C, H, W] is overwritten.
    """
    if mix is None:
        return images
    if mix.box is None:
        others = images.flip(0)
        return images.mul_(mix.lam).add_(others, alpha=1 - mix.lam)
    top, bottom, left, right = mix.box
    part = images[:, :, top:bottom, left:right]
    part.copy_(part.flip(0))
    return images


def to_device(array: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def pinned_array(shape: tuple[int, ...], dtype: type[np.uint8]) -> np.ndarray:
    """Return a uint8 array in pinned memory.

    A GPU copies from it asynchronously while this process launches further work. The memory is
    reused only after those copies have finished.
    """
    assert dtype is np.uint8
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
