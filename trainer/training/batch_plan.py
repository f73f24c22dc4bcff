"""All batch arithmetic: global batch = micro-batch x accumulation steps x data-parallel ranks."""

import math
from dataclasses import dataclass

from trainer.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """Batch sizes in samples.

    ``accumulation_steps`` is the number of micro-batches of each rank per optimizer step.
    """

    global_size: int
    micro_size: int
    ranks: int
    accumulation_steps: int


def plan_batches(global_size: int, micro_size: int | None, ranks: int, samples: int) -> BatchPlan:
    """Compute the number of accumulation steps.

    ``samples`` is the size of the training split; every rank must get at least one sample. Raises
    UserError that lists the nearest valid sizes.
    """
    if ranks > samples:
        raise UserError(
            f"{ranks} ranks are more than the {samples} samples of data.train; use at most "
            f"{samples}"
        )
    if global_size > samples:
        raise UserError(
            f"batch.global_size: {global_size} is more than the {samples} samples of data.train"
        )
    if global_size % ranks:
        raise UserError(
            f"batch.global_size: {global_size} is not divisible by {ranks} ranks; nearest valid "
            f"sizes: {_nearest(global_size, ranks)}"
        )
    share = global_size // ranks
    micro = share if micro_size is None else micro_size
    if share % micro:
        small = [d for d in range(1, math.isqrt(share) + 1) if share % d == 0]
        divisors = [*small, *(share // d for d in small)]
        below, above = (
            max(d for d in divisors if d < micro or d == 1),
            min(d for d in divisors if d > micro or d == share),
        )
        sizes = " or ".join(map(str, sorted({below, above})))
        raise UserError(
            f"batch.micro_size: {micro} does not divide the {share} samples per rank "
            f"({global_size} / {ranks} ranks); nearest valid sizes: {sizes}; or use "
            f"batch.global_size {_nearest(global_size, micro * ranks)}"
        )
    return BatchPlan(global_size, micro, ranks, share // micro)


def _nearest(value: int, multiple_of: int) -> str:
    below = value // multiple_of * multiple_of
    return " or ".join(str(size) for size in (below, below + multiple_of) if size)
