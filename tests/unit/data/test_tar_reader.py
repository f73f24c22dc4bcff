"""The strict tar reader against tarfile.

Valid archives give the same members; corrupt ones are rejected or lose no member.
"""

import io
import tarfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.shards.tar_reader import TarError, list_members, members_in, read_members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = {"plain": "a/{}", "long": "é/" + "x" * 120 + "{}"}


@cache
def archive(form: int = tarfile.GNU_FORMAT, pattern: str = "a/{}", comment: str = "") -> bytes:
    """Five pairs of an image of up to 700 bytes and a label.

    In pax archives each member has a pax header.
    """
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=form, pax_headers={"comment": comment} if comment else None
    ) as tar:
        for number in range(5):
            for extension, content in (
                ("png", bytes(150 * number + 100).replace(b"\0", b"\xa5")),
                ("cls", b"%d" % number),
            ):
                info = tarfile.TarInfo(pattern.format(f"{number}.{extension}"))
                info.size, info.mtime = len(content), 1.5
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def found(raw: bytes) -> list[tuple[str, int, int]]:
    return [
        (member.name, member.data_offset, member.size)
        for member in read_members(io.BytesIO(raw), len(raw))
    ]


def rejected(raw: bytes) -> str:
    with pytest.raises(TarError) as caught:
        found(raw)
    return str(caught.value)


def by_tarfile(raw: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]


def header(
    name: bytes = b"a.png",
    size: bytes = b"00000000000\0",
    kind: bytes = b"0",
    magic: bytes = b"ustar\x0000",
) -> bytes:
    block = bytearray(
        name.ljust(100, b"\0") + bytes(24) + size.ljust(12, b"\0") + bytes(12) + b" " * 8 + kind
    )
    block = block.ljust(257, b"\0") + magic.ljust(255, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(data: bytes, kind: bytes = b"x") -> bytes:
    return header(size=b"%o" % len(data), kind=kind) + data.ljust(512, b"\0")


END = bytes(1024)


@pytest.mark.parametrize("pattern", NAMES)
@pytest.mark.parametrize("form", FORMATS)
def test_members_of_valid_archives_match_tarfile(form: str, pattern: str, tmp_path: Path) -> None:
    if (form, pattern) == ("ustar", "long"):
        pattern = "y" * 90 + "/" + "x" * 80 + "{}"  # fits into the ustar prefix
    raw = archive(FORMATS[form], NAMES.get(pattern, pattern), "global" if form == "pax" else "")
    assert found(raw) == by_tarfile(raw)
    (tmp_path / "a.tar").write_bytes(b"before" + raw + b"after")
    inner = list_members(tmp_path / "a.tar", 6, len(raw))
    assert [(member.name, member.data_offset, member.size) for member in inner] == by_tarfile(
        raw
    ), "an archive inside a file"
    end = inner[-1].end
    assert members_in(memoryview(raw)[:end]) == [
        (name, start, start + size) for name, start, size in by_tarfile(raw)
    ]


def test_members_are_read_from_an_unseekable_file() -> None:
    raw = archive()
    stream = type("Stream", (), {"read": io.BytesIO(raw).read})()
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        for member in read_members(stream, len(raw)):
            assert member.read() == tar.extractfile(member.name).read()


@pytest.mark.parametrize("pattern", NAMES)
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_truncated_archives_are_rejected_at_every_length(form: str, pattern: str) -> None:
    raw = archive(FORMATS[form], NAMES[pattern])
    complete = by_tarfile(raw)
    end = list(read_members(io.BytesIO(raw), len(raw)))[-1].end + len(END)
    for length in [*range(0, end, 211), *range(0, end, 512), end - 1]:
        assert rejected(raw[:length])
    assert found(raw[:end]) == complete


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(list(FORMATS.values())),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=2),
)
def test_flipped_bits_lose_no_member(form: int, flips: list[tuple[float, int]]) -> None:
    """Names are not compared, because pax records have no checksum."""
    raw = bytearray(archive(form))
    expected = by_tarfile(raw)
    for place, bit in flips:
        raw[min(int(place * len(raw)), len(raw) - 1)] ^= 1 << bit
    try:
        members = found(bytes(raw))
    except TarError:
        return
    assert [member[1:] for member in members] == [member[1:] for member in expected]


@pytest.mark.parametrize(
    "field", [0, 99, 100, 124, 135, 136, 148, 156, 157, 257, 265, 345, 499, 511]
)
def test_header_with_a_flipped_bit_is_rejected(field: int) -> None:
    raw = bytearray(archive())
    second = by_tarfile(raw)[3][1] - 512
    raw[second + field] ^= 1
    assert f"no valid tar header at byte {second:,}" in rejected(bytes(raw))


