"""A strict tar reader: every byte of the archive is accounted for, or the archive is rejected.

Python's ``tarfile`` and GNU tar's compatibility modes end silently at a corrupt header, at the first
end-of-archive mark and at a truncated end, so that members behind it vanish. This reader raises
``TarError`` instead, with the byte at which the archive is wrong.

Use it on a seekable file (members' data are skipped by seeking, so that listing a large archive
reads only its headers) or on anything with ``read(count)``::

    with open(path, "rb") as file:
        for member in read_members(file, os.path.getsize(path)):
            if member.is_file:
                data = member.read()        # before the next member is taken
                member.name, member.offset, member.data_offset, member.size

    list_members(path)                      # a list of a local archive's members
    list_members(path, start, size)         # of an archive inside another one, without a copy

Accepted: POSIX ustar and pax (x and g headers; path, linkpath, size, hdrcharset), GNU (L and K
headers, base-256 sizes), v7 and Solaris archives; directories, links and special files are
yielded with their kind. Rejected: what has a wrong checksum, an invalid or negative size, a name
that is not UTF-8 or contains control characters, sparse files, parts of multi-volume archives,
unknown types of members, bytes missing before the end-of-archive mark, one zero block instead of
two, anything but zeros behind the mark (a second, concatenated archive), compressed files.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

BLOCK = 512  # bytes; the unit of a tar
_PIECE = 2**20  # bytes read at a time when skipping
_MAX_EXTENDED = 2**20  # bytes of a pax header or of a long name

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
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,7}) ([^=\n]+)=")
_CONTROL = re.compile("[\x00-\x1f\x7f]")
_CHARSETS = (b"", b"BINARY", b"ISO-IR 10646 2000 UTF-8")
_OTHER_FORMATS = {
    b"\x1f\x8b": "is compressed with gzip",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd",
    b"\xfd7zXZ\0": "is compressed with xz",
    b"BZh": "is compressed with bzip2",
    b"\x04\x22\x4d\x18": "is compressed with lz4",
    b"PK\x03\x04": "is a zip file",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
}


class TarError(ValueError):
    """Why an archive is rejected, as a clause that follows the archive's name: "is truncated: ..."."""


class Readable(Protocol):
    """The part of a binary file that is needed; ``seek`` is used if the file has ``seekable()``."""

    def read(self, count: int, /) -> bytes: ...


@dataclass(slots=True)
class Member:
    """One member of an archive. Offsets count from the beginning of the archive."""

    name: str
    kind: Kind
    offset: int
    """The first byte of its headers, extended ones included."""
    data_offset: int
    size: int
    """Bytes of its data, without the padding to a full block."""
    end: int
    """The first byte behind its padding."""
    _archive: "_Archive" = field(repr=False, compare=False)

    @property
    def is_file(self) -> bool:
        return self.kind == "file"

    def read(self) -> bytes:
        """Its data. Call it before the next member is taken, once."""
        return self._archive.take(self.size, f"{self.name!r}")


def read_members(file: Readable, size: int) -> Iterator[Member]:
    """The members of an archive of ``size`` bytes that begins at the file's position, in order.

    Raises TarError, after the members before the fault; only a complete iteration says that the
    archive is complete. Reads to the end of the archive.
    """
    archive = _Archive(file, size)
    while (block := archive.header()) is not None:
        member = _read_member(archive, block)
        if member is not None:
            yield member
            archive.skip_to(member.end)


def list_members(path: str | os.PathLike[str], start: int = 0, size: int | None = None) -> list[Member]:
    """All members of a local archive, or of one in the bytes ``start`` to ``start + size`` of a file.

    Raises TarError, OSError.
    """
    with Path(path).open("rb") as file:
        file.seek(start)
        length = os.fstat(file.fileno()).st_size - start if size is None else size
        return list(read_members(file, length))


