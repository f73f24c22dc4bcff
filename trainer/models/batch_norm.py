"""Batch norm in fp32 for every precision, and SyncBatchNorm over data-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm with fp32 statistics and arithmetic in every precision.

    Input and output keep their dtype. A half-precision engine keeps buffers in fp32 and converts
    the weights to half precision, which plain batch norm does not accept.
    """

    group: Any = None
    """Process group whose ranks share their statistics in training.

    All of its ranks must take part in each forward and backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.group is not None:
            return self._synchronized(x)
        if self.weight.dtype == torch.float32:
            return super().forward(x)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        assert self.momentum is not None
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(
            x,
            mean,
            var,
            self.weight.float(),
            self.bias.float(),
            self.training,
            self.momentum,
            self.eps,
        )

    def _synchronized(self, x: Tensor) -> Tensor:
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        values = x.float()
        mean, var, count = _shared_statistics(values.detach(), self.group)
        with torch.no_grad():
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            # unbiased, as in torch
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        out: Tensor = _NormalizeTogether.apply(
            values, self.weight.float(), self.bias.float(), mean, var, count, self.eps, self.group
        )  # type: ignore[no-untyped-call]
        return out.to(x.dtype)


def synchronize_batch_norm(model: nn.Module, group: Any) -> None:
    """Share the training statistics of the model's batch norms over the ranks of ``group``.

    With a group of one rank they are unchanged.
    """
    if dist.get_world_size(group) > 1:
        for module in model.modules():
            if isinstance(module, BatchNorm2d):
                module.group = group


def _shared_statistics(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return each channel's mean and biased variance over all ranks, and its number of values.

    ``x`` is this rank's [N, C, H, W]. Means and squared deviations from them are combined (Chan et
    al. 1979), because a difference of large sums would lose the variance.
    """
    channels = x.shape[1]
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    local = torch.cat([mean, var, mean.new_full((1,), x.numel() // channels)])
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local, group)
    of_all = torch.stack(parts)
    means, variances, counts = of_all[:, :channels], of_all[:, channels:-1], of_all[:, -1:]
    shares = counts / counts.sum()
    mean = (means * shares).sum(0)
    return mean, ((variances + (means - mean).square()) * shares).sum(0), counts.sum()


class _NormalizeTogether(torch.autograd.Function):
    """Batch norm with statistics that all ranks share.

    The gradient of the input passes through every rank's part in the statistics. The gradients of
    weight and bias are this rank's only, because the engine averages gradients over ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        group: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.group = eps, group
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        inverse = (var + ctx.eps).rsqrt()
        # as if the statistics were constants
        to_x, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([to_bias, to_weight])
        dist.all_reduce(sums, group=ctx.group)
        of_mean, of_deviation = sums / count
        slope, shift = (weight * inverse * inverse * of_deviation, weight * inverse * of_mean)
        through_statistics = (x - _channels(mean)).mul_(_channels(slope)).add_(_channels(shift))
        return to_x.sub_(through_statistics), to_weight, to_bias, None, None, None, None, None


def _channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
