"""Packs the first images of Fashion-MNIST into shards, once for each number of images."""

import gzip
import shutil
from pathlib import Path

from pipelines.datasets.pack import PackOptions, pack
from pipelines.local.demo import find_fashion
from trainer.errors import UserError

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_SHARD_SAMPLES = 8192


def prepare(folder: Path, train_samples: int, val_samples: int) -> Path:
    """Return the folder of the two splits with that many images each; pack them if missing.

    The dataset itself is shuffled, so that its first images are a fair sample. Raises UserError if
    it is unavailable.
    """
    packed = folder / f"fashion-mnist-{train_samples}-{val_samples}"
    if all((packed / split / "index.json").exists() for split in ("train", "val")):
        return packed
    source = find_fashion()
    if source is None:
        raise UserError(
            "Fashion-MNIST is unavailable: it is not installed and cannot be fetched with apt; "
            "install Debian's package dataset-fashion-mnist, or unpack it into "
            "~/.cache/convoy/dataset-fashion-mnist"
        )
    first = folder / f"{packed.name}.idx"
    first.mkdir(parents=True, exist_ok=True)
    for split, samples in (("train", train_samples), ("val", val_samples)):
        for name in _FILES[split]:
            (first / name).write_bytes(first_of_idx(_read(source, name), samples))
    shards = max(1, train_samples // _SHARD_SAMPLES)
    pack(str(first), str(packed), PackOptions(shards=shards, overwrite=True))
    shutil.rmtree(first)
    return packed


def _read(folder: Path, name: str) -> bytes:
    zipped = folder / f"{name}.gz"
    return gzip.decompress(zipped.read_bytes()) if zipped.exists() else (folder / name).read_bytes()


def first_of_idx(content: bytes, samples: int) -> bytes:
    """Return the first ``samples`` entries of an idx file.

    The format is type and rank in four bytes, then each dimension, big-endian (LeCun's format).
    """
    rank = content[3]
    dimensions = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    if samples > dimensions[0]:
        raise UserError(
            f"Fashion-MNIST has {dimensions[0]:,} images in this split, not {samples:,}"
        )
    size = 1
    for dimension in dimensions[1:]:
        size *= dimension
    head = 4 + 4 * rank
    return content[:4] + samples.to_bytes(4, "big") + content[8 : head + samples * size]
