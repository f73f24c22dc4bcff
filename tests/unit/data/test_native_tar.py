"""The native parser of tar members, against tarfile."""

import io
import tarfile

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from trainer.data.shards import tar as shard

pytestmark = pytest.mark.skipif(shard._native is None, reason="the native code was not built")

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
NAMES = st.text(st.sampled_from("abc/.-_ é"), min_size=1, max_size=12).filter(
    lambda name: not name.strip("/.").isspace()
)
FILES = st.lists(
    st.tuples(NAMES | st.just("x" * 101) | st.just("x/" * 60 + "x"), st.binary(max_size=1200)),
    min_size=1,
    max_size=4,
)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])


def tar_bytes(files: list[tuple[str, bytes]], form: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar up to the last file's padding. ``kind``: the type of the first file.

    Examples whose names do not fit into USTAR are rejected.
    """
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=form) as tar:
        for number, (name, content) in enumerate(files):
            info = tarfile.TarInfo(name)
            info.type = kind if number == 0 else tarfile.REGTYPE
            info.size = len(content) if info.isreg() else 0
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:
                reject()
        return raw.getvalue()[: tar.offset]


def by_tarfile(content: bytes) -> list[tuple[str, int, int]] | None:
    """The files that tarfile finds, if each has a single header.

    None if it finds anything else, or bytes that are not a header.
    """
    found, position = [], 0
    while position < len(content):
        try:
            info = tarfile.TarInfo.frombuf(content[position : position + 512], "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError):
            return None
        position += 512
        if not info.isreg() or info.size < 0:
            return None
        found.append((info.name, position, position + info.size))
        position += -(-info.size // 512) * 512
    return found if position == len(content) else None


@given(FILES, st.sampled_from(FORMATS), KINDS)
def test_native_parser_matches_tarfile_or_returns_none(
    files: list[tuple[str, bytes]], form: int, kind: bytes
) -> None:
    content = tar_bytes(files, form, kind)
    found = shard._native.members(content)
    plain = all(name.isascii() and len(name) <= 100 for name, _ in files) and kind in (
        tarfile.REGTYPE,
        tarfile.AREGTYPE,
    )
    if plain and not any(name.endswith("/") for name, _ in files):
        assert found is not None
    assert found is None or found == by_tarfile(content)


@given(FILES, st.sampled_from(FORMATS), st.data())
def test_native_parser_matches_tarfile_on_modified_bytes_or_returns_none(
    files: list[tuple[str, bytes]], form: int, data: st.DataObject
) -> None:
    content = bytearray(tar_bytes(files, form))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, 511) | st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from(b"\0 07/x\x80\xff"))
    if data.draw(st.booleans()):  # with a correct checksum
        content[148:156] = b" " * 8
        content[148:156] = b"%06o\0 " % sum(content[:512])
    truncated = bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    found = shard._native.members(truncated)
    assert found is None or found == by_tarfile(truncated)


def test_native_parser_returns_none_for_a_wrong_checksum() -> None:
    content = bytearray(tar_bytes([("a.jpg", b"abc")], tarfile.USTAR_FORMAT))
    assert shard._native.members(content) == [("a.jpg", 512, 515)]
    content[3] = ord("x")
    assert shard._native.members(content) is None
