"""Sources: every file is packed, rejected or skipped by a rule, and splits are never classes."""

import gzip
import io
import os
import shutil
import socket
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.images import DDS, jpeg, png

from pipelines.datasets.sources.check_images import check_items
from pipelines.datasets.sources.item import Source, Split
from pipelines.datasets.sources.layout import Layout, split_kind
from pipelines.datasets.sources.list_source import ListOptions, list_source, read_item
from trainer.errors import UserError

PNG = png()
Content = bytes | str | Callable[[str], None] | None
"""Bytes of a file, target of a link, function that creates the file, or None for a folder."""


def make_tree(root: Path, files: dict[str, Content]) -> Path:
    for name, content in files.items():
        path = os.path.join(root, name)
        if content is None:
            os.makedirs(path, exist_ok=True)
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if isinstance(content, str):
            os.symlink(content, path)
        elif isinstance(content, bytes):
            with open(path, "wb") as file:
                file.write(content)
        else:
            content(path)
    return root


def classes(*folders: str) -> dict[str, Content]:
    return {
        os.path.join(folder, name): PNG for folder in folders for name in ("cat/1.png", "dog/2.png")
    }


def listed(root: Path, layout: Layout = "auto", nested: bool = False) -> Source:
    return list_source(str(root), ListOptions(layout=layout, nested=nested))


def refused(root: Path, layout: Layout = "auto", nested: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        listed(root, layout, nested)
    for line in caught.value.faults:
        assert str(root) in line or "TRUTH" in line or "ground_truth" in line, line
        assert line.isprintable(), repr(line)
    return str(caught.value)


def paths(split: Split) -> set[str]:
    return {item.path for item in split.items}


# --- splits and classes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "val"),
        ("Training", "Testing"),
        ("TRAIN", "Valid"),
        ("training_set", "test_set"),
        ("trainset", "validationset"),
        ("seg_train", "seg_test"),
        ("train2017", "val2017"),
        ("train_images", "dev"),
        ("trainData", "EvalData"),
    ],
)
def test_common_names_of_split_folders_are_recognized(tmp_path: Path, train: str, val: str) -> None:
    source = listed(make_tree(tmp_path, classes(train, val)))
    assert [(split.name, split.class_ids) for split in source.splits] == [
        ("train", ["cat", "dog"]),
        ("val", ["cat", "dog"]),
    ]
    assert [paths(split) for split in source.splits] == [
        {f"{tmp_path}/{folder}/cat/1.png", f"{tmp_path}/{folder}/dog/2.png"}
        for folder in (train, val)
    ]


@pytest.mark.parametrize(
    "name", ["trainer", "testament", "cat", "evaluator", "n01440764", "train_test", "trainval", "0"]
)
def test_other_names_are_not_splits(name: str) -> None:
    assert split_kind(name) is None


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (classes("train", "Training"), "are the same split"),
        (classes("train", "val", "validation"), "are the same split"),
        (classes("train_1", "train_2"), "are the same split"),
        (classes("test"), "no train folder"),
        (classes("valid", "test"), "no train folder"),
        (classes("trainval", "test"), "no train folder"),
        (classes("train", "extra"), "ambiguous"),
        (classes("train", "val", "archive/train"), "ambiguous"),
        (classes("archive"), "name {root}/archive as the source"),
        (classes("archive/train", "archive/val"), "name {root}/archive as the source"),
        (classes("fold1", "fold2"), "which would become one class"),
        (
            {"cat/train/1.png": PNG, "cat/test/2.png": PNG, "dog/train/1.png": PNG},
            "split's folder within",
        ),
        ({"cat/1.png": PNG, "dog/1.png": PNG, "dog/Testing/2.png": PNG}, "split's folder within"),
        ({"train/1.png": PNG, "test/2.png": PNG}, "no class folders"),
        (classes("train") | {"test/1.png": PNG}, "no class folders"),
        (classes("train") | {"val": None}, "no class folders"),
        ({"bus/1.png": PNG, "car/1.png": PNG, "train/1.png": PNG}, "--layout classes"),
        ({"1.png": PNG, "2.png": PNG}, "no class folders"),
        ({"images/1.png": PNG, "labels.csv": b"x"}, "list of images without classes"),
        ({"train/images/1.png": PNG, "val/images/1.png": PNG}, "list of images without classes"),
        ({"images/train/1.png": PNG, "labels/train/1.txt": b"x"}, "split's folder within"),
        (classes(".") | {"train-images-idx3-ubyte": b"x"}, "train-images-idx3-ubyte"),
        (
            {"cat/1.png": PNG, "dog/1.png": "/none", "dog/2.png": "/none"},
            "dog/2.png: is a link to /none",
        ),
        ({}, "no class folders"),
        (classes(".") | {"owl": None}, "this class folder is empty"),
        (
            classes("train") | {"val/cat/1.png": PNG, "val/Dog/1.png": PNG},
            "it contains 'dog', which is spelled differently",
        ),
        (classes("train") | {"val/images/1.png": PNG}, "not in {root}/train"),
    ],
)
def test_ambiguous_sources_are_errors(
    tmp_path: Path, files: dict[str, Content], reason: str
) -> None:
    assert reason.format(root=tmp_path) in refused(make_tree(tmp_path, files))


