"""Batches for one rank, as a visible list of stages that webdataset's pipeline composes.

The streams between the stages: ``Window`` (which samples), ``dict(__key__=..., jpg=..., cls=..., slot facts)`` lists a
micro-batch, ``Batch`` (pixels). Every stage is a generator over a plain iterator.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import webdataset as wds

from trainer.config import RunConfig
from trainer.data.augment import UNIFORMS, Mix, draw_mix, eval_transform, train_transform
from trainer.data.decode import DecodeError, decode_rgb, to_array
from trainer.data.index import Index
from trainer.data.order import augment_uniforms, epoch_order, eval_portion, mix_generator, rank_slots
from trainer.data.reader import read_samples
from trainer.data.shard import Sample, encoded_image, label_of
from trainer.data.storage import Store
from trainer.errors import UserError

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class MicroBatch:
    """Sample numbers of one micro-batch, what stands at each, and what augments it."""

    samples: np.ndarray  # int64 [micro]
    weights: np.ndarray  # float32 [micro]; 0: padding
    global_weight: float  # samples with weight 1 in the whole global batch
    uniforms: np.ndarray | None  # float64 [micro, UNIFORMS]; None in evaluation
    mix: Mix | None = None


@dataclass(frozen=True)
class Batch:
    """What a forward pass gets."""

    pixels: np.ndarray  # uint8 [micro, size, size, 3]
    labels: np.ndarray  # int64 [micro]
    weights: np.ndarray  # float32 [micro]
    global_weight: float
    keys: list[str]
    mix: Mix | None = None  # of pixels and labels, left to the engine

    @property
    def lam(self) -> float | None:
        """The part of each target that is the sample's own label, where samples are mixed."""
        return self.mix.lam if self.mix else None


View = Callable[[memoryview, np.ndarray | None], np.ndarray]
"""Encoded image and its random numbers to uint8 [size, size, 3]."""

Window = list[MicroBatch]
"""Micro-batches whose bytes are fetched together."""


def train_loader(
    config: RunConfig,
    index: Index,
    store: Store,
    epoch: int,
    world_size: int,
    rank: int,
    accumulation_steps: int,
    start_step: int = 0,
) -> Iterator[Batch]:
    """One epoch's micro-batches of one rank from its step ``start_step`` on, ``accumulation_steps`` a step. What comes before
    is not read."""
    data, augment = config.data, config.augment

    def mix(step: int, micro_batch: int) -> Mix | None:
        return draw_mix(mix_generator(data.seed, epoch, step, micro_batch), augment.mixup, augment.cutmix, data.image_size)

    def windows() -> Iterator[Window]:
        global_size = config.batch.global_size
        order = epoch_order(index.sizes, data.seed, epoch, global_size, data.shuffle_window, data.tail)
        slots = rank_slots(global_size, world_size, rank, accumulation_steps)
        for first in range(start_step // order.block * order.block, order.steps, order.block):
            window = []
            for step in range(max(first, start_step), min(first + order.block, order.steps)):
                uniforms = augment_uniforms(data.seed, epoch, step, global_size, UNIFORMS)
                whole = float(order.weights[step].sum())
                window += [
                    MicroBatch(order.samples[step, s], order.weights[step, s], whole, uniforms[s], mix(step, a * world_size + rank))
                    for a, s in enumerate(slots)
                ]
            yield window

    def view(encoded: memoryview, uniforms: np.ndarray | None) -> np.ndarray:
        assert uniforms is not None
        image = decode_rgb(encoded)
        return to_array(
            train_transform(
                image, data.image_size, augment.crop, augment.padding, augment.min_area, augment.flip, augment.eval_crop, uniforms
            )
        )

    return _run(windows, index, store, view, data.workers, data.prefetch_batches)


def eval_loader(config: RunConfig, index: Index, store: Store, world_size: int, rank: int) -> Iterator[Batch]:
    """A rank's stretch of the validation split, each sample once; the last batch may be smaller."""
    data, size = config.data, config.batch.eval_size

    def windows() -> Iterator[Window]:
        samples = np.array(eval_portion(index.samples, world_size, rank))
        batches = [samples[i : i + size] for i in range(0, len(samples), size)]
        per_window = max(1, data.shuffle_window // (size * world_size))
        for first in range(0, len(batches), per_window):
            yield [MicroBatch(b, np.ones(len(b), np.float32), float(len(b)), None) for b in batches[first : first + per_window]]

    def view(encoded: memoryview, uniforms: np.ndarray | None) -> np.ndarray:
        return to_array(eval_transform(decode_rgb(encoded), data.image_size, config.augment.eval_crop))

    return _run(windows, index, store, view, data.workers, data.prefetch_batches)


def _run(
    windows: Callable[[], Iterator[Window]],
    index: Index,
    store: Store,
    view: View,
    workers: int,
    prefetch: int,
) -> Iterator[Batch]:
    with ExitStack() as stack:
        fetchers = stack.enter_context(_threads(1, "fetch"))
        decoders = stack.enter_context(_threads(workers, "decode")) if workers else None
        stages = [
            windows,  # Window
            ahead(partial(fetch, index=index, store=store), fetchers, 1),  # list[tuple[MicroBatch, list[Sample]]]
            unbatched,  # tuple[MicroBatch, list[Sample]]
            ahead(partial(make_batch, index=index, view=view), decoders, workers + prefetch),  # Batch
        ]
        yield from wds.DataPipeline(*stages)


@contextmanager
def _threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(count, name)
    try:
        yield pool
    finally:  # an abandoned epoch does not finish what is queued
        pool.shutdown(wait=True, cancel_futures=True)


def ahead(work: Callable[[A], B], pool: ThreadPoolExecutor | None, depth: int) -> Callable[[Iterable[A]], Iterator[B]]:
    """A stage that applies ``work`` in ``pool``, ``depth`` items ahead of the consumer, in order; without a pool, at once."""

    def stage(items: Iterable[A]) -> Iterator[B]:
        if pool is None:
            yield from map(work, items)
            return
        queue: deque[Future[B]] = deque()
        for item in items:
            queue.append(pool.submit(work, item))
            if len(queue) > depth:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()

    return stage


def unbatched(items: Iterable[list[A]]) -> Iterator[A]:
    """A stage that takes lists apart."""
    for item in items:
        yield from item


def fetch(window: Window, index: Index, store: Store) -> list[tuple[MicroBatch, list[Sample]]]:
    """Read every sample of a window; a lane's block is one request, or two at a shard's end."""
    samples = read_samples(np.concatenate([part.samples for part in window]), index, store)
    return [(part, [samples[int(s)] for s in part.samples]) for part in window]


def make_batch(fetched: tuple[MicroBatch, list[Sample]], index: Index, view: View) -> Batch:
    """Decode and augment a micro-batch. Raises UserError that names shard, key and byte of a sample that is no image."""
    part, samples = fetched
    pixels, labels = [], []
    for i, sample in enumerate(samples):
        try:
            pixels.append(view(encoded_image(sample), None if part.uniforms is None else part.uniforms[i]))
        except DecodeError as error:
            raise UserError(f"{sample['__where__']}: cannot be decoded: {error}") from None
        labels.append(label_of(sample, len(index.classes)))
    keys = [sample["__key__"] for sample in samples]
    return Batch(np.stack(pixels), np.array(labels, np.int64), part.weights, part.global_weight, keys, part.mix)
