"""Third-party shards are indexed in place, after which every command can read them."""

import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.helpers import RunText

from pipelines.datasets.index_shards import IndexOptions, index_shards
from pipelines.datasets.shard_set import missing_shards, split_of
from pipelines.datasets.verify import verify
from trainer.data.index import open_index
from trainer.data.shards.sample_reader import read_samples
from trainer.data.shards.tar import encoded_image, label_of
from trainer.data.storage.store import open_store
from trainer.errors import UserError

LONG = "folder.with.dots/" + "a_long_name_" * 12  # longer than fits into a plain header


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def _by_webdataset(folder: Path) -> None:
    with wds.ShardWriter(str(folder / "set-%04d.tar"), maxcount=7, verbose=0) as sink:
        for number in range(20):
            sink.write(
                {
                    "__key__": f"{number:03d}",
                    "png": _png(number),
                    "cls": number % 4,
                    "json": {"number": number},
                }
            )


def _by_tarfile(folder: Path, form: int) -> None:
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w", format=form) as tar:
            for number in range(shard * 10, shard * 10 + 10):
                for extension, content in (
                    ("CLS", f"{number % 4}\n".encode()),
                    ("PNG", _png(number)),
                    ("seg.txt", b"x"),
                ):
                    info = tarfile.TarInfo(f"{LONG}{number}.{extension}")
                    info.size, info.mtime = len(content), 1.5 + number
                    tar.addfile(info, io.BytesIO(content))


def _by_tar(folder: Path) -> None:
    """Archives of GNU tar, which contain entries for folders."""
    for shard in range(2):
        files = folder / f"files{shard}" / "deep"
        files.mkdir(parents=True)
        for number in range(shard * 10, shard * 10 + 10):
            (files / f"{number}.png").write_bytes(_png(number))
            (files / f"{number}.cls").write_text(str(number % 4))
        subprocess.run(
            [
                "tar",
                "--sort=name",
                "-cf",
                folder / f"{shard}.tar",
                "-C",
                folder / f"files{shard}",
                ".",
            ],
            check=True,
        )


