"""Compares the rate of training batches from JPEGs with eight other loaders, and profiles ours.

    python benchmarks/data.py [--images 2000] [--rounds 5] [--workers 2] [--json FILE]

All read the same JPEGs (500x375, about 55 KB, of photographs) from local disk, each in its own
format, with RandomResizedCrop to 224 pixels and flip, in batches of 64. The baselines have as many
worker processes as our loader has threads.

The loaders take turns, each time in a new process: one warmup epoch, then one that is timed from
the request for its first batch to its last batch. A round's ratio compares the rates in that round.
Memory is the largest sum of the proportional set sizes (PSS) of the process and its workers, in the
first epoch. Baselines that `make baselines` has not installed are skipped and listed; FFCV, which
is compiled, needs the development files of OpenCV.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
from data_loaders import BATCH, LOADERS, SIDE, prepare, random_box, versions
from pack import make_images

ROOT = Path(__file__).parents[1]
OURS, FOLDER = "ours", "torchvision ImageFolder"
_TIMEOUT = 300  # seconds per measurement


def python() -> str:
    """The interpreter with the baselines, if `make baselines` was run, else this one."""
    path = ROOT / ".venv-baselines" / "bin" / "python"
    return str(path) if path.exists() else sys.executable


def in_own_process(*arguments: str, script: str = __file__) -> str:
    """Run a benchmark with these arguments; return the last line that it prints.

    Raises RuntimeError with the end of its stderr.
    """
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": paths,
    }
    with tempfile.TemporaryFile("w+") as errors:
        result = subprocess.run(
            [python(), script, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=_TIMEOUT,
        )
        if result.returncode:
            errors.seek(0)
            raise RuntimeError(
                " ".join(arguments[:2]) + ": " + " ".join(errors.read().split()[-40:])
            )
    return result.stdout.splitlines()[-1]


class Memory:
    """Peak proportional set size in bytes of this process and its children during the block."""

    def __enter__(self) -> "Memory":
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        parent = psutil.Process()
        while True:
            total = 0
            for process in [parent, *parent.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it has just exited
                    continue
            self.peak = max(self.peak, total)
            if self._done.wait(0.2):
                return


def measure(name: str, folder: Path, workers: int) -> None:
    """Print the rate of one epoch after a warmup epoch, in which the memory is measured."""
    epoch = LOADERS[name][0](folder, workers)
    with Memory() as memory:
        sum(epoch())
    started = time.perf_counter()
    images = sum(epoch())
    seconds = time.perf_counter() - started
    print(
        json.dumps({"images_per_second": images / seconds, "peak_bytes": memory.peak}), flush=True
    )
    os._exit(0)  # the workers of some loaders would keep the process alive


def breakdown(folder: Path, workers: int) -> None:
    """Print the processor time of an epoch of our loader, by part, and the rates of the parts."""
    import numpy as np

    from trainer.data.decode.decoder import decode_crop, decoder_in_use
    from trainer.data.index import open_index
    from trainer.data.shards.sample_reader import read_samples

    epoch = LOADERS[OURS][0](folder, workers)
    sum(epoch())
    before, started = time.process_time(), time.perf_counter()
    images = sum(epoch())
    total, elapsed = time.process_time() - before, time.perf_counter() - started

    index, store = open_index(str(folder / "shards" / "train"))
    before = time.process_time()
    for first in range(0, index.samples, BATCH):
        read_samples(np.arange(first, min(first + BATCH, index.samples)), index, store)
    fetch = (time.process_time() - before) / index.samples

    contents = [path.read_bytes() for path in sorted((folder / "images").rglob("*.JPEG"))[:500]]
    out = np.empty((SIDE, SIDE, 3), np.uint8)
    random.seed(0)
    before = time.thread_time()
    for encoded in contents:
        decode_crop(encoded, random_box, out, False)
    decode = (time.thread_time() - before) / len(contents)
    parts = {"fetch": fetch, "decode and resize": decode, "rest": total / images - fetch - decode}
    figures = {
        "microseconds_per_image": {
            part: round(seconds * 1e6, 1) for part, seconds in parts.items()
        },
        "processors_used": round(total / elapsed, 2),
        "decode_crop_per_second_and_thread": round(1 / decode),
        "decoder": decoder_in_use(),
    }
    print(json.dumps(figures))


def missing() -> dict[str, str]:
    """The loaders that cannot run here, with the reason."""
    code = """
import importlib.util, sys
for module in sys.argv[1:]:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # its parent is missing
        found = None
    if found is None:
        print(module)
"""
    modules = [module for _, module in LOADERS.values()]
    absent = subprocess.run(
        [python(), "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return {
        name: f"{module} is not installed"
        for name, (_, module) in LOADERS.items()
        if module in absent
    }


def pack(folder: Path, count: int) -> int:
    """Create the images and Convoy's shards; return the mean size of an image in bytes."""
    (folder / "images").mkdir()
    size = make_images(folder / "images", count)
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "pack",
        str(folder / "images"),
        str(folder / "shards"),
    ]
    subprocess.run([*command, "--shard-mb", "8"], cwd=ROOT, check=True, capture_output=True)
    return size


