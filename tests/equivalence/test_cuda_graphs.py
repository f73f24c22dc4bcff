"""Layers that are replayed, against the same layers run by torch.

Without a GPU nothing can be captured. Here a recording is repeated by running it once more, and
its result is copied to where the first one lies; `make test-gpu` has the graphs themselves.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from trainer.config.schema import TrainConfig
from trainer.engine import model_chunk as stage_module
from trainer.engine.cuda_graphs import GraphedLayers
from trainer.engine.deepspeed.grad_reducer import make_grad_reducer
from trainer.engine.dropout_rng import DropoutRNG
from trainer.engine.model_chunk import ModelChunk
from trainer.models import build_model


class RunsAgain:
    """A recorder for a processor."""

    replays = 0

    def warm_up(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, run: Callable[[], Tensor | None]) -> tuple[Callable[[], None], Tensor | None]:
        result = run()

        def replay() -> None:
            RunsAgain.replays += 1
            with torch.enable_grad():
                again = run()
            if result is not None and again is not None:
                result.copy_(again)

        return replay, result


class CannotCapture(RunsAgain):
    """As a GPU refuses an operation that waits for it: the end of the capture fails too."""

    def record(self, run: Callable[[], Tensor | None]) -> tuple[Callable[[], None], Tensor | None]:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore about it")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904


def _stage(name: str, size: int) -> ModelChunk:
    torch.manual_seed(0)
    model = build_model(name, 10, size, width=16)
    return ModelChunk(
        OrderedDict(model.named_children()), TrainConfig(max_steps=1), DropoutRNG(model, 0, 0, 1)
    ).train()


def _graphed(
    stage: ModelChunk, monkeypatch: pytest.MonkeyPatch, recorder: type[RunsAgain], ranks: int = 1
) -> object:
    """``ranks``: as many are said to share the gradients, so that there are several segments."""
    monkeypatch.setattr(
        stage_module,
        "GraphedLayers",
        lambda *arguments: GraphedLayers(*arguments, recorder=recorder),
    )
    gradients = make_grad_reducer(stage, 1)
    stage.use_graphs(gradients, ranks)
    RunsAgain.replays = 0
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
def test_replayed_layers_compute_the_gradients_and_statistics_of_torch(
    name: str, size: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two micro-batches; GoogLeNet's layers with dropout run eagerly."""
    plain, graphed = _stage(name, size), _stage(name, size)
    gradients = _graphed(graphed, monkeypatch, RunsAgain, ranks)
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
    assert RunsAgain.replays >= 8  # forward and backward, four times


def test_each_shape_is_recorded_and_a_fifth_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed = _stage("resnet8", 16)
    gradients = _graphed(graphed, monkeypatch, RunsAgain)
    replays = []
    for count in (2, 3, 4, 5, 6, 2):
        plain = _stage("resnet8", 16)
        before = RunsAgain.replays
        graphed.zero_grad()
        loss = _loss(graphed(_images(count, count, 16)), 0)
        gradients.prepare_for_backward(True)
        loss.backward()
        gradients.finalize_backward()
        _loss(plain(_images(count, count, 16)), 0).backward()
        torch.testing.assert_close(graphed.head.weight.grad, plain.head.weight.grad)
        replays.append(RunsAgain.replays - before)
    assert replays == [2, 2, 2, 2, 0, 2]


def test_layers_that_cannot_be_captured_run_eagerly_and_the_reason_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, graphed = _stage("resnet8", 16), _stage("resnet8", 16)
    gradients = _graphed(graphed, monkeypatch, CannotCapture)
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
    (message,) = (record.getMessage() for record in caplog.records)
    assert (
        message
        == "CUDA graphs are not used for images (4, 3, 16, 16): operation not permitted when stream is capturing"
    )