def test_bytes_after_the_end_of_archive_mark_are_rejected() -> None:
    one, two = archive(), archive(pattern="b/{}")
    assert "several archives were concatenated" in rejected(one + two)
    data_end = list(read_members(io.BytesIO(one), len(one)))[-1].end
    assert f"continues at byte {data_end + 512:,}" in rejected(one[:data_end] + bytes(512) + two), (
        "with one zero block between the archives"
    )
    assert found(one[:data_end] + two), "without an end mark they are one archive"
    assert "continues at byte" in rejected(one + b"x")
    assert found(one + bytes(77)) == by_tarfile(one)


def test_archive_without_two_zero_blocks_at_its_end_is_rejected() -> None:
    raw = archive()
    data_end = list(read_members(io.BytesIO(raw), len(raw)))[-1].end
    assert "no end-of-archive mark" in rejected(raw[:data_end])
    assert "only one zero block" in rejected(raw[: data_end + 512])
    assert "is empty" in rejected(b"")


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (b"77777777777\0", "is truncated"),
        (b"\x80" + bytes(3) + b"\x80" + bytes(7), "is truncated"),  # 2**63
        (b"\xff" * 12, "invalid size"),  # -1
        (b"-0000000001\0", "invalid size"),
        (b"0o000000017\0", "invalid size"),
        (b"00000000_10\0", "invalid size"),
        (b"0000 0000 1\0", "invalid size"),
    ],
    ids=repr,
)
def test_invalid_or_excessive_sizes_are_rejected(size: bytes, reason: str) -> None:
    assert reason in rejected(header(size=size) + bytes(512) + END)


@pytest.mark.parametrize(
    "size",
    [b"          5\0", b"5\0", b"00000000005 ", b"000000000005", b"\x80" + bytes(10) + b"\x05"],
    ids=repr,
)
def test_all_valid_encodings_of_a_size_are_read(size: bytes) -> None:
    assert found(header(size=size) + b"12345".ljust(512, b"x") + END) == [("a.png", 512, 5)]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (header(name=b"caf\xe9.png"), "not UTF-8"),
        (header(name=b"a\nb.png"), "control character"),
        (header(name=b""), "has no name"),
        (header(kind=b"S"), "sparse"),
        (header(kind=b"M"), "multi-volume"),
        (header(kind=b"Q"), "unknown type"),
        (header(kind=b"1", size=b"5\0"), "whose extent is ambiguous"),
        (extended(b"name", b"L"), "its member is missing"),
        (extended(b"na\0me", b"L") + header(), "contains a zero byte"),
        (header(kind=b"L", size=b"77777777"), "extended header of"),
        (extended(b"9 path=x\n"), "its member is missing"),
        (extended(b"8 path=x\n") + header(), "invalid record"),
        (extended(b"9 path=x\n9 path") + header(), "invalid record"),
        (extended(b"12 path=a\0b\n") + header(), "control character"),
        (extended(b"13 path=caf\xe9\n") + header(), "not UTF-8"),
        (extended(b"9 path=x\n") + extended(b"y", b"L") + header(), "two names"),
        (extended(b"9 size=x\n") + header(), "invalid pax size"),
        (extended(b"9 size=7\n") + header(size=b"5\0") + bytes(512), "two sizes"),
        (extended(b"9 path=x\n", b"g") + header(), "global pax header"),
        (extended(b"22 GNU.sparse.major=1\n") + header(), "sparse"),
        (extended(b"18 hdrcharset=KOI\n") + header(), "unknown encoding"),
        (b"\x1f\x8b\x08" + bytes(600), "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd"),
        (b"<!DOCTYPE html><html>".ljust(600), "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"no tar at all" * 100, "is not a tar archive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_and_ambiguous_members_are_rejected(raw: bytes, reason: str) -> None:
    assert reason in rejected(raw + END)


def test_first_name_may_begin_like_another_format() -> None:
    assert found(header(b"BZh.png") + END) == [("BZh.png", 512, 0)]


def test_v7_headers_links_and_folders_have_their_kind() -> None:
    raw = (
        header(b"folder/", kind=b"\0", magic=b"")
        + header(b"old.png", kind=b"\0", magic=b"")
        + header(b"l", kind=b"2")
        + END
    )
    assert [(m.name, m.kind) for m in read_members(io.BytesIO(raw), len(raw))] == [
        ("folder/", "directory"), ("old.png", "file"), ("l", "symbolic link"),
    ]  # fmt: skip
