"""Renders the table of ``convoy models``."""

from collections.abc import Iterable

from rich.table import Table

from trainer.models.model_info import ModelInfo

_COLUMNS = (
    "model",
    "year",
    "layers",
    "params M",
    "pixels",
    "MACs G",
    "act. MiB",
    "top-5",
    "tv top-1/5",
)


def rows(entries: Iterable[ModelInfo]) -> list[tuple[str, ...]]:
    """Return one row of text cells per model."""
    return [
        (
            e.name,
            str(e.year),
            str(e.layers),
            f"{e.parameters / 1e6:.2f}"
            + (f" +{e.auxiliary_parameters / 1e6:.2f}" if e.auxiliary_parameters else ""),
            str(e.image_size),
            f"{e.multiply_adds / 1e9:.3f}",
            f"{e.activation_bytes / 2**20:.1f}",
            f"{e.top5_error:.2f}" if e.top5_error else "",
            f"{e.torchvision_top1:.2f}/{e.torchvision_top5:.2f}" if e.torchvision_top1 else "",
        )
        for e in entries
    ]


def table(entries: Iterable[ModelInfo]) -> Table:
    """Return the table for a terminal."""
    entries = list(entries)
    result = Table(
        *_COLUMNS, box=None, padding=(0, 1, 0, 0), caption=_caption(entries), caption_justify="left"
    )
    for cells in rows(entries):
        result.add_row(*cells)
    result.columns[0].no_wrap = True
    for column in result.columns[1:]:
        column.justify = "right"
    return result


def markdown(entries: Iterable[ModelInfo]) -> str:
    """Return the same table and its sources as Markdown, for the documentation."""
    entries = list(entries)
    return markdown_table(entries) + "\n\n" + _caption(entries).replace("\n", "\n\n") + "\n"


def markdown_table(entries: Iterable[ModelInfo]) -> str:
    """Return the table as Markdown."""
    return "\n".join(
        "| " + " | ".join(cells) + " |"
        for cells in (_COLUMNS, ["---", *["--:"] * (len(_COLUMNS) - 1)], *rows(entries))
    )


def top5_sources(entries: Iterable[ModelInfo]) -> dict[str, list[str]]:
    """Return the sources of the published top-5 errors, each with the names of its models."""
    sources: dict[str, list[str]] = {}
    for entry in entries:
        if entry.top5_source:
            sources.setdefault(entry.top5_source, []).append(entry.name)
    return sources


def _caption(entries: list[ModelInfo]) -> str:
    sources = top5_sources(entries)
    lines = [f"top-5 error of {', '.join(names)}: {source}" for source, names in sources.items()]
    lines += [
        "layers: layers with weights on the longest path. params: after the +, parameters of the "
        "auxiliary heads.",
        "MACs: multiply-adds to evaluate one image. act.: activations that autograd saves per "
        "image in training, fp32.",
        "top-5: error on ImageNet that the paper published, percent.",
        "tv: accuracy on ImageNet of torchvision's first weights of that name (IMAGENET1K_V1), "
        "percent, published by torchvision.",
    ]
    return "\n".join(lines)
