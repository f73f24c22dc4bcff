"""What there is to pack: class folders, ImageNet's own tars, idx files. Every image becomes an Item, unread so far."""

import gzip
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipelines.class_names import names_by_id, synsets
from trainer.errors import UserError

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm", "GIF": "gif"}
_HEADER_BYTES = 8192
_SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}
_IDX = {"train": "train", "val": "t10k"}


@dataclass(frozen=True, slots=True)
class Item:
    """One image: bytes ``offset`` to ``offset + size`` of a file, or image number ``offset`` of an idx file."""

    key: str
    label: int
    path: str
    offset: int
    size: int
    extension: str = ""
    changed: int = 0
    """The file's modification time, ns; tells a resumed pack that an image changed."""

    @property
    def is_idx(self) -> bool:
        return self.extension == "png" and "-idx3-" in self.path

    @property
    def source(self) -> str:
        """What a person would call it."""
        return self.path if not self.offset else f"{self.path} at byte {self.offset:,}"


@dataclass(frozen=True)
class Split:
    """The images of ``train`` or ``val`` in the source's order. ``class_ids[label]`` is the source's name of a class."""

    name: str
    class_ids: list[str]
    classes: list[str]
    items: list[Item]


def find_splits(source: str, class_names: str | None = None) -> list[Split]:
    """Recognize the kind of ``source`` and list its images; raises UserError for what cannot be packed.

    ``class_names``: a file as ``pipelines.class_names`` reads it; by default synset_words.txt if that is in ``source``.
    """
    root = Path(source)
    if not root.is_dir():
        raise UserError(
            f"{source}: " + ("is a file; name the folder that it is in" if root.exists() else "there is no such folder")
        )
    if any(root.glob("*-idx3-ubyte*")):
        splits = _idx_splits(root)
    elif _imagenet_tar(root, "train") or _imagenet_tar(root, "val"):
        splits = _imagenet_splits(root)
    else:
        splits = _folder_splits(root)
    names = Path(class_names) if class_names else root / "synset_words.txt"
    if class_names is None and not names.is_file():
        return splits
    return [replace(split, classes=names_by_id(names, split.class_ids)) for split in splits]


def read_item(item: Item) -> bytes:
    """The image's bytes, untouched; of an idx file the pixels as PNG."""
    if item.is_idx:
        buffer = io.BytesIO()
        Image.fromarray(_idx_images(item.path)[item.offset]).save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()
    with open(item.path, "rb") as file:
        file.seek(item.offset)
        return file.read(item.size)


def recognized(item: Item) -> Item | str:
    """The item with the extension that its content asks for, or why it is no image."""
    if item.extension:
        return item
    try:
        with open(item.path, "rb") as file:
            file.seek(item.offset)
            head = file.read(min(item.size, _HEADER_BYTES))
            try:
                form = Image.open(io.BytesIO(head)).format
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
                form = Image.open(io.BytesIO(head + file.read(item.size - len(head)))).format  # a header longer than most
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "empty" if item.size == 0 else "not an image"
    except OSError as error:
        return error.strerror or "not an image"
    if form not in EXTENSIONS:
        return f"a {form} image, which is not supported; use JPEG or PNG"
    return Item(item.key, item.label, item.path, item.offset, item.size, EXTENSIONS[form], item.changed)  # replace() is slow


# --- folders of class folders -----------------------------------------------------------------------------------------


def _folder_splits(root: Path) -> list[Split]:
    folders = {name: next((root / n for n in names if (root / n).is_dir()), None) for name, names in _SPLITS.items()}
    train, val = folders["train"], folders["val"]
    if train is None or not any(p.is_dir() for p in train.iterdir()):
        return [_folder_split("train", root)]
    splits = [_folder_split("train", train)]
    if val is not None:
        other = _folder_split("val", val)
        if unknown := sorted(set(other.class_ids) - set(splits[0].class_ids)):
            raise UserError(f"{val / unknown[0]}: this class is not in {train}")
        label = {c: i for i, c in enumerate(splits[0].class_ids)}
        items = [replace(item, label=label[other.class_ids[item.label]]) for item in other.items]
        splits.append(Split("val", splits[0].class_ids, splits[0].classes, items))
    return splits