def test_options_resolve_ambiguous_sources(tmp_path: Path) -> None:
    vehicles = make_tree(
        tmp_path / "vehicles", {f"{name}/1.png": PNG for name in ("bus", "car", "train")}
    )
    assert listed(vehicles, layout="classes").splits[0].class_ids == ["bus", "car", "train"]
    kaggle = make_tree(
        tmp_path / "kaggle", classes("train", "extra") | {"test/1.jpg": PNG, "labels.csv": b"x"}
    )
    source = listed(kaggle, layout="splits")
    assert [split.name for split in source.splits] == ["train"]
    assert source.account.num_skipped == 4
    animals = make_tree(
        tmp_path / "animals",
        {"animal/cat/1.png": PNG, "animal/dog/1.png": PNG, "car/red/1.png": PNG},
    )
    (split,) = listed(animals, nested=True).splits
    assert split.class_ids == ["animal", "car"]
    assert [item.key for item in split.items] == ["animal/1", "animal/1-2", "car/1"]
    assert "--layout splits" in refused(animals, layout="splits")


def test_test_split_next_to_val_is_skipped_and_counted(tmp_path: Path) -> None:
    source = listed(
        make_tree(tmp_path, classes("train", "val", "test") | {"README": b"", "docs/a.md": b""})
    )
    assert [split.name for split in source.splits] == ["train", "val"]
    assert source.account.skipped == {
        "next to the split folders": [f"{tmp_path}/README"],
        "in folders next to the splits": [f"{tmp_path}/docs/a.md"],
        "a test split; val is packed as val": [
            f"{tmp_path}/test/cat/1.png",
            f"{tmp_path}/test/dog/2.png",
        ],
    }


def test_images_folder_in_each_class_is_not_a_class_level(tmp_path: Path) -> None:
    tiny = {f"train/n0{c}/images/{i}.JPEG": PNG for c in "12" for i in "34"} | {
        "train/n01/n01_boxes.txt": b"x"
    }
    (split,) = listed(make_tree(tmp_path, tiny)).splits
    assert split.class_ids == ["n01", "n02"]
    assert [item.key for item in split.items][:2] == ["n01/3", "n01/4"]


