"""Transfer of batches to the device: pinned memory, copies, mixing."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(array: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def pinned_array(shape: tuple[int, ...], dtype: type[np.uint8]) -> np.ndarray:
    """Return a uint8 array in pinned memory.

    A GPU copies from it asynchronously while this process launches further work. The memory is
    reused only after those copies have finished.
    """
    assert dtype is np.uint8
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
