"""Plots of a run: curves from the MLflow history, and predictions on test images."""

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from pipelines.registry.evaluate import Predict
from trainer.data.index import open_index
from trainer.data.shards.sample_reader import read_samples
from trainer.data.shards.tar import encoded_image, label_of

matplotlib.use("Agg")

_BLUE, _ORANGE = "#0072B2", "#D55E00"  # colour-blind readers can distinguish these


def plot_curves(client: Any, run_id: str, title: str, file: Path) -> None:
    """Plot loss and learning rate over optimizer steps, and top-1 after each epoch."""
    import matplotlib.pyplot as plt

    def history(key: str) -> tuple[list[int], list[float]]:
        points = sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))
        return [step for step, _ in points], [value for _, value in points]

    figure, (loss_axes, rate_axes, top_axes) = plt.subplots(
        1, 3, figsize=(13, 3.8), constrained_layout=True
    )
    steps, losses = history("loss")
    loss_axes.plot(steps, losses, color=_BLUE, alpha=0.25, linewidth=0.8, label="each step")
    width = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    loss_axes.plot(steps[width - 1 :], smooth, color=_BLUE, label=f"mean of {width} steps")
    loss_axes.set(
        title="Training loss", xlabel="optimizer step", ylabel="cross-entropy (nats)", yscale="log"
    )
    loss_axes.legend(frameon=False)
    rate_axes.plot(*history("learning_rate"), color=_ORANGE)
    rate_axes.set(
        title="Learning rate", xlabel="optimizer step", ylabel="learning rate", ylim=(0, None)
    )
    steps, top1 = history("top1")
    top_axes.plot(steps, [100 * value for value in top1], color=_BLUE, marker="o")
    for step, value in zip(steps, top1, strict=True):
        top_axes.annotate(
            f"{value:.1%}",
            (step, 100 * value),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize=9,
        )
    top_axes.set(title="Validation", xlabel="optimizer step", ylabel="top-1 accuracy (%)")
    top_axes.margins(x=0.15, y=0.25)
    for axes in (loss_axes, rate_axes, top_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_predictions(
    predict: Predict, data_url: str, title: str, file: Path, rows: int = 4, columns: int = 8
) -> None:
    """Plot test images under their predicted classes; a wrong one also shows the true class."""
    import matplotlib.pyplot as plt

    index, store = open_index(data_url)
    numbers = np.linspace(0, index.samples - 1, rows * columns).astype(int)
    samples = list(read_samples(numbers, index, store).values())
    images = [bytes(encoded_image(sample)) for sample in samples]
    labels = [label_of(sample, len(index.classes)) for sample in samples]
    predicted = predict(images).argmax(axis=1)
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * 1.5, rows * 1.75), constrained_layout=True
    )
    for cell, image, label, guess in zip(axes.flat, images, labels, predicted, strict=False):
        cell.imshow(Image.open(io.BytesIO(image)).convert("RGB"))
        right = label == guess
        text = (
            index.classes[guess]
            if right
            else f"{index.classes[guess]}\n(is {index.classes[label]})"
        )
        cell.set_title(
            text,
            fontsize=8,
            color="black" if right else _ORANGE,
            fontweight="normal" if right else "bold",
        )
        cell.axis("off")
    wrong = sum(int(label != guess) for label, guess in zip(labels, predicted, strict=True))
    figure.suptitle(
        f"{title}: {len(labels) - wrong} of {len(labels)} right; wrong ones in orange with "
        "their true class"
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)
