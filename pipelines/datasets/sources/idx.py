"""Lists a source of idx files (LeCun's format, used by the MNIST family)."""

import gzip
import math
import zlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipelines.datasets.sources.item import Account, Item, Split
from pipelines.datasets.sources.source_format import ListOptions, SourceFormat
from pipelines.datasets.sources.walk import skip_others
from trainer.errors import UserError

_PREFIXES = {"train": "train", "val": "t10k"}
_KINDS = ("images-idx3", "labels-idx1")


def is_idx_folder(root: Path) -> bool:
    return any(path.is_file() for path in root.glob("*-idx3-ubyte*"))


def idx_splits(root: Path, options: ListOptions, account: Account) -> list[Split]:
    """Return the splits of ``train-*`` and ``t10k-*`` files, plain or gzip. Raises UserError.

    The labels are the classes.
    """
    splits = []
    pairs = {
        name: [_find(root, f"{prefix}-{kind}-ubyte") for kind in _KINDS]
        for name, prefix in _PREFIXES.items()
    }
    used = [path.name for pair in pairs.values() for path in pair if path is not None]
    skip_others(root, used, "not the idx files that were read", account)
    for name, prefix in _PREFIXES.items():
        images, labels = pairs[name]
        if images is None and labels is None and name == "val":
            continue
        if images is None or labels is None:
            raise UserError(
                f"{root}: needs both {prefix}-images-idx3-ubyte.gz and "
                f"{prefix}-labels-idx1-ubyte.gz"
            )
        splits.append(_split(name, prefix, images, labels))
    ids = max((split.class_ids for split in splits), key=len)
    return [replace(split, class_ids=ids, classes=list(ids)) for split in splits]


def _split(name: str, prefix: str, images: Path, labels: Path) -> Split:
    pixels, numbers = idx_images(str(images)), _read(labels, 1)
    if len(pixels) != len(numbers):
        raise UserError(f"{labels}: has {len(numbers)} labels for {len(pixels)} images")
    if not pixels.size:
        raise UserError(
            f"{images}: holds no pixels; its shape is {' x '.join(map(str, pixels.shape))}"
        )
    _, height, width = pixels.shape
    changed = images.stat().st_mtime_ns
    items = [
        Item(
            f"{prefix}-{i:06d}",
            int(label),
            str(images),
            i,
            height * width,
            "png",
            changed,
            pixels=_pixels,
        )
        for i, label in enumerate(numbers)
    ]
    ids = [str(i) for i in range(int(numbers.max()) + 1)]
    return Split(name, ids, list(ids), items)


def _find(root: Path, name: str) -> Path | None:
    return next(
        (root / f"{name}{end}" for end in (".gz", "") if (root / f"{name}{end}").is_file()), None
    )


def _pixels(path: str, number: int) -> np.ndarray:
    image: np.ndarray = idx_images(path)[number]
    return image


@lru_cache(maxsize=2)
def idx_images(path: str) -> np.ndarray:
    """Return the images of an idx3 file, uint8 [images, height, width]. Raises UserError."""
    return _read(Path(path), 3)


def _read(path: Path, dimensions: int) -> np.ndarray:
    """Read an idx file as a uint8 array: two zero bytes, type, rank, sizes, data."""
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        elif path.suffix == ".gz":
            raise ValueError("is not a gzip file; download it again")
    except (EOFError, zlib.error, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}") from None
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) < 4 + 4 * dimensions:
        raise UserError(
            f"{path}: is not an idx file of unsigned bytes in {dimensions} dimensions; it "
            f"begins with {raw[:4]!r}"
        )
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    found = len(raw) - 4 - 4 * dimensions
    if found != math.prod(shape):
        size = " x ".join(map(str, shape))
        raise UserError(
            f"{path}: its header says {size} = {math.prod(shape):,} bytes of data, but it has "
            f"{found:,}"
        )
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


FORMAT = SourceFormat(is_idx_folder, idx_splits)
