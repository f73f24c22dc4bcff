"""Shards that others wrote get an index in place, after which every command reads them."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from helpers import Run
from PIL import Image

from pipelines.adopt import index_shards
from pipelines.verify import verify
from trainer.data.index import open_index
from trainer.data.reader import read_samples
from trainer.data.shard import encoded_image, label_of
from trainer.errors import UserError

LONG = "folder.with.dots/" + "a_long_name_" * 12  # longer than a plain header takes


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _by_webdataset(folder: Path) -> None:
    with wds.ShardWriter(str(folder / "set-%04d.tar"), maxcount=7, verbose=0) as sink:
        for number in range(20):
            sink.write({"__key__": f"{number:03d}", "png": _png(number), "cls": number % 4, "json": {"number": number}})


def _by_tarfile(folder: Path, form: int) -> None:
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w", format=form) as tar:
            for number in range(shard * 10, shard * 10 + 10):
                for extension, content in (("CLS", f"{number % 4}\n".encode()), ("PNG", _png(number)), ("seg.txt", b"x")):
                    info = tarfile.TarInfo(f"{LONG}{number}.{extension}")
                    info.size, info.mtime = len(content), 1.5 + number
                    tar.addfile(info, io.BytesIO(content))


def _by_tar(folder: Path) -> None:
    """GNU tar of a folder, with its entries for folders."""
    for shard in range(2):
        files = folder / f"files{shard}" / "deep"
        files.mkdir(parents=True)
        for number in range(shard * 10, shard * 10 + 10):
            (files / f"{number}.png").write_bytes(_png(number))
            (files / f"{number}.cls").write_text(str(number % 4))
        subprocess.run(["tar", "--sort=name", "-cf", folder / f"{shard}.tar", "-C", folder / f"files{shard}", "."], check=True)


WRITERS = {
    "webdataset": _by_webdataset,
    "pax": lambda folder: _by_tarfile(folder, tarfile.PAX_FORMAT),
    "gnu": lambda folder: _by_tarfile(folder, tarfile.GNU_FORMAT),
    "tar": _by_tar,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_sample_is_found_where_it_stands(writer: str, tmp_path: Path) -> None:
    """Against what webdataset reads from the same files."""
    WRITERS[writer](tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    made = index_shards(str(tmp_path), "train", None, 1, False)
    assert (made.samples, made.classes, made.split) == (20, ["0", "1", "2", "3"], "train")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before, "in place"
    index, store = open_index(str(tmp_path))
    theirs = [
        s for path in sorted(tmp_path.glob("*.tar")) for s in wds.WebDataset(str(path), shardshuffle=False, empty_check=False)
    ]
    assert [key for shard in index.shards for key in shard.keys] == [sample["__key__"] for sample in theirs]
    for number in range(20):  # each alone, so that its own stretch is all that is read
        (sample,) = read_samples(np.array([number]), index, store).values()
        assert bytes(encoded_image(sample)) == theirs[number]["png"]
        assert label_of(sample, 4) == int(theirs[number]["cls"])
    (verdict,) = verify(str(tmp_path), 1)
    assert (verdict.samples, verdict.faults) == (20, [])


def test_our_own_shards_get_the_offsets_that_pack_wrote(convoy_ok: Run, digits: Path, tmp_path: Path) -> None:
    index, _ = open_index(str(digits / "train"))
    for shard in index.shards:
        (tmp_path / shard.name).write_bytes((digits / "train" / shard.name).read_bytes())
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{name}\n" for name in index.classes))
    assert f"{index.samples} images of 10 classes" in convoy_ok("index", tmp_path, "--class-names", names)
    lines = convoy_ok("order", tmp_path, "--epoch", 0, "--world-size", 1, "--rank", 0, "--batch-size", 50, "--json").splitlines()
    assert sorted(k for line in lines for k in json.loads(line)["keys"]) == sorted(k for shard in index.shards for k in shard.keys)
    ours, _ = open_index(str(tmp_path))
    assert (ours.shards, ours.classes, ours.split) == (index.shards, index.classes, tmp_path.name)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _refused(folder: Path, class_names: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        index_shards(str(folder), None, class_names, 1, False)
    return str(caught.value)


def test_what_is_no_set_of_samples_is_refused(tmp_path: Path) -> None:
    assert "no .tar stands there" in _refused(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    assert "a.tar.gz: is compressed" in _refused(tmp_path)
    (tmp_path / "a.tar.gz").unlink()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        _add(tar, "1.png", _png(1))
        _add(tar, "2.png", _png(2))
        _add(tar, "1.cls", b"0")
        _add(tar, "3.png", _png(3))
        _add(tar, "3.cls", b"dog")
    told = _refused(tmp_path)
    assert "a.tar: sample 1: an image and its label (.cls) are needed, but there is: png" in told
    assert "sample 1: its members do not stand together" in told
    assert "sample 3: its label b'dog' is no class number" in told
    (tmp_path / "a.tar").write_bytes(b"not a tar at all" * 100)
    assert "a.tar: is no tar, or is cut" in _refused(tmp_path)
    _by_webdataset(tmp_path)
    (tmp_path / "a.tar").write_bytes((tmp_path / "set-0000.tar").read_bytes()[:2000])
    assert "a.tar: is no tar, or is cut" in _refused(tmp_path)
    (tmp_path / "a.tar").unlink()
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    assert "has 2 lines, but there are labels up to 3" in _refused(tmp_path, str(tmp_path / "names.txt"))
    assert not (tmp_path / "index.json").exists(), "nothing half-written"


def test_an_index_that_says_something_else_stays(convoy_ok: Run, convoy_refuses: Run, tmp_path: Path) -> None:
    _by_webdataset(tmp_path)
    index_shards(str(tmp_path), None, None, 1, False)
    index_shards(str(tmp_path), None, None, 1, False)  # a second time changes nothing
    (tmp_path / "set-0001.tar").unlink()
    assert "--overwrite replaces it" in convoy_refuses("index", tmp_path)
    assert "13 images" in convoy_ok("index", tmp_path, "--overwrite")
