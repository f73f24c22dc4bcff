"""Turns fetched samples into batches of pixels.

The loader's stages are generators over plain iterators; threads do the work. The data flows as
follows: ``Window`` (sample numbers) -> ``fetch_samples`` -> micro-batches with their samples' bytes
-> ``decode_batches`` -> ``Batch`` (pixels).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from trainer.data.batch import Allocate, Batch, Fetched, MicroBatch
from trainer.data.decode.decoder import DecodeError
from trainer.data.shards.tar import Sample, encoded_image, label_of
from trainer.data.transforms.augmentation import Uniforms
from trainer.errors import UserError

_TASK = 8  # samples per decode task


Transform = Callable[[memoryview, Uniforms, np.ndarray], None]
"""Decodes an encoded image, given its random numbers, into uint8 [side, side, 3].

Raises DecodeError.
"""


@contextmanager
def threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(count, name)
    try:
        yield pool
    finally:  # if the epoch is abandoned, discard the queued tasks
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class _PendingBatch:
    """A batch whose samples are being decoded."""

    part: MicroBatch
    samples: list[Sample]
    pixels: np.ndarray
    labels: np.ndarray
    tasks: list[Future[list[tuple[int, str]]]] = field(default_factory=list)


@dataclass(frozen=True)
class Collator:
    """Turns samples into pixels and labels.

    If ``view`` is None, only labels are produced and the pixels stay uninitialized.
    """

    view: Transform | None
    num_classes: int
    skip_bad: bool
    """Whether to skip samples that cannot be decoded.

    A skipped sample gets weight 0 and the color ``grey``. If False, such a sample raises UserError.
    """
    grey: np.ndarray  # uint8 [3]
    allocate: Allocate = np.empty
    """Creates the pixel arrays."""

    def begin(self, part: MicroBatch, samples: list[Sample]) -> _PendingBatch:
        size = len(samples)
        return _PendingBatch(
            part,
            samples,
            self.allocate((size, part.side, part.side, 3), np.uint8),
            np.zeros(size, np.int64),
        )

    def work(self, batch: _PendingBatch, first: int) -> list[tuple[int, str]]:
        """Decodes up to ``_TASK`` samples of the batch, starting at index ``first``.

        Returns the index of each bad sample with a one-line reason.
        """
        bad = []
        for i in range(first, min(first + _TASK, len(batch.samples))):
            sample, part = batch.samples[i], batch.part
            try:
                if self.view is not None:
                    self.view(
                        encoded_image(sample),
                        {stream: values[i] for stream, values in part.uniforms.items()},
                        batch.pixels[i],
                    )
            except DecodeError as error:
                line = f"{sample['__where__']}: cannot be decoded: {error}"
                if not self.skip_bad:
                    raise UserError(line) from None
                batch.pixels[i] = self.grey
                bad.append((i, line))
                continue
            except MemoryError:
                raise UserError(
                    f"{sample['__where__']}: there is not enough memory to decode this image"
                ) from None
            batch.labels[i] = label_of(sample, self.num_classes)
        return bad

    def end(self, batch: _PendingBatch, bad: list[tuple[int, str]]) -> Batch:
        part, weights = batch.part, batch.part.weights
        keys = [
            sample["__key__"]
            for sample, weight in zip(batch.samples, weights, strict=True)
            if weight > 0
        ]
        lines = [line for i, line in bad if weights[i] > 0]
        if bad:
            weights = weights.copy()
            weights[[i for i, _ in bad]] = 0.0
        return Batch(batch.pixels, batch.labels, weights, part.global_weight, keys, part.mix, lines)


def decode_batches(
    items: Iterable[Fetched], decoder: Collator, pool: ThreadPoolExecutor | None, ahead: int
) -> Iterator[Batch]:
    """Yields batches in order, decoding up to ``ahead`` batches in advance of the consumer.

    The samples of a batch are decoded in parallel by the pool's threads. Without a pool, each batch
    is decoded synchronously.
    """
    queue: deque[_PendingBatch] = deque()

    def finish() -> Batch:
        batch = queue.popleft()
        return decoder.end(batch, [fault for task in batch.tasks for fault in task.result()])

    for part, samples in items:
        batch = decoder.begin(part, samples)
        firsts = range(0, len(samples), _TASK)
        if pool is None:
            yield decoder.end(
                batch, [fault for first in firsts for fault in decoder.work(batch, first)]
            )
            continue
        batch.tasks = [pool.submit(decoder.work, batch, first) for first in firsts]
        queue.append(batch)
        if len(queue) > ahead:
            yield finish()
    while queue:
        yield finish()
