"""Samples in a shard: consecutive tar members, an image and its label (``.cls``, decimal text).

This is plain WebDataset format.
"""

import re
import tarfile
from collections.abc import Callable
from typing import Any

from trainer.data.shards.tar_reader import BLOCK as BLOCK
from trainer.data.shards.tar_reader import TarError, members_in
from trainer.errors import UserError

try:
    from trainer.data import _native
except ImportError:  # not built
    _native = None  # type: ignore[assignment]

_RECORD = 10240  # bytes; the length of a tar archive is a multiple of this

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "gif")
"""Lowercase extensions of the members that are treated as the image."""

MAX_CLASSES = 2**20
"""Maximum number of classes of a dataset.

Each class costs a line of the index and a row of the classifier. Real datasets have up to 2**18.
"""

SIDE_FILES = frozenset(
    (
        "json",
        "jsonl",
        "txt",
        "md",
        "rst",
        "csv",
        "tsv",
        "yaml",
        "yml",
        "toml",
        "xml",
        "html",
        "log",
        "md5",
        "sha1",
        "sha256",
    )
)
"""Last extensions of members that describe samples or the archive and are not training data."""
# webdataset's rule for metadata; folders of macOS and Synology
_META = re.compile(r"__[^/]*__($|/)|(.*/)?(__MACOSX|@eaDir)/")

Sample = dict[str, Any]
"""``__key__``, ``__where__`` (for messages) and the members' bytes by extension."""


_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
# Fields of a header (POSIX.1-1988).
_NAME, _SIZE, _SUM = slice(0, 100), slice(124, 136), slice(148, 156)


def header(name: str, size: int) -> bytes:
    """Returns a member's header without time and owner, as tarfile writes it.

    tarfile takes ten times as long. ``name``: ASCII, at most 100 characters.
    """
    block = bytearray(_HEADER)
    block[_NAME] = name.encode("ascii").ljust(100, b"\0")
    block[_SIZE] = b"%011o\0" % size
    block[_SUM] = b" " * 8
    block[_SUM] = b"%06o\0 " % sum(block)
    return bytes(block)


def write_sample(
    write: Callable[[bytes], Any], key: str, extension: str, image: bytes, label: int
) -> None:
    """Appends a sample to a tar archive."""
    text = str(label).encode()
    write(header(f"{key}.{extension}", len(image)))
    write(image)
    write(
        bytes(-len(image) % BLOCK)
        + header(f"{key}.cls", len(text))
        + text
        + bytes(-len(text) % BLOCK)
    )


def end_mark(length: int) -> bytes:
    """Returns the end-of-archive mark and padding of a tar that is ``length`` bytes long so far."""
    return bytes(2 * BLOCK + -(length + 2 * BLOCK) % _RECORD)


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name into its key and its lowercase extension.

    By webdataset's rule, they are separated by the first dot of the last path component. The
    extension is empty if there is no dot.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def is_system_file(name: str) -> bool:
    """Whether a member is ignored because of its name, as in webdataset.

    Ignored are hidden files (macOS writes ``._NAME`` before each file), ``__NAME__`` metadata,
    names without an extension, and files that desktop systems leave in folders.
    """
    base = name.rpartition("/")[2]
    return (
        base.startswith(".")
        or "." not in base.rstrip(".")
        or base in ("Thumbs.db", "desktop.ini")
        or bool(_META.match(name))
    )


def is_side_file(name: str) -> bool:
    """Whether a member with a key of its own may be ignored: text that describes the archive."""
    return name.rpartition(".")[2].lower() in SIDE_FILES


def parse_label(content: bytes) -> int | None:
    """Parses the class number in a ``.cls`` member: decimal ASCII digits and white space.

    Returns None for any other content.
    """
    text = bytes(content).strip()
    return int(text) if text.isdigit() and len(text) <= 20 else None


def read_sample(content: memoryview, key: str, where: str) -> Sample:
    """Parses a sample's byte range of a tar archive.

    Raises UserError, whose message begins with ``where``, if the bytes are not the indexed sample.
    """
    sample: Sample = {"__key__": key, "__where__": where}
    found = _native.members(content) if _native is not None else None
    if found is None:  # headers that the native code does not parse: long names, folders, pax
        try:
            found = members_in(content)
        except TarError as error:
            raise UserError(
                f"{where}: the shard differs from the one that was indexed; it {error}"
            ) from None
    for name, start, end in found:
        _add(sample, name, content[start:end], where)
    if "cls" not in sample or not any(extension in IMAGES for extension in sample):
        raise UserError(
            f"{where}: needs an image and its label (.cls), but has: {', '.join(list(sample)[2:])}"
        )
    return sample


def _add(sample: Sample, name: str, content: memoryview, where: str) -> None:
    key, extension = split_name(name)
    if key == sample["__key__"] and extension not in sample and extension:
        sample[extension] = content
    elif not is_system_file(name) and (key == sample["__key__"] or not is_side_file(name)):
        raise UserError(
            f"{where}: contains {name}; the shard differs from the one that was indexed"
        )


def encoded_image(sample: Sample) -> memoryview:
    """Returns the first member that is an image."""
    image: memoryview = next(
        content for extension, content in sample.items() if extension in IMAGES
    )
    return image


def label_of(sample: Sample, num_classes: int) -> int:
    """Returns the class number. Raises UserError if it is not below ``num_classes``."""
    label = parse_label(sample["cls"])
    if label is None or label >= num_classes:
        text = bytes(sample["cls"][:20])
        raise UserError(
            f"{sample['__where__']}: label {text!r} is not one of the {num_classes} classes of "
            "the index"
        )
    return label
