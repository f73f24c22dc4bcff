"""Checkpoints with several sets of weights, wrapped names, and classes that are matched by name."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from support.helpers import run_convoy
from timm.data.imagenet_info import ImageNetInfo
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pipelines.registry.evaluate import evaluate, predict_files
from pipelines.registry.weights import import_weights
from trainer.data.index import open_index
from trainer.errors import UserError
from trainer.export.exported_model import ModelMetadata, save_model
from trainer.models import build_model
from trainer.weights.class_matching import imagenet_output_names, match_classes, output_names
from trainer.weights.pretrained import load_weights, select_weights

CLASSES = 7


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=CLASSES)


@pytest.fixture(scope="module")
def average(source: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return torchvision.models.resnet18(num_classes=CLASSES)


def _imported(
    tmp_path: Path, content: object, key: str | None = None
) -> tuple[dict[str, Tensor], str]:
    """Import ``content``; return its weights with torchvision's names, and the notes."""
    torch.save(content, tmp_path / "c.pth")
    weights = select_weights(str(tmp_path / "c.pth"), "resnet18", key)
    report = load_weights(
        build_model("resnet18", CLASSES), "resnet18", str(tmp_path / "c.pth"), weights
    )
    return weights.state, "\n".join(report.notes)


def _assert_holds(state: dict[str, Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


def _with_prefix(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "module.module.",
        "model.",
        "_fsdp_wrapped_module.",
        "state.model.module.",
        "backbone.",
    ],
)
def test_wrapper_prefixes_are_removed(prefix: str, source: nn.Module, tmp_path: Path) -> None:
    state, _ = _imported(tmp_path, _with_prefix(prefix, source))
    _assert_holds(state, source)


def test_compiled_submodules_are_unwrapped(source: nn.Module, tmp_path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=CLASSES)
    model.load_state_dict(source.state_dict())
    model.layer1 = torch.compile(model.layer1)
    assert any("layer1._orig_mod." in key for key in model.state_dict()), (
        "torch adds this component"
    )
    state, _ = _imported(tmp_path, model.state_dict())
    _assert_holds(state, source)


def test_timm_ema_weights_are_preferred_and_reported(
    source: nn.Module, average: nn.Module, tmp_path: Path
) -> None:
    ema = ModelEmaV3(average)
    content = {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": source.state_dict(),
        "state_dict_ema": ema.module.state_dict(),
    }
    state, notes = _imported(tmp_path, content | {"version": 2, "metric": 70.1})
    _assert_holds(state, average)
    assert "averaged (EMA) weights at state_dict_ema, not those at state_dict" in notes
    state, notes = _imported(tmp_path, content, key="state_dict")
    _assert_holds(state, source)


def test_torch_averaged_model_is_preferred(
    source: nn.Module, average: nn.Module, tmp_path: Path
) -> None:
    """torchvision's references save names below ``module.`` and a counter."""
    ema = torch.optim.swa_utils.AveragedModel(average)
    optimizer = torch.optim.SGD(source.parameters(), 0.1)
    content = {
        "model": source.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_ema": ema.state_dict(),
    }
    state, notes = _imported(tmp_path, content)
    _assert_holds(state, average)
    assert "model_ema" in notes
    assert "n_averaged" not in notes


def test_incomplete_ema_weights_are_reported_and_not_used(
    source: nn.Module, tmp_path: Path
) -> None:
    partial = {key: value for key, value in source.state_dict().items() if "running" not in key}
    state, notes = _imported(tmp_path, {"state_dict": source.state_dict(), "ema": partial})
    _assert_holds(state, source)
    assert "not those at ema" in notes


def test_equally_matching_weight_sets_are_an_error_without_key(
    source: nn.Module, average: nn.Module, tmp_path: Path
) -> None:
    content = _with_prefix("student.", source) | _with_prefix("teacher.", average)
    with pytest.raises(
        UserError, match=r"several sets of weights for resnet18: student, teacher; choose one"
    ):
        _imported(tmp_path, content)
    state, notes = _imported(tmp_path, content, key="teacher")
    _assert_holds(state, average)
    assert "ignores 122 tensors outside teacher" in notes
    with pytest.raises(UserError, match=r"no weights at 'tutor'; it has: 'student', 'teacher'"):
        _imported(tmp_path, content, key="tutor")


def test_duplicate_weight_sets_count_as_one(source: nn.Module, tmp_path: Path) -> None:
    state, _ = _imported(tmp_path, {"model": source.state_dict(), "best": source.state_dict()})
    _assert_holds(state, source)


def test_tensors_outside_the_model_are_reported(source: nn.Module, tmp_path: Path) -> None:
    """Lightning saves a module with the weights of its loss."""
    content = {
        "state_dict": _with_prefix("net.", source) | {"criterion.weight": torch.ones(CLASSES)},
        "epoch": 1,
    }
    state, notes = _imported(tmp_path, content)
    _assert_holds(state, source)
    assert "ignores 1 tensors outside state_dict.net: criterion.weight" in notes


def test_name_with_and_without_a_wrapper_is_an_error(source: nn.Module, tmp_path: Path) -> None:
    content = source.state_dict() | {"_orig_mod.conv1.weight": torch.zeros(64, 3, 7, 7)}
    with pytest.raises(UserError, match=r"holds conv1\.weight twice"):
        _imported(tmp_path, content)


def test_integer_weights_are_an_error(source: nn.Module, tmp_path: Path) -> None:
    content = source.state_dict() | {"conv1.weight": torch.zeros(64, 3, 7, 7, dtype=torch.int8)}
    with pytest.raises(
        UserError, match=r"1 keys not of a floating-point type: conv1\.weight torch\.int8"
    ):
        _imported(tmp_path, content)


def test_half_precision_weights_are_converted_to_fp32(source: nn.Module, tmp_path: Path) -> None:
    torch.save(
        {key: value.half() for key, value in source.state_dict().items()}, tmp_path / "h.pth"
    )
    model = build_model("resnet18", CLASSES)
    load_weights(model, "resnet18", str(tmp_path / "h.pth"))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    torch.testing.assert_close(
        model.state_dict()["conv.weight"], source.state_dict()["conv1.weight"], rtol=1e-3, atol=1e-4
    )


# --- classes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed dataset of two images of each of the ImageNet classes 0, 217 and 571."""
    root = tmp_path_factory.mktemp("three")
    random = np.random.default_rng(0)
    for name in ("n01440764", "n02102040", "n03425413"):
        (root / "images" / name).mkdir(parents=True)
        for number in range(2):
            pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{number}.png")
    done = run_convoy("pack", root / "images", root / "packed", "--shards", 1, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return root / "packed/train"


def test_imagenet_outputs_are_matched_with_a_subset_by_name(
    three_classes: Path, tmp_path: Path
) -> None:
    """The reference is torchvision's network with all 1,000 outputs."""
    torch.manual_seed(0)
    reference = torchvision.models.resnet18().eval()
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    lines = import_weights(
        str(tmp_path / "w.pth"), "resnet18", tmp_path / "m", 64, str(three_classes), None
    )
    assert "the outputs of 3 of ImageNet's 1,000 classes, matched by name" in "\n".join(lines)
    metadata = ModelMetadata(**json.loads((tmp_path / "m/model.json").read_text()))
    assert metadata.classes == open_index(str(three_classes))[0].classes
    model = metadata.build()
    model.load_state_dict(load_file(tmp_path / "m/model.safetensors"))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    wordnet_ids = list(ImageNetInfo("imagenet-1k").label_names())
    outputs = [wordnet_ids.index(name) for name in ("n01440764", "n02102040", "n03425413")]
    torch.testing.assert_close(
        model.eval()(images), reference(images)[:, outputs], rtol=1e-4, atol=1e-4
    )
    image = next((three_classes.parent.parent / "images").rglob("*.png"))
    assert len(predict_files(str(tmp_path / "m"), [str(image)])[0]["top5"]) == 3


def test_unnamed_outputs_of_another_number_of_classes_are_an_error(
    source: nn.Module, three_classes: Path, tmp_path: Path
) -> None:
    torch.save(source.state_dict(), tmp_path / "seven.pth")
    with pytest.raises(
        UserError, match=r"has 3 classes, but the weights in .* have 7 outputs without names"
    ):
        import_weights(
            str(tmp_path / "seven.pth"), "resnet18", tmp_path / "m", 64, str(three_classes), None
        )
    assert not (tmp_path / "m").exists()


class _Classes:
    """The part of an index that matching reads."""

    def __init__(self, ids: list[str], names: list[str] | None = None) -> None:
        self.class_ids, self.classes = ids, names or ids


def _match(outputs: list[set[str]], data: _Classes) -> list[int]:
    return match_classes(outputs, data, "MODEL", "DATA")  # type: ignore[arg-type]


def test_classes_are_matched_by_id_then_by_name() -> None:
    outputs = output_names(["cat", "dog", "bird"], 3)
    assert _match(outputs, _Classes(["bird", "cat"])) == [2, 0]
    assert _match(outputs, _Classes(["n1", "n2"], ["dog", "bird"])) == [1, 2]
    with pytest.raises(
        UserError, match=r"1 of its 2 classes are not among the 3 classes of MODEL: n2 \(cow\)"
    ):
        _match(outputs, _Classes(["n1", "n2"], ["dog", "cow"]))
    with pytest.raises(UserError, match="are not among"):
        _match(outputs, _Classes(["0", "1"]))
    numbers = [str(number) for number in range(1000)]
    assert _match(imagenet_output_names(), _Classes(numbers)) == list(range(1000)), (
        "third-party ImageNet shards have numbers"
    )


def test_name_of_two_outputs_matches_neither() -> None:
    """ImageNet has two classes named `crane`; a dataset with only that name could mean either."""
    outputs = imagenet_output_names()
    with pytest.raises(UserError, match="crane"):
        _match(outputs, _Classes(["crane", "tench"]))
    assert _match(outputs, _Classes(["n02012849", "n03126707"])) == [134, 517]


def test_evaluation_matches_classes_in_another_order(tmp_path: Path, digits: Path) -> None:
    """A model with permuted outputs has the same accuracy as the original."""
    index = open_index(f"{digits}/val")[0]
    torch.manual_seed(0)
    model = build_model("resnet8", 10, 8, width=4)
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    head = {key for key in model.state_dict() if key.startswith("head.")}
    names = [f"digit {name}" for name in index.classes]
    for folder, outputs in (("same", list(range(10))), ("permuted", order)):
        state = {
            key: value[outputs] if key in head else value
            for key, value in model.state_dict().items()
        }
        copy = build_model("resnet8", 10, 8, width=4)
        copy.load_state_dict(state)
        classes = [index.classes[i] for i in outputs]
        metadata = ModelMetadata(
            "resnet8", {"width": 4}, classes, 10, 8, 1.0, [0.5] * 3, [0.5] * 3, True
        )
        save_model(tmp_path / folder, copy, metadata)
    same, permuted = (
        evaluate(str(tmp_path / folder), f"{digits}/val") for folder in ("same", "permuted")
    )
    assert (permuted.top1, permuted.top5) == (same.top1, same.top5)
    assert 0 < same.top5 < 1
    metadata = ModelMetadata("resnet8", {"width": 4}, names, 10, 8, 1.0, [0.5] * 3, [0.5] * 3, True)
    save_model(tmp_path / "other", model, metadata)
    with pytest.raises(UserError, match="10 of its 10 classes are not among"):
        evaluate(str(tmp_path / "other"), f"{digits}/val")


def test_prediction_works_with_more_outputs_than_classes(tmp_path: Path) -> None:
    """``model.num_classes`` can exceed the number of classes in the dataset."""
    metadata = ModelMetadata(
        "resnet8", {"width": 4}, ["a", "b"], 6, 8, 1.0, [0.5] * 3, [0.5] * 3, True
    )
    save_model(tmp_path, metadata.build(), metadata)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (answer,) = predict_files(str(tmp_path), [str(tmp_path / "x.png")])
    assert len({guess["class"] for guess in answer["top5"]} & {"a", "b", "2", "3", "4", "5"}) == 5


def test_fine_tuning_on_other_classes_initializes_a_new_head(digits: Path, tmp_path: Path) -> None:
    index = open_index(f"{digits}/train")[0]
    for folder, classes, kept in (
        ("same", index.classes, True),
        ("reversed", index.classes[::-1], True),
        ("numbers", [str(i) for i in range(10)], True),
        ("other", [f"animal {i}" for i in range(10)], False),
    ):
        metadata = ModelMetadata(
            "resnet8", {"width": 4}, list(classes), 10, 8, 1.0, [0.5] * 3, [0.5] * 3, True
        )
        trained = metadata.build()
        save_model(tmp_path / folder, trained, metadata)
        target = build_model("resnet8", 10, 8, width=4)
        notes = load_weights(target, "resnet8", str(tmp_path / folder), data=index).notes
        expected = trained.state_dict()["head.weight"]
        if folder == "reversed":
            expected = expected.flip(0)
        assert torch.equal(target.state_dict()["head.weight"], expected) == kept, folder
        assert any("newly initialized" in note for note in notes) != kept


def test_prefixed_ema_weights_in_safetensors_are_preferred(
    source: nn.Module, average: nn.Module, tmp_path: Path
) -> None:
    save_file(
        _with_prefix("model.", source) | _with_prefix("ema_model.", average),
        tmp_path / "c.safetensors",
    )
    weights = select_weights(str(tmp_path / "c.safetensors"), "resnet18")
    _assert_holds(weights.state, average)
    assert "averaged (EMA) weights at ema_model, not those at model" in "\n".join(weights.notes)


def test_namespaces_and_numpy_scalars_in_checkpoints_are_accepted(
    source: nn.Module, average: nn.Module, tmp_path: Path
) -> None:
    """timm and torchvision store the argparse namespace, and scripts the best accuracy (NumPy)."""
    extras = {
        "args": argparse.Namespace(output=tmp_path),
        "best_acc": np.float64(0.5),
        "metric": np.float32(1),
    }
    content = {"state_dict": source.state_dict(), "state_dict_ema": average.state_dict(), **extras}
    _assert_holds(_imported(tmp_path, content)[0], average)


def test_pickled_module_is_an_error_with_advice(source: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"could run code \(it holds torchvision\.models\.resnet\.ResNet\); "
        r"save only the weights",
    ):
        _imported(tmp_path, source)


def test_modified_byte_is_detected_by_the_checksum(source: nn.Module, tmp_path: Path) -> None:
    torch.save(source.state_dict(), tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(
        UserError, match=r"is corrupt: the checksum of .*/data/[0-9]+ in it is wrong"
    ):
        select_weights(str(tmp_path / "w.pth"), "resnet18")


def test_files_without_checksums_are_accepted(source: nn.Module, tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        _assert_holds(_imported(tmp_path, source.state_dict())[0], source)
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fc.weight": torch.zeros(CLASSES, 512, device="meta")}, "fc.weight is a meta tensor"),
        ({"fc.weight": torch.zeros(CLASSES, 512).to_sparse()}, "fc.weight is a sparse tensor"),
        (
            {"fc.bias": torch.zeros(3)},
            "heads differ in the number of outputs or have none: head.weight 7x512, head.bias 3",
        ),
        ({"fc.bias": torch.zeros(0), "fc.weight": torch.zeros(0, 512)}, "head.weight 0x512"),
        (
            {"fc.bias": torch.zeros(CLASSES, dtype=torch.complex64)},
            "not of a floating-point type: fc.bias",
        ),
    ],
)
def test_unusable_weights_are_errors(
    change: dict[str, Tensor], reason: str, source: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        _imported(tmp_path, source.state_dict() | change)
    assert reason in str(caught.value)
    assert "likely those of" not in str(caught.value)


def _saved(folder: Path, classes: list[str]) -> nn.Sequential:
    torch.manual_seed(0)
    model = build_model("resnet18", len(classes), 32)
    save_model(
        folder,
        model,
        ModelMetadata("resnet18", {}, classes, len(classes), 32, 0.875, [0.5] * 3, [0.5] * 3, True),
    )
    return model


def test_fine_tuning_from_the_weights_file_of_a_run_matches_classes(
    digits: Path, tmp_path: Path
) -> None:
    index = open_index(str(digits / "train"))[0]
    named = index.model_copy(update={"classes": list("abcdefghij")})
    saved = _saved(tmp_path / "run", named.classes[::-1])
    model = build_model("resnet18", 10, 32)
    report = load_weights(
        model, "resnet18", str(tmp_path / "run" / "model.safetensors"), data=named
    )
    assert "matched with the dataset's classes by name" in "\n".join(report.notes)
    assert torch.equal(model.state_dict()["head.weight"], saved.state_dict()["head.weight"].flip(0))


@pytest.mark.parametrize("file", ["run", "run/model.safetensors"])
def test_importing_a_model_that_convoy_saved_is_an_error(
    file: str, digits: Path, tmp_path: Path
) -> None:
    _saved(tmp_path / "run", list("abcdefghij"))
    with pytest.raises(UserError, match="is a model that Convoy saved"):
        import_weights(
            str(tmp_path / file), "resnet18", tmp_path / "out", 32, str(digits / "train"), None
        )
    assert not (tmp_path / "out").exists()
