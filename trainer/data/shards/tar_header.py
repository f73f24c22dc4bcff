"""Parses the fields of tar headers and the records of extended headers, with strict validation."""

import re

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
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; fetch it with "
    "`git lfs pull`",
}


class TarError(ValueError):
    """Raised for a rejected archive.

    The message is a clause that follows the archive's name: "is truncated: ...".
    """


def check_format(block: bytes) -> None:
    """Rejects files that begin like a format other than tar."""
    for magic, fault in _OTHER_FORMATS.items():
        if block.startswith(magic):
            raise TarError(f"is not a plain tar archive: it {fault}")
    if re.match(rb"\s*<(!doctype|html|\?xml)", block, re.IGNORECASE):
        raise TarError(
            "is not a tar archive: it is a web page or an XML document, probably an error of a "
            "download"
        )


def has_valid_sum(block: bytes) -> bool:
    """Whether the checksum of a header is correct."""
    field = _OCTAL.fullmatch(block[148:156])
    if field is None or not field[1]:
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(rest)
    signed = unsigned - 256 * sum(byte > 127 for byte in rest)  # as some old writers compute it
    return int(field[1], 8) in (unsigned, signed)


def check_sum(block: bytes, at: int) -> None:
    """Rejects a header with a wrong checksum.

    ``at``: the header's first byte in the archive, as in all functions of this module.
    """
    if has_valid_sum(block):
        return
    if at == 0:
        raise TarError("is not a tar archive, or its first header is corrupt (wrong checksum)")
    raise TarError(
        f"is corrupt: no valid tar header at byte {at:,} (wrong checksum); members after it "
        "would be lost"
    )


def size_in(block: bytes, at: int) -> int:
    """Returns the member's data size in bytes according to the header."""
    raw = block[124:136]
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    field = _OCTAL.fullmatch(raw)
    if field is None:
        raise TarError(f"{describe(block, at)} has the invalid size {raw!r}")
    return int(field[1] or b"0", 8)


def pax_size(value: bytes, in_header: int, at: int) -> int:
    """Returns the member's data size in bytes according to a pax record ``size``.

    ``in_header``: the size according to the header that follows.
    """
    if not re.fullmatch(rb"[0-9]{1,19}", value):
        raise TarError(f"the member at byte {at:,} has the invalid pax size {value[:40]!r}")
    size = int(value)
    if size != in_header and in_header and size < 8**11:  # the header has space for it
        raise TarError(f"the member at byte {at:,} has two sizes: {in_header:,} and {size:,} bytes")
    return size


def pax_records(data: bytes, at: int) -> dict[bytes, bytes]:
    """Returns the key and value of each record ``LENGTH KEY=VALUE\\n``."""
    records: dict[bytes, bytes] = {}
    position = 0
    while data[position:].strip(b"\0"):
        head = _PAX_RECORD.match(data, position)
        end = position + int(head[1]) if head else 0
        if head is None or not head.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise TarError(
                f"is corrupt: the pax header at byte {at:,} has an invalid record at its byte "
                f"{position:,}"
            )
        records[head[2]] = data[head.end() : end - 1]
        position = end
    if records.get(b"hdrcharset", b"") not in _CHARSETS:
        raise TarError(
            f"has names in the unknown encoding {records[b'hdrcharset']!r}, by the pax header "
            f"at byte {at:,}"
        )
    return records


def check_global(records: dict[bytes, bytes], at: int) -> None:
    """Rejects global headers that would change names, sizes or links of members.

    Members are read individually later, so nothing in a global header may affect them.
    """
    for key in records:
        if key in (b"path", b"size", b"linkpath") or key.startswith(b"GNU.sparse."):
            raise TarError(
                f"sets {key.decode()!r} of all members in a global pax header at byte {at:,}, "
                "which is not supported"
            )


def long_name(data: bytes, at: int) -> bytes:
    """Returns the name in the data of a GNU long-name header."""
    name, _, rest = data.partition(b"\0")
    if rest.strip(b"\0"):
        raise TarError(f"is corrupt: the long name at byte {at:,} contains a zero byte")
    return name


def header_name(block: bytes) -> bytes:
    """Returns the name in a header, including its ustar prefix."""
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def decode_name(name: bytes, at: int) -> str:
    """Decodes a name; rejects names that are not UTF-8 or contain control characters."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise TarError(
            f"contains a name that is not UTF-8 at byte {at:,}: {name[:80]!r}; "
            "rename the file (`convmv`) and write the archive again"
        ) from None
    if _CONTROL.search(text):
        raise TarError(
            f"contains a name with a control character at byte {at:,}: {text[:80]!r}; rename "
            "the file"
        )
    return text


def describe(block: bytes, at: int) -> str:
    """Describes a member, for messages."""
    return f"the member {header_name(block).decode('utf-8', 'replace')!r} at byte {at:,}"
