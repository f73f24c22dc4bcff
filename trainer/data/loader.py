"""Builds the batches of one rank.

The loader is an explicit list of stages, composed by webdataset's ``DataPipeline`` (see ``stages``
in ``_run``).
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import ceil

import numpy as np
import webdataset as wds

from trainer.config.schema import RunConfig
from trainer.data.batch import Allocate, Batch, MicroBatch, Window
from trainer.data.collate import Collator, Transform, decode_batches, threads
from trainer.data.decode.decoder import decode_crop, decode_rgb
from trainer.data.fetch import fetch_samples
from trainer.data.index import Index
from trainer.data.random_streams import LATEST_VERSION, RandomStreams
from trainer.data.sampler import (
    EpochOrder,
    block_steps,
    epoch_order,
    eval_range,
    micro_batch_slots,
    steps_per_epoch,
)
from trainer.data.storage.store import RangeReader, is_remote
from trainer.data.transforms.augmentation import (
    ImageAugmentation,
    Uniforms,
    enabled_augmentations,
)
from trainer.data.transforms.crop import PaddedCrop, RandomResizedCrop, eval_transform
from trainer.data.transforms.flip import RandomFlip
from trainer.data.transforms.mixup import Mix, Mixup

_LONG = 8 * 2**20  # bytes; longer contiguous reads of one stream are no faster
_SLOW = 64 * 2**20  # bytes; an epoch's first window may delay its first step by this much reading


def train_loader(
    config: RunConfig,
    index: Index,
    store: RangeReader,
    epoch: int,
    world_size: int,
    rank: int,
    accumulation_steps: int,
    start_step: int = 0,
    labels_only: bool = False,
    allocate: Allocate = np.empty,
    streams_version: int = LATEST_VERSION,
) -> Generator[Batch, None, None]:
    """Yields one rank's micro-batches of an epoch, starting at step ``start_step``.

    Each step has ``accumulation_steps`` micro-batches. Data before ``start_step`` is not read.
    ``labels_only``: pixels are not decoded (for the last stage of a pipeline). ``allocate``:
    creates the pixel arrays. ``streams_version``: version of the random streams.
    """
    data, global_size = config.data, config.batch.global_size
    side = data.size_in(epoch)
    streams = RandomStreams(streams_version, data.seed, epoch)
    mixup = Mixup.from_config(config.augment)
    counts = {
        augmentation.stream: augmentation.num_uniforms
        for augmentation in enabled_augmentations(config.augment)
        if augmentation.num_uniforms
    }

    def mix(step: int, micro_batch: int) -> Mix | None:
        if not mixup.enabled:
            return None
        return mixup.draw(streams.generator(mixup.stream, step, micro_batch), side)

    def windows() -> Iterator[Window]:
        order = epoch_order(
            index.sizes, data.seed, epoch, global_size, data.shuffle_window, data.tail
        )
        slots = micro_batch_slots(global_size, world_size, rank, accumulation_steps)
        step_bytes = index.bytes / index.samples  # of one stream
        for first, end in step_windows(
            order, start_step, step_bytes, slots.size, data.prefetch_mb * 2**20
        ):
            window = []
            for step in range(first, end):
                uniforms = streams.uniforms(counts, step, global_size)
                global_weight = float(order.weights[step].sum())
                window += [
                    MicroBatch(
                        order.samples[step, s],
                        order.weights[step, s],
                        global_weight,
                        side,
                        {stream: values[s] for stream, values in uniforms.items()},
                        mix(step, a * world_size + rank),
                    )
                    for a, s in enumerate(slots)
                ]
            yield window

    return _run(
        config,
        windows,
        index,
        store,
        None if labels_only else build_train_transform(config),
        allocate,
    )


def step_windows(
    order: EpochOrder, start: int, step_bytes: float, streams: int, budget: int
) -> Iterator[tuple[int, int]]:
    """Yields step ranges (first, end), from ``start`` on, whose bytes are fetched together.

    ``step_bytes``: bytes that one stream reads per step. ``streams``: number of streams that the
    rank reads. ``budget``: bytes that the rank may hold in memory.

    A window is one block of the order, in which each stream reads one contiguous byte range, or
    several blocks if those ranges are short. If two blocks exceed ``budget``, a window is only part
    of a block and samples are read one by one. If the first window is large, it is reduced to its
    first step, so that training starts early.
    """
    block = min(order.block, order.steps)
    size = block * step_bytes * streams
    if 2 * size > budget:
        steps = max(1, int(budget / 4 / (step_bytes * streams)))
    else:
        steps = block * max(1, int(min(_LONG / (block * step_bytes), budget / 4 / size)))
    first = start
    while first < order.steps:
        end = min(order.steps, (first // steps + 1) * steps)
        if first == start and (end - first) * step_bytes * streams > _SLOW:
            end = first + 1
        if 2 * size > budget:
            end = min(end, (first // block + 1) * block)
        yield first, end
        first = end


def prefetch_hint(config: RunConfig, index: Index, ranks: int) -> str | None:
    """Returns a warning if ``data.prefetch_mb`` is so small that samples are read one by one.

    Single reads are slow on a remote store, because each request has a high latency. Returns None
    for local data, with a cache, and if ``data.prefetch_mb`` is large enough for ``step_windows``
    to read long ranges.
    """
    data, global_size = config.data, config.batch.global_size
    if data.cache_dir is not None or not is_remote(data.train):
        return None
    block = min(
        block_steps(data.shuffle_window, global_size),
        steps_per_epoch(index.samples, global_size, data.tail),
    )
    needed = ceil(2 * block * index.bytes / index.samples * (global_size // ranks) / 2**20)
    if needed <= data.prefetch_mb:
        return None
    return (
        f"data.prefetch_mb: {data.prefetch_mb} is too small, so samples are read one by one; set "
        f"it to {needed} to read long ranges"
    )


def build_train_transform(config: RunConfig) -> Transform:
    """Builds the training augmentation of single images that the recipe configures."""
    eval_crop, fill = config.augment.eval_crop, _grey(config)
    resized_crop = RandomResizedCrop.from_config(config.augment)
    padded_crop = PaddedCrop.from_config(config.augment)
    random_flip = RandomFlip.from_config(config.augment)
    augmentations = [
        augmentation
        for augmentation in enabled_augmentations(config.augment)
        if isinstance(augmentation, ImageAugmentation)
    ]

    def view(encoded: memoryview, uniforms: Uniforms, out: np.ndarray) -> None:
        flip = random_flip.enabled and random_flip.is_flipped(uniforms[random_flip.stream])
        if resized_crop.enabled:
            crop_uniforms = uniforms[resized_crop.stream]
            decode_crop(
                encoded,
                lambda width, height: resized_crop.box(width, height, crop_uniforms),
                out,
                flip,
            )
        else:
            image = eval_transform(decode_rgb(encoded), len(out), eval_crop)
            if padded_crop.enabled:
                image = padded_crop.shift(image, len(out), uniforms[padded_crop.stream])
            out[:] = np.asarray(image)[:, ::-1] if flip else np.asarray(image)
        for augmentation in augmentations:
            augmentation.apply(out, uniforms[augmentation.stream], fill)

    return view


def _grey(config: RunConfig) -> np.ndarray:
    return np.round(np.array(config.data.mean) * 255).astype(np.uint8)


def eval_loader(
    config: RunConfig,
    index: Index,
    store: RangeReader,
    world_size: int,
    rank: int,
    allocate: Allocate = np.empty,
) -> Iterator[Batch]:
    """Yields a rank's share of the validation split, each sample once.

    The last batch may be smaller. Samples that cannot be decoded are removed from their batch.
    """
    data, size = config.data, config.batch.eval_size

    def windows() -> Iterator[Window]:
        samples = np.array(eval_range(index.samples, world_size, rank))
        batches = [samples[i : i + size] for i in range(0, len(samples), size)]
        per_window = max(
            1, int(min(4 * _LONG, data.prefetch_mb * 2**18) / (index.bytes / index.samples * size))
        )
        for first in range(0, len(batches), per_window):
            yield [
                MicroBatch(b, np.ones(len(b), np.float32), float(len(b)), data.image_size, {})
                for b in batches[first : first + per_window]
            ]

    def view(encoded: memoryview, uniforms: Uniforms, out: np.ndarray) -> None:
        out[:] = np.asarray(
            eval_transform(decode_rgb(encoded), data.image_size, config.augment.eval_crop)
        )

    for batch in _run(config, windows, index, store, view, allocate):
        good = batch.weights > 0
        if not good.all():
            batch = replace(
                batch,
                pixels=batch.pixels[good],
                labels=batch.labels[good],
                weights=batch.weights[good],
            )
        yield batch


def _run(
    config: RunConfig,
    windows: Callable[[], Iterator[Window]],
    index: Index,
    store: RangeReader,
    view: Transform | None,
    allocate: Allocate,
) -> Generator[Batch, None, None]:
    data = config.data
    decoder = Collator(
        view, len(index.classes), data.bad_samples == "skip", _grey(config), allocate
    )
    with ExitStack() as stack:
        fetchers = stack.enter_context(threads(data.requests, "fetch"))
        decoders = stack.enter_context(threads(data.workers, "decode")) if data.workers else None
        stages = [
            windows,  # Window
            partial(
                fetch_samples,
                index=index,
                store=store,
                pool=fetchers,
                budget=data.prefetch_mb * 2**20,
            ),  # MicroBatch, list[Sample]
            partial(
                decode_batches, decoder=decoder, pool=decoders, ahead=data.prefetch_batches
            ),  # Batch
        ]
        yield from wds.DataPipeline(*stages)
