"""Plot style of all studies.

The colours are Okabe and Ito's, which colour-blind readers can distinguish; seeds are drawn as
bands.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

BLUE, ORANGE, GREEN, PINK, BLACK, SKY, YELLOW = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#000000",
    "#56B4E9",
    "#E69F00",
)
COLOURS = (BLUE, ORANGE, GREEN, PINK, BLACK, SKY, YELLOW)


@contextmanager
def panels(count: int, title: str, file: Path, height: float = 4.2) -> Iterator[list[Any]]:
    """Yield ``count`` axes in a row, and write the figure to ``file`` at the end."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, count, figsize=(6.0 * count, height), constrained_layout=True, squeeze=False
    )
    row = list(axes[0])
    for one in row:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    try:
        yield row
        figure.suptitle(title)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=100)
    finally:
        plt.close(figure)


def band(
    axes: Any,
    x: Sequence[float],
    rows: Sequence[Sequence[float]],
    colour: str,
    label: str,
    **style: Any,
) -> None:
    """Plot the mean of the rows (one per seed), and a band from their minimum to their maximum.

    Rows of unequal length are truncated to the shortest.
    """
    length = min(len(x), *(len(row) for row in rows))
    values = np.array([row[:length] for row in rows], dtype=float)
    axes.plot(x[:length], values.mean(axis=0), color=colour, label=label, linewidth=1.6, **style)
    if len(rows) > 1:
        axes.fill_between(
            x[:length], values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0
        )


def bars(
    axes: Any,
    labels: Sequence[str],
    spreads: Sequence[dict[str, Any]],
    colours: Sequence[str],
    form: str = "{:.1f}",
) -> None:
    """Plot a bar per spread, with its seeds as dots and its mean above."""
    for place, (values, colour) in enumerate(zip(spreads, colours, strict=False)):
        axes.bar(place, values["mean"], color=colour, width=0.6, alpha=0.85)
        axes.plot([place] * len(values["each"]), values["each"], ".", color=BLACK, markersize=4)
        axes.annotate(
            form.format(values["mean"]),
            (place, max(values["each"])),
            textcoords="offset points",
            xytext=(0, 5),
            ha="center",
        )
    axes.set_xticks(range(len(labels)), labels)
    axes.margins(y=0.15)


def points(
    axes: Any,
    labels: Sequence[str],
    spreads: Sequence[dict[str, Any]],
    colours: Sequence[str],
    form: str = "{:.1f}",
) -> None:
    """Plot a large dot per mean and a small one per seed, for values far from zero."""
    for place, (values, colour) in enumerate(zip(spreads, colours, strict=True)):
        axes.plot(place, values["mean"], "o", color=colour, markersize=11)
        axes.plot([place] * len(values["each"]), values["each"], ".", color=BLACK, markersize=4)
        axes.annotate(
            form.format(values["mean"]),
            (place, values["mean"]),
            textcoords="offset points",
            xytext=(11, -4),
        )
    axes.set_xticks(range(len(labels)), labels)
    axes.margins(x=0.4, y=0.5)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of the last ``width`` values at each place, of fewer at the beginning."""
    sums = np.cumsum(np.asarray(values, dtype=float))
    counts = np.minimum(np.arange(1, len(sums) + 1), max(1, width))
    sums[width:] -= sums[:-width].copy() if width < len(sums) else 0
    return [float(value) for value in sums / counts]


def thinned(values: Sequence[float], most: int = 200) -> tuple[list[int], list[float]]:
    """Return at most ``most`` points of a curve, evenly spaced, including the last.

    Returns their places, counted from 1, and their values, rounded.
    """
    places = sorted(set(np.linspace(1, len(values), min(most, len(values))).astype(int).tolist()))
    return places, [float(f"{values[place - 1]:.5g}") for place in places]
