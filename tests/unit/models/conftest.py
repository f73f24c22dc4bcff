import gc
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.datasets.sources.list_source import list_source, read_item
from pipelines.local.demo import _find_data


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small layers gain nothing from a second thread, and wait for it on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    """Free VGG's copies, half a gigabyte each.

    Objects older than the test are not searched, because that takes most of a second.
    """
    gc.freeze()
    yield
    gc.collect()


@pytest.fixture(scope="session")
def real_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor]:
    """64 normalized images [64, 3, 16, 16] of Fashion-MNIST, and their labels.

    If Fashion-MNIST is unavailable, scikit-learn's digits are used.
    """
    folder: Path = tmp_path_factory.mktemp("data")
    items = list_source(str(_find_data(folder).source)).splits[0].items
    chosen = [items[i] for i in np.random.default_rng(0).choice(len(items), 64, replace=False)]
    pixels = [
        np.asarray(Image.open(io.BytesIO(read_item(item))).convert("RGB").resize((16, 16)))
        for item in chosen
    ]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    images = (images - images.mean()) / images.std()
    return images.contiguous(memory_format=torch.channels_last), torch.tensor(
        [item.label for item in chosen]
    )
