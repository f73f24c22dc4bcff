"""Layers as an engine runs them: the full model, or one pipeline stage of it."""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import isqrt

import torch
from torch import Tensor, nn
from torch.compiler import config as compiler
from torch.utils.checkpoint import checkpoint

from trainer.config.schema import TrainConfig
from trainer.engine.cuda_graphs import GraphedLayers
from trainer.engine.deepspeed.grad_reducer import GradReducer
from trainer.engine.dropout_rng import DropoutRNG
from trainer.models.batch_norm import BatchNorm2d
from trainer.models.layers import Value


class ModelChunk(nn.Sequential):
    """Consecutive layers of a model.

    Inputs and outputs are contiguous, as sending them between ranks requires. Inside, activations
    have the memory layout set by ``train.channels_last``.
    """

    def __init__(
        self, layers: "OrderedDict[str, nn.Module]", config: TrainConfig, draws: DropoutRNG
    ) -> None:
        super().__init__(layers)
        self._layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self._dropout_rng = draws
        self._graphs: GraphedLayers | None = None
        length = max(1, isqrt(len(layers))) if config.activation_checkpointing else len(layers)
        modules = list(layers.values())
        self._segments = [modules[i : i + length] for i in range(0, len(modules), length)]
        for first, *_ in self._segments:
            if isinstance(first, nn.ReLU):
                # its input belongs to another rank, or is saved for recomputation
                first.inplace = False
        if config.compile:
            # the number of kinds of block in a deep network
            limit = max(64, compiler.recompile_limit)
            for layer in self:
                # the hook of dropout must not be traced
                if not any(isinstance(module, nn.Dropout) for module in layer.modules()):
                    # dynamic: layers of one kind would share code for all sizes, which is slow to
                    # compile and to run
                    layer.compile(dynamic=False, recompile_limit=limit)

    def forward(self, value: Value) -> Value:
        value = _laid_out(value, self._layout)
        position = self._dropout_rng.advance() if self.training else (0, 0)
        if self.training and self._graphs is not None and isinstance(value, Tensor):
            return _laid_out(self._graphs(value), torch.contiguous_format)
        # not the last segment, whose backward pass follows immediately
        again = self._segments[:-1] if self.training else []
        for layers in again:
            value = checkpoint(
                self._run,
                layers,
                position,
                value,
                use_reentrant=False,
                context_fn=partial(_recomputing, layers),
            )
        for layers in self._segments[len(again) :]:
            value = self._run(layers, position, value)
        return _laid_out(value, torch.contiguous_format)

    def use_graphs(self, gradients: GradReducer, ranks: int) -> None:
        """Train with CUDA graphs.

        Only for a chunk that is the full model and recomputes no activations.
        """

        def run(layers: Sequence[nn.Module], value: Value) -> Value:
            return self._run(layers, self._dropout_rng.position, value)

        self._graphs = GraphedLayers(list(self), run, gradients, ranks)

    def _run(self, layers: Sequence[nn.Module], position: tuple[int, int], value: Value) -> Value:
        self._dropout_rng.position = position
        for layer in layers:
            value = layer(value)
        return value


def _recomputing(
    layers: Sequence[nn.Module],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts for the forward pass and for its recomputation.

    During recomputation, batch norm must not count the same batch again.
    """
    return nullcontext(), _StatisticsKept(layers)


class _StatisticsKept(AbstractContextManager[None]):
    """Context that leaves the running statistics of batch norm unchanged.

    It can be entered more than once: torch does so if a backward pass is split into several, as
    ZeRO 3 does.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        modules = (module for layer in layers for module in layer.modules())
        self._norms = [module for module in modules if isinstance(module, BatchNorm2d)]
        self._kept: list[tuple[float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        self._kept = [(norm.momentum, norm.num_batches_tracked) for norm in self._norms]
        for norm in self._norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, tracked) in zip(self._norms, self._kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def _laid_out(value: Value, layout: torch.memory_format) -> Value:
    def one(part: Tensor) -> Tensor:
        return part.contiguous(memory_format=layout) if part.dim() == 4 else part.contiguous()

    return tuple(map(one, value)) if isinstance(value, tuple) else one(value)
