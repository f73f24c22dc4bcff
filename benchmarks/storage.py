"""Compares the rate of training batches from local disk, from S3, and from S3 with the disk cache.

    python benchmarks/storage.py [--images 8000] [--window 2048] [--rounds 5] [--workers 2]
                                 [--json FILE]

The images are those of `benchmarks/data.py`, as shards in a folder and in a SeaweedFS bucket on
this machine; RandomResizedCrop to 224 pixels and flip; batches of 64. If eight ranks shuffle within
16,384 samples, each serves an eighth of these, in contiguous ranges that it reads in full. The
single rank here therefore shuffles within 2,048. With 16,384, its memory (``data.prefetch_mb``)
would hold only single samples, each requested separately: ``--window 16384`` shows that.

The sources take turns, each time in a new process: one warmup epoch, then one whose first window is
timed separately (first, s). Nothing is decoded while the first window is awaited, and an epoch of
ImageNet has hundreds of windows. A round's ratio compares the rates after the first window. In
practice a bucket puts no load on the loader's machine. The server therefore has the last processor
to itself, and the loader has the others, whatever its source. The processor time of both is also
reported, per image.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
from data import in_own_process
from data_loaders import our_config
from pack import make_images

from pipelines.local import servers
from trainer.data.index import open_index
from trainer.data.loader import train_loader
from trainer.data.storage.cache import with_cache

ROOT = Path(__file__).parents[1]
DISK, S3, CACHED = "local disk", "S3 on loopback", "S3, data.cache_dir"


def measure(url: str, cache_dir: str | None, workers: int, window: int) -> None:
    """Print the rate and the processor seconds per image of one epoch, after a warmup epoch."""
    config = our_config(url, workers, cache_dir=cache_dir, shuffle_window=window)
    index, store = open_index(url)
    source = with_cache(store, index, cache_dir, config.data.cache_gb)
    sum(len(batch.pixels) for batch in train_loader(config, index, source, 0, 1, 0, 1))
    started, images = time.perf_counter(), 0
    for batch in train_loader(config, index, source, 1, 1, 0, 1):
        images += len(batch.pixels)
        if images <= min(window, index.samples // 2):
            first, counted, before = time.perf_counter(), images, time.process_time()
    seconds, processor = time.perf_counter() - first, time.process_time() - before
    images -= counted
    figures = {
        "images_per_second": images / seconds,
        "first_seconds": first - started,
        "processor_seconds": processor / images,
    }
    print(json.dumps(figures))


def server_seconds(services: servers.Services) -> float:
    """Processor seconds that the S3 server has used so far."""
    times = psutil.Process(services.processes["s3"].pid).cpu_times()
    return times.user + times.system


def reserve_processor(server: psutil.Process) -> None:
    """Reserve the last processor for the server; this process and its children use the others."""
    *ours, last = sorted(os.sched_getaffinity(0))
    if not ours:
        raise SystemExit("needs two processors: one for the S3 server, one for the loader")
    for thread in server.threads():
        os.sched_setaffinity(thread.id, {last})
    os.sched_setaffinity(0, ours)


def compete(
    folder: Path, services: servers.Services, rounds: int, workers: int, window: int
) -> dict[str, list[dict[str, float]]]:
    bucket = f"s3://{servers.BUCKET}/shards/train"
    sources = {
        DISK: (str(folder / "shards" / "train"), ""),
        S3: (bucket, ""),
        CACHED: (bucket, str(folder / "cache")),
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in sources}
    for number in range(rounds):
        for name in list(sources) if number % 2 == 0 else list(sources)[::-1]:
            before = server_seconds(services)
            arguments = ["--workers", str(workers), "--window", str(window)]
            output = in_own_process("--measure", *sources[name], *arguments, script=__file__)
            figures = json.loads(output)
            results[name].append(figures | {"server_seconds": server_seconds(services) - before})
    return results


def summary(results: dict[str, list[dict[str, float]]], images: int) -> dict[str, dict[str, Any]]:
    rows = {}
    for name, rounds in results.items():
        rates = [row["images_per_second"] for row in rounds]
        ratios = [
            rate / disk["images_per_second"]
            for rate, disk in zip(rates, results[DISK], strict=True)
        ]
        rows[name] = {
            "images_per_second": round(statistics.median(rates)),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(v, 3) for v in statistics.quantiles(ratios, n=4)[::2]]
            if len(ratios) > 1
            else None,
            "first_seconds": round(statistics.median(row["first_seconds"] for row in rounds), 2),
            "loader_microseconds": round(
                1e6 * statistics.median(row["processor_seconds"] for row in rounds)
            ),
            "server_microseconds": round(
                1e6 * statistics.median(row["server_seconds"] for row in rounds) / (2 * images)
            ),
        }
    return rows


def report(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "images").mkdir()
        make_images(folder / "images", options.images)
        services = servers.up(folder / "services")
        try:
            os.environ.update(services.environment())
            for destination in (str(folder / "shards"), f"s3://{servers.BUCKET}/shards"):
                command = [
                    sys.executable,
                    "-m",
                    "pipelines.cli",
                    "pack",
                    str(folder / "images"),
                    destination,
                    "--shard-mb",
                    "8",
                ]
                subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            reserve_processor(psutil.Process(services.processes["s3"].pid))
            results = compete(folder, services, options.rounds, options.workers, options.window)
        finally:
            servers.down(folder / "services")
    rows = summary(results, options.images)
    work = (
        f"{options.images:,} JPEGs, {options.workers} workers, shuffle window "
        f"{options.window:,}, {options.rounds} rounds"
    )
    machine = (
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, "
        f"Python {platform.python_version()}"
    )
    print(f"{work}; {machine}; {date.today()}")
    print(
        f"{'':20} {'images/s':>8} {'/ disk':>8} {'quartiles':>13} {'first, s':>8} "
        f"{'loader, us':>11} {'server, us':>11}"
    )
    for name, row in rows.items():
        quartiles = "{}-{}".format(*row["ratio_quartiles"] or "  ")
        print(
            f"{name:20} {row['images_per_second']:8,} {row['ratio']:8.2f} {quartiles:>13} "
            f"{row['first_seconds']:8} "
            f"{row['loader_microseconds']:11,} {row['server_microseconds']:11,}"
        )
    if options.json:
        options.json.write_text(
            json.dumps(
                {"work": work, "machine": machine, "rows": rows, "rounds": results}, indent=1
            )
            + "\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--images", type=int, default=8_000)
    parser.add_argument(
        "--window",
        type=int,
        default=2_048,
        help="shuffle window in samples (default %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], options.measure[1] or None, options.workers, options.window)
    else:
        report(options)


if __name__ == "__main__":
    main()