def compete(
    folder: Path, rounds: int, workers: int, skipped: dict[str, str]
) -> dict[str, list[dict[str, float]]]:
    """The results of each round, by loader. A loader that fails is skipped from then on."""
    for name in LOADERS:
        if name in skipped:
            continue
        try:
            in_own_process("--prepare", name, str(folder))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            skipped[name] = str(error)
    results: dict[str, list[dict[str, float]]] = {
        name: [] for name in LOADERS if name not in skipped
    }
    for number in range(rounds):
        for name in list(results) if number % 2 == 0 else list(results)[::-1]:
            try:
                results[name].append(
                    json.loads(
                        in_own_process("--measure", name, str(folder), "--workers", str(workers))
                    )
                )
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                skipped[name] = str(error)
                del results[name]
    return results


def summary(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """For each loader, the median and quartiles of images/s, our ratio to it, and its memory."""
    rates = {
        name: [result["images_per_second"] for result in rounds] for name, rounds in results.items()
    }
    rows = {}
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates[OURS], values, strict=True)]
        rows[name] = {
            "images_per_second": round(statistics.median(values)),
            "quartiles": [round(value) for value in statistics.quantiles(values, n=4)[::2]]
            if len(values) > 1
            else None,
            "ratio_of_ours": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(v, 3) for v in statistics.quantiles(ratios, n=4)[::2]]
            if len(values) > 1
            else None,
            "peak_bytes": max(int(result["peak_bytes"]) for result in results[name]),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(LOADERS), help="only these and ours")
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--breakdown", help=argparse.SUPPRESS)
    parser.add_argument("--versions", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(options.prepare[0], Path(options.prepare[1]))
        print("done")
    elif options.measure:
        measure(options.measure[0], Path(options.measure[1]), options.workers)
    elif options.breakdown:
        breakdown(Path(options.breakdown), options.workers)
    elif options.versions:
        print(versions())
    else:
        report(options)


def report(options: argparse.Namespace) -> None:
    skipped = missing()
    if options.only:
        skipped |= {name: "not requested" for name in LOADERS if name not in (OURS, *options.only)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = pack(folder, options.images)
        results = compete(folder, options.rounds, options.workers, skipped)
        parts = json.loads(
            in_own_process("--breakdown", str(folder), "--workers", str(options.workers))
        )
    rows, used = summary(results), json.loads(in_own_process("--versions"))
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    work = (
        f"{options.images:,} JPEGs of {size / 1000:.0f} KB, {options.workers} workers, "
        f"{options.rounds} rounds"
    )
    print(
        f"{work}; {machine}; {date.today()}\n"
        + ", ".join(f"{name} {version}" for name, version in used.items())
    )
    print(
        f"{'':28} {'images/s':>8} {'quartiles':>13} {'ours/theirs':>11} {'quartiles':>13} "
        f"{'memory, MB':>11}"
    )
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["images_per_second"]):
        spread = "{}-{}".format(*row["quartiles"] or "  ")
        ratios = "{}-{}".format(*row["ratio_quartiles"] or "  ")
        rate, ratio, memory = (
            row["images_per_second"],
            row["ratio_of_ours"],
            row["peak_bytes"] / 1e6,
        )
        print(f"{name:28} {rate:8,} {spread:>13} {ratio:11.2f} {ratios:>13} {memory:11,.0f}")
    for name, reason in skipped.items():
        print(f"{name:28} skipped: {reason}")
    baselines = {name: row for name, row in rows.items() if not name.startswith(OURS)}
    if baselines:
        best = max(baselines, key=lambda name: baselines[name]["images_per_second"])
        print(
            f"ours / best baseline ({best}): {baselines[best]['ratio_of_ours']:.2f} (target 1.6)",
            end="",
        )
        print(
            f"; ours / ImageFolder: {baselines[FOLDER]['ratio_of_ours']:.2f} (target 2.2)"
            if FOLDER in baselines
            else ""
        )
    print("ours, processor time per image in microseconds: ", end="")
    print(
        ", ".join(
            f"{part} {value:,.0f}" for part, value in parts["microseconds_per_image"].items()
        ),
        end="",
    )
    print(
        f"; {parts['processors_used']} processors used; decode_crop alone "
        f"{parts['decode_crop_per_second_and_thread']:,} images/s per thread"
    )
    print(f"decoder: {parts['decoder']}")
    if options.json:
        record = {
            "work": work,
            "machine": machine,
            "versions": used,
            "rows": rows,
            "rounds": results,
            "ours": parts,
        }
        options.json.write_text(json.dumps(record | {"skipped": skipped}, indent=1) + "\n")


if __name__ == "__main__":
    main()
