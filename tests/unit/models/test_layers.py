"""The layers of the networks, against the formulas of their papers."""

import pytest
import torch
from torch import nn

from trainer.models import build_model
from trainer.models.batch_norm import BatchNorm2d
from trainer.models.googlenet import AuxiliaryHead, Inception
from trainer.models.layers import LocalResponseNorm, ShortcutA
from trainer.models.resnet import Block, Bottleneck
from trainer.training.loss import weighted_loss


def test_local_response_norm_matches_the_formula_of_the_paper() -> None:
    x = torch.randn(2, 7, 3, 3)
    norm = LocalResponseNorm(size=5, alpha=1e-4, beta=0.75, k=2.0)
    expected = torch.empty_like(x)
    for i in range(7):  # Krizhevsky et al. 2012, 3.3
        nearest = x[:, max(0, i - 2) : min(6, i + 2) + 1]
        expected[:, i] = x[:, i] / (2.0 + 1e-4 * nearest.square().sum(1)) ** 0.75
    torch.testing.assert_close(norm(x), expected)
    large = LocalResponseNorm(alpha=0.1)(x)
    torch.testing.assert_close(
        large, nn.LocalResponseNorm(5, alpha=0.5, beta=0.75, k=2.0)(x)
    )  # which divides alpha by 5


def test_local_response_norm_does_not_overflow_in_half_precision() -> None:
    x = torch.full((1, 5, 1, 1), 1000.0)
    half = LocalResponseNorm()(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), LocalResponseNorm()(x), rtol=1e-3, atol=0)


def test_batch_norm_computes_in_fp32_for_half_precision() -> None:
    """Half precision would lose the variance of large values."""
    norm, half = BatchNorm2d(4), BatchNorm2d(4)
    half.weight.data, half.bias.data = half.weight.data.half(), half.bias.data.half()
    x = (torch.randn(8, 4, 5, 5) + 300).half()
    out = half(x)
    assert out.dtype == torch.float16
    assert half.running_var is not None
    assert half.running_var.dtype == torch.float32
    torch.testing.assert_close(out.float(), norm(x.float()), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(half.running_var, norm.running_var)
    assert half.num_batches_tracked == 1


def test_shortcut_a_is_strided_and_padded_with_zeros() -> None:
    x = torch.randn(1, 2, 4, 4)
    out = ShortcutA(3, 2)(x)
    assert out.shape == (1, 5, 2, 2)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2])
    assert not out[:, 2:].any()


@pytest.mark.parametrize("depth", [8, 18, 50])
def test_plain_network_equals_the_residual_network_without_shortcuts(depth: int) -> None:
    residual, plain = (
        build_model(f"resnet{depth}", 10, width=4),
        build_model(f"plain{depth}", 10, width=4),
    )
    assert [name for name, _ in residual.named_children()] == [
        name for name, _ in plain.named_children()
    ]
    weights = {
        key: value for key, value in residual.state_dict().items() if ".shortcut." not in key
    }
    plain.load_state_dict(weights, strict=True)
    for module in residual.modules():
        if isinstance(module, Block):
            module.shortcut = None
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(residual(x), plain(x))


@pytest.mark.parametrize(
    ("stride_in", "first", "second"), [(None, 1, 2), ("3x3", 1, 2), ("1x1", 2, 1)]
)
def test_stride_in_selects_the_convolution_with_the_stride(
    stride_in: str | None, first: int, second: int
) -> None:
    block = build_model("resnet50", 10, width=4, stride_in=stride_in).get_submodule("stage2_0")
    assert isinstance(block, Bottleneck)
    assert (block.conv1.stride[0], block.conv2.stride[0]) == (first, second)


def test_zero_init_gamma_makes_each_block_its_shortcut() -> None:
    model = build_model("resnet20", 10, width=4, zero_init_gamma=True)
    x = torch.rand(2, 4, 8, 8)  # nonnegative, like the output of the previous block
    torch.testing.assert_close(model.get_submodule("stage1_1")(x), x)


def test_alexnet2012_initialization_matches_the_paper() -> None:
    torch.manual_seed(0)
    model = build_model("alexnet2012", 10, width=32)
    ones = {
        name
        for name, layer in model.named_children()
        if getattr(layer, "bias", None) is not None and layer.bias.eq(1).all()
    }
    assert ones == {"conv2", "conv4", "conv5", "fc6", "fc7"}
    assert model.get_submodule("fc6").weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert model.get_submodule("conv2").groups == 2


def test_googlenet2014_has_5x5_and_googlenet_3x3_kernels() -> None:
    for name, kernel in (("googlenet2014", 5), ("googlenet", 3)):
        module = build_model(name, 10, width=8).get_submodule("inception3a")
        assert isinstance(module, Inception)
        assert module.branch5.conv.kernel_size == (kernel, kernel)


def test_auxiliary_heads_add_logits_only_in_training() -> None:
    model = build_model("googlenet2014", 10, width=8)
    head = model.get_submodule("aux2")
    assert isinstance(head, AuxiliaryHead)
    image, first = torch.randn(2, head.conv.conv.in_channels, 14, 14), torch.randn(2, 10)
    passed = head.train()((image, first))
    assert passed[0] is image
    assert passed[1] is first
    assert passed[2].shape == (2, 10)
    assert head.eval()(image) is image
    pooled = []
    head.conv.register_forward_hook(lambda module, inputs, output: pooled.append(inputs[0]))
    head.logits(image)
    torch.testing.assert_close(
        pooled[0], nn.functional.avg_pool2d(image, 5, 3)
    )  # the paper's 4x4, exactly


def test_auxiliary_losses_have_weight_0_3() -> None:
    logits, first, second = torch.randn(3, 4, 5)
    labels, weights = torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    loss = [weighted_loss(head, labels, weights, 3.0, 1) for head in (logits, first, second)]
    together = weighted_loss((logits, first, second), labels, weights, 3.0, 1)
    torch.testing.assert_close(together, loss[0] + 0.3 * (loss[1] + loss[2]))


def test_options_are_passed_to_the_layers() -> None:
    tanh = build_model("vgg11", 10, width=4, activation="tanh", batch_norm=True, dropout=0.1)
    kinds = [type(m) for m in tanh.modules()]
    assert kinds.count(nn.Tanh) == 10
    assert nn.ReLU not in kinds
    assert kinds.count(BatchNorm2d) == 8
    assert {m.p for m in tanh.modules() if isinstance(m, nn.Dropout)} == {0.1}
    bare = build_model("resnet18", 10, width=4, batch_norm=False, stem="small")
    assert not any(isinstance(m, BatchNorm2d | nn.MaxPool2d) for m in bare.modules())
    assert all(m.bias is not None for m in bare.modules() if isinstance(m, nn.Conv2d))
