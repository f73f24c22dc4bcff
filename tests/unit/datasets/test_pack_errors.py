"""``convoy pack`` and ``convoy verify`` on invalid sources and destinations.

Each error is one line, all errors are counted, and nothing is written partially.
"""

import json
import os
import re
import shutil
import signal
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from PIL import Image
from support.helpers import Run, RunText
from support.images import NOT_SUPPORTED, encode, jpeg, pixels, png

from pipelines.datasets import pack as packing
from pipelines.datasets import verify as verifying
from pipelines.datasets.pack import PackOptions, pack
from pipelines.datasets.sources.item import Item
from pipelines.datasets.sources.list_source import read_item
from pipelines.datasets.verify import verify
from trainer.data.index import INDEX_NAME, open_index
from trainer.errors import RetryableError, UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    for name in ("cat", "dog"):
        for number in range(3):
            path = root / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number + (7 if name == "dog" else 0)))
    return root


OPTIONS = PackOptions(workers=1)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace worker processes, which take a second to start, with threads.

    The tests that run the command use processes.
    """
    for module in (packing, verifying):
        monkeypatch.setattr(module, "worker_pool", ThreadPoolExecutor)


def keys(folder: Path) -> set[str]:
    return {key for shard in open_index(str(folder))[0].shards for key in shard.keys}


def test_files_that_cannot_be_packed_are_named_and_counted(
    convoy: Run, convoy_refuses: RunText, source: Path, tmp_path: Path
) -> None:
    for name, (content, _) in NOT_SUPPORTED.items():
        (source / "cat" / f"{name}.jpg").write_bytes(content)
    (source / "cat" / "truncated\n.jpg").write_bytes(jpeg(1)[:-9])
    (source / "dog" / "missing.jpg").symlink_to("/none")
    (source / "dog" / ".DS_Store").write_bytes(b"x")
    (source / "README.md").write_bytes(b"x")
    (source / "front.jpg").write_bytes(jpeg())
    num_bad = len(NOT_SUPPORTED) + 3
    message = convoy_refuses("pack", source, tmp_path / "out", "--workers", 1)
    reasons = {f"{source}/cat/{name}.jpg: ": reason for name, (_, reason) in NOT_SUPPORTED.items()}
    reasons |= {
        f"{source}/cat/truncated\\n.jpg: ": "truncated",
        f"{source}/dog/missing.jpg: ": "/none",
        f"{source}/front.jpg: ": "no class",
    }
    for path, reason in reasons.items():
        assert re.search(
            f"^convoy: {re.escape(path)}.*{re.escape(reason)}", message, re.MULTILINE
        ), path
    assert f"{num_bad} of {num_bad + 6} files cannot be packed; --skip-bad omits them" in message
    assert not (tmp_path / "out").exists()
    done = convoy("pack", source, tmp_path / "out", "--workers", 1, "--skip-bad")
    assert done.returncode == 0, done.stderr
    for path, reason in reasons.items():
        assert re.search(
            f"^convoy: omitted: {re.escape(path)}.*{re.escape(reason)}", done.stderr, re.MULTILINE
        ), path
    assert (
        f"{num_bad + 8} images and other files: 6 to pack, 2 skipped by a rule, {num_bad} omitted"
        in done.stderr
    )
    assert keys(tmp_path / "out/train") == {
        f"{name}/{number}" for name in ("cat", "dog") for number in range(3)
    }
    assert convoy("verify", tmp_path / "out").returncode == 0


@pytest.mark.usefixtures("in_process")
def test_class_without_valid_images_is_an_error_despite_skip_bad(
    source: Path, tmp_path: Path
) -> None:
    for path in (source / "cat").iterdir():
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError) as caught:
        pack(str(source), str(tmp_path / "out"), PackOptions(workers=1, skip_bad=True))
    assert "train: no image of class cat can be packed" in caught.value.faults
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("in_process")
def test_png_without_iend_is_reported_and_checked_by_decoding(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = encode(pixels(1, 40, 30), "PNG")
    (source / "cat/end.png").write_bytes(content[:-12])  # Pillow decodes it completely
    assert (
        Image.open(source / "cat/end.png").convert("RGB").tobytes() == pixels(1, 40, 30).tobytes()
    )
    pack(str(source), str(tmp_path / "one"), PackOptions(workers=1, decode=True))
    assert "IEND" not in capsys.readouterr().err
    (source / "cat/truncated.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cat/truncated.png: cannot be decoded"):
        pack(str(source), str(tmp_path / "two"), PackOptions(workers=1, decode=True))
    capsys.readouterr()
    pack(str(source), str(tmp_path / "three"), OPTIONS)
    doubts = [line for line in capsys.readouterr().err.splitlines() if "IEND" in line]
    assert [
        name in line for name, line in zip(("end", "truncated"), sorted(doubts), strict=True)
    ] == [True, True]
    (report,) = verify(str(tmp_path / "three"), workers=1)
    assert ["cat/truncated" in fault for fault in report.faults] == [True]


@pytest.mark.usefixtures("in_process")
def test_decode_option_finds_the_corruption_that_verify_finds(source: Path, tmp_path: Path) -> None:
    content = bytearray(encode(pixels(1, 300, 200)))
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    (source / "cat/corrupt.png").write_bytes(content)
    pack(str(source), str(tmp_path / "out"), OPTIONS)
    (report,) = verify(str(tmp_path / "out"), workers=1)
    assert len(report.faults) == 1
    assert "cat/corrupt" in report.faults[0]
    with pytest.raises(UserError, match=r"cat/corrupt.png: cannot be decoded") as caught:
        pack(str(source), str(tmp_path / "decoded"), PackOptions(workers=1, decode=True))
    assert len(caught.value.faults) == 2
    assert not (tmp_path / "decoded").exists()


@pytest.mark.usefixtures("in_process")
def test_val_images_that_are_also_in_train_are_reported(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = tmp_path / "both"
    shutil.copytree(source, both / "train")
    shutil.copytree(source, both / "val")
    (both / "val/cat/1.jpg").write_bytes(jpeg(99))
    packed = pack(str(both), str(tmp_path / "out"), OPTIONS)
    assert [index.samples for _, index in packed] == [6, 6]
    assert "warning: 5 of the 6 images of val are in train too" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["grow", "shrink", "touch", "remove"])
def test_file_that_changes_during_packing_is_an_error(source: Path, change: str) -> None:
    path = source / "cat/0.jpg"
    status = path.stat()
    item = Item("cat/0", 0, str(path), 0, status.st_size, "jpg", status.st_mtime_ns)
    assert read_item(item) == path.read_bytes()
    if change == "remove":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes({"grow": content + b"x", "shrink": content[:-1], "touch": content}[change])
        os.utime(path, ns=(0, status.st_mtime_ns + (change != "shrink")))
    with pytest.raises(UserError, match=r"cat/0\.jpg: (was changed while|cannot be read any more)"):
        read_item(item)


def test_killed_worker_is_a_retryable_error(source: Path, tmp_path: Path) -> None:
    """The kernel kills a worker like this if memory runs out."""
    shutil.copytree(source, tmp_path / "copy")
    ended = threading.Event()

    def kill() -> None:
        while not ended.is_set():
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGKILL)
                    return
            time.sleep(0.005)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with pytest.raises(RetryableError, match="a worker process was killed"):
            pack(str(tmp_path / "copy"), str(tmp_path / "out"), OPTIONS)
    finally:
        ended.set()
        thread.join()


# --- destinations ---------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if an image is read; other checks come first."""

    def fail(*_: object) -> None:
        pytest.fail("a worker was started")

    monkeypatch.setattr(packing, "worker_pool", fail)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("destination", "reason"),
    [
        ("{source}", "is in the source"),
        ("{source}/packed", "is in the source"),
        ("{source}/../source/packed", "is in the source"),
        ("file://{source}/packed", "is in the source"),
        ("{root}/link", "is in the source"),
        ("{root}/file", "is a file, not a folder"),
        ("{root}/file/below", "is a file, not a folder"),
        ("{root}/caf\udce9", "is not UTF-8"),
        ("", "DESTINATION is empty"),
    ],
)
def test_invalid_destinations_are_errors_before_any_work(
    source: Path, tmp_path: Path, destination: str, reason: str
) -> None:
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=reason):
        pack(str(source), destination.format(source=source, root=tmp_path), OPTIONS)
    assert sorted(path.name for path in source.iterdir()) == ["cat", "dog"]


