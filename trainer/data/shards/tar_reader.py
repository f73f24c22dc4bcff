"""A strict tar reader: every byte of the archive is accounted for, or the archive is rejected.

Python's ``tarfile`` and GNU tar's compatibility modes stop silently at a corrupt header, at the
first end-of-archive mark and at a truncated end, so members after that point are lost. This reader
raises ``TarError`` instead, with the byte at which the archive is invalid.

Use it on a seekable file (members' data is skipped by seeking, so listing a large archive reads
only its headers) or on any object with ``read(count)``::

    with open(path, "rb") as file:
        for member in read_members(file, os.path.getsize(path)):
            if member.is_file:
                data = member.read()        # before the next iteration
                member.name, member.offset, member.data_offset, member.size

    list_members(path)                      # a list of a local archive's members
    list_members(path, start, size)         # of an archive inside another one, without a copy

Accepted: POSIX ustar and pax (x and g headers; path, linkpath, size, hdrcharset), GNU (L and K
headers, base-256 sizes), v7 and Solaris archives. Directories, links and special files are yielded
with their kind.

Rejected: wrong checksums, invalid or negative sizes, names that are not UTF-8 or contain control
characters, sparse files, parts of multi-volume archives, unknown member types, bytes missing before
the end-of-archive mark, one zero block instead of two, anything but zeros after the mark (a second,
concatenated archive), compressed files.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from trainer.data.shards.tar_header import TarError as TarError
from trainer.data.shards.tar_header import (
    check_format,
    check_global,
    check_sum,
    decode_name,
    describe,
    has_valid_sum,
    header_name,
    long_name,
    pax_records,
    pax_size,
    size_in,
)

BLOCK = 512  # bytes; the block size of tar
_PIECE = 2**20  # bytes read at a time when skipping
_MAX_EXTENDED = 2**20  # maximum bytes of a pax header or of a long name

Kind = Literal["file", "directory", "symbolic link", "hard link", "device or pipe", "volume label"]

_FILES = (b"0", b"\0", b"7")
_WITHOUT_DATA: dict[bytes, Kind] = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device or pipe",
    b"4": "device or pipe",
    b"5": "directory",
    b"6": "device or pipe",
    b"V": "volume label",
}
_UNSUPPORTED = {
    b"S": "is stored as a sparse file; write the archive without --sparse",
    b"M": "continues in another volume; multi-volume archives are not supported",
}


class Readable(Protocol):
    """The required part of a binary file; ``seek`` is used if the file has ``seekable()``."""

    def read(self, count: int, /) -> bytes: ...


@dataclass(slots=True)
class Member:
    """One member of an archive. Offsets count from the beginning of the archive."""

    name: str
    kind: Kind
    offset: int
    """First byte of its headers, including extended ones."""
    data_offset: int
    size: int
    """Bytes of its data, without the padding to a full block."""
    end: int
    """First byte after its padding."""
    _archive: "_Archive" = field(repr=False, compare=False)

    @property
    def is_file(self) -> bool:
        return self.kind == "file"

    def read(self) -> bytes:
        """Reads its data. Call it at most once, before the next member is iterated."""
        return self._archive.take(self.size, f"{self.name!r}")


def read_members(file: Readable, size: int) -> Iterator[Member]:
    """Yields the members of an archive of ``size`` bytes that begins at the file's position.

    Reads to the end of the archive. Raises TarError after yielding the members before the error;
    only a finished iteration proves that the archive is complete.
    """
    archive = _Archive(file, size)
    while (block := archive.header()) is not None:
        member = _read_member(archive, block)
        if member is not None:
            yield member
            archive.skip_to(member.end)


def list_members(
    path: str | os.PathLike[str], start: int = 0, size: int | None = None
) -> list[Member]:
    """Returns all members of a local archive.

    ``start``, ``size``: read an archive in the bytes ``start`` to ``start + size`` of a file.
    Raises TarError, OSError.
    """
    with Path(path).open("rb") as file:
        file.seek(start)
        length = os.fstat(file.fileno()).st_size - start if size is None else size
        return list(read_members(file, length))


def members_in(content: memoryview) -> list[tuple[str, int, int]]:
    """Returns the name and the data's [first byte, end) of each file in a byte range of an archive.

    The range has no end-of-archive mark. Raises TarError for bytes that are not complete members.
    """
    archive = _Archive(_Memory(content), len(content))
    found = []
    while archive.position < len(content):
        member = _read_member(archive, archive.block("a header"))
        if member is not None:
            if member.is_file:
                found.append((member.name, member.data_offset, member.data_offset + member.size))
            archive.skip_to(member.end)
    return found


class _Memory:
    """A file interface to bytes in memory."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._position = content, 0

    def read(self, count: int) -> bytes:
        part = bytes(self._content[self._position : self._position + count])
        self._position += len(part)
        return part

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset if whence == os.SEEK_SET else self._position + offset
        return self._position


