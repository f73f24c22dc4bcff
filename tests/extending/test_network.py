"""The network of docs/how-to/add-a-network.md computes what torchvision's computes, is listed and
described without further edits, and trains the same in one process and in two pipeline stages.
"""

import json
from pathlib import Path

import pytest
import torch
from guide import ROOT, follow_guide, run_python
from safetensors.torch import load_file
from torchvision.models import SqueezeNet1_1_Weights

COMPARE = """
import torch, torchvision
from trainer.models import build_model, get_model_spec
from trainer.models.state_dict_adapter import export_state, to_native_state_dict

torch.manual_seed(0)
theirs = torchvision.models.squeezenet1_1(num_classes=10).eval()
ours = build_model("squeezenet1_1", 10, 64).eval()
spec = get_model_spec("squeezenet1_1")
ours.load_state_dict(to_native_state_dict(theirs.state_dict(), "torchvision", spec, ours))
exported = export_state("torchvision", "squeezenet1_1", ours)
assert all(torch.equal(exported[name], value) for name, value in theirs.state_dict().items())
images = torch.randn(2, 3, 65, 65)
torch.testing.assert_close(ours(images), theirs(images))
"""
SETTINGS = [
    "model.name=squeezenet1_1",
    *("model.dropout=0", "model.width=16", "data.image_size=17"),
    *("batch.global_size=8", "train.max_steps=2", "batch.micro_size=4", "data.workers=0"),
    *(f"data.train={ROOT}/tests/compatibility/fixture/data/train", "data.val=null"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("network")
    assert follow_guide("add-a-network", tree) == "trainer/models/squeezenet.py"
    return tree


def test_the_network_computes_what_torchvisions_computes(tree: Path) -> None:
    run_python(tree, "-c", COMPARE)


def test_the_network_is_listed_with_its_figures(tree: Path) -> None:
    listed = json.loads(run_python(tree, "-m", "pipelines.cli", "models", "--json"))
    (entry,) = [entry for entry in listed if entry["name"] == "squeezenet1_1"]
    meta = SqueezeNet1_1_Weights.IMAGENET1K_V1.meta
    assert entry["parameters"] == meta["num_params"]
    assert entry["multiply_adds"] / 1e9 == pytest.approx(meta["_ops"], rel=0.02)
    assert entry["torchvision_top1"] == meta["_metrics"]["ImageNet-1K"]["acc@1"]
    assert (entry["layers"], entry["top5_error"]) == (18, 19.7)


def test_two_pipeline_stages_train_as_one_process(tree: Path) -> None:
    run_python(tree, "-m", "trainer", "digits-resnet8", *SETTINGS, f"train.output_dir={tree}/one")
    printed = run_python(
        tree,
        *("-m", "trainer.launch", "--procs", 2, "digits-resnet8", *SETTINGS),
        *("parallel.pipeline_stages=2", f"train.output_dir={tree}/two"),
    )
    assert "stage 1: " in printed
    one, two = (load_file(tree / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    losses = [
        json.loads((tree / name / "result.json").read_text())["loss"] for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
