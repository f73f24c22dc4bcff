"""``convoy pack`` and ``convoy verify`` against webdataset, tarfile, Pillow and the sources."""

import gzip
import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import scipy.io
import webdataset as wds
from PIL import Image
from support.helpers import Run, RunText

from trainer.data.index import Index, open_index
from trainer.data.shards.tar import header


def _with_webdataset(split: Path | str) -> list[dict]:
    urls = sorted(str(p) for p in Path(split).glob("*.tar"))
    return list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))


def _index(split: Path) -> Index:
    return open_index(str(split))[0]


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_webdataset_reads_the_unmodified_image_files(
    convoy_ok: RunText, jpeg_folder: Path, tmp_path: Path
) -> None:
    convoy_ok("pack", jpeg_folder, tmp_path, "--shards", 3)
    samples = _with_webdataset(tmp_path / "train")
    sources = {f"{p.parent.name}/{p.stem}": p for p in jpeg_folder.rglob("*.JPEG")}
    assert {s["__key__"] for s in samples} == set(sources)
    assert len(samples) == len(sources)
    for sample in samples:
        source = sources[sample["__key__"]]
        assert sample["jpg"] == source.read_bytes()
        assert ["china", "flower"][int(sample["cls"])] == source.parent.name


def test_index_has_the_offset_of_each_sample(
    convoy_ok: RunText, jpeg_folder: Path, tmp_path: Path
) -> None:
    convoy_ok("pack", jpeg_folder, tmp_path, "--shards", 4)
    index = _index(tmp_path / "train")
    assert (index.samples, index.classes, len(index.shards)) == (40, ["china", "flower"], 4)
    for shard in index.shards:
        content = (tmp_path / "train" / shard.name).read_bytes()
        assert len(content) == shard.bytes
        assert hashlib.sha256(content).hexdigest() == shard.sha256
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            images = [m for m in tar.getmembers() if not m.name.endswith(".cls")]
        assert [m.offset for m in images] == shard.offsets[:-1]
        assert [m.name.removesuffix(".jpg") for m in images] == shard.keys


def test_packing_is_deterministic_for_any_number_of_workers(
    convoy_ok: RunText, jpeg_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(jpeg_folder, copy)
    for path in copy.rglob("*.JPEG"):
        path.touch()
    convoy_ok("pack", jpeg_folder, tmp_path / "a", "--shards", 3, "--workers", 1)
    convoy_ok("pack", copy, tmp_path / "b", "--shards", 3, "--workers", 2)
    convoy_ok("pack", copy, tmp_path / "c", "--shards", 3, "--seed", 1)
    assert _snapshot(tmp_path / "a") == _snapshot(tmp_path / "b")
    assert _index(tmp_path / "a/train").digest != _index(tmp_path / "c/train").digest


def test_concurrent_parts_give_the_same_bytes_as_one_run(
    convoy_ok: RunText, convoy_refuses: RunText, jpeg_folder: Path, tmp_path: Path
) -> None:
    """The parts are pods of an Indexed Job: they finish in any order, and may run again."""
    convoy_ok("pack", jpeg_folder, tmp_path / "one", "--shards", 7)
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "pack",
        str(jpeg_folder),
        str(tmp_path / "parts"),
        "--shards",
        "7",
    ]
    pods = [
        subprocess.Popen([*command, "--parts", "3", "--part", str(part)], stderr=subprocess.DEVNULL)
        for part in (1, 2)
    ]
    assert [pod.wait(timeout=120) for pod in pods] == [0, 0]
    assert not (tmp_path / "parts/train/index.json").exists()
    for _ in range(2):
        convoy_ok("pack", jpeg_folder, tmp_path / "parts", "--shards", 7, "--parts", 3, "--part", 0)
    assert _snapshot(tmp_path / "parts") == _snapshot(tmp_path / "one")
    overwrite = ["--shards", 7, "--parts", 3, "--overwrite"]
    assert "is not empty" in convoy_refuses("pack", jpeg_folder, tmp_path / "parts", *overwrite)
    assert "--part: 3 must be below" in convoy_refuses(
        "pack", jpeg_folder, tmp_path / "x", "--parts", 3, "--part", 3
    )