def _folder_split(name: str, root: Path) -> Split:
    folders = sorted((p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)
    if not folders:
        raise UserError(f"{root}: holds no class folders; what can be packed: a folder a class, ImageNet's tars, idx files")
    files = {folder.name: list(_files(folder)) for folder in folders}
    if empty := [name for name, found in files.items() if not found]:
        raise UserError(*(f"{root / name}: this class folder is empty" for name in empty))
    keys = _Keys()
    items = []
    for label, folder in enumerate(folders):
        for path, status in files[folder.name]:
            key = keys.new(f"{folder.name}/{os.path.splitext(os.path.basename(path))[0]}")
            items.append(Item(key, label, path, 0, status.st_size, changed=status.st_mtime_ns))
    ids = [folder.name for folder in folders]
    return Split(name, ids, list(ids), items)


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """All files below a folder but hidden ones and what desktop systems leave behind, by name."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name == "Thumbs.db":
            continue
        if entry.is_dir():
            yield from _files(Path(entry.path))
        elif entry.is_file():
            yield entry.path, entry.stat()


class _Keys:
    """WebDataset keys: ASCII, no dot (which begins the extension), short enough for a plain tar header, each once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def new(self, wanted: str) -> str:
        folder, slash, stem = re.sub(r"[^A-Za-z0-9/_+-]", "_", wanted).rpartition("/")
        base = key = f"{folder[:40]}{slash}{stem[:40]}"
        number = 2
        while key in self._given:
            key, number = f"{base}-{number}", number + 1
        self._given.add(key)
        return key


# --- idx files (the MNIST family) -------------------------------------------------------------------------------------


def _idx_splits(root: Path) -> list[Split]:
    splits = []
    for name, prefix in _IDX.items():
        images, labels = (_idx_file(root, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        if images is None and labels is None and name == "val":
            continue
        if images is None or labels is None:
            raise UserError(f"{root}: needs both {prefix}-images-idx3-ubyte.gz and {prefix}-labels-idx1-ubyte.gz")
        pixels, numbers = _idx_images(str(images)), _read_idx(labels, 1)
        if len(pixels) != len(numbers):
            raise UserError(f"{labels}: has {len(numbers)} labels for {len(pixels)} images")
        _, height, width = pixels.shape
        changed = images.stat().st_mtime_ns
        items = [
            Item(f"{prefix}-{i:06d}", int(label), str(images), i, height * width, "png", changed) for i, label in enumerate(numbers)
        ]
        ids = [str(i) for i in range(int(numbers.max()) + 1)]
        splits.append(Split(name, ids, list(ids), items))
    ids = max((split.class_ids for split in splits), key=len)
    return [replace(split, class_ids=ids, classes=list(ids)) for split in splits]


def _idx_file(root: Path, name: str) -> Path | None:
    return next((root / f"{name}{end}" for end in (".gz", "") if (root / f"{name}{end}").is_file()), None)


@lru_cache(maxsize=2)
def _idx_images(path: str) -> np.ndarray:
    return _read_idx(Path(path), 3)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """uint8 array of an idx file (LeCun's format: two zero bytes, type, rank, sizes, data)."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"is no idx file of unsigned bytes in {dimensions} dimensions")
        shape = np.frombuffer(raw, ">i4", dimensions, 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


# --- ImageNet's own tars ----------------------------------------------------------------------------------------------


def _imagenet_tar(root: Path, split: str) -> Path | None:
    return next((root / n for n in (f"ILSVRC2012_img_{split}.tar", f"{split}.tar") if (root / n).is_file()), None)


def _imagenet_splits(root: Path) -> list[Split]:
    train, val = _imagenet_tar(root, "train"), _imagenet_tar(root, "val")
    devkit = _Devkit(root)
    splits = []
    if train is not None:
        classes = sorted(_members(train), key=lambda member: member[0])
        if wrong := [name for name, _, _ in classes if not name.endswith(".tar")]:
            raise UserError(f"{train}: {wrong[0]} is not a class's tar, as ILSVRC2012_img_train.tar holds")
        ids = [Path(name).stem for name, _, _ in classes]
        changed = train.stat().st_mtime_ns
        items = []
        for label, (name, offset, size) in enumerate(classes):
            inner = _members(train, offset, size)
            if not inner:
                raise UserError(f"{train}: {name} is empty")
            items += [Item(Path(n).stem, label, str(train), offset + o, s, changed=changed) for n, o, s in inner]
        splits.append(Split("train", ids, [devkit.words.get(i, i) for i in ids], items))
    if val is not None:
        images = sorted(_members(val), key=lambda member: member[0])
        truth = devkit.ground_truth()
        if len(truth) != len(images):
            raise UserError(f"{devkit.truth_name}: has {len(truth)} lines for the {len(images)} images of {val}")
        ids = splits[0].class_ids if splits else sorted(set(truth))
        if unknown := sorted(set(truth) - set(ids)):
            raise UserError(f"{devkit.truth_name}: names class {unknown[0]}, which is not in {train}")
        label_of = {identity: label for label, identity in enumerate(ids)}
        changed = val.stat().st_mtime_ns
        items = [
            Item(Path(n).stem, label_of[identity], str(val), o, s, changed=changed)
            for (n, o, s), identity in zip(images, truth, strict=True)
        ]
        splits.append(Split("val", ids, [devkit.words.get(i, i) for i in ids], items))
    return splits


def _members(path: Path, offset: int = 0, size: int | None = None) -> list[tuple[str, int, int]]:
    """(name, offset of its data, bytes) of each member of a tar, or of a tar inside one; offsets count from ``offset``."""
    with path.open("rb") as file:
        window: BinaryIO = file if size is None else _Window(file, offset, size)  # type: ignore[assignment]
        try:
            with tarfile.open(fileobj=window, mode="r:") as tar:
                return [(m.name, m.offset_data, m.size) for m in tar if m.isfile() and not Path(m.name).name.startswith(".")]
        except tarfile.TarError as error:
            raise UserError(f"{path}: is not a tar, or a cut one ({error})") from None


class _Window(io.RawIOBase):
    """Bytes ``offset`` to ``offset + size`` of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        self._file.seek(self._offset + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data


class _Devkit:
    """Ground truth of the validation images and readable class names, from the devkit (a folder, its tar.gz, or loose files)."""

    truth_name = "ILSVRC2012_validation_ground_truth.txt"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._by_number: dict[int, str] = {}
        self.words: dict[str, str] = {}
        if (raw := self._find("meta.mat")) is not None:
            self._read_meta(raw)
        elif (raw := self._find("synset_words.txt")) is not None:
            self.words = synsets("synset_words.txt", raw)
            self._by_number = dict(enumerate(self.words, start=1))
            ids = list(self.words)
            # the well-known list of 1,000 is sorted by WordNet id, but the ground truth counts in the devkit's own order
            self._is_alphabetical = len(ids) == 1000 and ids == sorted(ids)

    _is_alphabetical = False

    def ground_truth(self) -> list[str]:
        """The class of each validation image, by the images' names."""
        raw = self._find(self.truth_name)
        if raw is None:
            raise UserError(
                f"{self._root}: needs the devkit for val.tar: ILSVRC2012_devkit_t12.tar.gz, or data/{self.truth_name} of it"
            )
        if not self._by_number:
            raise UserError(
                f"{self._root}: needs the devkit's meta.mat (or a synset_words.txt in its order) to read {self.truth_name}"
            )
        if self._is_alphabetical:
            raise UserError(
                f"{self._root}/synset_words.txt: is in alphabetical order, but {self.truth_name} counts in the devkit's order, "
                "which meta.mat holds: add ILSVRC2012_devkit_t12.tar.gz"
            )
        truth = []
        for number, line in enumerate(raw.decode("ascii").split(), start=1):
            if not line.isdigit() or int(line) not in self._by_number:
                raise UserError(f"{self.truth_name}: line {number}: {line!r} is none of the {len(self._by_number)} classes")
            truth.append(self._by_number[int(line)])
        return truth

    def _read_meta(self, raw: bytes) -> None:
        from scipy.io import loadmat

        for synset in loadmat(io.BytesIO(raw), squeeze_me=True)["synsets"]:
            if synset["num_children"] == 0:
                self._by_number[int(synset["ILSVRC2012_ID"])] = str(synset["WNID"])
                self.words[str(synset["WNID"])] = str(synset["words"])

    def _find(self, name: str) -> bytes | None:
        for folder in (".", "data", "ILSVRC2012_devkit_t12/data"):
            if (self._root / folder / name).is_file():
                return (self._root / folder / name).read_bytes()
        packed = self._root / "ILSVRC2012_devkit_t12.tar.gz"
        if not packed.is_file():
            return None
        with tarfile.open(packed) as tar:
            found = next((m for m in tar if Path(m.name).name == name and m.isfile()), None)
            file = tar.extractfile(found) if found else None
            return file.read() if file else None
