"""Training loss and accuracy counts."""

import torch
import torch.nn.functional as F
from torch import Tensor

AUXILIARY_WEIGHT = 0.3
"""Weight of each auxiliary head's loss (Szegedy et al. 2014, section 5)."""


def weighted_loss(
    logits: Tensor | tuple[Tensor, ...],
    labels: Tensor,
    weights: Tensor,
    global_weight: float,
    micro_batches: int,
    smoothing: float = 0.0,
    lam: float | Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of a micro-batch, scaled to average correctly over a global batch.

    The mean of the losses of all ``micro_batches`` of a global batch is the mean over its samples.
    The engine averages gradients over micro-batches and ranks, regardless of how many samples each
    has; this scale makes that the average over samples, also in the short last batch of an epoch.

    Args:
        logits: [N, classes], or a tuple of the main logits and those of the auxiliary heads.
        labels: int64 [N].
        weights: [N]; 0 for padding.
        global_weight: Sum of the weights over the global batch.
        micro_batches: Number of micro-batches in the global batch.
        smoothing: Fraction of each target that is spread over all classes (Szegedy et al. 2016,
            section 7).
        lam: If samples were mixed, the fraction of the sample's own label; the rest is the label at
            the same position in the reversed micro-batch.
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
    """Return int64 [3]: top-1 correct samples, top-5 correct samples and all samples.

    Ties go to the lower class.
    """
    ranked = torch.argsort(logits.float(), dim=1, descending=True, stable=True)[:, :5]
    hits = ranked == labels[:, None]
    return torch.stack(
        [hits[:, 0].sum(), hits.any(1).sum(), hits.new_full((), len(labels), dtype=torch.int64)]
    )
