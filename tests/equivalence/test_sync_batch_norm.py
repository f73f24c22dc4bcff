"""Batch norm over two ranks, compared with torch's batch norm of the full batch in one process."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from trainer.models.batch_norm import BatchNorm2d, synchronize_batch_norm

CHANNELS, STEPS = 5, 3
SHARES = (slice(0, 3), slice(3, 8))  # of unequal size
CASES = [
    (0.0, torch.float32, torch.contiguous_format),
    (0.0, torch.float32, torch.channels_last),
    # at this mean, a difference of squares would lose the variance
    (300.0, torch.float32, torch.contiguous_format),
    (0.0, torch.bfloat16, torch.contiguous_format),
    (0.0, torch.float16, torch.channels_last),
]


def _batch(step: int, offset: float, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the input and the gradient of the loss, of both ranks.

    Channels differ in scale, ranks in mean.
    """
    torch.manual_seed(step)
    x = torch.randn(8, CHANNELS, 6, 4) * torch.arange(1.0, CHANNELS + 1).view(1, -1, 1, 1) + offset
    x[SHARES[1]] += 0.7
    return x.to(kind), torch.randn(8, CHANNELS, 6, 4).to(kind)


def _initialized(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    torch.manual_seed(99)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def _trained(
    norm: nn.BatchNorm2d,
    share: slice,
    offset: float,
    kind: torch.dtype,
    layout: torch.memory_format,
) -> dict[str, Tensor]:
    """Train for some steps; return the state, and outputs and gradients of the last step."""
    for step in range(STEPS):
        x, gradient = _batch(step, offset, kind)
        x = x[share].to(norm.weight.dtype if norm.weight.dtype == torch.float64 else kind)
        x = x.contiguous(memory_format=layout).requires_grad_()
        out = norm(x)
        out.backward(gradient[share].to(out.dtype))
    assert out.dtype == x.dtype
    state = {name: value.detach() for name, value in norm.state_dict().items()}
    return state | {
        "out": out.detach(),
        "x": x.grad,
        "d_weight": norm.weight.grad,
        "d_bias": norm.bias.grad,
    }


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    results = []
    for offset, kind, layout in CASES:
        model = nn.Sequential(nn.Identity(), _initialized(BatchNorm2d(CHANNELS)))
        norm = model[1]
        norm.weight.data, norm.bias.data = norm.weight.data.to(kind), norm.bias.data.to(kind)
        synchronize_batch_norm(model, alone)
        assert norm.group is None, "a group of one rank uses plain batch norm"
        synchronize_batch_norm(model, dist.group.WORLD)
        results.append(_trained(norm, SHARES[rank], offset, kind, layout))
        if rank == 0:  # evaluation does not communicate
            results[-1]["evaluated"] = norm.eval()(_batch(7, offset, kind)[0]).detach()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Tensor]]]:
    """The results by rank and case."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_ranks_match_one_process_with_the_full_batch(
    case: int, results: list[list[dict[str, Tensor]]]
) -> None:
    offset, kind, _ = CASES[case]
    first, second = (rank_results[case] for rank_results in results)
    plain = _initialized(nn.BatchNorm2d(CHANNELS)).to(kind).double()
    want = _trained(plain, slice(None), offset, kind, torch.contiguous_format)

    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if kind == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    )
    if offset:
        tolerance = {"rtol": 1e-4, "atol": 1e-4}  # the spacing of fp32 numbers at 300 is 3e-5

    def same(got: Tensor, name: str) -> None:
        torch.testing.assert_close(
            got.double(), want[name].double(), **tolerance, msg=lambda text: f"{name}: {text}"
        )

    for name in ("out", "x"):
        same(torch.cat([first[name], second[name]]), name)
    for name in ("d_weight", "d_bias"):
        same(first[name].double() + second[name].double(), name)
        assert not torch.allclose(first[name], second[name]), (
            "local gradients, which the engine averages"
        )
    for name in ("running_mean", "running_var"):
        assert torch.equal(first[name], second[name])
        assert first[name].dtype == torch.float32
        same(first[name], name)
    assert first["num_batches_tracked"] == want["num_batches_tracked"] == STEPS
    want["evaluated"] = plain.eval()(_batch(7, offset, kind)[0].double()).detach()
    same(first["evaluated"], "evaluated")
