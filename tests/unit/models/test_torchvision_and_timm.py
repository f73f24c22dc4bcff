"""Our networks compute what torchvision's and timm's compute with the same weights."""

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
    """A model of the meta device gets weights that keep the signal's size, and batch-norm
    statistics that are not 0 and 1.
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


def sharing_weights_of(peer: nn.Module, name: str, scheme: str, **options: object) -> nn.Sequential:
    with torch.device("meta"):
        model = build_model(name, 1000, **options)
    model.load_state_dict(
        to_native_state_dict(peer.state_dict(), scheme, get_model_spec(name), model),
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
    """Of the training loss; the same seed gives both models' dropout the same masks."""
    torch.manual_seed(1)
    result = model.train()(images)
    if hasattr(result, "aux_logits1"):  # torchvision's GoogLeNet
        result = (result.logits, result.aux_logits1, result.aux_logits2)
    weighted_loss(result, labels, torch.ones(len(labels)), len(labels), 1).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(name: str, peer: nn.Module, scheme: str, **options: object) -> None:
    state = randomized(peer).state_dict()
    ours = sharing_weights_of(peer, name, scheme, **options)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())

    exported = export_state(scheme, name, ours)
    assert set(exported) == set(state)
    for key, value in state.items():
        assert exported[key].dtype == value.dtype
        assert torch.equal(exported[key], value), key

    side = (
        get_model_spec(name).smallest_input["imagenet"] + 1
    )  # odd sizes and windows over the border too
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = peer.eval()(images)
        assert_close(ours.eval()(images), expected, 1e-5, "output", expected)

    labels = torch.tensor([3, 907])
    theirs = gradients(peer, images, labels)
    own = gradients(ours, images, labels)
    names = dict(zip(ours.state_dict(), exported, strict=True))
    batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in peer.modules())
    for key, gradient in own.items():
        expected = theirs[names[key]].reshape(gradient.shape)
        # a bias before batch norm has no effect: what its gradient holds is rounding, small beside
        # that of its weights
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
def test_same_as_torchvision(name: str) -> None:
    with torch.device("meta"):
        peer = torchvision_model(name)
    compare(name, peer, "torchvision")


@pytest.mark.parametrize("name", IN_TIMM)
def test_same_as_timm(name: str) -> None:
    with torch.device("meta"):
        peer = timm.create_model(name, drop_rate=0.0)
    compare(name, peer, "timm", **({"dropout": 0.0} if name.startswith("vgg") else {}))
