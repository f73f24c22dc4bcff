"""Top-1 and top-5 accuracy on a validation split, counted exactly over all ranks."""

from collections.abc import Callable, Iterator

import torch

from trainer.data.batch import Batch
from trainer.distributed.collectives import all_reduce_sum
from trainer.engine.input_transfer import to_device
from trainer.errors import Preempted
from trainer.models.layers import normalize
from trainer.training.loss import count_correct
from trainer.training.preemption import PreemptionSignal


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    batches: Iterator[Batch],
    device: torch.device,
    mean: list[float],
    std: list[float],
    preemption: PreemptionSignal,
    heartbeat: Callable[[], None],
) -> tuple[float, float, int]:
    """Return top-1 accuracy, top-5 accuracy (fractions) and the number of samples.

    Samples are counted exactly over all ranks; all ranks must take part. ``heartbeat`` is called
    after each batch.

    Raises Preempted on all ranks if any rank received a stop signal before it had read all of its
    samples.
    """
    model.eval()
    # top-1 hits, top-5 hits, samples, ranks that stopped
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    for batch in batches:
        if preemption.received:
            counts[3] = 1
            break
        images = normalize(to_device(batch.pixels, device), mean, std)
        counts[:3] += count_correct(model(images), to_device(batch.labels, device))
        heartbeat()
    top1, top5, samples, stopped = all_reduce_sum(counts).tolist()
    if stopped:
        raise Preempted
    return top1 / max(samples, 1), top5 / max(samples, 1), samples
