"""A sample in a shard: neighbouring tar members, an image and its label (``.cls``, decimal text), as plain WebDataset has it."""

import io
import tarfile
from collections.abc import Callable
from typing import Any

from trainer.errors import UserError

try:
    from trainer.data import native
except ImportError:  # it was not built
    native = None  # type: ignore[assignment]

BLOCK = 512  # bytes; a tar's unit
_RECORD = 10240  # bytes; a tar's length is a multiple

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "gif")
"""Extensions of the members that are taken for the image, in small letters."""

Sample = dict[str, Any]
"""``__key__``, ``__where__`` (for messages) and the members' bytes by extension."""


_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_NAME, _SIZE, _SUM = slice(0, 100), slice(124, 136), slice(148, 156)  # fields of a header (POSIX.1-1988)


def header(name: str, size: int) -> bytes:
    """A member's header with neither time nor owner, as tarfile writes it, which takes ten times as long.

    ``name``: ASCII, at most 100 characters.
    """
    block = bytearray(_HEADER)
    block[_NAME] = name.encode("ascii").ljust(100, b"\0")
    block[_SIZE] = b"%011o\0" % size
    block[_SUM] = b" " * 8
    block[_SUM] = b"%06o\0 " % sum(block)
    return bytes(block)


def write_sample(write: Callable[[bytes], Any], key: str, extension: str, image: bytes, label: int) -> None:
    """Append a sample to a tar."""
    text = str(label).encode()
    write(header(f"{key}.{extension}", len(image)))
    write(image)
    write(bytes(-len(image) % BLOCK) + header(f"{key}.cls", len(text)) + text + bytes(-len(text) % BLOCK))


def end_mark(length: int) -> bytes:
    """What closes a tar that is ``length`` bytes long so far."""
    return bytes(2 * BLOCK + -(length + 2 * BLOCK) % _RECORD)


def split_name(name: str) -> tuple[str, str]:
    """A member's key and its extension in small letters, by webdataset's rule: the first dot of the last path component parts
    them. The extension of what has none is empty."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def read_sample(content: memoryview, key: str, where: str) -> Sample:
    """Take a sample's stretch of a tar apart. Raises UserError, which begins with ``where``, for bytes that are not it."""
    sample: Sample = {"__key__": key, "__where__": where}
    found = native.members(content) if native is not None else None
    for name, start, end in found or ():
        _add(sample, name, content[start:end], where)
    position = len(content) if found else 0
    while position < len(content):
        try:
            member = tarfile.TarInfo.frombuf(bytes(content[position : position + BLOCK]), "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: no tar member begins here ({error}); `convoy verify` tells more") from None
        if not member.isreg():  # a header of another kind comes before or between them, as in a tar that others wrote
            for name, part in _any_members(content, where):
                _add(sample, name, part, where)
            break
        _add(sample, member.name, content[position + BLOCK : position + BLOCK + member.size], where)
        position += BLOCK + -(-member.size // BLOCK) * BLOCK
    else:
        if position != len(content):
            raise UserError(f"{where}: the bytes end within a member; the shard is not the one that was indexed")
    if "cls" not in sample or not any(extension in IMAGES for extension in sample):
        raise UserError(f"{where}: an image and its label should stand there, but there is: {', '.join(list(sample)[2:])}")
    return sample


def _add(sample: Sample, name: str, content: memoryview, where: str) -> None:
    key, extension = split_name(name)
    if not extension:
        return
    if key != sample["__key__"]:
        raise UserError(f"{where}: {name} stands there; the shard is not the one that was indexed")
    sample[extension] = content


def _any_members(content: memoryview, where: str) -> list[tuple[str, memoryview]]:
    """Names and bytes of the files in a stretch of any tar, long names, folders and all."""
    try:
        with tarfile.open(fileobj=io.BytesIO(bytes(content) + bytes(2 * BLOCK))) as tar:
            files = ((member.name, tar.extractfile(member)) for member in tar if member.isreg())
            return [(name, memoryview(file.read())) for name, file in files if file]
    except tarfile.TarError as error:
        raise UserError(f"{where}: no tar member begins here ({error}); `convoy verify` tells more") from None


def encoded_image(sample: Sample) -> memoryview:
    """The first member that is an image."""
    image: memoryview = next(content for extension, content in sample.items() if extension in IMAGES)
    return image


def label_of(sample: Sample, num_classes: int) -> int:
    """The class number. Raises UserError where it is none of ``num_classes``."""
    text = bytes(sample["cls"]).strip()
    if not text.isdigit() or int(text) >= num_classes:
        raise UserError(f"{sample['__where__']}: label {text[:20]!r} is none of the {num_classes} classes of the index")
    return int(text)
