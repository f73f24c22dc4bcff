"""docs/how-to/add-an-augmentation.md: its class equals torchvision's functions, and nothing else
changes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from guide import ROOT, follow_guide, run_python
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from trainer.config.run_plan import build_run_plan
from trainer.engine.deepspeed.optimizer_state import TrainingState
from trainer.training.checkpoint import Checkpoint, CheckpointManager

DATA = ROOT / "tests/compatibility/fixture/data/train"
AUGMENT = {"crop": "padded", "padding": 2, "auto": "rand", "mixup": 0.2, "cutmix": 1.0}
BATCHES = """
import json, sys
import numpy as np
from trainer.config.schema import RunConfig
from trainer.data.index import open_index
from trainer.data.loader import train_loader
from trainer.data.random_streams import RandomStreams

data, out, *augments = sys.argv[1:]
index, store = open_index(data)
for number, augment in enumerate(map(json.loads, augments)):
    config = RunConfig.model_validate({
        "model": {"name": "resnet8"},
        "data": {"train": data, "image_size": 16, "workers": 0, "shuffle_window": 32, "seed": 5},
        "batch": {"global_size": 24},
        "augment": augment,
        "train": {"max_steps": 1},
    })
    batches = list(train_loader(config, index, store, 3, 1, 0, 2))
    np.savez(
        f"{out}/{number}.npz",
        pixels=[batch.pixels for batch in batches],
        keys=[batch.keys for batch in batches],
        mixes=[repr(batch.mix) for batch in batches],
        jitter=[RandomStreams(2, 5, 3).uniforms({"color_jitter": 4}, step, 24)["color_jitter"]
                for step in range(len(batches) // 2)],
    )
"""
RESUME = """
import sys
from trainer.config.run_plan import build_run_plan
from trainer.errors import UserError
from trainer.training.checkpoint import CheckpointManager

url, *overrides = sys.argv[1:]
for changed in ([], ["augment.color_jitter_prob=0.5"]):
    plan = build_run_plan("digits-resnet8", [*overrides, *changed], 1, False)
    try:
        found = CheckpointManager(url, 3).load_latest(plan.config_fingerprint, print)
        print("step", found.state.step)
    except UserError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    follow_guide("add-an-augmentation", tree)
    return tree


def _batches(tree: Path, out: Path, *augments: dict) -> list[dict[str, np.ndarray]]:
    out.mkdir()
    run_python(tree, "-c", BATCHES, DATA, out, *map(json.dumps, augments))
    return [dict(np.load(out / f"{number}.npz")) for number in range(len(augments))]


def test_color_jitter_equals_torchvision_and_changes_nothing_else(
    tree: Path, tmp_path: Path
) -> None:
    (before,) = _batches(ROOT, tmp_path / "before", AUGMENT)
    disabled, enabled = _batches(
        tree, tmp_path / "after", AUGMENT, {**AUGMENT, "color_jitter_prob": 0.6}
    )
    for name in ("pixels", "keys", "mixes"):
        assert np.array_equal(disabled[name], before[name]), name
    assert np.array_equal(enabled["keys"], before["keys"])
    assert np.array_equal(enabled["mixes"], before["mixes"])

    # slot j of a global batch belongs to micro-batch j mod 2
    uniforms = before["jitter"].reshape(-1, 12, 2, 4).swapaxes(1, 2).reshape(-1, 4)
    shape = (-1, *before["pixels"].shape[2:])
    jittered = 0
    for image, got, (chance, *factors) in zip(
        before["pixels"].reshape(shape), enabled["pixels"].reshape(shape), uniforms, strict=True
    ):
        want = Image.fromarray(image)
        if chance < 0.6:
            jittered += 1
            brightness, contrast, saturation = (0.6 + 0.8 * factor for factor in factors)
            want = TF.adjust_brightness(want, brightness)
            want = TF.adjust_contrast(want, contrast)
            want = TF.adjust_saturation(want, saturation)
        assert np.array_equal(got, np.asarray(want))
    assert 0.4 < jittered / len(uniforms) < 0.8
    assert (enabled["pixels"] != before["pixels"]).any()


def test_checkpoints_from_before_the_augmentation_fit_recipes_that_leave_it_off(
    tree: Path, tmp_path: Path
) -> None:
    overrides = [f"data.train={DATA}", "data.val=null"]
    plan = build_run_plan("digits-resnet8", overrides, 1, False)
    checkpoints = CheckpointManager(str(tmp_path), 3)
    state = TrainingState({}, {}, 7, 7, None)
    checkpoints.save(Checkpoint(state, plan.config_fingerprint, {}, None))
    checkpoints.wait()
    fits, differs = run_python(tree, "-c", RESUME, tmp_path, *overrides).splitlines()[-2:]
    assert fits == "step 7"
    assert "augment.color_jitter_prob is 0.0 in the checkpoint and 0.5 in the recipe" in differs


def test_the_keys_are_listed(tree: Path) -> None:
    listed = json.loads(
        run_python(tree, "-m", "pipelines.cli", "recipe", "keys", "augment.color_jitter", "--json")
    )
    assert [(key["key"], key["default"]) for key in listed] == [
        ("augment.color_jitter_prob", 0.0),
        ("augment.color_jitter_strength", 0.4),
    ]
    assert all(key["description"] for key in listed)