def test_samples_are_shuffled_over_shards(digits: Path) -> None:
    labels = [[int(s["cls"]) for s in _with_webdataset(digits / "train")]]
    # 600 digits in 5 shards: each shard holds every class, not sorted by class as in the source
    assert len(set(labels[0][:120])) == 10
    assert sum(a == b for a, b in zip(labels[0], labels[0][1:], strict=False)) < 120


def test_idx_files_become_png_with_the_same_pixels(convoy_ok: RunText, tmp_path: Path) -> None:
    source = tmp_path / "idx"
    source.mkdir()
    random = np.random.default_rng(0)
    pixels = {
        "train": random.integers(0, 256, (50, 9, 7), np.uint8),
        "t10k": random.integers(0, 256, (20, 9, 7), np.uint8),
    }
    labels = {name: random.integers(0, 4, len(p), dtype=np.uint8) for name, p in pixels.items()}
    for name in pixels:
        head = bytes([0, 0, 8, 3]) + np.array(pixels[name].shape, ">i4").tobytes()
        (source / f"{name}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(head + pixels[name].tobytes())
        )
        head = bytes([0, 0, 8, 1]) + np.array([len(labels[name])], ">i4").tobytes()
        (source / f"{name}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(head + labels[name].tobytes())
        )
    names = tmp_path / "names.txt"
    names.write_text("0 T-shirt/top\n1 Ankle boot\n")
    convoy_ok("pack", source, tmp_path / "out", "--shards", 2, "--class-names", names)
    for name, split in (("train", "train"), ("t10k", "val")):
        samples = {s["__key__"]: s for s in _with_webdataset(tmp_path / "out" / split)}
        assert len(samples) == len(pixels[name])
        for i in range(len(samples)):
            sample = samples[f"{name}-{i:06d}"]
            assert np.array_equal(
                np.asarray(Image.open(io.BytesIO(sample["png"]))), pixels[name][i]
            )
            assert int(sample["cls"]) == labels[name][i]
    assert _index(tmp_path / "out/train").classes == ["T-shirt/top", "Ankle boot", "2", "3"]


def _tar(path: Path | None, members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    if path:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


@pytest.fixture
def imagenet(tmp_path: Path, jpeg_folder: Path) -> Path:
    """ILSVRC2012 in its published form, with 3 classes.

    It has tars in a tar, and a devkit whose class numbers are not in the order of the ids.
    """
    root = tmp_path / "imagenet"
    root.mkdir()
    files = sorted(jpeg_folder.rglob("*.JPEG"))
    ids = ["n01440764", "n01443537", "n02119789"]
    classes = {
        f"{identity}.tar": _tar(
            None, {f"{identity}_{i}.JPEG": files[10 * c + i].read_bytes() for i in range(10)}
        )
        for c, identity in enumerate(ids)
    }
    _tar(root / "ILSVRC2012_img_train.tar", classes)
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": files[30 + i].read_bytes() for i in range(6)}
    _tar(root / "ILSVRC2012_img_val.tar", dict(reversed(val.items())))
    # devkit numbers: 1 = fox, 2 = tench, 3 = goldfish, and an inner node as 4
    rows = [
        (1, "n02119789", "kit fox", 0),
        (2, "n01440764", "tench", 0),
        (3, "n01443537", "goldfish", 0),
    ]
    rows.append((4, "n00000001", "animal", 3))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array([tuple(row) for row in rows], dtype=kind)})
    truth = "\n".join(map(str, [2, 3, 1, 1, 2, 3])) + "\n"
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(_tar(None, devkit)))
    return root


