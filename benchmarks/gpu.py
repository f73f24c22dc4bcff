"""Compares training steps on one GPU with a torch reference loop, and memory with its prediction.

Also measures the full pipeline.

    python benchmarks/gpu.py [--json FILE] [--rows NAME ...] [--rounds 7] [--pipeline-images 12288]

The reference loop does what torchvision's and timm's training scripts do: autocast and, in fp16, a
gradient scaler, channels-last, fused SGD with momentum, and pinned uint8 images copied concurrently
with the computation. "eager" is our engine without CUDA graphs. All three alternate, ten steps each
(40 with few images), on the same random images and in a different order each round. A round's ratio
is the loop's time over the engine's (above 1: the engine is faster).

Rows are named by network, precision and images per step. The most important come first, and each is
written to the JSON file immediately. ``pipeline``: our loader feeds the engine from JPEG shards on
disk; the rate is compared with that of the loader alone and of the engine alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pack import make_images
from step import CLASSES, Step, data_of, engine_of
from torch import nn

from trainer.config.schema import load_config
from trainer.data.batch import Batch
from trainer.data.index import open_index
from trainer.data.loader import train_loader
from trainer.distributed import process_group
from trainer.distributed.env import DistEnv
from trainer.engine.engine import Engine
from trainer.engine.input_transfer import pinned_array
from trainer.models import build_model
from trainer.models.model_info import forward_costs
from trainer.training.metrics.meter import MetricsMeter

ROOT = Path(__file__).parents[1]
SIDE, RATE, STEPS = 224, 1e-4, 10
_AHEAD = 2
ROWS: dict[str, dict[str, Any]] = {
    f"{model} {precision} {images}": {"model": model, "precision": precision, "images": images}
    for model, precision, images in (
        ("resnet50", "fp16", 32),
        ("resnet50", "fp16", 256),
        ("resnet50", "bf16", 32),
        ("resnet50", "bf16", 256),
        ("resnet50", "fp16", 16),
        ("googlenet", "bf16", 256),
        ("resnet50", "bf16", 16),
        ("googlenet", "bf16", 32),
        ("vgg16", "bf16", 32),
        ("alexnet", "bf16", 32),
        ("alexnet", "bf16", 256),
        ("vgg16", "bf16", 256),
        ("resnet152", "bf16", 32),
        ("resnet50", "fp32", 32),
        ("resnet50", "fp32", 256),
    )
} | {
    "resnet50 bf16 32 compiled": {
        "model": "resnet50",
        "precision": "bf16",
        "images": 32,
        "compile": True,
    },
    "resnet50 bf16 256 compiled": {
        "model": "resnet50",
        "precision": "bf16",
        "images": 256,
        "compile": True,
    },
}
"""In fp32, convolutions use TF32, torch's default. ``zero``: ZeRO stage, by default 1."""


def row_of(name: str) -> dict[str, Any]:
    return ROWS[name] | {"side": SIDE, "rate": RATE}


def engine_step(row: dict[str, Any], device: torch.device) -> tuple[Engine, Step]:
    return engine_of(row, row.get("zero", 1), device, pinned_array)


def loop_step(row: dict[str, Any], device: torch.device) -> Step:
    pixels, labels = (torch.from_numpy(array) for array in data_of(row, 0, pinned_array))
    torch.manual_seed(0)
    model = build_model(row["model"], CLASSES).to(device, memory_format=torch.channels_last)
    if row.get("compile"):
        model.compile()
    optimizer = torch.optim.SGD(
        model.parameters(), RATE, momentum=0.9, weight_decay=1e-4, fused=True
    )
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(row["precision"])
    scaler = torch.amp.GradScaler("cuda", enabled=half is torch.float16)
    mean = torch.tensor((0.485, 0.456, 0.406), device=device).view(3, 1, 1) * 255
    std = torch.tensor((0.229, 0.224, 0.225), device=device).view(3, 1, 1) * 255

    def step() -> torch.Tensor:
        model.train()
        images, target = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        images = images.permute(0, 3, 1, 2).float().sub_(mean).div_(std)
        with torch.autocast("cuda", half, enabled=half is not None):
            outputs = model(images)
            main, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = nn.functional.cross_entropy(main, target)
            for head in auxiliary:
                loss = loss + 0.3 * nn.functional.cross_entropy(head, target)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step


