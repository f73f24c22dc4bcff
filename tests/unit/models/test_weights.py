"""Import and export of weights files: selection, errors, and round trips."""

import pickle
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.registry.weights import export_weights, import_weights
from trainer.config.schema import load_config
from trainer.data.storage.store import open_store
from trainer.errors import UserError
from trainer.export.exported_model import ModelMetadata, Predictor, save_model
from trainer.models import build_model
from trainer.weights.pretrained import load_weights
from trainer.weights.state_dict_file import read_weight_sets


@pytest.fixture
def resnet18(tmp_path: Path) -> Path:
    """A state dict file of torchvision's ResNet-18 with random weights."""
    torch.manual_seed(0)
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), path)
    return path


def images(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("form", ["torchvision", "timm"])
def test_export_after_import_gives_the_same_weights(
    resnet18: Path, tmp_path: Path, form: str, suffix: str
) -> None:
    lines = import_weights(str(resnet18), "resnet18", tmp_path / "model", 64, None, None)
    assert "resnet18 from torchvision's names: 11,180,103 parameters" in lines[0]
    export_weights(str(tmp_path / "model"), tmp_path / f"out{suffix}", form)
    original = torch.load(resnet18)
    exported = read_weight_sets(str(tmp_path / f"out{suffix}"))[0].tensors
    assert set(original) == set(exported)
    assert all(torch.equal(original[key], exported[key]) for key in original)
    timm.create_model("resnet18", num_classes=7).load_state_dict(exported)


def test_timm_vgg_round_trip_in_safetensors(tmp_path: Path) -> None:
    reference = timm.create_model("vgg11", num_classes=3)
    save_file(reference.state_dict(), tmp_path / "vgg.safetensors")
    lines = import_weights(
        str(tmp_path / "vgg.safetensors"), "vgg11", tmp_path / "model", 64, None, None
    )
    assert "from timm's names" in lines[0]
    export_weights(str(tmp_path / "model"), tmp_path / "out.safetensors", "timm")
    exported = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(value, exported[key]) for key, value in reference.state_dict().items())


def test_imported_model_predicts_like_its_source(resnet18: Path, tmp_path: Path) -> None:
    import_weights(str(resnet18), "resnet18", tmp_path / "model", 64, None, None)
    predictor = Predictor(
        tmp_path / "model" / "model.safetensors", tmp_path / "model" / "model.json"
    )
    reference = torchvision.models.resnet18(num_classes=7)
    reference.load_state_dict(torch.load(resnet18))
    torch.testing.assert_close(
        predictor.model(images()), reference.eval()(images()), rtol=1e-4, atol=1e-4
    )
    assert predictor.facts.classes == ["0", "1", "2", "3", "4", "5", "6"]


def test_imported_googlenet_has_its_preprocessing_and_new_auxiliary_heads(
    tmp_path: Path,
) -> None:
    reference = torchvision.models.googlenet(aux_logits=False, init_weights=False)
    torch.save(reference.state_dict(), tmp_path / "g.pth")
    lines = import_weights(
        str(tmp_path / "g.pth"), "googlenet", tmp_path / "model", 224, None, None
    )
    assert any("has no auxiliary heads, so they are newly initialized" in line for line in lines)
    metadata = Predictor(
        tmp_path / "model" / "model.safetensors", tmp_path / "model" / "model.json"
    ).facts
    assert metadata.mean == [0.5] * 3
    assert metadata.classes[0] == "tench"


