"""The registry of optimizers, against what torch's and timm's optimizers keep."""

import subprocess
import sys

import pytest
import torch

from trainer.config.schema import OptimizerConfig, RunConfig, load_config
from trainer.engine.deepspeed.config import validate_parallelism
from trainer.errors import UserError
from trainer.training.optimizers.build import build_optimizer
from trainer.training.optimizers.options import Momentum
from trainer.training.optimizers.registry import OPTIMIZERS, Groups, OptimizerSpec, register


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_keeps_the_state_that_its_entry_lists(name: str) -> None:
    layer = torch.nn.Linear(4, 3)
    optimizer = build_optimizer(layer, OptimizerConfig(name=name), 0.1)
    layer(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    spec = OPTIMIZERS[name]
    for weight in (layer.weight, layer.bias):
        state = optimizer.state[weight]
        assert {key for key in state if key != "step"} == set(spec.state_keys)
        assert all(state[key].shape == weight.shape for key in spec.state_keys)
        assert ("step" in state) == (spec.step_counter == "weight")
    assert ("step" in optimizer.param_groups[0]) == (spec.step_counter == "group")


def test_an_unknown_optimizer_is_refused_with_the_names() -> None:
    names = "'adamw', 'lamb', 'lars' or 'sgd'"
    with pytest.raises(UserError, match=rf"optimizer.name: 'adam' is invalid: .* be {names}"):
        load_config("digits-resnet8", ["optimizer.name=adam"])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_layerwise_optimizers_need_fp32_without_zero(name: str, stage: int, precision: str) -> None:
    config: RunConfig = load_config(
        "digits-resnet8",
        [f"optimizer.name={name}", f"parallel.zero_stage={stage}", f"precision={precision}"],
    )
    faults: tuple[str, ...] = ()
    try:
        validate_parallelism(config)
    except UserError as error:
        faults = error.faults
    refused = (
        f"optimizer.name: {name} needs the norm of each layer's weights, which ZeRO and 16-bit "
        "precision store in one flat tensor; use precision fp32 with parallel.zero_stage 0, or "
        "another optimizer"
    )
    layerwise = name in ("lars", "lamb")
    assert (refused in faults) == (layerwise and (stage, precision) != (0, "fp32"))


def test_entries_that_contradict_another_are_refused() -> None:
    def build(groups: Groups, rate: float, *, momentum: Momentum = 0.5) -> torch.optim.Optimizer:
        raise NotImplementedError

    with pytest.raises(ValueError, match="optimizer sgd is registered twice"):
        register(OptimizerSpec("sgd", build, ()))
    with pytest.raises(ValueError, match="option momentum has another type or default than that"):
        register(OptimizerSpec("other", build, ()))
    assert "other" not in OPTIMIZERS


def test_the_registry_does_not_load_torch() -> None:
    code = "import sys, trainer.training.optimizers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
