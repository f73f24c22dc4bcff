"""What is minimized, and what is measured."""

import torch
import torch.nn.functional as F
from torch import Tensor

AUXILIARY_WEIGHT = 0.3
"""Of each auxiliary head's loss (Szegedy et al. 2014, section 5)."""


def weighted_loss(
    logits: Tensor | tuple[Tensor, ...],
    labels: Tensor,
    weights: Tensor,
    global_weight: float,
    micro_batches: int,
    smoothing: float = 0.0,
    lam: float | Tensor | None = None,
) -> Tensor:
    """Cross-entropy whose mean over all ``micro_batches`` of a global batch is the mean over its
    samples.

    logits [N, classes], those of auxiliary heads after the main ones in a tuple; labels int64 [N],
    weights [N] (0: padding); ``global_weight``: the sum of the weights over the global batch. The
    engine averages gradients over micro-batches and ranks, whatever each of them held; this scale
    makes that the average by samples, in an epoch's short last batch too. ``smoothing``: part of
    each target that is spread over all classes (Szegedy et al. 2016, section 7); ``lam``: part that
    is the sample's own label where samples were mixed, the rest being the label at its place in the
    reversed micro-batch.
    """

    def of(head: Tensor) -> Tensor:
        own = F.cross_entropy(head.float(), labels, reduction="none", label_smoothing=smoothing)
        if lam is None:
            return own
        other = F.cross_entropy(
            head.float(), labels.flip(0), reduction="none", label_smoothing=smoothing
        )
        return lam * own + (1 - lam) * other

    main, *auxiliary = logits if isinstance(logits, tuple) else (logits,)
    losses = of(main)
    for head in auxiliary:
        losses = losses + AUXILIARY_WEIGHT * of(head)
    return (losses * weights).sum() * (micro_batches / global_weight)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """int64 [3]: samples whose label is the first, or among the first five, and samples in all. A
    tie goes to the lower class.
    """
    ranked = torch.argsort(logits.float(), dim=1, descending=True, stable=True)[:, :5]
    hits = ranked == labels[:, None]
    return torch.stack(
        [hits[:, 0].sum(), hits.any(1).sum(), hits.new_full((), len(labels), dtype=torch.int64)]
    )
