"""A sample in a shard: the image's tar member, then its label's (``.cls``, decimal text), as plain WebDataset has it."""

import tarfile
from collections.abc import Callable
from typing import Any

from trainer.errors import UserError

BLOCK = 512  # bytes; a tar's unit
_RECORD = 10240  # bytes; a tar's length is a multiple

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


def read_sample(content: memoryview, key: str, where: str) -> Sample:
    """Take a sample's stretch of a tar apart. Raises UserError, which begins with ``where``, for bytes that are not it."""
    sample: Sample = {"__key__": key, "__where__": where}
    position = 0
    while position < len(content):
        try:
            member = tarfile.TarInfo.frombuf(bytes(content[position : position + BLOCK]), "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: no tar member begins here ({error}); `convoy verify` tells more") from None
        name, _, extension = member.name.rpartition(".")
        if name != key:
            raise UserError(f"{where}: {member.name} stands there; the shard is not the one that was indexed")
        sample[extension] = content[position + BLOCK : position + BLOCK + member.size]
        position += BLOCK + -(-member.size // BLOCK) * BLOCK
    if position != len(content) or "cls" not in sample or len(sample) != 4:
        raise UserError(f"{where}: an image and its label should stand there, but there is: {', '.join(list(sample)[2:])}")
    return sample


def encoded_image(sample: Sample) -> memoryview:
    """The member that is not the label."""
    image: memoryview = next(v for k, v in sample.items() if k != "cls" and not k.startswith("__"))
    return image


def label_of(sample: Sample, num_classes: int) -> int:
    """The class number. Raises UserError where it is none of ``num_classes``."""
    text = bytes(sample["cls"])
    if not text.isdigit() or int(text) >= num_classes:
        raise UserError(f"{sample['__where__']}: label {text[:20]!r} is none of the {num_classes} classes of the index")
    return int(text)
