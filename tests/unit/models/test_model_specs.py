"""Properties of every network in the registry."""

import os
import shutil

import pytest
import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.models import build_model, get_model_spec, list_models
from trainer.models.batch_norm import BatchNorm2d
from trainer.training.loss import weighted_loss

NAMES = [v.name for v in list_models()]
FAMILIES = ("alexnet", "vgg", "googlenet", "resnet", "plain")
"""Families whose batch norms are known here; a new family must pass all other tests."""
ONE_PER_FAMILY = ["alexnet2012", "vgg11_bn", "googlenet2014", "resnet50", "resnet8", "plain18"]
SOME = NAMES if os.environ.get("CONVOY_MATRIX") else ONE_PER_FAMILY
WIDTH = 8


def narrow(name: str, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    return build_model(name, 10, width=WIDTH, **options)


def images_for(name: str, count: int = 2, stem: str | None = None) -> Tensor:
    variant = get_model_spec(name)
    side = variant.smallest_input[stem or variant.default_stem]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    labels = torch.arange(len(images)) % 10
    return weighted_loss(model(images), labels, torch.ones(len(images)), len(images), 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_finite_gradient(name: str) -> None:
    model = narrow(name).train()
    loss_of(model, images_for(name, 4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_accepts_one_image_of_any_size(name: str) -> None:
    model = narrow(name).eval()
    smallest = images_for(name).shape[-1]
    for height, width in ((smallest, smallest), (smallest + 6, smallest + 13), (75, 66)):
        logits = model(torch.randn(1, 3, height, width))
        assert logits.shape == (1, 10)
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_gives_the_same_output(name: str) -> None:
    model = narrow(name).eval()
    images = images_for(name)
    expected = model(images)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        model(images.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("stem", "name"), [(stem, v.name) for v in list_models() for stem in v.smallest_input]
)
def test_images_below_the_smallest_input_are_errors(name: str, stem: str) -> None:
    variant = get_model_spec(name)
    smallest = variant.smallest_input[stem]
    options = {"width": WIDTH} | ({"stem": stem} if "stem" in variant.options else {})
    with torch.device("meta"):
        model = build_model(name, 10, image_size=smallest, **options).train()
        if variant.family in ("alexnet", "vgg", "googlenet"):  # others are padded for any size
            assert isinstance(model(torch.empty(2, 3, smallest, smallest)), Tensor | tuple)
            with pytest.raises(RuntimeError):
                model(torch.empty(2, 3, smallest - 1, smallest - 1))
    message = rf"data\.image_size: {smallest - 1} is too small for {name}.* {smallest} "
    with torch.device("meta"), pytest.raises(UserError, match=message):
        build_model(name, 10, image_size=smallest - 1, **options)


def test_networks_with_the_option_stem_state_the_smallest_input_of_each() -> None:
    stems = [set(v.smallest_input) for v in list_models() if "stem" in v.options]
    assert len(stems) >= 36
    assert all(s == {"imagenet", "small"} for s in stems)


@pytest.mark.parametrize("name", NAMES)
def test_value_between_any_two_layers_is_tensors(name: str) -> None:
    """A pipeline engine can therefore split the model between any two layers."""
    model = narrow(name, **({"dropout": 0.0} if "dropout" in get_model_spec(name).options else {}))
    images = images_for(name, 4)
    for training in (True, False):
        model.train(training)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        expected_outputs = model(images)
        value: object = images
        for layer in model:
            value = layer(value)
            parts = value if isinstance(value, tuple) else (value,)
            assert all(isinstance(part, Tensor) for part in parts)
        heads = 3 if training and name.startswith("googlenet") else 1
        assert len(parts) == heads
        for part, expected in zip(
            parts,
            expected_outputs if isinstance(expected_outputs, tuple) else (expected_outputs,),
            strict=True,
        ):
            torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("name", NAMES)
def test_all_batch_norms_compute_in_fp32(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, 10)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(type(m) is BatchNorm2d for m in norms)
    if get_model_spec(name).family in FAMILIES:
        assert bool(norms) == (
            name.startswith(("resnet", "plain")) or name.endswith("_bn") or name == "googlenet"
        )


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_half_precision_weights_train(name: str) -> None:
    """A 16-bit engine converts weights to half precision and keeps buffers in fp32."""
    model = narrow(name).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    loss = loss_of(model, images_for(name, 4).bfloat16())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(b.dtype in (torch.float32, torch.int64) for b in model.buffers())


@pytest.mark.parametrize("name", SOME)
def test_torch_export_gives_the_same_output(name: str) -> None:
    model = narrow(name).eval()
    images = images_for(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    three = torch.cat([images, images[:1]])
    torch.testing.assert_close(exported.module()(three), model(three))


def _assert_trains_alike(name: str, backend: str) -> None:
    model = narrow(name).train()
    images = images_for(name, 4)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and backend == "inductor":
            module.p = 0.0  # its kernels draw other masks
    # graphs that other networks compiled for shared layers count against a limit
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.manual_seed(3)
    loss = loss_of(compiled, images)
    loss.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(3)
    expected = loss_of(model, images)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for key, parameter in model.named_parameters():
        difference = (gradients[key] - parameter.grad).norm()
        assert difference / (parameter.grad.norm() + 1e-6) < 1e-2, key


@pytest.mark.parametrize("name", SOME)
def test_compiles_to_a_single_graph(name: str) -> None:
    _assert_trains_alike(name, "eager")  # only the capture can fail; kernels take long


@pytest.mark.skipif(shutil.which("g++") is None, reason="CPU kernels need a C++ compiler")
@pytest.mark.parametrize("name", NAMES if os.environ.get("CONVOY_MATRIX") else ["resnet8"])
def test_compiled_kernels_give_the_same_gradients(name: str) -> None:
    _assert_trains_alike(name, "inductor")


def test_unknown_model_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no model 'resnet51'; nearest: .*resnet50"):
        build_model("resnet51", 10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet8",
            {"dropout": 0.5},
            r"model\.dropout: resnet8 has no such option; those of the resnet family: "
            r".*zero_init_gamma",
        ),
        (
            "alexnet",
            {"batch_norm": True},
            r"model\.batch_norm: alexnet has no such option; .*alexnet family: activation, dropout",
        ),
        ("resnet18", {"stride_in": "1x1"}, r"model\.stride_in: only networks of bottleneck"),
        ("plain18", {"zero_init_gamma": True}, r"model\.zero_init_gamma: needs shortcuts"),
        (
            "resnet18",
            {"zero_init_gamma": True, "batch_norm": False},
            r"model\.zero_init_gamma: needs",
        ),
        ("alexnet2012", {"width": 9}, r"model\.width: 9 is not divisible by 2"),
    ],
)
def test_options_that_do_not_apply_are_errors(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_model(name, 10, **options)