def members_in(content: memoryview) -> list[tuple[str, int, int]]:
    """Name, first byte and end of the data of each file in a stretch of an archive without its end.

    Raises TarError for bytes that are not complete members.
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
    """Bytes in memory as a file."""

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
    """The position in an archive, and reads that never pass its end."""

    def __init__(self, file: Readable, size: int) -> None:
        seekable = getattr(file, "seekable", None)
        self._file: Any = file
        self._seekable = seekable is not None and seekable()
        self.size = size
        self.position = 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise TarError(f"is truncated: it ends at byte {self.size:,}, but {what} extends to byte {self.position + count:,}")
        parts = []
        left = count
        while left > 0:
            part = self._file.read(left)
            if not part:
                raise TarError(f"is truncated: it ends at byte {self.position:,} of {self.size:,}, within {what}")
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
        """The next header; None at the end of the archive, which is then read and checked."""
        if self.size == 0:
            raise TarError("is empty (0 bytes)")
        if self.position == self.size:
            raise TarError(
                f"is truncated or unfinished: no end-of-archive mark (two zero blocks) at byte {self.size:,}; "
                "if its writer omits the mark and it is complete, append 1,024 zero bytes"
            )
        start = self.position
        block = self.take(min(BLOCK, self.size - start), "a header")
        if start == 0:
            _check_format(block)
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
                raise TarError(self._behind_the_end(at + len(piece) - len(rest), start))
        return None

    @staticmethod
    def _behind_the_end(at: int, end: int) -> str:
        return (
            f"continues at byte {at:,} behind a zero block at byte {end:,}: it is corrupt, or several archives were "
            "concatenated, of which readers see the first one; keep them as separate files"
        )


def _check_format(block: bytes) -> None:
    for magic, fault in _OTHER_FORMATS.items():
        if block.startswith(magic):
            raise TarError(f"is not a plain tar archive: it {fault}")
    if re.match(rb"\s*<(!doctype|html|\?xml)", block, re.IGNORECASE):
        raise TarError("is not a tar archive: it is a web page or an XML document, probably an error of a download")


def _read_member(archive: _Archive, block: bytes) -> Member | None:
    """The member whose headers begin with ``block``; None for a global pax header that stands alone."""
    offset = archive.position - BLOCK
    names: set[str] = set()
    pax: dict[bytes, bytes] = {}
    described = False
    while True:
        at = archive.position - BLOCK
        _check_sum(block, at)
        kind = block[156:157]
        if kind not in b"xXgLK" or not kind.strip(b"\0"):
            break
        size = _size(block, at)
        if size > _MAX_EXTENDED:
            raise TarError(f"has an extended header of {size:,} bytes at byte {at:,}, which is corrupt or not supported")
        data = archive.take(size, f"the extended header at byte {at:,}")
        archive.take(-size % BLOCK, f"the extended header at byte {at:,}")
        if kind == b"g":
            _check_global(_pax_records(data, at), at)
            if not described:
                return None
        else:
            described = True
            if kind == b"L":
                names.add(_text(_long_name(data, at), at))
            elif kind != b"K":
                pax |= _pax_records(data, at)
        block = archive.block(f"the member that the extended header at byte {at:,} describes")
        if not any(block):
            raise TarError(f"ends behind the extended header at byte {at:,}; its member is missing")
    at = archive.position - BLOCK
    if any(key.startswith(b"GNU.sparse.") for key in pax):
        raise TarError(f"{_describe(block, at)} {_UNSUPPORTED[b'S']}")
    if path := pax.get(b"path"):
        names.add(_text(path, at))
    if len(names) > 1:
        raise TarError(f"{_describe(block, at)} has two names: {', '.join(repr(name) for name in sorted(names))}")
    name = names.pop() if names else _text(_header_name(block), at)
    size = _size(block, at)
    if pax.get(b"size"):
        size = _pax_size(pax[b"size"], size, at)
    return _member(archive, block, name, size, offset)


def _member(archive: _Archive, block: bytes, name: str, size: int, offset: int) -> Member:
    at, start, flag = archive.position - BLOCK, archive.position, block[156:157]
    if not name:
        raise TarError(f"{_describe(block, at)} has no name")
    if flag in _UNSUPPORTED:
        raise TarError(f"{_describe(block, at)} {_UNSUPPORTED[flag]}")
    if flag in _FILES:
        kind: Kind = "directory" if name.endswith("/") else "file"
    elif flag == b"D":  # GNU tar's directory of an incremental backup: its data are a list of names
        kind = "directory"
    elif flag in _WITHOUT_DATA:
        kind = _WITHOUT_DATA[flag]
        if size and kind.endswith("link"):
            raise TarError(f"{_describe(block, at)} is a {kind} with {size:,} bytes, whose extent is ambiguous")
        size = 0
    else:
        raise TarError(f"{_describe(block, at)} is of the unknown type {flag!r}")
    end = start + size + -size % BLOCK
    if end > archive.size:
        raise TarError(
            f"is truncated: it ends at byte {archive.size:,}, but {name!r}, {size:,} bytes from byte {start:,} on, "
            f"extends to byte {end:,}"
        )
    return Member(name, kind, offset, start, size, end, archive)


def _check_sum(block: bytes, at: int) -> None:
    field = _OCTAL.fullmatch(block[148:156])
    if field is not None and field[1]:
        rest = block[:148] + b" " * 8 + block[156:]
        unsigned = sum(rest)
        signed = unsigned - 256 * sum(byte > 127 for byte in rest)  # as some old writers compute it
        if int(field[1], 8) in (unsigned, signed):
            return
    if at == 0:
        raise TarError("is not a tar archive, or its first header is corrupt (wrong checksum)")
    raise TarError(f"is corrupt: no valid tar header at byte {at:,} (wrong checksum); members behind it would be lost")


def _size(block: bytes, at: int) -> int:
    raw = block[124:136]
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    field = _OCTAL.fullmatch(raw)
    if field is None:
        raise TarError(f"{_describe(block, at)} has the invalid size {raw!r}")
    return int(field[1] or b"0", 8)


def _pax_size(value: bytes, in_header: int, at: int) -> int:
    if not re.fullmatch(rb"[0-9]{1,19}", value):
        raise TarError(f"the member at byte {at:,} has the invalid pax size {value[:40]!r}")
    size = int(value)
    if size != in_header and in_header and size < 8**11:  # the header has space for it
        raise TarError(f"the member at byte {at:,} has two sizes: {in_header:,} and {size:,} bytes")
    return size


def _pax_records(data: bytes, at: int) -> dict[bytes, bytes]:
    """Key and value of each record ``LENGTH KEY=VALUE\\n``."""
    records: dict[bytes, bytes] = {}
    position = 0
    while data[position:].strip(b"\0"):
        head = _PAX_RECORD.match(data, position)
        end = position + int(head[1]) if head else 0
        if head is None or not head.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise TarError(f"is corrupt: the pax header at byte {at:,} has an invalid record at its byte {position:,}")
        records[head[2]] = data[head.end() : end - 1]
        position = end
    if records.get(b"hdrcharset", b"") not in _CHARSETS:
        raise TarError(f"has names in the unknown encoding {records[b'hdrcharset']!r}, by the pax header at byte {at:,}")
    return records


def _check_global(records: dict[bytes, bytes], at: int) -> None:
    """Members are read alone later, so that nothing in a global header may change what they are."""
    for key in records:
        if key in (b"path", b"size", b"linkpath") or key.startswith(b"GNU.sparse."):
            raise TarError(f"sets {key.decode()!r} of all members in a global pax header at byte {at:,}, which is not supported")


def _long_name(data: bytes, at: int) -> bytes:
    name, _, rest = data.partition(b"\0")
    if rest.strip(b"\0"):
        raise TarError(f"is corrupt: the long name at byte {at:,} contains a zero byte")
    return name


def _header_name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(name: bytes, at: int) -> str:
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise TarError(
            f"contains a name that is not UTF-8 at byte {at:,}: {name[:80]!r}; "
            "rename the file (`convmv`) and write the archive again"
        ) from None
    if _CONTROL.search(text):
        raise TarError(f"contains a name with a control character at byte {at:,}: {text[:80]!r}; rename the file")
    return text


def _describe(block: bytes, at: int) -> str:
    return f"the member {_header_name(block).decode('utf-8', 'replace')!r} at byte {at:,}"
