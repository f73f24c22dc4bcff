"""Forward and backward passes replayed as CUDA graphs.

With few images per GPU a step is CPU-bound, because it launches some thousand small kernels. A CUDA
graph launches all kernels of several layers at once. The layers are divided into segments. Each
segment has one graph for its forward pass and one for its backward pass, which also adds the
gradients to the flat buffers. Between two segments, full buckets are reduced as usual.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.engine.deepspeed.grad_reducer import GradReducer
from trainer.models.batch_norm import BatchNorm2d
from trainer.models.layers import Value, on_image

_WARMUP_RUNS = 3  # cuDNN tries its algorithms and libraries allocate their workspaces
_SEGMENTS = 6  # with several ranks: enough to overlap communication with the backward pass
_SHAPES = 4
"""Number of input shapes that get CUDA graphs; further shapes run eagerly."""
_log = logging.getLogger(__name__)

RunLayers = Callable[[Sequence[nn.Module], Value], Value]


class Recorder(Protocol):
    """Recorder of kernels that write to fixed addresses."""

    def warm_up(self) -> AbstractContextManager[None]:
        """Return a context for the runs before the first recording."""

    def record(self, run: Callable[[], Tensor | None]) -> tuple[Callable[[], None], Tensor | None]:
        """Record the kernels that ``run`` launches.

        Returns a function that replays them, and the result of ``run``, which each replay
        overwrites.
        """


class CudaRecorder:
    """Recorder of ``torch.cuda.CUDAGraph`` objects that share a memory pool.

    They must be replayed in the order of recording.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self) -> AbstractContextManager[None]:
        return _side_stream()

    def record(self, run: Callable[[], Tensor | None]) -> tuple[Callable[[], None], Tensor | None]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's threads allocate pinned memory during the capture
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


@contextmanager
def _side_stream() -> Iterator[None]:
    """Use a side stream, as torch requires because the default stream cannot be captured."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class _Segment(nn.Module):
    """Consecutive layers, run as the engine runs them."""

    def __init__(self, layers: Sequence[nn.Module], run: RunLayers) -> None:
        super().__init__()
        self.layers, self._run = nn.ModuleList(layers), run

    def forward(self, image: Tensor) -> Value:
        return self._run(list(self.layers), image)


class _Graph:
    """CUDA graphs of one segment for one input shape, from image to image.

    The graph differentiates with respect to aliases of the parameters, which are separate leaf
    tensors with the same memory. DeepSpeed keeps the ``AccumulateGrad`` nodes of the parameters
    alive, and these make the default stream wait for every gradient, which a capture does not
    allow.
    """

    def __init__(self, layers: Sequence[nn.Module], run: RunLayers, gradients: GradReducer) -> None:
        self._segment, self._grad_reducer = _Segment(layers, run), gradients
        trained = {n: p for n, p in self._segment.named_parameters() if p.requires_grad}
        self._parameters = list(trained.values())
        self._aliases = {n: p.detach().requires_grad_() for n, p in trained.items()}
        self._anchor = torch.zeros((), requires_grad=True)
        self.input = self.output = self.gradient = torch.empty(0)
        self.input_gradient: Tensor | None = None
        self._result = torch.empty(0)
        self._replay_forward: Callable[[], None] = _nothing
        self._replay_backward: Callable[[], None] = _nothing

    def _apply(self) -> Tensor:
        result = torch.func.functional_call(self._segment, self._aliases, (self.input,))
        if not isinstance(result, Tensor):
            raise RuntimeError("the segment returns several tensors")
        self._result = result
        return result.detach()

    def _differentiate(self) -> Tensor | None:
        inputs = [self.input] if self.input.requires_grad else []
        gradients = torch.autograd.grad(
            self._result,
            [*inputs, *self._aliases.values()],
            self.gradient,
            allow_unused=True,
        )
        self._grad_reducer.add(self._parameters, gradients[len(inputs) :])
        return gradients[0] if inputs else None

    def warm_up(self, image: Tensor, needs_gradient: bool) -> Tensor:
        """Run forward and backward passes; return the output for ``image``."""
        self.input = image.detach().requires_grad_(needs_gradient)
        for _ in range(_WARMUP_RUNS):
            output = self._apply()
            self.gradient = torch.zeros_like(output)
            self._differentiate()
        self._result = torch.empty(0)
        return output

    def record_forward(self, recorder: Recorder, fixed_input: Tensor, needs_gradient: bool) -> None:
        self.input = fixed_input.detach().requires_grad_(needs_gradient)
        self._replay_forward, output = recorder.record(self._apply)
        assert output is not None
        self.output = output

    def record_backward(self, recorder: Recorder, fixed_gradient: Tensor | None) -> None:
        """Record the backward pass.

        ``fixed_gradient`` is the tensor to which the next segment's graph writes the gradient of
        this segment's output, or None if the next segment has no graph.
        """
        self.gradient = torch.empty_like(self.output) if fixed_gradient is None else fixed_gradient
        self._replay_backward, self.input_gradient = recorder.record(self._differentiate)

    def forget_activations(self) -> None:
        """Release torch's references to activations.

        The graphs' memory pool keeps the activations that the backward graph reads.
        """
        self._result = torch.empty(0)

    def __call__(self, image: Tensor) -> Tensor:
        output: Tensor = _Replayed.apply(image, self._anchor, self)  # type: ignore[no-untyped-call]
        return output

    def forward(self, image: Tensor) -> Tensor:
        if image.data_ptr() != self.input.data_ptr():
            self.input.data.copy_(image)
        self._replay_forward()
        return self.output.detach()

    def backward(self, gradient: Tensor) -> Tensor | None:
        if gradient.data_ptr() != self.gradient.data_ptr():
            self.gradient.copy_(gradient)
        self._replay_backward()
        self._grad_reducer.arrived(self._parameters)
        return None if self.input_gradient is None else self.input_gradient.detach()


class _Replayed(torch.autograd.Function):
    """Autograd function that replays a segment's graphs.

    The anchor requires a gradient, so that autograd calls ``backward`` although the parameters are
    not inputs: the graph adds their gradients to the buffers.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, anchor: Tensor, graph: _Graph) -> Tensor:
        ctx.graph = graph
        return graph.forward(image)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.graph.backward(gradient), None, None