def test_val_has_the_labels_of_train_if_classes_are_missing(tmp_path: Path) -> None:
    source = listed(
        make_tree(tmp_path, classes("train") | {"train/ant/1.png": PNG, "val/dog/1.png": PNG})
    )
    assert [item.label for item in source.splits[1].items] == [2]
    assert "val has no images of 2 of the 3 classes: ant, cat" in source.account.notes


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([os.fsdecode(b"caf\xe9")], "caf\\xe9: the name of this class is not UTF-8"),
        (["a\nb"], "a\\nb: the name of this class contains a control character"),
        (["a\tb"], "control character"),
        (["a\u2028b"], "control character"),
        (["caf\u00e9", "cafe\u0301"], "differ only by spaces or Unicode normalization"),
        (["cat", "cat "], "differ only by spaces or Unicode normalization"),
    ],
)
def test_invalid_or_ambiguous_class_names_are_errors(
    tmp_path: Path, names: list[str], reason: str
) -> None:
    assert reason in refused(make_tree(tmp_path, {f"{name}/1.png": PNG for name in names}))


def test_class_names_that_differ_only_by_case_are_reported(tmp_path: Path) -> None:
    source = listed(make_tree(tmp_path, {"Cat/1.png": PNG, "cat/1.png": PNG}))
    assert source.splits[0].class_ids == ["Cat", "cat"]
    assert any("differ only by case" in note for note in source.account.notes)


def test_files_with_unusual_names_are_packed(tmp_path: Path) -> None:
    names = [
        os.fsdecode(b"caf\xe9.png"),
        "a\nb.png",
        "-rf.png",
        "a.b.c.png",
        "猫.PNG",
        " .png",
        "a'\"$`b.png",
        "noextension",
    ]
    (split,) = listed(make_tree(tmp_path, {f"cat/{name}": PNG for name in names})).splits
    assert paths(split) == {f"{tmp_path}/cat/{name}" for name in names}
    assert [result.fault for result in check_items(split.items, decode=True)] == [""] * len(names)
    assert all(read_item(item) == PNG and item.source.isprintable() for item in split.items)


def test_items_do_not_depend_on_the_listing_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_tree(
        tmp_path, {f"cat/{'x' * 50}{i}{'y' * 30}.png": PNG for i in range(20)} | classes(".")
    )
    expected = listed(root).splits[0].items
    scandir = os.scandir

    @contextmanager
    def reversed_scandir(folder: str) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(folder) as entries:
            yield list(entries)[::-1]

    monkeypatch.setattr("pipelines.datasets.sources.walk.os.scandir", reversed_scandir)
    monkeypatch.setattr(
        "pipelines.datasets.sources.list_source.check_root", lambda source: Path(source)
    )
    assert listed(root).splits[0].items == expected


# --- links, special files, permissions ------------------------------------------------------------


def test_links_are_followed_and_broken_links_are_rejected(tmp_path: Path) -> None:
    outside = make_tree(tmp_path / "outside", {"9.png": PNG, "owl/1.png": PNG})
    root = make_tree(
        tmp_path / "source",
        classes(".")
        | {
            "cat/9.png": str(outside / "9.png"),
            "owl": "../outside/owl",
            "cat/broken.png": "/none/1.png",
            "cat/me": "me",
        },
    )
    source = listed(root)
    assert source.splits[0].class_ids == ["cat", "dog", "owl"]
    assert paths(source.splits[0]) == {
        f"{root}/{name}" for name in ("cat/1.png", "cat/9.png", "dog/2.png", "owl/1.png")
    }
    assert source.account.rejected == [
        f"{root}/cat/broken.png: is a link to /none/1.png, which does not exist",
        f"{root}/cat/me: is a link that leads back to itself",
    ]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"owl": "/none/owl"}, "owl: is a link to /none/owl, which does not exist"),
        ({"owl": "owl"}, "owl: is a link that leads back to itself"),
        ({"cat/loop": "."}, "cat/loop: is the same folder as"),
        ({"cat/loop": ".."}, "cat/loop: is the same folder as"),
        ({"kitty": "cat"}, "kitty: is the same folder as"),
        ({"dog/cats": "../cat"}, "dog/cats: is the same folder as"),
    ],
)
def test_broken_or_repeated_folder_links_are_errors(
    tmp_path: Path, files: dict[str, Content], reason: str
) -> None:
    assert reason in refused(make_tree(tmp_path, classes(".") | files), nested=True)


