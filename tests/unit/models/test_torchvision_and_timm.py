"""Networks match those of torchvision and timm with the same weights."""

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from trainer.models import build_model, get_model_spec, list_models
from trainer.models.state_dict_adapter import export_state, schemes_of, to_native_state_dict
from trainer.training.loss import weighted_loss

IN_TORCHVISION = [v.name for v in list_models() if "torchvision" in schemes_of(v.name)]
IN_TIMM = [v.name for v in list_models() if "timm" in schemes_of(v.name)]


def torchvision_model(name: str) -> nn.Module:
    options = {"init_weights": False} if name.startswith(("vgg", "googlenet")) else {}
    return torchvision.models.get_model(name, weights=None, **options)


def randomized(model: nn.Module) -> nn.Module:
    """Give a model of the meta device weights that preserve the signal's scale.

    The batch-norm statistics are not 0 and 1.
    """
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.data.uniform_(-1, 1, generator=generator).mul_((6 / fan_in) ** 0.5)
            if module.bias is not None:
                module.bias.data.uniform_(-0.1, 0.1, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            for value, low, high in ((module.weight, 0.3, 0.7), (module.bias, -0.1, 0.1)):
                value.data.uniform_(low, high, generator=generator)
            module.num_batches_tracked.zero_()
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def sharing_weights_of(
    reference: nn.Module, name: str, scheme: str, **options: object
) -> nn.Sequential:
    with torch.device("meta"):
        model = build_model(name, 1000, **options)
    model.load_state_dict(
        to_native_state_dict(reference.state_dict(), scheme, get_model_spec(name), model),
        assign=True,
        strict=True,
    )
    for parameter in model.parameters():
        parameter.requires_grad_()
    return model


def assert_close(ours: Tensor, theirs: Tensor, relative: float, what: str, scale: Tensor) -> None:
    difference = (ours - theirs).abs().max() / scale.abs().max()
    assert difference <= relative, f"{what}: relative difference {difference:.2e}"


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of the training loss; the seed gives both models the same dropout masks."""
    torch.manual_seed(1)
    result = model.train()(images)
    if hasattr(result, "aux_logits1"):  # torchvision's GoogLeNet
        result = (result.logits, result.aux_logits1, result.aux_logits2)
    weighted_loss(result, labels, torch.ones(len(labels)), len(labels), 1).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(name: str, reference: nn.Module, scheme: str, **options: object) -> None:
    state = randomized(reference).state_dict()
    ours = sharing_weights_of(reference, name, scheme, **options)
    assert sum(p.numel() for p in ours.parameters()) == sum(
        p.numel() for p in reference.parameters()
    )

    exported = export_state(scheme, name, ours)
    assert set(exported) == set(state)
    for key, value in state.items():
        assert exported[key].dtype == value.dtype
        assert torch.equal(exported[key], value), key

    # includes odd sizes, and windows over the border
    side = get_model_spec(name).smallest_input["imagenet"] + 1
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = reference.eval()(images)
        assert_close(ours.eval()(images), expected, 1e-5, "output", expected)

    labels = torch.tensor([3, 907])
    theirs = gradients(reference, images, labels)
    actual = gradients(ours, images, labels)
    names = dict(zip(ours.state_dict(), exported, strict=True))
    batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in reference.modules())
    for key, gradient in actual.items():
        expected = theirs[names[key]].reshape(gradient.shape)
        # a bias before batch norm has no effect, so its gradient is rounding error, which is small
        # relative to the gradient of the weights
        idle = batch_norm and key.startswith("conv") and key.endswith(".bias")
        scale = theirs[names[key.replace(".bias", ".weight")]] if idle else expected
        assert_close(gradient, expected, 1e-4, f"gradient of {key}", scale)


def test_every_torchvision_variant_is_compared() -> None:
    bases = {
        "alexnet",
        "googlenet",
        *(f"vgg{d}{bn}" for d in (11, 13, 16, 19) for bn in ("", "_bn")),
    }
    families = ("alexnet", "vgg", "googlenet", "resnet", "plain")
    torchvisions, timms = (
        {name for name in names if get_model_spec(name).family in families}
        for names in (IN_TORCHVISION, IN_TIMM)
    )
    assert torchvisions == bases | {f"resnet{d}" for d in (18, 34, 50, 101, 152)}
    assert timms == torchvisions - {"alexnet", "googlenet"}


@pytest.mark.parametrize("name", IN_TORCHVISION)
def test_outputs_and_gradients_match_torchvision(name: str) -> None:
    with torch.device("meta"):
        reference = torchvision_model(name)
    compare(name, reference, "torchvision")


@pytest.mark.parametrize("name", IN_TIMM)
def test_outputs_and_gradients_match_timm(name: str) -> None:
    with torch.device("meta"):
        reference = timm.create_model(name, drop_rate=0.0)
    compare(name, reference, "timm", **({"dropout": 0.0} if name.startswith("vgg") else {}))
