"""The guide's dataset source, CIFAR-10, against files that are written and read without Convoy."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from guide import follow_guide, run_python
from PIL import Image

CLASSES = ["airplane", "automobile", "bird"]


@pytest.fixture
def cifar10(tmp_path: Path) -> dict[str, tuple[int, np.ndarray]]:
    """Two training files and a test file of random images; returns label and pixels by key."""
    random = np.random.default_rng(0)
    folder, expected = tmp_path / "cifar", {}
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")
    for name, samples in (("data_batch_1", 7), ("data_batch_2", 5), ("test_batch", 4)):
        images = random.integers(0, 256, (samples, 32, 32, 3), np.uint8)
        labels = [i % 3 for i in range(samples)]
        with (folder / f"{name}.bin").open("wb") as file:
            for number, (label, image) in enumerate(zip(labels, images, strict=True)):
                red, green, blue = (image[:, :, channel].tobytes() for channel in range(3))
                file.write(bytes([label]) + red + green + blue)
                expected[f"{name}-{number:05d}"] = (label, image)
    return expected


def test_every_image_of_cifar10_is_packed_unchanged(
    tmp_path: Path, cifar10: dict[str, tuple[int, np.ndarray]]
) -> None:
    tree = tmp_path / "tree"
    follow_guide("add-a-dataset-source", tree)
    convoy = ("-m", "pipelines.cli")
    run_python(tree, *convoy, "pack", tmp_path / "cifar", tmp_path / "packed", "--shards", 2)
    found = {}
    for split, samples in (("train", 12), ("val", 4)):
        run_python(tree, *convoy, "verify", tmp_path / "packed" / split)
        parts: dict[str, dict[str, bytes]] = {}
        for shard in sorted((tmp_path / "packed" / split).glob("*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    content = tar.extractfile(member)
                    assert content is not None
                    parts.setdefault(key, {})[extension] = content.read()
        assert len(parts) == samples
        for key, part in parts.items():
            found[key] = (int(part["cls"]), np.asarray(Image.open(io.BytesIO(part["png"]))))
    assert found.keys() == cifar10.keys()
    for key, (label, image) in cifar10.items():
        assert found[key][0] == label
        assert np.array_equal(found[key][1], image), key

    # a truncated file is named, and other sources are still recognized
    (tmp_path / "cifar/data_batch_2.bin").write_bytes(bytes(100))
    script = (
        "import sys; from pipelines.datasets.sources.list_source import list_source\n"
        "from trainer.errors import UserError\n"
        "try: list_source(sys.argv[1])\n"
        "except UserError as error: print(error)\n"
    )
    assert "data_batch_2.bin: is empty or truncated" in run_python(
        tree, "-c", script, tmp_path / "cifar"
    )
