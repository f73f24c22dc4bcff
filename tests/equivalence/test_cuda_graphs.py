"""Replayed layers, compared with the same layers run eagerly.

CUDA graphs need a GPU. Here a recorder for the CPU replays by running the layers again and copying
the result to the memory of the first one; `make test-gpu` tests real graphs.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from trainer.config.schema import TrainConfig
from trainer.engine import model_chunk
from trainer.engine.cuda_graphs import GraphedLayers
from trainer.engine.deepspeed.grad_reducer import make_grad_reducer
from trainer.engine.dropout_rng import DropoutRNG
from trainer.engine.model_chunk import ModelChunk
from trainer.models import build_model


class CpuRecorder:
    """A recorder for the CPU, which replays by running again."""

    replays = 0

    def warm_up(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, run: Callable[[], Tensor | None]) -> tuple[Callable[[], None], Tensor | None]:
        result = run()

        def replay() -> None:
            CpuRecorder.replays += 1
            with torch.enable_grad():
                replayed = run()
            if result is not None and replayed is not None:
                result.copy_(replayed)

        return replay, result


class FailingRecorder(CpuRecorder):
    """Fails as a GPU does for an operation that waits for it: ending the capture fails too."""

    def record(self, run: Callable[[], Tensor | None]) -> tuple[Callable[[], None], Tensor | None]:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore about it")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904


def _chunk(name: str, size: int) -> ModelChunk:
    torch.manual_seed(0)
    model = build_model(name, 10, size, width=16)
    return ModelChunk(
        OrderedDict(model.named_children()), TrainConfig(max_steps=1), DropoutRNG(model, 0, 0, 1)
    ).train()


def _graphed(
    chunk: ModelChunk, monkeypatch: pytest.MonkeyPatch, recorder: type[CpuRecorder], ranks: int = 1
) -> object:
    """Use graphs in ``chunk``.

    ``ranks``: number of ranks assumed to share the gradients; more than one gives several segments.
    """
    monkeypatch.setattr(
        model_chunk,
        "GraphedLayers",
        lambda *arguments: GraphedLayers(*arguments, recorder=recorder),
    )
    gradients = make_grad_reducer(chunk, 1)
    chunk.use_graphs(gradients, ranks)
    CpuRecorder.replays = 0
    return gradients


def _loss(outputs: Tensor | tuple[Tensor, ...], seed: int) -> Tensor:
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    labels = torch.randint(0, 10, (len(heads[0]),), generator=torch.Generator().manual_seed(seed))
    return sum((nn.functional.cross_entropy(head, labels) for head in heads), start=torch.zeros(()))


def _images(seed: int, count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "size", "ranks"), [("resnet8", 16, 1), ("resnet8", 16, 2), ("googlenet", 64, 2)]
)
def test_replayed_layers_match_eager_gradients_and_statistics(
    name: str, size: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two micro-batches; GoogLeNet's layers with dropout run eagerly."""
    plain, graphed = _chunk(name, size), _chunk(name, size)
    gradients = _graphed(graphed, monkeypatch, CpuRecorder, ranks)
    for step in range(2):
        plain.zero_grad()
        graphed.zero_grad()  # as the engine does
        for each in (plain, graphed):
            each._dropout_rng.begin(step)
        for micro_batch in range(2):
            seed = 2 * step + micro_batch
            images = _images(seed, 4, size)
            expected = _loss(plain(images), seed)
            expected.backward()
            loss = _loss(graphed(images), seed)
            gradients.prepare_for_backward(micro_batch == 1)
            loss.backward()
            assert torch.equal(loss, expected)
        gradients.finalize_backward()
        found = dict(graphed.named_parameters())
        for parameter_name, parameter in plain.named_parameters():
            torch.testing.assert_close(found[parameter_name].grad, parameter.grad)
            assert parameter.grad.any() or parameter_name.endswith("bias")
    for (_, expected), (buffer, found) in zip(
        plain.named_buffers(), graphed.named_buffers(), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=buffer)
    assert CpuRecorder.replays >= 8  # forward and backward, four times


def test_first_four_shapes_are_recorded_and_the_fifth_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphed = _chunk("resnet8", 16)
    gradients = _graphed(graphed, monkeypatch, CpuRecorder)
    replays = []
    for count in (2, 3, 4, 5, 6, 2):
        plain = _chunk("resnet8", 16)
        before = CpuRecorder.replays
        graphed.zero_grad()
        loss = _loss(graphed(_images(count, count, 16)), 0)
        gradients.prepare_for_backward(True)
        loss.backward()
        gradients.finalize_backward()
        _loss(plain(_images(count, count, 16)), 0).backward()
        torch.testing.assert_close(graphed.head.weight.grad, plain.head.weight.grad)
        replays.append(CpuRecorder.replays - before)
    assert replays == [2, 2, 2, 2, 0, 2]


def test_failed_capture_runs_eagerly_and_logs_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, graphed = _chunk("resnet8", 16), _chunk("resnet8", 16)
    gradients = _graphed(graphed, monkeypatch, FailingRecorder)
    for seed in range(2):
        plain.zero_grad()
        graphed.zero_grad()
        images = _images(seed, 4, 16)
        _loss(plain(images), seed).backward()
        loss = _loss(graphed(images), seed)
        gradients.prepare_for_backward(True)
        loss.backward()
        gradients.finalize_backward()
        for found, expected in zip(graphed.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad)
    for found, expected in zip(graphed.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    records = [record for record in caplog.records if record.name == "trainer.engine.cuda_graphs"]
    (message,) = (record.getMessage() for record in records)
    assert message == (
        "CUDA graphs are not used for images (4, 3, 16, 16): operation not permitted when stream "
        "is capturing"
    )
