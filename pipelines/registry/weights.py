"""``convoy weights``: imports pretrained weights and exports trained models."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import nn

from pipelines.registry.evaluate import downloaded
from trainer.data.index import open_index
from trainer.dependencies.process_patches import log_level
from trainer.errors import UserError
from trainer.export.exported_model import METADATA_NAME, WEIGHTS_NAME, ModelMetadata, save_model
from trainer.models import build_model
from trainer.models.registry import Library, get_model_spec
from trainer.models.state_dict_adapter import StateDictAdapter, export_state
from trainer.weights.class_matching import imagenet_output_names, match_classes
from trainer.weights.pretrained import classes_in, load_weights, select_weights
from trainer.weights.state_dict_file import saved_class_names

_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_SUFFIXES = {
    "torchvision": (".pth", ".pt", ".safetensors"),
    "timm": (".safetensors", ".pth", ".pt"),
    "onnx": (".onnx",),
}


def import_weights(
    file: str,
    name: str,
    output: Path,
    image_size: int,
    data_url: str | None,
    half_range: bool | None,
    key: str | None = None,
) -> list[str]:
    """Convert the weights of ``file`` to a model folder; return lines about it.

    ``convoy evaluate``, ``convoy weights export`` and ``model.init`` accept the folder.

    ``data_url``: a split whose classes the model gets. Weights with 1,000 outputs are ImageNet's:
    the classes of the split are matched with them by name, and the head keeps the outputs of these
    classes, in their order. Other weights must have as many outputs as the split has classes.
    Without ``data_url``, names are ImageNet's for 1,000 outputs, else numbers.

    ``half_range``: the weights expect pixels from -1 to 1 instead of ImageNet's mean and deviation.
    The default is True only for torchvision's GoogLeNet, whose published weights were trained that
    way (its ``transform_input``).

    ``key``: the set of weights to take from a file that holds several; see ``select_weights``.
    """
    if (output / WEIGHTS_NAME).exists():
        raise UserError(f"{output}: already holds a model; choose another --output or delete it")
    get_model_spec(name)
    if saved_class_names(file) is not None:
        raise UserError(
            f"{file}: is a model that Convoy saved, with its class names; `convoy evaluate`, "
            "`convoy weights export` and model.init accept its folder directly"
        )
    weights = select_weights(file, name, key)
    num_outputs = classes_in(weights, name) or 1000
    classes, outputs, notes = _classes_of(file, num_outputs, data_url)
    model = build_model(name, len(classes), image_size)
    loaded = load_weights(model, name, file, weights, outputs)
    notes = [*loaded.notes, *notes]
    if half_range is None:
        libraries = get_model_spec(name).libraries
        half_range = loaded.scheme != "convoy" and libraries[loaded.scheme].half_range
    mean, std = ([0.5] * 3, [0.5] * 3) if half_range else _IMAGENET
    if half_range:
        notes.append(
            "pixels are scaled to -1..1 (mean and std 0.5), as torchvision's published "
            "GoogLeNet weights expect"
        )
    metadata = ModelMetadata(
        name, {}, classes, len(classes), image_size, 0.875, mean, std, channels_last=True
    )
    save_model(output, model, metadata)
    return [
        f"{name} from {loaded.scheme}'s names: {sum(p.numel() for p in model.parameters()):,} "
        f"parameters in {output}",
        *notes,
    ]


def _classes_of(
    file: str, num_outputs: int, data_url: str | None
) -> tuple[list[str], list[int] | None, list[str]]:
    """Return the model's class names, the file's output for each if they differ, and notes.

    Raises UserError.
    """
    if data_url is None:
        return _class_names(num_outputs), None, []
    index = open_index(data_url)[0]
    count = len(index.classes)
    if num_outputs == 1000:
        outputs = match_classes(imagenet_output_names(), index, f"{file} (ImageNet)", data_url)
        if outputs == list(range(num_outputs)):
            return index.classes, None, []
        return (
            index.classes,
            outputs,
            [f"the head has the outputs of {count:,} of ImageNet's 1,000 classes, matched by name"],
        )
    if count != num_outputs:
        raise UserError(
            f"--data: {data_url} has {count:,} classes, but the weights in {file} have "
            f"{num_outputs:,} outputs without names; use the dataset that they were trained on, "
            "or train a new head with model.init"
        )
    return (
        index.classes,
        None,
        [f"{file}: has no class names; its outputs are assumed to be in the order of {data_url}"],
    )


def _class_names(num_classes: int) -> list[str]:
    if num_classes != 1000:
        return [str(number) for number in range(num_classes)]
    import torchvision

    return list(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def export_weights(source: str, file: Path, form: str) -> str:
    """Write a model to a file for other libraries; return a line about it.

    ``source``: the output folder of a run, or a model in MLflow. torchvision and timm formats are a
    state dict with their names, .pth or .safetensors. onnx is a graph from normalized images [N, 3,
    S, S] to logits [N, num_classes], for any N; its metadata holds mean, std and class names.
    """
    if form not in _SUFFIXES:
        raise UserError(f"--format: {form!r} is not one of {', '.join(_SUFFIXES)}")
    if file.suffix not in _SUFFIXES[form]:
        raise UserError(
            f"{file}: a file of --format {form} must end with {' or '.join(_SUFFIXES[form])}"
        )
    with _model_folder(source) as folder:
        metadata = ModelMetadata(**json.loads((folder / METADATA_NAME).read_text(encoding="utf-8")))
        library = get_model_spec(metadata.name).libraries.get(cast(Library, form))
        for key, theirs in (library.options if library else {}).items():
            value = metadata.options.get(key, theirs)
            if value != theirs:
                raise UserError(
                    f"model.{key}: {form}'s {metadata.name} supports only {theirs!r}, not "
                    f"{value!r}; export it as onnx"
                )
        model = metadata.build()
        load_weights(model, metadata.name, str(folder))
    state = (
        {} if form == "onnx" else export_state(cast(StateDictAdapter, form), metadata.name, model)
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.stem}.part{file.suffix}")
    try:
        if form == "onnx":
            _write_onnx(model.eval(), metadata, part)
        else:
            save = save_file if file.suffix == ".safetensors" else torch.save
            save({name: value.contiguous() for name, value in state.items()}, part)
        part.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
    return f"{metadata.name} as {form}: {file}, {file.stat().st_size / 2**20:,.1f} MiB"


def _write_onnx(model: nn.Module, metadata: ModelMetadata, path: Path) -> None:
    images = torch.zeros(2, 3, metadata.image_size, metadata.image_size)
    with (
        log_level("torch.onnx", logging.ERROR),
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        program = torch.onnx.export(
            model,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    meta = {
        "mean": metadata.mean,
        "std": metadata.std,
        "classes": metadata.classes,
        "eval_crop": metadata.eval_crop,
    }
    program.model.metadata_props.update({key: json.dumps(value) for key, value in meta.items()})
    program.save(path, external_data=False)


@contextlib.contextmanager
def _model_folder(source: str) -> Iterator[Path]:
    """Yield the folder with the weights and metadata files.

    It is the output folder of a run, or a copy of a model in MLflow (``models:/NAME@champion``,
    ...).
    """
    folder = Path(source)
    if (folder / WEIGHTS_NAME).is_file() and (folder / METADATA_NAME).is_file():
        yield folder
        return
    if ":/" not in source:
        raise UserError(
            f"{source}: is neither a folder with {WEIGHTS_NAME} and {METADATA_NAME} nor a model in "
            "MLflow"
        )
    with downloaded(source) as copy:
        found = next(Path(copy).rglob(WEIGHTS_NAME), None)
        if found is None or not (found.parent / METADATA_NAME).is_file():
            raise UserError(
                f"{source}: was not registered by Convoy: it has no folder with {WEIGHTS_NAME} "
                f"and {METADATA_NAME}"
            )
        yield found.parent