@pytest.mark.usefixtures("no_work")
def test_source_inside_a_split_of_the_destination_is_an_error(source: Path, tmp_path: Path) -> None:
    source.rename(tmp_path / "train")
    with pytest.raises(UserError, match="packing writes to train/, which contains the source"):
        pack(str(tmp_path / "train"), str(tmp_path), OPTIONS)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "content", [b"<html>", b"", b"[]", b"7", b'{"resume_digest": 7}', b"\xff\xfe", b'{"x": "y"}']
)
def test_corrupt_plan_is_a_one_line_error(source: Path, tmp_path: Path, content: bytes) -> None:
    records = tmp_path / "out/train/.pack"
    records.mkdir(parents=True)
    (records / "plan.json").write_bytes(content)
    with pytest.raises(
        UserError, match=r"plan\.json: is not the record of an unfinished pack"
    ) as caught:
        pack(str(source), str(tmp_path / "out"), OPTIONS)
    assert len(caught.value.faults) == 1
    assert (records / "plan.json").read_bytes() == content


@pytest.mark.usefixtures("no_work")
def test_third_party_tars_are_never_deleted(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out/train"
    (folder / "backup").mkdir(parents=True)
    for name in ("theirs.tar", "train-000000.tar"):
        (folder / name).write_bytes(b"theirs")
        with pytest.raises(UserError, match=f"{name}, which Convoy did not pack"):
            pack(str(source), str(tmp_path / "out"), OPTIONS)
        with pytest.raises(UserError if name == "theirs.tar" else pytest.fail.Exception):
            pack(str(source), str(tmp_path / "out"), PackOptions(workers=1, overwrite=True))
        assert (folder / name).read_bytes() == b"theirs"
        (folder / name).unlink()
    with pytest.raises(UserError, match="--shards: 7 is more than the 6 images"):
        pack(str(source), str(tmp_path / "out"), PackOptions(workers=1, shards=7))


@pytest.mark.usefixtures("in_process")
def test_overwrite_replaces_only_the_dataset(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out/train"
    pack(str(source), str(tmp_path / "out"), PackOptions(workers=1, shards=3))
    for name in ("notes.txt", "backup/train-000000.tar"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"theirs")
    (folder / INDEX_NAME).write_bytes(b"corrupt")
    with pytest.raises(UserError, match="is not JSON"):
        pack(str(source), str(tmp_path / "out"), OPTIONS)
    pack(str(source), str(tmp_path / "out"), PackOptions(workers=1, shards=2, overwrite=True))
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "notes.txt", "backup/train-000000.tar", "train-000000.tar", "train-000001.tar", INDEX_NAME
    }  # fmt: skip


@pytest.mark.usefixtures("in_process")
def test_shard_with_a_corrupt_record_is_packed_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A crash of the machine can leave a corrupt record.

    The unfinished pack is created by an error when the index is built.
    """
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing.Index, "of", lambda *_: (_ for _ in ()).throw(UserError("stopped")))
        with pytest.raises(UserError, match="stopped"):
            pack(str(source), str(out), PackOptions(workers=1, shards=3))
    (out / "train/.pack/000000.json").write_bytes(b"<html>")
    record = json.loads((out / "train/.pack/000001.json").read_bytes())
    (out / "train/.pack/000001.json").write_text(json.dumps(record | {"keys": ["x", "y"]}))
    pack(str(source), str(out), PackOptions(workers=1, shards=3))
    message = capsys.readouterr().err
    assert ".pack/000000.json: is corrupt" in message
    assert "resuming, 1 of 3 shards" in message
    pack(str(source), str(tmp_path / "fresh"), PackOptions(workers=1, shards=3))
    assert [p.read_bytes() for p in sorted((out / "train").iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "fresh/train").iterdir())
    ]


# --- verify ---------------------------------------------------------------------------------------


def test_verify_prints_a_few_errors_and_lists_all_as_json(
    convoy: Run, convoy_refuses: RunText, tmp_path: Path
) -> None:
    from pipelines.datasets.index_shards import IndexOptions, index_shards

    folder = tmp_path / "theirs"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(12):
                for extension, content in (
                    ("jpg", jpeg()[: -9 if number else None]),
                    ("cls", b"0"),
                ):
                    (tmp_path / "member").write_bytes(content)
                    archive.add(tmp_path / "member", f"{shard}-{number}.{extension}")
    index_shards(str(folder), IndexOptions(workers=1))
    lines = convoy_refuses("verify", folder, "--workers", 1).strip().splitlines()
    assert len(lines) <= 12
    assert "truncated: the end-of-image marker is missing" in lines[-2]
    assert "23 more errors" in lines[-1]
    report = json.loads(convoy("verify", folder, "--workers", 1, "--json").stdout)
    assert len(report["splits"][0]["faults"]) == 33


@pytest.mark.usefixtures("in_process")
def test_verify_accepts_what_pack_accepts(source: Path, tmp_path: Path) -> None:
    (source / "cat/trailing.jpg").write_bytes(jpeg(3) + b"\0" * 900)
    (source / "cat/really-a.jpg").write_bytes(png())
    pack(str(source), str(tmp_path / "out"), OPTIONS)
    assert [report.faults for report in verify(str(tmp_path / "out"), workers=1)] == [[]]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("spelling", ["FILE://{}", "file://localhost{}", "~/{.name}"])
def test_existing_dataset_is_found_for_every_spelling_of_the_destination(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    pack(str(source), str(out), OPTIONS)
    before = keys(out / "train")
    (source / "cat" / "new.jpg").write_bytes(jpeg(99))
    with pytest.raises(UserError, match="holds another dataset of 6 images"):
        pack(str(source), spelling.format(out), OPTIONS)
    assert keys(out / "train") == before
    with pytest.raises(UserError, match="is in the source"):
        pack(str(tmp_path), spelling.format(out), OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