def test_broken_link_named_like_a_split_is_an_error(tmp_path: Path) -> None:
    assert "val: is a link to /none, which does not exist" in refused(
        make_tree(tmp_path, classes("train") | {"val": "/none"})
    )


def test_pipes_sockets_and_devices_are_rejected_and_never_opened(tmp_path: Path) -> None:
    def make_socket(path: str) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)

    root = make_tree(
        tmp_path,
        classes(".") | {"cat/p.png": os.mkfifo, "cat/s.png": make_socket, "cat/n.png": "/dev/zero"},
    )
    assert [line.removeprefix(f"{root}/cat/") for line in listed(root).account.rejected] == [
        "n.png: is a device, not a file",
        "p.png: is a named pipe, not a file",
        "s.png: is a socket, not a file",
    ]


@contextmanager
def without_privileges() -> Iterator[None]:
    """Runs as the user nobody if the tests run as root, who can read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def readable_by_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for other users too; pytest's are readable only by their owner."""
    folder = (
        Path(os.path.realpath(os.environ.get("TMPDIR", "/tmp")))
        / f"{tmp_path_factory.mktemp('x').name}-{os.getpid()}"
    )
    folder.mkdir(mode=0o755)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def test_unreadable_folders_are_errors_and_unreadable_files_are_rejected(
    readable_by_all: Path,
) -> None:
    nested = classes(".") | {"cat/deep/3.png": PNG}
    for folder, files in {
        "cat": classes("."),
        "cat/deep": nested,
        "train": classes("train", "val"),
        "val": classes("train", "val"),
        "train/cat": classes("train"),
        "extra": classes("train", "extra"),
    }.items():
        root = make_tree(readable_by_all / folder.replace("/", "-"), files)
        (root / folder).chmod(0)
        with without_privileges():
            assert (
                "extra" in refused(root)
                if folder == "extra"
                else f"{root / folder}: cannot be listed" in refused(root)
            )
    root = make_tree(readable_by_all / "file", classes("."))
    (root / "cat/1.png").chmod(0)
    items = listed(root).splits[0].items
    with without_privileges():
        assert [result.fault for result in check_items(items, decode=False)] == [
            "Permission denied",
            "",
        ]
        with pytest.raises(UserError, match="Permission denied"):
            read_item(items[0])
    (root).chmod(0)
    with without_privileges():
        assert "cannot be listed: Permission denied" in refused(root)


# --- the account, against an independent walk -----------------------------------------------------

_FILES: dict[str, bytes] = {
    "a.png": PNG,
    "b.jpg": jpeg(),
    "B.JPG": jpeg(1),
    "wrong.jpg": png(3),
    "truncated.jpg": jpeg(2)[:-40],
    "truncated.png": png(4)[:-30],
    "t.dds": DDS,
    "notes.txt": b"notes",
    "empty.png": b"",
    ".hidden.png": PNG,
    "._a.png": b"\0\5\x16\7",
    "Thumbs.db": b"x",
    "página.gif": Image.new("L", (3, 3)).tobytes(),
    "a.b.png": png(5),
}
_FOLDERS = ["cat", "dog", "cat/deep", "dog/deep/er", "cat/.git", "__MACOSX/cat", "", "猫"]


