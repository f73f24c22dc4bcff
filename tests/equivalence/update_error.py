"""Relative differences between the results of two trainings of the same network."""

from collections.abc import Mapping

from torch import Tensor


def relative_error(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], running: bool = False
) -> float:
    """Return the norm of the difference of all parameters, divided by the norm of ``want``.

    ``running``: compare batch norm's running statistics instead of the parameters.
    """
    return _relative_error(got, want, None, running)


def relative_update_error(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> float:
    """Return the norm of the difference of all parameters, divided by the norm of their update.

    The update is the difference between ``want`` and the ``initial`` parameters.
    """
    return _relative_error(got, want, initial, False)


def _relative_error(
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    initial: Mapping[str, Tensor] | None,
    running: bool,
) -> float:
    difference = total = 0.0
    for name, value in want.items():
        if value.is_floating_point() and ("running" in name) == running:
            difference += float((got[name].to(value) - value).square().sum())
            reference = value if initial is None else value - initial[name].to(value)
            total += float(reference.square().sum())
    return (difference / total) ** 0.5 if total else 0.0
