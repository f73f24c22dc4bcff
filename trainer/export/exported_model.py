"""A trained model as two plain files: master weights (safetensors) and metadata (JSON)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from trainer.config.schema import RunConfig
from trainer.data.decode.decoder import decode_rgb, to_array
from trainer.data.transforms.crop import eval_transform
from trainer.dependencies.process_patches import pillow_warnings_ignored
from trainer.errors import UserError
from trainer.faults.disk_space import write_file
from trainer.models import build_model
from trainer.models.layers import normalize

WEIGHTS_NAME, METADATA_NAME = "model.safetensors", "model.json"


@dataclass(frozen=True)
class ModelMetadata:
    """Everything besides the weights that is needed to turn image bytes into probabilities."""

    name: str
    options: dict[str, Any]
    classes: list[str]
    num_classes: int
    image_size: int
    eval_crop: float
    mean: list[float]
    std: list[float]
    channels_last: bool

    @classmethod
    def of(cls, config: RunConfig, classes: list[str], num_classes: int) -> "ModelMetadata":
        options = config.model.model_dump(
            exclude={"name", "num_classes", "init"}, exclude_none=True
        )
        data = config.data
        return cls(
            config.model.name,
            options,
            classes,
            num_classes,
            data.image_size,
            config.augment.eval_crop,
            data.mean,
            data.std,
            config.train.channels_last,
        )

    def build(self) -> nn.Sequential:
        return build_model(self.name, self.num_classes, self.image_size, **self.options)


def save_model(folder: Path, model: nn.Module, metadata: ModelMetadata) -> None:
    """Writes both files, each atomically. Raises UserError if the disk is full."""
    weights = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    write_file(folder / WEIGHTS_NAME, save(weights))
    write_file(
        folder / METADATA_NAME, json.dumps(vars(metadata), indent=1, ensure_ascii=False) + "\n"
    )


class Predictor:
    """Runs a saved model: encoded images in, class probabilities out.

    The preprocessing is the same as in evaluation.
    """

    def __init__(self, weights: Path, metadata: Path) -> None:
        # `convoy evaluate` reads this attribute of registered models, so its name is fixed
        self.facts = ModelMetadata(**json.loads(metadata.read_text(encoding="utf-8")))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = self.facts.build()
        try:
            model.load_state_dict(load_file(weights))
        except (SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{weights}: does not hold the weights of {self.facts.name}: "
                f"{str(error).splitlines()[0]}"
            ) from None
        layout = torch.channels_last if self.facts.channels_last else torch.contiguous_format
        self.model = model.eval().to(self.device).to(memory_format=layout)

    @torch.inference_mode()
    def predict(self, images: list[bytes]) -> np.ndarray:
        """Returns probabilities, float32 [N, num_classes].

        Raises DecodeError for bytes that cannot be decoded as an image.
        """
        metadata = self.facts
        with pillow_warnings_ignored():
            views = [
                to_array(eval_transform(decode_rgb(image), metadata.image_size, metadata.eval_crop))
                for image in images
            ]
        pixels = torch.from_numpy(np.stack(views)).to(self.device)
        logits = self.model(normalize(pixels, metadata.mean, metadata.std))
        probabilities: np.ndarray = torch.softmax(logits.float(), dim=1).cpu().numpy()
        return probabilities