@settings(max_examples=60, deadline=None)
@given(
    st.sets(
        st.tuples(st.sampled_from(_FOLDERS), st.sampled_from(sorted(_FILES))),
        min_size=1,
        max_size=25,
    )
)
def test_every_file_is_packed_skipped_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, chosen: set[tuple[str, str]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    make_tree(root, {os.path.join(folder, name): _FILES[name] for folder, name in chosen})
    files = {os.path.join(path, name) for path, _, names in os.walk(root) for name in names}
    try:
        source = listed(root, layout="classes", nested=True)
    except UserError as error:
        tops = {p.name for p in root.iterdir() if p.is_dir() and p.name[0] not in "._"}
        visible = {
            top
            for top in tops
            for f in files
            if f.startswith(f"{root}/{top}/") and not _is_skipped(f, root)
        }
        assert tops != visible or not tops, error  # noqa: PT017
        return
    (split,) = source.splits
    results = check_items(split.items, decode=True)
    packed = {
        item.path: item
        for item, result in zip(split.items, results, strict=True)
        if not result.fault
    }
    rejected = {
        item.path for item, result in zip(split.items, results, strict=True) if result.fault
    }
    rejected |= {line.partition(": ")[0] for line in source.account.rejected}
    skipped = [path for of_rule in source.account.skipped.values() for path in of_rule]
    assert len(packed) + len(rejected) + len(skipped) == len(files)
    assert set(packed) | rejected | set(skipped) == files
    assert len({item.key for item in split.items}) == len(split.items)
    for path in files - set(skipped):
        parts = Path(path).relative_to(root).parts
        assert (path in packed) == (len(parts) > 1 and _decodes(path)), path
        if path in packed:
            assert split.class_ids[packed[path].label] == parts[0]


def _is_skipped(path: str, root: Path) -> bool:
    parts = Path(path).relative_to(root).parts
    return (
        parts[0] == "__MACOSX"
        or parts[-1] == "Thumbs.db"
        or any(part.startswith(".") for part in parts)
    )


def _decodes(path: str) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception:
        return False
    return "truncated" not in path  # Pillow accepts a PNG without its end


# --- ImageNet's tars ------------------------------------------------------------------------------


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def class_tars(classes: dict[str, list[str]]) -> bytes:
    return tar(
        {
            f"{name}.tar": tar({n: png(i) for i, n in enumerate(names)})
            for name, names in classes.items()
        }
    )


THREE = class_tars({f"n0{c}": [f"n0{c}_{i}.JPEG" for i in range(4)] for c in (1, 2, 3)})


def write_train(root: Path, content: bytes) -> Path:
    root.mkdir(exist_ok=True)
    (root / "ILSVRC2012_img_train.tar").write_bytes(content)
    return root


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_corrupt_imagenet_tar_is_an_error_or_every_image_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    headers = [i for i in range(0, len(THREE), 512) if THREE[i + 257 : i + 262] == b"ustar"]
    content = bytearray(THREE)
    at = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 511))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        content = bytearray(THREE[: data.draw(st.integers(0, len(THREE) - 1))])
    root = write_train(tmp_path_factory.mktemp("imagenet"), bytes(content))
    try:
        (split,) = listed(root).splits
    except UserError as error:
        assert "ILSVRC2012_img_train.tar" in str(error)  # noqa: PT017
        return
    assert split.class_ids == ["n01", "n02", "n03"]
    assert [read_item(item) for item in split.items] == [png(i) for _ in range(3) for i in range(4)]


@pytest.mark.parametrize(
    ("members", "keys"),
    [
        ({"cat": ["0.JPEG"], "dog": ["1.JPEG"]}, ["0", "1"]),
        ({"cat": ["0.JPEG"], "dog": ["0.JPEG"]}, ["cat/0", "dog/0"]),
        (
            {"cat": ["a.v1.JPEG", "x" * 110 + ".JPEG"], "dog": ["猫.JPEG"]},
            ["a_v1", "x" * 18 + "__" + "x" * 20, "_"],
        ),
        ({"cat": ["sub/0.JPEG", "0.JPEG"]}, ["cat/0", "cat/0-2"]),
    ],
)
def test_names_in_imagenet_tars_become_unique_keys(
    tmp_path: Path, members: dict[str, list[str]], keys: list[str]
) -> None:
    assert [
        item.key for item in listed(write_train(tmp_path, class_tars(members))).splits[0].items
    ] == keys