def ready(build: Callable[[], Step]) -> tuple[Step, float, int, float]:
    """Build a step and run it five times.

    Returns the step, its first loss, the peak bytes of the last two runs, and the seconds of all.
    """
    torch.cuda.empty_cache()
    held, started = torch.cuda.memory_reserved(), time.perf_counter()
    step = build()
    loss = float(step())
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # frees what cuDNN's algorithm search allocated
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    return step, loss, torch.cuda.memory_reserved() - held, time.perf_counter() - started


def seconds_of(step: Step, steps: int = STEPS) -> tuple[float, float]:
    """Seconds per step, and the part of them until all kernels were launched."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps, launched / steps


def measure(name: str, rounds: int, device: torch.device) -> dict[str, Any]:
    row = row_of(name)
    images = row["images"]
    eager_row = row | {"cuda_graphs": "off"}
    makers: dict[str, Callable[[], Step]] = {
        "ours": lambda: engine_step(row, device)[1],
        "eager": lambda: engine_step(eager_row, device)[1],
        "loop": lambda: loop_step(row, device),
    }
    variants = {variant: ready(make) for variant, make in makers.items()}
    losses = [loss for _, loss, *_ in variants.values()]
    assert max(losses) - min(losses) < 0.3, f"the first losses differ: {losses}"
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    for number in range(rounds):
        for variant in list(variants) if number % 2 == 0 else reversed(variants):
            times[variant].append(
                seconds_of(variants[variant][0], STEPS if images > 64 else 4 * STEPS)
            )
    seconds = {variant: [total for total, _ in found] for variant, found in times.items()}
    ratios = [theirs / our for our, theirs in zip(seconds["ours"], seconds["loop"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    with torch.device("meta"):
        network = build_model(row["model"], CLASSES)
    multiply_adds, saved = forward_costs(network, SIDE)
    medians = {variant: statistics.median(found) for variant, found in seconds.items()}
    return {
        "row": name,
        "images": images,
        "images_per_second": {variant: images / median for variant, median in medians.items()},
        "launch_ms": {
            c: 1e3 * statistics.median(launched for _, launched in found)
            for c, found in times.items()
        },
        "ratio": middle,
        "quartiles": [low, high],
        "peak_bytes": {variant: peak for variant, (_, _, peak, _) in variants.items()},
        "predicted_bytes": predicted(network, saved, row, images),
        "teraflops": 6 * multiply_adds * images / medians["ours"] / 1e12,
        "start_seconds": {variant: start for variant, (*_, start) in variants.items()},
        "losses": losses,
    }


def predicted(network: nn.Module, saved: int, row: dict[str, Any], images: int) -> int:
    """Predicted bytes of weights, master weights, gradients, momentum, images and activations.

    ``saved``: bytes of activations in fp32 that autograd saves per image.
    """
    width = 4 if row["precision"] == "fp32" else 2
    weights = sum(parameter.numel() for parameter in network.parameters())
    per_weight = 4 + 4 + 4 if width == 4 else 2 + 4 + 4 + 2
    return weights * per_weight + images * (saved * width // 4 + 3 * SIDE * SIDE)


def profile_of(name: str, device: torch.device) -> str:
    """A profile of the GPU time of three steps of our engine."""
    step, *_ = ready(lambda: engine_step(row_of(name), device)[1])
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        started = time.perf_counter()
        for _ in range(3):
            step()
        launched = time.perf_counter() - started
        torch.cuda.synchronize()
        total = time.perf_counter() - started
    table = trace.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=60
    )
    return (
        f"3 steps: launched after {launched * 1e3:.0f} ms, done after {total * 1e3:.0f} ms\n{table}"
    )


def pipeline(name: str, workers: int, folder: Path, device: torch.device) -> dict[str, Any]:
    """Images/s of our engine with our loader, of the engine with one batch, and of the loader.

    The loader reads the JPEG shards below ``folder``. The first rate is measured in the middle of
    an epoch.
    """
    url, images = f"data.train={folder}/packed/train", int(ROWS[name]["images"])
    config = load_config(
        "resnet50", [url, "data.val=null", f"data.workers={workers}", f"batch.global_size={images}"]
    )
    index, store = open_index(f"{folder}/packed/train")

    def batches() -> Iterator[Batch]:
        return train_loader(config, index, store, 0, 1, 0, 1, allocate=pinned_array)

    engine, step = engine_step(row_of(name), device)
    for _ in range(5):
        step()
    without = images / seconds_of(step)[0]
    meter = MetricsMeter()
    timed = meter.time_batches(batches())
    first = _AHEAD * (config.data.prefetch_batches + 1)  # batches ready before the first step
    steps = index.samples // images - 2 * first  # without the batches that are ready at the end
    for _ in range(first):
        engine.step(timed, RATE)
    torch.cuda.synchronize()
    started, meter.waited_seconds = time.perf_counter(), 0.0
    for _ in range(steps):
        engine.step(timed, RATE)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    alone = batches()
    next(alone)
    started = time.perf_counter()
    loaded = sum(len(batch.keys) for batch in alone)
    return {
        "row": name,
        "workers": workers,
        "images_per_second": images * steps / seconds,
        "waiting_for_data": meter.waited_seconds / seconds,
        "same_batch_images_per_second": without,
        "loader_images_per_second": loaded / (time.perf_counter() - started),
        "steps": steps,
    }


def make_shards(folder: Path, images: int) -> None:
    for split, count in (("train", images), ("val", 20)):
        (folder / "images" / split).mkdir(parents=True)
        make_images(folder / "images" / split, count)
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "pack",
        str(folder / "images"),
        str(folder / "packed"),
        "--shards",
        "16",
    ]
    subprocess.run(
        [*command, "--workers", str(os.cpu_count())], cwd=ROOT, check=True, capture_output=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results to this file after each row")
    parser.add_argument(
        "--rows", nargs="+", default=[*ROWS, "pipeline"], choices=[*ROWS, "pipeline"]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pipeline-images", type=int, default=12288)
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[os.cpu_count() or 1],
        help="decode threads of the pipeline",
    )
    parser.add_argument(
        "--profile", choices=ROWS, help="only print a profile of the GPU time of this row"
    )
    arguments = parser.parse_args()
    ranks = DistEnv.from_env()
    device = process_group.init_distributed(ranks)
    if device.type != "cuda":
        process_group.cleanup()
        sys.exit("this benchmark needs a GPU")
    if arguments.profile:
        print(profile_of(arguments.profile, device))
        process_group.cleanup()
        return
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}, {os.cpu_count()} cores, {SIDE} pixels")
    head = (
        "",
        "ours",
        "eager",
        "loop",
        "ratio",
        "quartiles",
        "ms to launch",
        "eager",
        "loop",
        "TFLOP/s",
        "GiB",
        "predicted",
        "loop",
    )
    print(
        "{:26} {:>7} {:>7} {:>7} {:>6} {:>13} {:>12} {:>6} {:>6} {:>8} {:>6} {:>9} {:>6}".format(
            *head
        )
    )
    results: dict[str, Any] = {"gpu": gpu, "torch": torch.__version__, "rows": [], "pipeline": []}

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        torch.cuda.empty_cache()

    for name in (name for name in arguments.rows if name != "pipeline"):
        try:
            found = measure(name, arguments.rounds, device)
        except (RuntimeError, AssertionError) as error:
            traceback.print_exc()
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        results["rows"].append(found)
        speed, launch, peak = found["images_per_second"], found["launch_ms"], found["peak_bytes"]
        low, high = found["quartiles"]
        gib = [value / 2**30 for value in (peak["ours"], found["predicted_bytes"], peak["loop"])]
        print(
            f"{name:26} {speed['ours']:7,.0f} {speed['eager']:7,.0f} {speed['loop']:7,.0f} "
            f"{found['ratio']:6.3f} "
            f"{low:6.3f}-{high:.3f} {launch['ours']:12.1f} {launch['eager']:6.1f} "
            f"{launch['loop']:6.1f} "
            f"{found['teraflops']:8.0f} {gib[0]:6.1f} {gib[1]:9.1f} {gib[2]:6.1f}",
            flush=True,
        )
        save()
    if "pipeline" in arguments.rows:
        print(
            "{:24} {:>8} {:>9} {:>8} {:>11} {:>12}".format(
                "pipeline", "workers", "images/s", "waiting", "same batch", "loader alone"
            )
        )
        with tempfile.TemporaryDirectory() as folder:
            make_shards(Path(folder), arguments.pipeline_images)
            for workers in arguments.workers:
                found = pipeline("resnet50 fp16 256", workers, Path(folder), device)
                results["pipeline"].append(found)
                print(
                    f"{found['row']:24} {workers:8} {found['images_per_second']:9,.0f} "
                    f"{found['waiting_for_data']:8.1%} "
                    f"{found['same_batch_images_per_second']:11,.0f} "
                    f"{found['loader_images_per_second']:12,.0f}",
                    flush=True,
                )
                save()
    process_group.cleanup()


if __name__ == "__main__":
    main()
