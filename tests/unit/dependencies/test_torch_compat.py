"""Private names of torch and torchvision, against the installed versions and public functions."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.models import ResNet50_Weights

from trainer.dependencies import torch_compat
from trainer.errors import UserError


def test_the_installed_torch_has_every_attribute() -> None:
    torch_compat.check_torch()


@pytest.mark.parametrize("name", torch_compat.FUNCTIONS)
def test_a_missing_function_is_an_error_that_names_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch, name)
    with pytest.raises(UserError, match=rf"torch \d.*: torch has no attribute '{name}'"):
        torch_compat.check_torch()


def test_a_missing_attribute_of_storages_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_compat, "STORAGE_ATTRIBUTES", ("_cdata", "_moved"))
    with pytest.raises(UserError, match="UntypedStorage has no attribute '_moved'"):
        torch_compat.check_torch()


def test_many_tensors_change_as_each_alone() -> None:
    torch.manual_seed(0)
    tensors, others = ([torch.randn(3), torch.randn(2, 2)] for _ in range(2))
    sums = [a + 0.25 * b for a, b in zip(tensors, others, strict=True)]
    torch_compat.add_each(tensors, others, alpha=0.25)
    torch.testing.assert_close(tensors, sums)
    means = [torch.lerp(a, b, 0.1) for a, b in zip(tensors, others, strict=True)]
    torch_compat.interpolate_each(tensors, others, 0.1)
    torch.testing.assert_close(tensors, means)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_views_share_the_id_of_a_storage(device: str) -> None:
    first, second = torch.empty(4, device=device), torch.empty(4, device=device)
    assert torch_compat.storage_id(first) == torch_compat.storage_id(first[1:].view(3, 1))
    assert torch_compat.storage_id(first) != torch_compat.storage_id(second)


def test_published_accuracies() -> None:
    # the table in torchvision's documentation
    assert torch_compat.published_accuracy(ResNet50_Weights.IMAGENET1K_V1) == (76.13, 92.862)
    with pytest.raises(UserError, match=r"torchvision \d.*meta has no key '_metrics'"):
        torch_compat.published_accuracy(SimpleNamespace(meta={}))
