"""The MLflow model as code.

MLflow copies this file and runs it to load a registered version, so nothing is pickled.
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd

from trainer.export.exported_model import Predictor

_IMAGES_AT_ONCE = 256


class ConvoyModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Predicts class probabilities from encoded images.

    Input: column ``image`` of encoded bytes (JPEG, PNG, ...). Output: float32 [N, classes] of
    probabilities.
    """

    def load_context(self, context: Any) -> None:
        self.predictor = Predictor(
            Path(context.artifacts["weights"]), Path(context.artifacts["facts"])
        )

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        images = [bytes(image) for image in model_input["image"]]
        parts = [
            self.predictor.predict(images[i : i + _IMAGES_AT_ONCE])
            for i in range(0, len(images), _IMAGES_AT_ONCE)
        ]
        return (
            np.concatenate(parts)
            if parts
            else np.empty((0, self.predictor.facts.num_classes), np.float32)
        )


mlflow.models.set_model(ConvoyModel())
