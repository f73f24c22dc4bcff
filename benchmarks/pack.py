"""Compares the speed of `convoy pack` with ``webdataset.ShardWriter``, in one interleaved run.

    python benchmarks/pack.py [--images 24000] [--rounds 5] [--json FILE]

Both read the same JPEGs from local disk and write shards to it without re-encoding. The baseline
follows webdataset's documentation: one process, the bytes of the files and their labels. Convoy
does more (it inspects every image, hashes, writes an index). It is timed as a full command
including its startup, with one worker and with one worker per core.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images

_CLASSES = 20
_SHARD_BYTES = 128 * 2**20
_TARGET = 3000  # images/s per core


def make_images(root: Path, count: int) -> int:
    """Write 500 x 375 JPEGs of about 55 KB, crops of two photographs; return their mean bytes."""
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    random = np.random.default_rng(0)
    distinct = []
    for number in range(200):
        photograph = photographs[number % 2]
        left, top = int(random.integers(0, 640 - 420)), int(random.integers(0, 427 - 315))
        image = photograph.crop((left, top, left + 420, top + 315)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noise = random.normal(
            0, 5, (375, 500, 3)
        )  # camera grain, which determines the size of the files
        path = root.parent / "distinct.jpg"
        Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)).save(
            path, quality=88
        )
        distinct.append(path.read_bytes())
    for number in range(count):
        path = root / f"class{number % _CLASSES:02d}" / f"{number:06d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(distinct[number % len(distinct)] + b"\0" * (number // len(distinct) % 7))
    return sum(map(len, distinct)) // len(distinct)


def shard_writer(source: Path, target: Path) -> None:
    """Run ``webdataset.ShardWriter`` in a new process."""
    code = (
        "import sys, pathlib, webdataset as wds\n"
        "source, target, size = sys.argv[1:]\n"
        "folders = sorted(pathlib.Path(source).iterdir())\n"
        "with wds.ShardWriter(target + '/train-%06d.tar', maxsize=int(size), maxcount=10**9, "
        "verbose=0) as writer:\n"
        "    for label, folder in enumerate(folders):\n"
        "        for path in sorted(folder.iterdir()):\n"
        "            key = f'{folder.name}/{path.stem}'\n"
        "            writer.write({'__key__': key, 'jpg': path.read_bytes(), 'cls': label})\n"
    )
    target.mkdir()
    subprocess.run(
        [sys.executable, "-c", code, str(source), str(target), str(_SHARD_BYTES)], check=True
    )


def convoy(source: Path, target: Path, workers: int) -> None:
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "pack",
        str(source),
        str(target),
        "--workers",
        str(workers),
    ]
    subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=24_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    variants = {
        "webdataset.ShardWriter, 1 process": (1, shard_writer),
        "convoy pack, 1 worker": (1, lambda source, target: convoy(source, target, 1)),
        f"convoy pack, {cores} workers": (
            cores,
            lambda source, target: convoy(source, target, cores),
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        size = make_images(source, options.images)
        for round_number in range(options.rounds + 1):
            for name, (_, run) in variants.items():
                started = time.perf_counter()
                run(source, target)
                elapsed = time.perf_counter() - started
                shutil.rmtree(target)
                if round_number:  # round 0 warms the page cache
                    seconds[name].append(elapsed)
    base = seconds["webdataset.ShardWriter, 1 process"]
    rows = {}
    for name, (processes, _) in variants.items():
        ratios = [b / s for b, s in zip(base, seconds[name], strict=True)]
        rate = options.images / statistics.median(seconds[name])
        rows[name] = {
            "images_per_second": round(rate),
            "images_per_second_per_core": round(rate / processes),
            "ratio_to_shardwriter": [round(f(ratios), 2) for f in (min, statistics.median, max)],
        }
    machine = f"{cores} cores, Python {platform.python_version()}, webdataset {wds.__version__}"
    title = (
        f"packing {options.images:,} JPEGs of {size / 1000:.0f} KB, {options.rounds} rounds; "
        f"{machine}; {date.today()}"
    )
    table = Table(
        "",
        "images/s",
        "images/s per core",
        "ratio to ShardWriter: min, median, max",
        title=title,
        title_justify="left",
    )
    for name, row in rows.items():
        ratios = ", ".join(f"{r:.2f}" for r in row["ratio_to_shardwriter"])
        table.add_row(
            name, f"{row['images_per_second']:,}", f"{row['images_per_second_per_core']:,}", ratios
        )
    Console(width=120).print(table)
    print(f"target: at least {_TARGET:,} images/s per core, and a ratio of at least 1")
    if options.json:
        options.json.write_text(
            json.dumps(
                {"title": title, "image_bytes": size, "seconds": seconds, "rows": rows}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
