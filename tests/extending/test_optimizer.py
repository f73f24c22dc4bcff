"""The optimizer of docs/how-to/add-an-optimizer.md updates weights as torch's own does, also after
a checkpoint, and its options are recipe keys.
"""

import json
from pathlib import Path

import pytest
from guide import follow_guide, run_python

TRAIN = """
import copy, json
import numpy as np, torch, torch.nn.functional as F
from trainer.config.schema import RunConfig
from trainer.data.batch import Batch
from trainer.distributed import process_group
from trainer.distributed.env import DistEnv
from trainer.engine.data_parallel import DataParallel
from trainer.models import build_model
from trainer.training.batch_plan import plan_batches

STEPS, SIZE, RATES = 6, 8, (1e-3, 1e-3, 3e-3, 2e-3, 1e-3, 1e-3)
device = process_group.init_distributed(DistEnv(0, 1, 0))
random = np.random.default_rng(0)
pixels = random.integers(0, 256, (STEPS, SIZE, 8, 8, 3), np.uint8)
labels = random.integers(0, 10, (STEPS, SIZE))
settings = {"name": "rmsprop", "alpha": 0.9, "momentum": 0.5, "weight_decay": 0.01}


def network():
    torch.manual_seed(0)
    return build_model("resnet8", 10, width=4, batch_norm=False)


def engine_of(model, stage):
    config = RunConfig.model_validate({
        "model": {"name": "resnet8"}, "data": {"train": "none", "image_size": 8},
        "batch": {"global_size": SIZE}, "optimizer": settings, "parallel": {"zero_stage": stage},
        "train": {"max_steps": STEPS, "channels_last": False},
    })
    return DataParallel(model, config, plan_batches(SIZE, None, 1, 100), device)


def train(engine, steps):
    for step in steps:
        ones = np.ones(SIZE, np.float32)
        batch = Batch(pixels[step], labels[step], ones, float(SIZE), [""] * SIZE)
        engine.step(iter([batch]), RATES[step])


expected = network()
optimizer = torch.optim.RMSprop(expected.parameters(), alpha=0.9, momentum=0.5, weight_decay=0.01)
mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
for step in range(STEPS):
    optimizer.param_groups[0]["lr"] = RATES[step]
    optimizer.zero_grad()
    images = ((torch.from_numpy(pixels[step]) / 255 - mean) / std).permute(0, 3, 1, 2)
    F.cross_entropy(expected(images), torch.from_numpy(labels[step])).backward()
    optimizer.step()

first = engine_of(network(), 0)
train(first, range(3))
state = copy.deepcopy(first.training_state())  # it refers to the engine's own tensors
train(first, range(3, STEPS))
resumed = network()
resumed.load_state_dict(state.model)
resumed = engine_of(resumed, 1)  # another ZeRO stage
resumed.restore(state)
train(resumed, range(3, STEPS))
moved = max((a - b).abs().max() for a, b in zip(expected.parameters(), network().parameters()))
for engine in (first, resumed):
    got = engine.full_state_dict()
    for name, weight in expected.named_parameters():
        assert (got[name] - weight).abs().max() < 1e-4 * moved, name
first._fp32_state.names = ("square_avg",)  # as if the entry did not list the other
try:
    first.training_state()
except RuntimeError as error:
    assert "rmsprop keeps the state momentum_buffer" in str(error)
else:
    raise AssertionError("a checkpoint without momentum_buffer")
print(json.dumps(sorted({slot.partition("/")[0] for slot in state.slots})))
process_group.cleanup()
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("optimizer")
    path = follow_guide("add-an-optimizer", tree)
    assert path == "trainer/training/optimizers/rmsprop.py"
    return tree


def test_the_optimizer_updates_weights_as_torchs_and_resumes(tree: Path) -> None:
    printed = run_python(tree, "-c", TRAIN)
    assert json.loads(printed.splitlines()[-1]) == ["momentum_buffer", "square_avg"]


def test_the_optimizers_options_are_recipe_keys(tree: Path) -> None:
    listed = run_python(tree, "-m", "pipelines.cli", "recipe", "keys", "optimizer.", "--json")
    keys = {key["key"]: key for key in json.loads(listed)}
    assert "rmsprop" in keys["optimizer.name"]["type"].split(" or ")
    assert keys["optimizer.alpha"]["default"] == 0.99
    assert keys["optimizer.momentum"]["description"].endswith("Used by: lars, rmsprop, sgd.")
