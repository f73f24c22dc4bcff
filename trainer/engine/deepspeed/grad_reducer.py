"""Averages gradients over data-parallel ranks, in place of DeepSpeed's code at ZeRO 0 and 1.

DeepSpeed copies all gradients into a flat tensor after the backward pass, reduces it, and copies
them back, even with one rank. At ZeRO 1 it copies each gradient four times. Here a gradient is
copied once, while it is still in the cache, to its place in a persistent flat buffer. A bucket of
the buffer is reduced as soon as it is full, while the backward pass computes the gradients of
earlier layers (Li et al. 2020, "PyTorch Distributed", 3.2). The optimizer then uses views of the
buffer as its gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.dependencies.torch_compat import add_each
from trainer.engine.deepspeed import compat
from trainer.engine.deepspeed.zero1_layout import ParamOffsets

BUCKET_BYTES = 25 * 2**20
FIRST_BUCKET_BYTES = 2**20
"""Size of the first bucket to fill; it is small so that communication starts early."""


@dataclass
class _Bucket:
    """Adjacent gradients that are reduced together.

    ``missing`` is the number of gradients that the backward pass has not produced yet.
    """

    part: Tensor
    parameters: list[nn.Parameter] = field(default_factory=list)
    missing: int = 0


class GradReducer:
    """Reduces the gradients of one model on one rank.

    All ranks must take part in each backward pass and in ``finalize_backward``.
    """

    def __init__(
        self,
        module: nn.Module,
        buffers: Sequence[Tensor],
        places: Sequence[ParamOffsets],
        ranks: int,
    ) -> None:
        self.buffers, self._ranks = list(buffers), ranks
        self._views: dict[nn.Parameter, Tensor] = {}
        # IDs, because hashing a tensor calls a Python function
        self._filled: set[int] = set()
        self._handles: list[Any] = []
        self._last = True
        self.zero_before_step = False
        """Whether to zero the buffers before each step.

        CUDA graphs need it: they add to the buffers for every micro-batch of a step.
        """
        self._buckets: list[_Bucket] = []
        for buffer, offsets in zip(buffers, places, strict=True):
            for parameter, offset in offsets.items():
                self._views[parameter] = buffer.as_strided(
                    parameter.shape, parameter.stride(), offset
                )
                parameter.register_post_accumulate_grad_hook(self._on_grad_ready)  # type: ignore[no-untyped-call]
            self._buckets += _build_buckets(buffer, offsets)
        number = {parameter: i for i, parameter in enumerate(module.parameters())}
        # in the order in which backward passes fill them
        self._buckets.sort(key=lambda bucket: -min(number[p] for p in bucket.parameters))
        self._bucket_of = {
            id(parameter): bucket for bucket in self._buckets for parameter in bucket.parameters
        }
        self._waiting: list[_Bucket] = []

    def prepare_for_backward(self, last: bool) -> None:
        """Prepare for a backward pass. Call before each one.

        ``last`` marks the last backward pass of a step, which is the one that reduces the
        gradients.
        """
        self._last = last
        if self.zero_before_step and not self._filled:
            for buffer in self.buffers:
                buffer.zero_()
        self._waiting = list(self._buckets)
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def _on_grad_ready(self, parameter: Tensor) -> None:
        """Copy a gradient that the backward pass has just computed to its buffer."""
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        view = self._views[parameter]
        if id(parameter) in self._filled:
            view.add_(parameter.grad, alpha=1 / self._ranks)
        elif self._ranks == 1:
            view.copy_(parameter.grad)
        else:
            torch.mul(parameter.grad, 1 / self._ranks, out=view)
        parameter.grad = None
        self.arrived([parameter])

    def add(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """Add gradients to the buffers, which ``prepare_for_backward`` has set to zero.

        Call ``arrived`` afterwards.
        """
        came = [
            (self._views[p], g) for p, g in zip(parameters, gradients, strict=True) if g is not None
        ]
        if came:
            views, values = zip(*came, strict=True)
            add_each(views, values, alpha=1 / self._ranks)

    def arrived(self, parameters: Sequence[nn.Parameter]) -> None:
        """Mark the gradients of ``parameters`` as ready in the buffers; reduce full buckets."""
        arrived = [id(parameter) for parameter in parameters]
        self._filled.update(arrived)
        if self._last:
            for identity in arrived:
                self._bucket_of[identity].missing -= 1
            while self._waiting and not self._waiting[0].missing:  # in the same order on all ranks
                self._reduce(self._waiting.pop(0))

    def _reduce(self, bucket: _Bucket) -> None:
        if self._ranks > 1:
            self._handles.append(dist.all_reduce(bucket.part, async_op=True))

    def finalize_backward(self) -> None:
        """Wait for the reductions and set every parameter's ``grad`` to the mean over ranks.

        Call after the last backward pass of a step. A parameter without a gradient gets zeros.
        """
        for parameter, view in self._views.items():
            if id(parameter) not in self._filled:
                view.zero_()
            parameter.grad = view
        for bucket in self._waiting:
            self._reduce(bucket)
        for handle in self._handles:
            handle.wait()
        self._waiting, self._handles = [], []
        self._filled.clear()


def _build_buckets(buffer: Tensor, offsets: ParamOffsets) -> list[_Bucket]:
    """Split a buffer into buckets from its end, since a backward pass starts at the last layers."""
    buckets: list[_Bucket] = []
    stop, limit, parameters = buffer.numel(), FIRST_BUCKET_BYTES, []
    for parameter, offset in reversed(offsets.items()):
        parameters.append(parameter)
        if (stop - offset) * buffer.element_size() >= limit:
            buckets.append(_Bucket(buffer[offset:stop], parameters))
            stop, limit, parameters = offset, BUCKET_BYTES, []
    if parameters:
        buckets.append(_Bucket(buffer[:stop], parameters))
    return buckets


def make_grad_reducer(module: nn.Module, ranks: int) -> GradReducer:
    """Create a reducer for an optimizer that updates the module's parameters directly (ZeRO 0)."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    places: ParamOffsets = {}
    size = 0
    for parameter in parameters:
        places[parameter] = size
        size += parameter.numel()
    return GradReducer(module, [parameters[0].new_zeros(size)], [places], ranks)


class Zero1GradReducer(GradReducer):
    """Reducer for DeepSpeed's ZeRO 1, whose optimizer updates one flat partition per rank."""

    def __init__(self, module: nn.Module, optimizer: Any, ranks: int) -> None:
        self._optimizer = optimizer
        groups = compat.flat_groups(optimizer)
        super().__init__(
            module,
            [torch.zeros_like(group.weights) for group in groups],
            [group.offsets for group in groups],
            ranks,
        )
        self._sizes = [group.fp32_partition.numel() for group in groups]
        self._rank = dist.get_rank()

    def finalize_backward(self) -> None:
        super().finalize_backward()
        for number, (buffer, size) in enumerate(zip(self.buffers, self._sizes, strict=True)):
            part = buffer.narrow(0, self._rank * size, size)
            compat.set_averaged_gradient(self._optimizer, number, part)