def test_imagenet_tars_are_packed_with_the_devkit_labels(
    convoy_ok: RunText, imagenet: Path, tmp_path: Path
) -> None:
    convoy_ok("pack", imagenet, tmp_path / "out", "--shards", 2)
    index = _index(tmp_path / "out/val")
    assert index.class_ids == ["n01440764", "n01443537", "n02119789"]
    assert index.classes == ["tench", "goldfish", "kit fox"]
    labels = {s["__key__"]: int(s["cls"]) for s in _with_webdataset(tmp_path / "out/val")}
    # 2, 3, 1, 1, 2, 3 of the devkit are tench, goldfish, fox, fox, tench, goldfish
    assert [labels[f"ILSVRC2012_val_{i:08d}"] for i in range(1, 7)] == [0, 1, 2, 2, 0, 1]
    with tarfile.open(imagenet / "ILSVRC2012_img_train.tar") as outer:
        for label, identity in enumerate(index.class_ids):
            with tarfile.open(fileobj=outer.extractfile(f"{identity}.tar")) as inner:
                want = {m.name.removesuffix(".JPEG"): inner.extractfile(m).read() for m in inner}
            samples = [
                s for s in _with_webdataset(tmp_path / "out/train") if int(s["cls"]) == label
            ]
            assert {s["__key__"].split("/")[-1]: s["jpg"] for s in samples} == want


def test_imagenet_val_without_the_devkit_is_an_error(
    convoy_refuses: RunText, imagenet: Path, tmp_path: Path
) -> None:
    (imagenet / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert "needs the devkit" in convoy_refuses("pack", imagenet, tmp_path / "out")
    assert not (tmp_path / "out" / "val" / "index.json").exists()


def test_killed_pack_to_object_storage_resumes_and_writes_the_index_last(
    convoy_ok: RunText, jpeg_folder: Path, tmp_path: Path, bucket: str, service_env: dict[str, str]
) -> None:
    import obstore
    from obstore.store import S3Store

    url = f"{bucket}/resume"
    store = S3Store(
        "convoy",
        prefix="resume",
        endpoint=service_env["AWS_ENDPOINT_URL"],
        access_key_id=service_env["AWS_ACCESS_KEY_ID"],
        secret_access_key=service_env["AWS_SECRET_ACCESS_KEY"],
        region="us-east-1",
        client_options={"allow_http": True},
    )
    big = tmp_path / "big"  # enough shards that it is killed before the last one
    for copy in range(6):
        shutil.copytree(jpeg_folder, big / f"c{copy}")
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "pack",
        str(big),
        url,
        "--nested",
        "--shards",
        "240",
        "--workers",
        "1",
    ]
    with subprocess.Popen(
        command,
        env={**service_env, "PATH": "/usr/bin"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as killed:
        deadline = time.monotonic() + 60
        while (
            time.monotonic() < deadline
            and killed.poll() is None
            and not _names(store, obstore, ".tar", 5)
        ):
            time.sleep(0.02)
        workers = psutil.Process(killed.pid).children(recursive=True)
        killed.send_signal(signal.SIGKILL)
    assert workers
    assert not psutil.wait_procs(workers, 20)[1], "its workers exit too"
    written = _names(store, obstore, ".tar")
    assert 5 <= len(written) < 240
    assert not _names(store, obstore, "index.json"), "a partial pack has no index"
    done = _stderr_of_second_run(url, big, service_env)
    assert int(re.search(r"resuming, (\d+) of 240", done)[1]) >= 4  # type: ignore[index]
    convoy_ok("pack", big, tmp_path / "uninterrupted", "--nested", "--shards", 240)
    expected = {p.name: p.read_bytes() for p in (tmp_path / "uninterrupted/train").iterdir()}
    remote = {
        n.split("/")[-1]: obstore.get(store, n).bytes().to_bytes()
        for n in _names(store, obstore, "")
    }
    assert remote == expected, "equals an uninterrupted run, without leftovers"


def _names(store: object, obstore: object, ending: str, at_least: int = 0) -> list[str]:
    names = [m["path"] for part in obstore.list(store) for m in part if m["path"].endswith(ending)]  # type: ignore[attr-defined]
    return names if len(names) >= at_least else []


def _stderr_of_second_run(url: str, source: Path, env: dict[str, str]) -> str:
    from support.helpers import run_convoy

    done = run_convoy("pack", source, url, "--nested", "--shards", 240, env=env)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_packing_again_is_a_no_op_and_other_data_is_an_error(
    convoy: Run, convoy_refuses: RunText, jpeg_folder: Path, digits_folder: Path, tmp_path: Path
) -> None:
    convoy("pack", jpeg_folder, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "train").iterdir()}
    assert "already holds this dataset" in convoy("pack", jpeg_folder, tmp_path).stderr
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "train").iterdir()} == before
    assert "holds another dataset" in convoy_refuses("pack", digits_folder / "train", tmp_path)
    assert convoy("pack", digits_folder / "train", tmp_path, "--overwrite").returncode == 0
    assert _index(tmp_path / "train").samples == 600