def test_weights_are_loaded_from_an_object_store(
    resnet18: Path,
    tmp_path: Path,
    bucket: str,
    service_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in service_env.items():
        monkeypatch.setenv(name, value)
    open_store(bucket).write("weights/resnet18.pth", resnet18.read_bytes())
    url = f"{bucket}/weights/resnet18.pth"
    import_weights(url, "resnet18", tmp_path / "model", 64, None, None)
    model = build_model("resnet18", 7)
    assert load_weights(model, "resnet18", url).notes == []
    reference = torchvision.models.resnet18(num_classes=7)
    reference.load_state_dict(torch.load(resnet18))
    for one in (
        model,
        Predictor(tmp_path / "model/model.safetensors", tmp_path / "model/model.json").model,
    ):
        assert torch.allclose(
            one.eval()(images()), reference.eval()(images()), rtol=1e-5, atol=1e-6
        )
    with pytest.raises(UserError, match="there is no such file"):
        load_weights(model, "resnet18", f"{bucket}/weights/resnet19.pth")


@pytest.mark.parametrize(
    ("name", "options"), [("resnet18", {}), ("vgg11", {"width": 8}), ("googlenet", {"width": 8})]
)
def test_another_number_of_classes_initializes_a_new_head(
    name: str, options: dict[str, int], tmp_path: Path
) -> None:
    source = build_model(name, 10, **options)
    save_file(source.state_dict(), tmp_path / "ten.safetensors")
    target = build_model(name, 4, **options)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    notes = load_weights(target, name, str(tmp_path / "ten.safetensors")).notes
    assert len(notes) == 1
    assert "has 10 classes, so the head for 4 classes is newly initialized" in notes[0]
    for key, value in target.state_dict().items():
        same_shape = value.shape == source.state_dict()[key].shape
        assert torch.equal(value, source.state_dict()[key] if same_shape else before[key]), key


def test_data_parallel_checkpoint_without_batch_counters_is_loaded(tmp_path: Path) -> None:
    source = torchvision.models.resnet18()
    state = {
        f"module.{key}": value
        for key, value in source.state_dict().items()
        if "num_batches_tracked" not in key
    }
    torch.save({"model": state, "epoch": 3}, tmp_path / "c.pth")
    model = build_model("resnet18", 1000)
    load_weights(model, "resnet18", str(tmp_path / "c.pth"))
    torch.testing.assert_close(model.eval()(images()), source.eval()(images()))


def test_weights_of_another_architecture_are_an_error(resnet18: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_weights(build_model("resnet34", 7), "resnet34", str(resnet18))
    first, *faults = caught.value.faults
    assert "does not hold the weights of resnet34; they are likely those of resnet18" in first
    assert len(faults) == 1
    assert "96 keys missing: " not in faults[0]
    assert " keys missing: layer1.2.conv1.weight, " in faults[0]
    assert faults[0].count("layer") == 10
    assert faults[0].endswith("more")


def test_weights_of_another_shape_are_an_error(resnet18: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_weights(build_model("resnet18", 7, stem="small"), "resnet18", str(resnet18))
    assert "1 keys of another shape: conv1.weight 64x3x7x7 for 64x3x3x3" in str(caught.value)


def test_error_names_the_likely_model_for_timm_names(tmp_path: Path) -> None:
    torch.save(timm.create_model("vgg13_bn").state_dict(), tmp_path / "v.pth")
    with pytest.raises(UserError, match="likely those of vgg13_bn"):
        load_weights(build_model("resnet18", 1000), "resnet18", str(tmp_path / "v.pth"))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickle_with_code_is_an_error_and_not_run(how: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"conv1.weight": Evil(trace)}
    torch.save(content, path) if how == "torch" else path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="is a pickle that could run code") as caught:
        read_weight_sets(str(path))
    assert len(caught.value.faults) == 1
    assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_weights_are_errors(value: float, resnet18: Path, tmp_path: Path) -> None:
    state = torch.load(resnet18)
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = value
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"NaN or infinite values: stage2_0\.conv1\.weight"):
        load_weights(build_model("resnet18", 7), "resnet18", str(tmp_path / "bad.pth"))


def test_files_without_weights_are_errors(tmp_path: Path) -> None:
    for name, content, message in (
        ("text.pth", b"hello", "is neither a .safetensors nor a .pth file"),
        ("empty.safetensors", b"", "is neither"),
        ("truncated.safetensors", (128).to_bytes(8, "little") + b'{"a":', "is corrupt"),
        ("truncated.pth", b"PK\x03\x04rest", "is corrupt"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_weight_sets(str(tmp_path / name))
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(UserError, match="does not hold tensors by name"):
        read_weight_sets(str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="No such file"):
        read_weight_sets(str(tmp_path / "absent.pth"))


def test_export_rejects_invalid_arguments(tmp_path: Path) -> None:
    config = load_config("digits-resnet8")
    metadata = ModelMetadata.of(config, ["a", "b"], 2)
    save_model(tmp_path / "run", metadata.build(), metadata)
    with pytest.raises(
        UserError,
        match="torchvision has no resnet8; Convoy's models that it has: alexnet, googlenet, "
        "resnet18",
    ):
        export_weights(str(tmp_path / "run"), tmp_path / "x.pth", "torchvision")
    with pytest.raises(UserError, match=r"--format: 'tf' is not one of torchvision, timm, onnx"):
        export_weights(str(tmp_path / "run"), tmp_path / "x.pth", "tf")
    with pytest.raises(UserError, match=r"must end with \.onnx"):
        export_weights(str(tmp_path / "run"), tmp_path / "x.pth", "onnx")
    with pytest.raises(UserError, match=r"is neither a folder with model\.safetensors"):
        export_weights(str(tmp_path / "nothing"), tmp_path / "x.onnx", "onnx")


def test_export_rejects_options_that_the_other_library_lacks(tmp_path: Path) -> None:
    """torchvision would accept the weights of a tanh network and compute something else."""
    for key, value in {"activation": "tanh", "head": "average", "filters": "single"}.items():
        config = load_config(
            "digits-resnet8",
            ["model.name=vgg11", "model.width=8", "data.image_size=32", f"model.{key}={value}"],
        )
        metadata = ModelMetadata.of(config, ["a", "b"], 2)
        save_model(tmp_path / key, metadata.build(), metadata)
        with pytest.raises(
            UserError,
            match=f"model.{key}: torchvision's vgg11 supports only .*, not '{value}'; "
            "export it as onnx",
        ):
            export_weights(str(tmp_path / key), tmp_path / "x.pth", "torchvision")


@pytest.mark.parametrize("name", ["alexnet2012", "vgg11_bn", "googlenet", "resnet8"])
def test_onnx_runtime_gives_the_same_output(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"width": 8}
    model = build_model(name, 10, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    metadata = ModelMetadata(
        name, options, [str(i) for i in range(10)], 10, 64, 1.0, [0.5] * 3, [0.5] * 3, True
    )
    save_model(tmp_path, model, metadata)
    export_weights(str(tmp_path), tmp_path / "m.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["mean"] == "[0.5, 0.5, 0.5]"
    for count in (1, 3):
        batch = torch.randn(count, 3, 64, 64)
        expected = model.eval()(batch).detach()
        (output,) = session.run(None, {"images": batch.numpy()})
        assert (torch.from_numpy(output) - expected).abs().max() <= 1e-4 * expected.abs().max()
