"""How far two trainings of the same network have come apart."""

from collections.abc import Mapping

from torch import Tensor


def distance(
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    first: Mapping[str, Tensor] | None = None,
    running: bool = False,
) -> float:
    """Of the trained parameters, as a part of their length, or of the way that they have come since
    ``first``.

    ``running``: of batch norm's running statistics instead.
    """
    apart = whole = 0.0
    for name, value in want.items():
        if value.is_floating_point() and ("running" in name) == running:
            apart += float((got[name].to(value) - value).square().sum())
            whole += float(
                (value if first is None else value - first[name].to(value)).square().sum()
            )
    return (apart / whole) ** 0.5 if whole else 0.0