WRITERS = {
    "webdataset": _by_webdataset,
    "pax": lambda folder: _by_tarfile(folder, tarfile.PAX_FORMAT),
    "gnu": lambda folder: _by_tarfile(folder, tarfile.GNU_FORMAT),
    "tar": _by_tar,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_index_locates_every_sample_that_webdataset_reads(writer: str, tmp_path: Path) -> None:
    WRITERS[writer](tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    _, result = index_shards(str(tmp_path), IndexOptions("train"))
    assert (result.samples, result.classes, result.split) == (20, ["0", "1", "2", "3"], "train")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before, "unchanged"
    index, store = open_index(str(tmp_path))
    theirs = [
        s
        for path in sorted(tmp_path.glob("*.tar"))
        for s in wds.WebDataset(str(path), shardshuffle=False, empty_check=False)
    ]
    assert [key for shard in index.shards for key in shard.keys] == [
        sample["__key__"] for sample in theirs
    ]
    for number in range(20):  # one by one, so that only the bytes of this sample are read
        (sample,) = read_samples(np.array([number]), index, store).values()
        assert bytes(encoded_image(sample)) == theirs[number]["png"]
        assert label_of(sample, 4) == int(theirs[number]["cls"])
    (report,) = verify(str(tmp_path), 1)
    assert (report.samples, report.faults) == (20, [])


def test_packed_shards_get_the_same_offsets_as_from_pack(
    convoy_ok: RunText, digits: Path, tmp_path: Path
) -> None:
    index, _ = open_index(str(digits / "train"))
    for shard in index.shards:
        (tmp_path / shard.name).write_bytes((digits / "train" / shard.name).read_bytes())
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{name}\n" for name in index.classes))
    assert f"{index.samples} images of 10 classes" in convoy_ok(
        "index", tmp_path, "--class-names", names
    )
    lines = convoy_ok(
        "order",
        tmp_path,
        "--epoch",
        0,
        "--world-size",
        1,
        "--rank",
        0,
        "--batch-size",
        50,
        "--json",
    ).splitlines()
    assert sorted(k for line in lines for k in json.loads(line)["keys"]) == sorted(
        k for shard in index.shards for k in shard.keys
    )
    ours, _ = open_index(str(tmp_path))
    assert (ours.shards, ours.classes, ours.split) == (index.shards, index.classes, tmp_path.name)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _refused(folder: Path, class_names: str | None = None) -> str:
    return _refused_at(str(folder), class_names)


def _refused_at(url: str, class_names: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        index_shards(url, IndexOptions(class_names=class_names))
    return str(caught.value)


def test_invalid_shards_and_labels_are_errors(tmp_path: Path) -> None:
    assert "contains no .tar file" in _refused(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    assert "a.tar.gz: is compressed" in _refused(tmp_path)
    (tmp_path / "a.tar.gz").unlink()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        _add(tar, "1.png", _png(1))
        _add(tar, "2.png", _png(2))
        _add(tar, "1.cls", b"0")
        _add(tar, "3.png", _png(3))
        _add(tar, "3.cls", b"dog")
    message = _refused(tmp_path)
    assert "a.tar: sample 1: needs an image and its label (.cls), but has: png" in message
    assert "sample 1: its members are not adjacent" in message
    assert "sample 3: its label b'dog' is not a class number" in message
    (tmp_path / "a.tar").write_bytes(b"not a tar at all" * 100)
    assert "a.tar: is not a tar archive" in _refused(tmp_path)
    _by_webdataset(tmp_path)
    (tmp_path / "a.tar").write_bytes((tmp_path / "set-0000.tar").read_bytes()[:2000])
    assert "a.tar: is truncated" in _refused(tmp_path)
    (tmp_path / "a.tar").unlink()
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    assert "has 2 names, but there are labels up to 3" in _refused(
        tmp_path, str(tmp_path / "names.txt")
    )
    assert not (tmp_path / "index.json").exists(), "nothing is written"


def test_differing_index_is_kept_unless_overwritten(
    convoy_ok: RunText, convoy_refuses: RunText, tmp_path: Path
) -> None:
    _by_webdataset(tmp_path)
    index_shards(str(tmp_path), IndexOptions())
    index_shards(str(tmp_path), IndexOptions())  # a second time changes nothing
    (tmp_path / "set-0001.tar").unlink()
    assert "exists with other content; use --overwrite to replace it" in convoy_refuses(
        "index", tmp_path
    )
    assert "13 images" in convoy_ok("index", tmp_path, "--overwrite")


def _tar(pairs: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in pairs:
            _add(tar, name, content)
    return out.getvalue()


def _samples(first: int, end: int, folder: str = "") -> list[tuple[str, bytes]]:
    return [
        (
            f"{folder}{number:04d}.{extension}",
            _png(number) if extension == "png" else b"%d" % (number % 4),
        )
        for number in range(first, end)
        for extension in ("png", "cls")
    ]


def _write(folder: Path, shards: dict[str, bytes]) -> Path:
    for name, content in shards.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _webdataset_keys(path: Path) -> list[str]:
    return [
        sample["__key__"]
        for sample in wds.WebDataset(str(path), shardshuffle=False, empty_check=False)
    ]


def test_corrupt_header_or_concatenated_archive_is_an_error(
    convoy_refuses: RunText, tmp_path: Path
) -> None:
    raw = bytearray(_tar(_samples(0, 10)))
    raw[raw.index(b"0005.png") + 150] ^= 1
    _write(tmp_path, {"a.tar": raw})
    message = convoy_refuses("index", tmp_path)
    assert "a.tar: is corrupt: no valid tar header at byte" in message
    assert message.count("convoy: ") == 1
    _write(tmp_path, {"a.tar": _tar(_samples(0, 5)) + _tar(_samples(5, 10))})
    assert "concatenated" in _refused(tmp_path)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        (
            [("x.png", b"1"), ("x.cls", b"0"), ("x.png", b"2"), ("x.cls", b"1")],
            "x.png and x.png are the same member",
        ),
        (
            [("x.png", b"1"), ("x.cls", b"0"), ("x.PNG", b"2"), ("x.CLS", b"1")],
            "x.png and x.PNG are the same member",
        ),
        (
            [*_samples(0, 1), *_samples(5, 6), *_samples(0, 1)],
            "sample 0000: its members are not adjacent",
        ),
        ([("x.png", b"1"), ("x.jpg", b"2"), ("x.cls", b"0")], "has several images, x.png, x.jpg"),
        (
            [("x.png", b"1"), ("x.cls", b"0"), ("y.avif", b"2")],
            "sample y: needs an image and its label",
        ),
        (
            [("x.png", b"1"), ("x.cls", b"0"), ("inner.tar", _tar(_samples(0, 2)))],
            "sample inner: needs an image and its label",
        ),
        ([("x.png", b"1"), ("x.cls", b"0"), ("x.__key__", b"0")], "is reserved"),
        (
            [("README.md", b"text"), ("._x.png", b"")],
            "contains no sample (1 hidden or system files, 1 text files without an image)",
        ),
        ([("caf\udce9/1.png", b"1"), ("caf\udce9/1.cls", b"0")], "not UTF-8"),
        ([("a\nb.png", b"1"), ("a\nb.cls", b"0")], "control character"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_samples_that_cannot_be_represented_exactly_are_errors(
    pairs: list[tuple[str, bytes]], reason: str, tmp_path: Path
) -> None:
    assert reason in _refused(_write(tmp_path, {"a.tar": _tar(pairs)}))


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (b"4294967295", "4294967295 (-1 as an unsigned number) is above"),
        (b"1048576", "is above 1,048,575"),
        (b"65535", "only 5 distinct labels"),
        (b"9" * 5000, "is not a class number"),
        *(
            (text, "is not a class number")
            for text in (
                b"-1",
                b"1.0",
                b"1e3",
                b"",
                b"0x1",
                b"\xef\xbb\xbf1",
                b"1_0",
                b"+1",
                b"1\0",
                b"{}",
            )
        ),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else "",
)
def test_invalid_or_huge_labels_are_errors(label: bytes, reason: str, tmp_path: Path) -> None:
    shard = _tar([*_samples(0, 4), ("x.png", _png(1)), ("x.cls", label)])
    assert reason in _refused(_write(tmp_path, {"a.tar": shard}))


def test_system_and_side_files_are_ignored_and_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    apple = [
        pair
        for name, data in _samples(0, 3, "./")
        for pair in ((name.replace("./", "./._"), bytes(64)), (name, data))
    ]
    apple += [
        ("./.DS_Store", b"x"),
        ("__MACOSX/._0000.png", b"x"),
        ("README", b"x"),
    ]  # 9 with the 3 x 2 AppleDouble files
    shard = _tar([("meta.json", b"{}"), *apple, ("stats.csv", b"1")])
    _write(tmp_path, {"a.tar": shard, "._a.tar": b"AppleDouble"})
    _, index = index_shards(str(tmp_path), IndexOptions())
    assert index.shards[0].keys == [
        key for key in _webdataset_keys(tmp_path / "a.tar") if key[0] == "."
    ]
    message = capfd.readouterr().err
    assert "2 text files without an image" in message
    assert "9 hidden or system files" in message
    assert verify(str(tmp_path), 1)[0].faults == [], "the reader ignores the same members"


def test_links_named_like_images_are_errors_and_others_are_ignored(tmp_path: Path) -> None:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content in _samples(0, 2):
            _add(tar, name, content)
        for name, kind in (
            ("latest", tarfile.SYMTYPE),
            ("0002.png", tarfile.LNKTYPE),
            ("0002.cls", tarfile.SYMTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0000.png"
            tar.addfile(info)
    message = _refused(_write(tmp_path, {"a.tar": raw.getvalue()}))
    assert "0002.png is a hard link" in message
    assert "0002.cls is a symbolic link" in message
    assert "latest" not in message


def test_shards_with_equal_keys_are_an_error(tmp_path: Path) -> None:
    _write(tmp_path, {"a.tar": _tar(_samples(0, 4)), "b.tar": _tar(_samples(3, 6))})
    assert "a.tar and b.tar both contain a sample 0003" in _refused(tmp_path)


def test_splits_in_one_folder_are_indexed_separately_and_never_merged(
    convoy_ok: RunText, tmp_path: Path
) -> None:
    train, val = "imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"
    _write(tmp_path, {train: _tar(_samples(0, 8)), val: _tar(_samples(100, 104))})
    assert f"{train} (train), {val} (val)" in _refused(tmp_path)
    assert "8 images" in convoy_ok("index", tmp_path, "--shards", "imagenet1k-train-*.tar")
    index_shards(str(tmp_path), IndexOptions(shards="*validation*"))
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json")) == [
        "train/index.json",
        "val/index.json",
    ]
    assert [(v.samples, v.faults) for v in verify(str(tmp_path), 1)] == [(8, []), (4, [])]
    index, store = open_index(f"{tmp_path}/val")
    assert store.size(index.shards[0].name) == (tmp_path / val).stat().st_size
    for options, reason in (
        (IndexOptions(), "contains indexed splits"),
        (IndexOptions(shards="*.tar"), "never merged"),
        (
            IndexOptions("extra", shards="*train*"),
            f"{train} is a shard of {tmp_path}/train/index.json too",
        ),
        (IndexOptions("../x", shards="*train*"), "--split: '../x' cannot name a folder"),
        (IndexOptions(shards="nothing*"), "matches --shards"),
    ):
        with pytest.raises(UserError) as caught:
            index_shards(str(tmp_path), options)
        assert reason in str(caught.value)


def test_split_in_a_shared_bucket_folder_is_indexed_separately(
    bucket: str, service_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in service_env.items():
        monkeypatch.setenv(name, value)
    url = f"{bucket}/several"
    store = open_store(url)
    for name, first in (("a-train-0.tar", 0), ("a-val-0.tar", 5)):
        store.write(name, _tar(_samples(first, first + 2)))
    assert "shards of several splits" in _refused_at(url)
    split, index = index_shards(url, IndexOptions(shards="*train*"))
    assert (split, index.samples) == (f"{url}/train", 2)
    found, shards = open_index(split)
    assert (found, shards.url) == (index, url)
    assert verify(url, 1)[0].faults == []


@pytest.mark.parametrize(
    "names",
    [
        ["train-000.tar", "val-000.tar"],
        ["train/000.tar", "val/000.tar"],
        ["a_train_0.tar", "a_test_0.tar"],
        ["x.dev.0.tar", "x.train.0.tar"],
        ["train0.tar", "valid0.tar"],
        ["setTrain0.tar", "setEval0.tar"],
        ["shard-0.tar", "shard-holdout-0.tar"],
        ["train.tar", "extra.tar"],
    ],
)
def test_shard_names_of_different_splits_are_an_error(names: list[str], tmp_path: Path) -> None:
    _write(
        tmp_path,
        {name: _tar(_samples(10 * number, 10 * number + 2)) for number, name in enumerate(names)},
    )
    assert "shards of several splits" in _refused(tmp_path)


def test_split_of_ignores_words_that_only_contain_a_split_name() -> None:
    assert [
        split_of(name) for name in ("strain-0.tar", "latest-0.tar", "intervals/0.tar", "0000.tar")
    ] == [None] * 4
    assert split_of("imagenet1k-validation-00.tar") == "val"


def test_gaps_in_shard_numbers_are_found() -> None:
    assert missing_shards([f"s-{n:04d}.tar" for n in (0, 1, 3)]) == ["s-0002.tar"]
    assert missing_shards([f"s-{n:02d}.tar" for n in range(120) if n != 100]) == ["s-100.tar"]
    assert missing_shards([f"s-{n:05d}-of-00004.tar" for n in (0, 1, 2)]) == [
        "s-00003-of-00004.tar"
    ]
    for complete in (
        [f"{n}.tar" for n in range(12)],
        [f"s{n}.tar" for n in (1, 2)],
        ["20240101.tar", "20250101.tar"],
        ["a.tar"],
    ):
        assert missing_shards(complete) == []


def test_unusable_shard_files_are_errors_and_never_skipped(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "a.tar": _tar(_samples(0, 2)),
            "b.tar.zst": b"x",
            "c.tar.part": b"x",
            "d.tgz": b"x",
            "f.tar.sha256": b"x",
        },
    )
    (tmp_path / "e.tar").symlink_to(tmp_path / "missing")
    message = _refused(tmp_path)
    for name, reason in (
        ("b.tar.zst", "is compressed"),
        ("c.tar.part", "unfinished"),
        ("d.tgz", "is compressed"),
        ("e.tar", "dangling"),
    ):
        assert any(name in line and reason in line for line in message.splitlines()), message
    assert "sha256" not in message
    _write(
        tmp_path / "packing", {"train-000000.tar": _tar(_samples(0, 2)), ".pack/plan.json": b"{}"}
    )
    assert "unfinished dataset of `convoy pack`" in _refused(tmp_path / "packing")


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.integers(0, 7), st.booleans(), st.floats(0, 1))
def test_corrupt_shard_is_an_error_or_is_indexed_completely(
    place: float, bit: int, truncate: bool, length: float
) -> None:
    raw = bytearray(_tar(_samples(0, 4)))
    raw[int(place * (len(raw) - 1))] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.tar").write_bytes(raw[: int(length * len(raw))] if truncate else raw)
        try:
            _, index = index_shards(folder, IndexOptions())
        except UserError:
            return
        assert index.shards[0].keys == ["0000", "0001", "0002", "0003"]
        assert open_index(folder)[0] == index