def test_ambiguous_or_incomplete_imagenet_sources_are_errors(tmp_path: Path) -> None:
    for name in ("train", "cats"):
        root = make_tree(write_train(tmp_path / f"both-{name}", THREE), classes(name))
        assert f"{root / name}: contains images" in refused(root)
    inner = tar({"1.JPEG": PNG})
    assert "more than once" in refused(
        write_train(tmp_path / "a", tar({"x/n01.tar": inner, "y/n01.tar": inner}))
    )
    twice = inner[: len(PNG) // 512 * 512 + 1024] + inner  # two images with the same name
    assert "contains 1.JPEG more than once" in refused(
        write_train(tmp_path / "f", tar({"n01.tar": twice}))
    )
    assert "contains no images" in refused(write_train(tmp_path / "b", tar({"n01.tar": tar({})})))
    assert "n02.tar is not a tar archive" in refused(
        write_train(tmp_path / "c", tar({"n01.tar": inner, "n02.tar": inner[512:]}))
    ).replace(": is", " is")
    assert "is not a class's tar" in refused(write_train(tmp_path / "d", inner))
    devkit = write_train(tmp_path / "e", THREE)
    (devkit / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(
        gzip.compress(tar({"x": bytes(9000)}))[:-20]
    )
    assert "ILSVRC2012_devkit_t12.tar.gz: cannot be read" in refused(devkit)


def test_other_files_next_to_imagenet_tars_are_counted(tmp_path: Path) -> None:
    root = make_tree(
        write_train(tmp_path, THREE), {"checksums.md5": b"", "boxes/a.xml": b"", ".DS_Store": b""}
    )
    assert listed(root).account.num_skipped == 3


# --- idx files ------------------------------------------------------------------------------------


def write_idx(
    root: Path, kind: str, shape: tuple[int, ...], content: bytes, name: str = "train"
) -> None:
    root.mkdir(exist_ok=True)
    head = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
    (root / f"{name}-{kind}-idx{len(shape)}-ubyte.gz").write_bytes(gzip.compress(head + content))


@pytest.mark.parametrize(
    ("images", "labels", "reason"),
    [
        (((3, 2, 2), bytes(12)), ((2,), bytes(2)), "has 2 labels for 3 images"),
        (((3, 2, 2), bytes(11)), ((3,), bytes(3)), "12 bytes of data, but it has 11"),
        (((3, 2, 2), bytes(13)), ((3,), bytes(3)), "12 bytes of data, but it has 13"),
        (((0, 2, 2), b""), ((0,), b""), "holds no pixels"),
        (((3, 0, 2), b""), ((3,), bytes(3)), "holds no pixels"),
        (((2**31 - 1, 2**31 - 1, 2**31 - 1), b""), ((3,), bytes(3)), "bytes of data, but it has 0"),
    ],
)
def test_inconsistent_idx_files_are_errors(
    tmp_path: Path,
    images: tuple[tuple[int, ...], bytes],
    labels: tuple[tuple[int, ...], bytes],
    reason: str,
) -> None:
    write_idx(tmp_path, "images", *images)
    write_idx(tmp_path, "labels", *labels)
    assert reason in refused(tmp_path)


def test_corrupt_idx_files_are_errors(tmp_path: Path) -> None:
    write_idx(tmp_path, "images", (3, 2, 2), bytes(12))
    write_idx(tmp_path, "labels", (3,), bytes(3))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    good = path.read_bytes()
    for content in (
        good[:-9],
        good[:9],
        good[:20] + b"\xff\xff" + good[22:],
        b"<html>",
        b"",
        gzip.compress(b"\0\0\x0d\3"),
    ):
        path.write_bytes(content)
        assert str(path) in refused(tmp_path)
    path.write_bytes(good)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"the same, unpacked")
    source = listed(tmp_path)
    assert (len(source.splits[0].items), source.account.num_skipped) == (3, 1)


def test_class_folders_are_found_below_a_path_named_like_an_idx_file(tmp_path: Path) -> None:
    (split,) = listed(make_tree(tmp_path / "my-idx3-ubyte-set", classes("."))).splits
    assert [read_item(item) for item in split.items] == [PNG, PNG]