def test_files_that_are_not_images_are_errors_unless_skip_bad(
    convoy: Run, convoy_refuses: RunText, jpeg_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(jpeg_folder, source)
    (source / "china" / "notes.txt").write_text("not an image")
    (source / "flower" / "empty.JPEG").touch()
    (source / "flower" / "really-png.JPEG").write_bytes(_png())
    message = convoy_refuses("pack", source, tmp_path / "out")
    assert re.search(r"china/notes.txt: not an image", message)
    assert re.search(r"flower/empty.JPEG: empty", message)
    assert "2 of 43 files cannot be packed; --skip-bad omits them" in message
    assert not list((tmp_path).glob("out/**/*.tar")), "nothing is written"
    done = convoy("pack", source, tmp_path / "out", "--skip-bad")
    assert done.returncode == 0
    assert "china/notes.txt" in done.stderr
    assert "2 of 43 files are omitted" in done.stderr
    png = [s for s in _with_webdataset(tmp_path / "out/train") if "png" in s]
    assert [s["__key__"] for s in png] == ["flower/really-png"], "the extension follows the content"


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (3, 5), 7).save(buffer, "PNG")
    return buffer.getvalue()


def test_empty_class_folder_is_an_error(
    convoy_refuses: RunText, jpeg_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(jpeg_folder, source)
    (source / "nothing").mkdir()
    assert f"{source / 'nothing'}: this class folder is empty" in convoy_refuses(
        "pack", source, tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_file_names_that_collide_in_webdataset_get_unique_keys(
    convoy_ok: RunText, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for name in ("a.b.png", "a_b.png", "ünï.png", "x" * 200 + ".png"):
        (source / "class one").mkdir(parents=True, exist_ok=True)
        (source / "class one" / name).write_bytes(_png())
    convoy_ok("pack", source, tmp_path / "out")
    keys = [s["__key__"] for s in _with_webdataset(tmp_path / "out/train")]
    assert len(keys) == len(set(keys)) == 4


# --- verify ---------------------------------------------------------------------------------------


def test_verify_checks_both_splits(convoy_ok: RunText, digits: Path) -> None:
    report = json.loads(convoy_ok("verify", digits, "--json"))
    assert report["ok"]
    assert [(s["samples"], s["shards"], s["faults"]) for s in report["splits"]] == [
        (600, 5, []),
        (151, 5, []),
    ]


@pytest.mark.parametrize("corruption", ["flip", "truncate", "delete", "label"])
def test_verify_names_a_corrupt_shard(
    convoy_refuses: RunText, digits: Path, tmp_path: Path, corruption: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(digits / "train", copy)
    shard = copy / "train-000003.tar"
    content = bytearray(shard.read_bytes())
    if corruption == "flip":
        content[len(content) // 2] ^= 1
    elif corruption == "truncate":
        content = content[:-512]
    elif corruption == "label":
        start = content.index(b".cls\0") // 512 * 512 + 512  # the label follows its header block
        content[start : start + 1] = b"8" if content[start : start + 1] != b"8" else b"9"
    if corruption == "delete":
        shard.unlink()
    else:
        shard.write_bytes(content)
    message = convoy_refuses("verify", copy)
    assert "train-000003.tar" in message
    assert "train-000002.tar" not in message


def test_modified_or_truncated_index_is_an_error(
    convoy_refuses: RunText, digits: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(digits / "train", copy)
    index = copy / "index.json"
    index.write_text(index.read_text().replace('"samples": 600', '"samples": 599'))
    assert "totals are not the sums" in convoy_refuses("verify", copy)
    index.write_text(index.read_text()[:1000])
    assert "is not JSON" in convoy_refuses("verify", copy)


def test_header_equals_that_of_tarfile() -> None:
    for name, size in (("a/b.jpg", 0), ("x" * 100, 8**11 - 1), ("class/7.cls", 12345)):
        member = tarfile.TarInfo(name)
        member.size = size
        assert header(name, size) == member.tobuf(tarfile.USTAR_FORMAT)
