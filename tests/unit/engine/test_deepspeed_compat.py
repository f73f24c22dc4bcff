"""The installed DeepSpeed has every internal that Convoy uses, and a run leaves DeepSpeed and the
process as it found them.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from trainer.config.schema import RunConfig
from trainer.distributed import process_group
from trainer.distributed.env import DistEnv
from trainer.engine.data_parallel import DataParallel
from trainer.engine.deepspeed import compat
from trainer.engine.engine import Engine
from trainer.engine.pipeline_parallel import PipelineParallel
from trainer.errors import UserError
from trainer.models import build_model
from trainer.training.batch_plan import BatchPlan

ENGINES = [
    ("fp32", 0, False),
    ("bf16", 0, False),
    ("bf16", 0, True),
    ("fp16", 1, False),
    ("fp32", 1, True),
    ("fp32", 2, False),
    ("fp16", 3, False),
]
"""Precision, ZeRO stage and whether it is a pipeline: every class of engine and optimizer."""


def _engine(precision: str, zero_stage: int, pipeline: bool, device: torch.device) -> Engine:
    config = RunConfig.model_validate(
        {
            "model": {"name": "resnet8"},
            "data": {"train": "none"},
            "parallel": {"zero_stage": zero_stage},
            "precision": precision,
            "train": {"max_steps": 1, "compile": not pipeline},
        }
    )
    model = build_model("resnet8", 10, 16, width=8)
    batch = BatchPlan(4, 4, 1, 1)
    if pipeline:
        names = [[name for name, _ in model.named_children()]]
        return PipelineParallel(model, config, batch, device, names)
    return DataParallel(model, config, batch, device)


def _class_names(*values: Any) -> set[str]:
    return {kind.__name__ for value in values for kind in type(value).__mro__}


def _objects_of(engine: Any) -> Iterator[Any]:
    yield from (engine, engine.module, engine.optimizer)
    if hasattr(engine, "grid"):
        yield engine.grid
    if hasattr(engine.optimizer, "loss_scaler"):
        yield engine.optimizer.loss_scaler


def _process_state() -> dict[str, Any]:
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import stage_1_and_2

    return {
        # without those that torch sets for its compiler
        "environment": {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")},
        "hidden modules": [name for name, module in sys.modules.items() if module is None],
        "log level": logging.getLogger("DeepSpeed").level,
        "operations": dict(deepspeed.ops.__compatible_ops__),
        "accelerator": type(get_accelerator()).__name__,
        "weight gathering": stage_1_and_2.all_gather_dp_groups.__module__,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "recompile_limit": torch.compiler.config.recompile_limit,
    }


def _build_every_engine(rank: int, folder: str) -> None:
    from deepspeed.accelerator import get_accelerator

    torch.set_num_threads(1)
    before = _process_state()
    device = process_group.init_distributed(DistEnv(0, 1, 0), fp16=True)
    names, kinds = _class_names(get_accelerator()), set()
    for precision, zero_stage, pipeline in ENGINES:
        engine = _engine(precision, zero_stage, pipeline, device)._engine
        names |= _class_names(*_objects_of(engine))
        kinds.add(compat.optimizer_kind(engine.optimizer).name)
    during = _process_state()
    process_group.cleanup()
    results = {
        "names": sorted(names),
        "kinds": sorted(kinds),
        "before": before,
        "during": during,
        "after": _process_state(),
    }
    Path(folder, "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the engines consist of, and the state of the process before, during and after a run."""
    folder = tmp_path_factory.mktemp("engines")
    mp.spawn(_build_every_engine, (str(folder),))
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_deepspeed_has_every_attribute_of_the_tables(results: dict[str, Any]) -> None:
    """Each engine is checked when it is built; here, every class of the tables is covered."""
    assert set(compat.OBJECT_ATTRIBUTES) <= set(results["names"])
    assert set(results["kinds"]) == {kind.name for kind in compat.OptimizerKind}
    assert set(compat.PARAMETER_ATTRIBUTES) == set(compat.OptimizerKind)


def test_cleanup_restores_everything_that_a_run_changes_in_the_process(
    results: dict[str, Any],
) -> None:
    before, during = results["before"], results["during"]
    assert results["after"] == before
    changed = {name for name in before if before[name] != during[name]}
    assert changed == {
        "environment",
        "log level",
        "operations",
        "accelerator",
        "weight gathering",
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, names in compat.OBJECT_ATTRIBUTES.items() for name in names],
)
def test_an_object_without_an_attribute_is_an_error_that_names_it(kind: str, name: str) -> None:
    others = dict.fromkeys(set(compat.OBJECT_ATTRIBUTES[kind]) - {name})
    value = type("Renamed", (type(kind, (), others),), {})()
    with pytest.raises(UserError, match=rf"deepspeed \d.*: Renamed has no attribute '{name}'"):
        compat.check_object(value)


@contextmanager
def _without(owner: Any, name: str) -> Iterator[None]:
    value = getattr(owner, name)
    delattr(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, value)


def _start_without_attributes(rank: int) -> None:
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime.zero import stage_1_and_2
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    def start() -> torch.device:
        return process_group.init_distributed(DistEnv(0, 1, 0), fp16=True)

    with (
        _without(stage_1_and_2, "all_gather_dp_groups"),
        pytest.raises(UserError, match=r"stage_1_and_2 has no attribute 'all_gather_dp_groups'"),
    ):
        start()
    process_group.cleanup()
    enabled = __compatible_ops__.pop(compat.SHARED_MEMORY_OP)
    with pytest.raises(UserError, match=compat.SHARED_MEMORY_OP):
        start()
    process_group.cleanup()
    __compatible_ops__[compat.SHARED_MEMORY_OP] = enabled
    device = start()
    for owner, name, engine in (
        (stage_1_and_2.DeepSpeedZeroOptimizer, "refresh_fp32_params", ("fp16", 1, False)),
        (DeepSpeedZeroOptimizer_Stage3, "_update_scale", ("fp16", 3, False)),
    ):
        with (
            _without(owner, name),
            pytest.raises(UserError, match=f"{owner.__name__} has no attribute '{name}'"),
        ):
            _engine(*engine, device)
    process_group.cleanup()


def test_training_does_not_start_without_an_attribute() -> None:
    mp.spawn(_start_without_attributes)


def test_a_module_that_was_moved_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "MODULE_ATTRIBUTES", {"json.moved": ("Name",)})
    with pytest.raises(UserError, match=r"deepspeed \d.*: there is no module 'json\.moved'"):
        compat.check_installation()
