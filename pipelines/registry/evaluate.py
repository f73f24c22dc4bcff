"""``convoy evaluate`` and ``convoy predict``: evaluates and applies registered models."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.terminal.progress_bar import WorkProgress
from trainer.data.decode.decoder import DecodeError, decode_rgb
from trainer.data.index import Index, open_index
from trainer.data.shards.sample_reader import read_samples
from trainer.data.shards.tar import encoded_image, label_of
from trainer.errors import UserError
from trainer.tracking import configure_mlflow
from trainer.weights.class_matching import match_classes, output_names

Predict = Callable[[list[bytes]], np.ndarray]
"""Maps encoded images to probabilities [N, classes]."""

_BATCH = 256


@dataclass(frozen=True)
class Evaluation:
    """Exact accuracy over all samples of a split. ``top1``, ``top5``: fractions of ``samples``."""

    model: str
    data: str
    samples: int
    top1: float
    top5: float


@contextmanager
def downloaded(model_uri: str) -> Iterator[str]:
    """Download a model from MLflow to a temporary folder that is deleted after the block.

    Raises UserError if the download fails, or if MLflow or the file system fails in the block.
    """
    configure_mlflow()
    import mlflow
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(prefix="convoy-model-") as folder:
        try:
            yield mlflow.artifacts.download_artifacts(artifact_uri=model_uri, dst_path=folder)
        except (MlflowException, OSError) as error:
            reason = " ".join(str(error).split())[:240]
            raise UserError(
                f"{model_uri}: cannot be loaded from {mlflow.get_tracking_uri()}: {reason}"
            ) from None


def load_predict(model_uri: str) -> tuple[Predict, list[str]]:
    """Load a model and return its predict function and class names.

    ``model_uri``: a model in MLflow (``models:/NAME@champion``, ``runs:/ID/model``) or the output
    folder of a run. Raises UserError if it cannot be loaded.
    """
    folder = Path(model_uri)
    if (folder / "model.safetensors").is_file():
        from trainer.export.exported_model import Predictor

        predictor = Predictor(folder / "model.safetensors", folder / "model.json")
        return predictor.predict, predictor.facts.classes
    import mlflow
    import pandas as pd

    with downloaded(model_uri) as copy:
        model = mlflow.pyfunc.load_model(copy)

    def predict(images: list[bytes]) -> np.ndarray:
        probabilities: np.ndarray = model.predict(pd.DataFrame({"image": images}))
        return probabilities

    return predict, _classes(model)


def _classes(model: Any) -> list[str]:
    metadata = getattr(getattr(model.unwrap_python_model(), "predictor", None), "facts", None)
    if metadata is None:
        raise UserError("this model was not registered by Convoy: it has no class names")
    return list(metadata.classes)


def evaluate(model_uri: str, data_url: str) -> Evaluation:
    """Measure a model on every sample of a split."""
    index, store = open_index(data_url)
    predict, classes = load_predict(model_uri)
    outputs = _outputs_for(index, classes, model_uri, data_url)
    hits1 = hits5 = 0
    with WorkProgress("evaluating", index.samples, "images") as progress:
        for numbers in np.array_split(np.arange(index.samples), -(-index.samples // _BATCH)):
            samples = read_samples(numbers, index, store).values()
            labels = outputs[[label_of(sample, len(index.classes)) for sample in samples]]
            images = [(sample["__where__"], bytes(encoded_image(sample))) for sample in samples]
            top = topk_indices(_predict_named(predict, images))
            hits1 += int((top[:, 0] == labels).sum())
            hits5 += int((top == labels[:, None]).any(1).sum())
            progress.add(len(numbers))
    return Evaluation(
        model_uri, data_url, index.samples, hits1 / index.samples, hits5 / index.samples
    )


def _outputs_for(index: Index, classes: list[str], model: str, data: str) -> np.ndarray:
    """Return the model's output for each label of the dataset, int64 [classes of the dataset].

    Raises UserError.
    """
    if classes[: len(index.classes)] == index.classes:
        return np.arange(len(index.classes))
    return np.array(match_classes(output_names(classes, len(classes)), index, model, data))


def _predict_named(predict: Predict, images: list[tuple[str, bytes]]) -> np.ndarray:
    """Predict images that have names.

    Raises UserError that names the first image that cannot be decoded. A registered model runs its
    own copy of the decoder and raises its own exceptions, so after a failure our decoder checks the
    images.
    """
    try:
        return predict([content for _, content in images])
    except Exception:
        for name, content in images:
            try:
                decode_rgb(content)
            except DecodeError as error:
                raise UserError(f"{name}: cannot be decoded: {error}") from None
        raise


def topk_indices(probabilities: np.ndarray) -> np.ndarray:
    """Return the five likeliest classes of each row, in order; ties go to the lower class."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :5]


def _class_name(classes: list[str], output: int) -> str:
    """Return the name of an output, or its number if it has no class.

    Outputs without a class exist if ``model.num_classes`` exceeds the number of classes of the
    dataset.
    """
    return classes[output] if output < len(classes) else str(output)


def predict_files(model_uri: str, files: Iterable[str]) -> list[dict[str, Any]]:
    """Return the five most likely classes of each image file.

    Raises UserError that names a file that is not an image.
    """
    contents = []
    for file in files:
        try:
            contents.append((file, Path(file).read_bytes()))
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from None
    predict, classes = load_predict(model_uri)
    answers = []
    for file, content in contents:
        probabilities = _predict_named(predict, [(file, content)])[0]
        likeliest = topk_indices(probabilities[None])[0]
        top5 = [
            {"class": _class_name(classes, i), "probability": float(probabilities[i])}
            for i in likeliest
        ]
        answers.append({"file": file, "top5": top5})
    return answers