class _Archive:
    """The position in an archive, with reads that never pass its end."""

    def __init__(self, file: Readable, size: int) -> None:
        seekable = getattr(file, "seekable", None)
        self._file: Any = file
        self._seekable = seekable is not None and seekable()
        self.size = size
        self.position = 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise TarError(
                f"is truncated: it ends at byte {self.size:,}, but {what} extends to byte "
                f"{self.position + count:,}"
            )
        parts = []
        left = count
        while left > 0:
            part = self._file.read(left)
            if not part:
                raise TarError(
                    f"is truncated: it ends at byte {self.position:,} of {self.size:,}, within "
                    f"{what}"
                )
            parts.append(part)
            left -= len(part)
            self.position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def block(self, what: str) -> bytes:
        return self.take(BLOCK, what)

    def skip_to(self, end: int) -> None:
        if self._seekable:
            self._file.seek(end - self.position, os.SEEK_CUR)
            self.position = end
        while self.position < end:
            self.take(min(_PIECE, end - self.position), "the data of a member")

    def header(self) -> bytes | None:
        """Returns the next header, or None at the end of the archive.

        At the end, the rest of the archive is read and checked.
        """
        if self.size == 0:
            raise TarError("is empty (0 bytes)")
        if self.position == self.size:
            raise TarError(
                "is truncated or unfinished: no end-of-archive mark (two zero blocks) at byte "
                f"{self.size:,}; "
                "if its writer omits the mark and it is complete, append 1,024 zero bytes"
            )
        start = self.position
        block = self.take(min(BLOCK, self.size - start), "a header")
        if start == 0 and (len(block) < BLOCK or (any(block) and not has_valid_sum(block))):
            check_format(block)
        if len(block) < BLOCK:
            raise TarError(f"is truncated: it ends at byte {self.size:,}, within a header")
        if any(block):
            return block
        if self.size - start < 2 * BLOCK:
            raise TarError(
                f"is truncated: only one zero block of the end-of-archive mark at byte {start:,}; "
                "if it is complete, append 1,024 zero bytes"
            )
        while self.position < self.size:
            at = self.position
            piece = self.take(min(_PIECE, self.size - at), "the end-of-archive mark")
            if rest := piece.lstrip(b"\0"):
                raise TarError(self._trailing_data(at + len(piece) - len(rest), start))
        return None

    @staticmethod
    def _trailing_data(at: int, end: int) -> str:
        return (
            f"continues at byte {at:,} after a zero block at byte {end:,}: it is corrupt, or "
            "several archives were concatenated and readers see only the first one; keep them as "
            "separate files"
        )


def _read_member(archive: _Archive, block: bytes) -> Member | None:
    """Returns the member whose headers begin with ``block``.

    Returns None for a standalone global pax header.
    """
    offset = archive.position - BLOCK
    names: set[str] = set()
    pax: dict[bytes, bytes] = {}
    described = False
    while True:
        at = archive.position - BLOCK
        check_sum(block, at)
        kind = block[156:157]
        if kind not in b"xXgLK" or not kind.strip(b"\0"):
            break
        size = size_in(block, at)
        if size > _MAX_EXTENDED:
            raise TarError(
                f"has an extended header of {size:,} bytes at byte {at:,}, which is corrupt or "
                "not supported"
            )
        data = archive.take(size, f"the extended header at byte {at:,}")
        archive.take(-size % BLOCK, f"the extended header at byte {at:,}")
        if kind == b"g":
            check_global(pax_records(data, at), at)
            if not described:
                return None
        else:
            described = True
            if kind == b"L":
                names.add(decode_name(long_name(data, at), at))
            elif kind != b"K":
                pax |= pax_records(data, at)
        block = archive.block(f"the member that the extended header at byte {at:,} describes")
        if not any(block):
            raise TarError(f"ends after the extended header at byte {at:,}; its member is missing")
    at = archive.position - BLOCK
    if any(key.startswith(b"GNU.sparse.") for key in pax):
        raise TarError(f"{describe(block, at)} {_UNSUPPORTED[b'S']}")
    if path := pax.get(b"path"):
        names.add(decode_name(path, at))
    if len(names) > 1:
        raise TarError(
            f"{describe(block, at)} has two names: "
            f"{', '.join(repr(name) for name in sorted(names))}"
        )
    name = names.pop() if names else decode_name(header_name(block), at)
    size = size_in(block, at)
    if pax.get(b"size"):
        size = pax_size(pax[b"size"], size, at)
    return _member(archive, block, name, size, offset)


def _member(archive: _Archive, block: bytes, name: str, size: int, offset: int) -> Member:
    at, start, flag = archive.position - BLOCK, archive.position, block[156:157]
    if not name:
        raise TarError(f"{describe(block, at)} has no name")
    if flag in _UNSUPPORTED:
        raise TarError(f"{describe(block, at)} {_UNSUPPORTED[flag]}")
    if flag in _FILES:
        kind: Kind = "directory" if name.endswith("/") else "file"
    elif flag == b"D":  # directory of a GNU tar incremental backup: its data is a list of names
        kind = "directory"
    elif flag in _WITHOUT_DATA:
        kind = _WITHOUT_DATA[flag]
        if size and kind.endswith("link"):
            raise TarError(
                f"{describe(block, at)} is a {kind} with {size:,} bytes, whose extent is ambiguous"
            )
        size = 0
    else:
        raise TarError(f"{describe(block, at)} has the unknown type {flag!r}")
    end = start + size + -size % BLOCK
    if end > archive.size:
        raise TarError(
            f"is truncated: it ends at byte {archive.size:,}, but {name!r} ({size:,} bytes from "
            f"byte {start:,} on) extends to byte {end:,}"
        )
    return Member(name, kind, offset, start, size, end, archive)