def _nothing() -> None:
    """Do nothing: the replay function before recording."""


class GraphedLayers:
    """Layers in training, with CUDA graphs for those that can be captured.

    Graphs are captured at the first call with an input shape. From then on the weights must keep
    their addresses. ``run`` runs some of the layers eagerly. ``recorder`` creates the recorder for
    one shape.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        run: RunLayers,
        gradients: GradReducer,
        ranks: int,
        recorder: Callable[[], Recorder] = CudaRecorder,
    ) -> None:
        self._layers, self._run = layers, run
        self._grad_reducer, self._recorder = gradients, recorder
        self._segments = _segments(layers, 1 if ranks == 1 else _SEGMENTS)
        self._graphs: dict[Any, list[_Graph | None] | None] = {}
        gradients.zero_before_step = True
        for segment, _ in self._segments:
            if isinstance(segment[0], nn.ReLU):
                segment[0].inplace = False  # its input is another segment's output

    def __call__(self, image: Tensor) -> Value:
        key = (image.shape, image.dtype, image.stride())
        if key not in self._graphs:
            self._graphs[key] = self._captured(image) if len(self._graphs) < _SHAPES else None
        graphs = self._graphs[key]
        if graphs is None:
            return self._run(self._layers, image)
        value: Value = image
        for (segment, _), graph in zip(self._segments, graphs, strict=True):
            value = self._run(segment, value) if graph is None else on_image(graph, value)
        return value

    def _captured(self, image: Tensor) -> list[_Graph | None] | None:
        buffers = [buffer for layer in self._layers for buffer in layer.buffers()]
        saved = [buffer.clone() for buffer in buffers]
        try:
            return self._capture(image)
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a failed capture raises too
            reason = str(cause).partition("\n")[0]
            _log.warning("CUDA graphs are not used for images %s: %s", tuple(image.shape), reason)
            if image.is_cuda:
                _end_capture_of_random_numbers()
            return None
        finally:
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)

    def _capture(self, image: Tensor) -> list[_Graph | None]:
        recorder = self._recorder()
        graphs = [
            _Graph(s, self._run, self._grad_reducer) if able else None for s, able in self._segments
        ]
        inputs: list[Tensor] = []
        with recorder.warm_up():
            value: Value = image
            for (segment, _), graph in zip(self._segments, graphs, strict=True):
                inputs.append(_image(value))
                if graph is None:
                    with torch.no_grad():
                        value = self._run(segment, value)
                else:
                    needs_gradient = len(inputs) > 1
                    value = on_image(partial(graph.warm_up, needs_gradient=needs_gradient), value)
        previous: _Graph | None = None
        for number, graph in enumerate(graphs):
            if graph is not None:
                fixed = inputs[number].detach().clone() if previous is None else previous.output
                graph.record_forward(recorder, fixed, number > 0)
            previous = graph
        following: _Graph | None = None
        for graph in reversed(graphs):
            if graph is not None:
                graph.record_backward(recorder, following.input_gradient if following else None)
            following = graph
        for graph in graphs:
            if graph is not None:
                graph.forget_activations()
        return graphs


def _end_capture_of_random_numbers() -> None:
    """Reset the CUDA generator after a failed capture, which leaves it in a bad state.

    In that state dropout raises.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


def _image(value: Value) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def _segments(layers: Sequence[nn.Module], count: int) -> list[tuple[list[nn.Module], bool]]:
    """Split layers into segments with about ``1 / count`` of the weights each.

    Returns each segment with a flag that says whether it can be captured.
    """
    total = sum(p.numel() for layer in layers for p in layer.parameters())
    segments: list[tuple[list[nn.Module], bool]] = []
    size = 0
    for layer in layers:
        able = _can_be_captured(layer)
        if not segments or segments[-1][1] != able or (able and size * count >= total):
            segments.append(([], able))
            size = 0
        segments[-1][0].append(layer)
        size += sum(p.numel() for p in layer.parameters())
    return segments


def _can_be_captured(layer: nn.Module) -> bool:
    """Return whether a layer can be captured.

    Two layers cannot: dropout, whose mask depends on a seed that is set in each step, and batch
    norm that communicates.
    """
    for module in layer.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return False
        if isinstance(module, BatchNorm2d) and module.group is not None:
            return False
    return True
