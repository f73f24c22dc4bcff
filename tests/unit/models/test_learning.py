"""Each family can memorize 64 real images in a bounded number of steps."""

import pytest
import torch
from torch import Tensor

from trainer.models import build_model
from trainer.training.loss import weighted_loss

STEPS = 400


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alexnet", {"width": 16}),
        ("alexnet2012", {"width": 32}),
        ("vgg11", {"width": 16}),
        ("vgg11_bn", {"width": 8}),
        ("googlenet2014", {"width": 16}),
        ("resnet8", {}),
        ("resnet18", {"width": 8, "stem": "small"}),
        ("plain8", {}),
    ],
)
def test_network_memorizes_64_images(
    name: str, options: dict[str, object], real_images: tuple[Tensor, Tensor]
) -> None:
    images, labels = real_images
    torch.manual_seed(0)
    if name.startswith(("alexnet", "vgg", "googlenet")):
        options = {"stem": "small", "dropout": 0.0, **options}
    model = build_model(name, 10, image_size=16, **options).to(memory_format=torch.channels_last)
    # N(0, 0.01) is meant for hundreds of channels; with few, the signal is small at first
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3 if name == "alexnet2012" else 1e-3)
    for step in range(STEPS):
        loss = weighted_loss(model.train()(images), labels, torch.ones(64), 64, 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            with torch.inference_mode():
                correct = (model.eval()(images).argmax(1) == labels).sum().item()
            if correct == 64:
                return
    pytest.fail(f"{correct} of 64 after {STEPS} steps, loss {loss.item():.3f}")
