"""Measures the memory of a loader over many epochs, and the time to a large dataset's first batch.

    python benchmarks/epochs.py [--epochs 20] [--images 2000] [--json FILE] [--plot FILE.png]

The loader reads JPEGs from disk as in training, with a new loader for each epoch; the resident
memory after each epoch is reported. Then an index of 1,281 shards of 1,000 samples, the size of
ImageNet, is opened without the shards: time and memory are measured from opening it to the list of
reads for the first batch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from pack import make_images
from ranks import status

from trainer.config.schema import RunConfig
from trainer.data.index import INDEX_NAME, Index, Shard, open_index
from trainer.data.loader import train_loader
from trainer.data.sampler import epoch_order, micro_batch_slots


def config_of(train: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": "resnet50"},
            "data": {"train": str(train), "workers": 2},
            "batch": {"global_size": 64},
            "train": {"max_steps": 1},
        }
    )


def epochs(count: int, images: int) -> list[dict[str, float]]:
    """Resident MiB and images per second after each epoch."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "images", images)
        command = [
            sys.executable,
            "-m",
            "pipelines.cli",
            "pack",
            f"{folder}/images",
            f"{folder}/shards",
            "--shards",
            "8",
        ]
        subprocess.run(command, check=True, capture_output=True)
        train = Path(folder) / "shards" / "train"
        index, store = open_index(str(train))
        config = config_of(train)
        for epoch in range(count):
            started = time.perf_counter()
            seen = sum(
                len(batch.keys) for batch in train_loader(config, index, store, epoch, 1, 0, 1)
            )
            memory = status("VmRSS") / 2**20
            rows.append(
                {
                    "epoch": epoch + 1,
                    "mib": memory,
                    "images_per_second": seen / (time.perf_counter() - started),
                }
            )
            print(
                f"epoch {epoch + 1:3}  {memory:7.1f} MiB  {rows[-1]['images_per_second']:7,.0f} "
                "images/s",
                flush=True,
            )
    return rows


def write_large_index(folder: Path, shards: int, samples: int) -> None:
    """Write an index of JPEGs of 50 to 160 KB with keys like ImageNet's."""
    random = np.random.default_rng(0)
    entries = []
    for number in range(shards):
        offsets = [0, *np.cumsum(random.integers(100, 320, samples) * 512).tolist()]
        keys = [
            f"n{i:08d}/n{i:08d}_{number * samples + i}"
            for i in random.integers(0, 10**7, samples).tolist()
        ]
        entries.append(
            Shard(
                name=f"train-{number:06d}.tar",
                samples=samples,
                sha256="0" * 64,
                bytes=offsets[-1] + 10240,
                offsets=offsets,
                keys=keys,
            )
        )
    names = [f"class {i}" for i in range(1000)]
    (folder / INDEX_NAME).write_bytes(Index.of("train", names, names, entries).to_json())


def first_batch(folder: str) -> None:
    """Print seconds and MiB until the reads for the first batch of rank 3 of 8 are known."""
    before = status("VmRSS")
    started = time.perf_counter()
    index, _ = open_index(folder)
    opened = time.perf_counter() - started
    order = epoch_order(index.sizes, 0, 0, 256, 16384)
    keys = [
        index.key(int(sample)) for sample in order.samples[0, micro_batch_slots(256, 8, 3, 1)[0]]
    ]
    planned = time.perf_counter() - started
    grown = (status("VmHWM") - before) / 2**20
    print(
        json.dumps(
            {
                "open_seconds": opened,
                "first_batch_seconds": planned,
                "grown_mib": grown,
                "keys": len(keys),
            }
        )
    )


def large(shards: int = 1281, samples: int = 1000) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_large_index(Path(folder), shards, samples)
        command = [sys.executable, __file__, "--first-batch", folder]
        figures: dict[str, Any] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
    print(
        f"index of {shards:,} shards x {samples:,} samples: open in "
        f"{figures['open_seconds']:.2f} s, first batch planned after "
        f"{figures['first_batch_seconds']:.2f} s, peak memory growth "
        f"{figures['grown_mib']:.0f} MiB"
    )
    return figures


def plot(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    axes.plot(
        [row["epoch"] for row in rows], [row["mib"] for row in rows], marker="o", color="#0072B2"
    )
    axes.set(
        xlabel="epoch",
        ylabel="resident memory, MiB",
        title="Loader of one rank, constructed again in each epoch",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="write a plot of memory by epoch to this file")
    parser.add_argument("--first-batch", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_batch:
        first_batch(arguments.first_batch)
        return
    results = {"large": large(), "epochs": epochs(arguments.epochs, arguments.images)}
    if arguments.plot:
        plot(results["epochs"], arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
