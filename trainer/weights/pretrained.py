"""Loads a network's weights from a file: selects, renames and checks the matching set."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.data.index import Index
from trainer.errors import UserError
from trainer.models.registry import ModelSpec, build_model, get_model_spec, list_models
from trainer.models.state_dict_adapter import (
    State,
    StateDictAdapter,
    auxiliary_names,
    head_names,
    key_map,
    schemes_of,
    to_native_state_dict,
)
from trainer.weights.class_matching import match_classes, output_names
from trainer.weights.state_dict_file import (
    WeightSet,
    is_average,
    read_weight_sets,
    saved_class_names,
)

_SHOWN = 10
"""Maximum number of keys of each kind that an error message lists."""
_COUNTER = "num_batches_tracked"
"""Batch norm's counter, which is missing in files from before 2018."""
_PREFIX_DEPTH = 3
"""Maximum number of components of a prefix, such as ``state.model.module.``, that is tried."""


@dataclass(frozen=True)
class LoadReport:
    """The naming scheme of a weights file, with notes.

    The notes say what the file did not provide, one line each.
    """

    scheme: StateDictAdapter
    notes: list[str]


@dataclass(frozen=True)
class _Candidate:
    """A set's tensors below one prefix; ``score`` counts the network's names among them."""

    path: str
    state: State
    scheme: StateDictAdapter
    score: int
    others: tuple[str, ...]
    """Names in the same set outside the prefix."""

    @property
    def name(self) -> str:
        return self.path or "the top level"


@dataclass(frozen=True)
class FittingWeights:
    """The weights in a file that match one network, under the file's names without any prefix."""

    state: State
    scheme: StateDictAdapter
    notes: list[str]


def select_weights(url: str, name: str, key: str | None = None) -> FittingWeights:
    """Selects the set of weights at ``url`` whose names best match the network ``name``.

    Prefixes (``module.``, ``model.``) are removed. Averaged (EMA) weights are preferred; the notes
    name the selected set and what was ignored. ``key``: the set to select, as named in the notes.
    Raises UserError if two sets match equally well, and if ``key`` is missing.
    """
    variant = get_model_spec(name)
    with torch.device("meta"):
        model = build_model(name, 1)
    sets = read_weight_sets(url)
    candidates = [candidate for one in sets for candidate in _candidates(one, variant, model)]
    if key is not None:
        chosen = [candidate for candidate in candidates if candidate.path == key]
        if not chosen:
            most = max(candidate.score for candidate in candidates)
            keys = sorted({candidate.path for candidate in candidates if candidate.score == most})
            raise UserError(
                f"--key: {url} has no weights at {key!r}; it has: {', '.join(map(repr, keys))}"
            )
        return _selected(chosen[0], [], url)
    best = max(candidate.score for candidate in candidates)
    # The weights of another network: the caller reports the differences.
    if best < len(key_map("convoy", variant, model)) // 4:
        complete = [candidate for candidate in candidates if not candidate.others]
        closest = max(complete, key=lambda candidate: (len(candidate.state), len(candidate.path)))
        return FittingWeights(closest.state, closest.scheme, [])
    fitting = _without_copies([candidate for candidate in candidates if candidate.score == best])
    averages = [candidate for candidate in fitting if is_average(candidate.path)]
    if len(averages or fitting) > 1:
        names = ", ".join(candidate.name for candidate in averages or fitting)
        raise UserError(
            f"{url}: holds several sets of weights for {name}: {names}; choose one: convoy "
            "weights import --key KEY"
        )
    chosen = averages or fitting
    unfit = [c for c in candidates if is_average(c.path) and not averages and c.score > best // 2]
    return _selected(chosen[0], [c for c in [*fitting, *unfit] if c is not chosen[0]], url)


def _selected(chosen: _Candidate, rest: list[_Candidate], url: str) -> FittingWeights:
    notes = []
    if rest:
        kind = "averaged (EMA) weights" if is_average(chosen.path) else "weights"
        unused = ", ".join(dict.fromkeys(candidate.name for candidate in rest))
        notes.append(
            f"{url}: uses the {kind} at {chosen.name}, not those at {unused}; --key selects others"
        )
    elif is_average(chosen.path):
        notes.append(f"{url}: uses the averaged (EMA) weights at {chosen.name}")
    # n_averaged is the counter of torch's AveragedModel.
    others = [key for key in chosen.others if key != "n_averaged"]
    if others:
        more = f" and {len(others) - _SHOWN:,} more" if len(others) > _SHOWN else ""
        notes.append(
            f"{url}: ignores {len(others):,} tensors outside {chosen.name}: "
            f"{', '.join(others[:_SHOWN])}{more}"
        )
    return FittingWeights(chosen.state, chosen.scheme, notes)


def _candidates(one: WeightSet, variant: ModelSpec, model: nn.Sequential) -> list[_Candidate]:
    """Returns a candidate for each prefix of the set's names.

    Each has the naming scheme that matches best below its prefix.
    """
    names = {
        scheme: {n for n in key_map(scheme, variant, model).values() if _COUNTER not in n}
        for scheme in schemes_of(variant.name)
    }
    prefixes = {""}
    for key in one.tensors:
        parts = key.split(".")
        prefixes |= {
            ".".join(parts[:depth]) + "."
            for depth in range(1, min(_PREFIX_DEPTH, len(parts) - 1) + 1)
        }
    found = []
    for prefix in sorted(prefixes):
        state = {
            key[len(prefix) :]: value
            for key, value in one.tensors.items()
            if key.startswith(prefix)
        }
        score, scheme = max(
            ((len(names[scheme] & set(state)), scheme) for scheme in names),
            key=lambda pair: pair[0],
        )
        others = tuple(key for key in one.tensors if not key.startswith(prefix))
        path = ".".join(filter(None, (one.key, prefix.removesuffix("."))))
        found.append(_Candidate(path, state, scheme, score, others))
    return found


def _without_copies(candidates: list[_Candidate]) -> list[_Candidate]:
    """Removes candidates that contain the same tensors as an earlier one."""
    kept: list[_Candidate] = []
    for candidate in candidates:
        if not any(_same_tensors(candidate.state, other.state) for other in kept):
            kept.append(candidate)
    return kept


def _same_tensors(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) for key, value in one.items()
    )


def load_weights(
    model: nn.Sequential,
    name: str,
    url: str,
    weights: FittingWeights | None = None,
    outputs: Sequence[int] | None = None,
    data: Index | None = None,
) -> LoadReport:
    """Loads the weights file at ``url`` into ``model``, built as ``name``.

    The file is a .safetensors, or a .pth that contains only tensors. Names may be Convoy's,
    torchvision's or timm's. If the file has another number of classes, the model's heads keep their
    new initialization; so do auxiliary heads that the file does not have.

    ``weights``: the file's content, if it was read already. ``outputs``: the file's output for each
    of the model's classes, if they differ. ``data``: the dataset whose classes the model has. If
    ``url`` is a run's output folder, its classes are matched with the dataset's by name, and a head
    for other classes keeps its new initialization as well.

    Raises UserError for any other mismatch, and for NaN or Inf weights.
    """
    weights = select_weights(url, name) if weights is None else weights
    variant, state, scheme = get_model_spec(name), weights.state, weights.scheme
    native = to_native_state_dict(state, scheme, variant, model)
    expected = model.state_dict()
    notes = [*weights.notes]
    present = [key for key in head_names(model) if key in native]
    trained_on = saved_class_names(url) if data is not None else None
    if trained_on == [str(number) for number in range(len(trained_on or []))]:
        trained_on = None
    if data is not None and trained_on is not None and data.classes != trained_on:
        try:
            outputs = match_classes(
                output_names(trained_on, len(trained_on)), data, url, "the dataset"
            )
        except UserError:
            notes.append(
                f"{url}: was trained on other classes ({trained_on[0]}, ...), so the head is "
                "newly initialized"
            )
            native = {key: value for key, value in native.items() if key not in present}
            return _filled(model, native, present, weights, notes, url, name)
        notes.append(f"{url}: the head's outputs are matched with the dataset's classes by name")
    _check_heads(native, present, url)
    if outputs is not None:
        chosen = torch.tensor(outputs)
        native |= {key: native[key][chosen] for key in present}
    heads = [key for key in present if native[key].shape != expected[key].shape]
    if heads and all(native[key].shape[1:] == expected[key].shape[1:] for key in heads):
        found, needed = native[heads[0]].shape[0], expected[heads[0]].shape[0]
        notes.append(
            f"{url}: has {found:,} classes, so the head for {needed:,} classes is newly initialized"
        )
        native = {key: value for key, value in native.items() if key not in heads}
    else:
        heads = []
    return _filled(model, native, heads, weights, notes, url, name)


def _filled(
    model: nn.Sequential,
    native: State,
    new: list[str],
    weights: FittingWeights,
    notes: list[str],
    url: str,
    name: str,
) -> LoadReport:
    """Checks ``native`` against the model and loads it.

    The weights listed in ``new`` are left unchanged.
    """
    expected, variant, scheme = model.state_dict(), get_model_spec(name), weights.scheme
    auxiliary = auxiliary_names(model)
    if auxiliary and not any(key in native for key in auxiliary):
        notes.append(f"{url}: has no auxiliary heads, so they are newly initialized")
        new = new + auxiliary
    faults = _misfits(native, expected, new, key_map(scheme, variant, model))
    if faults:
        first = f"{url}: does not hold the weights of {name}{_likely(weights.state, name)}"
        raise UserError(first, *(f"{url}: {fault}" for fault in faults))
    bad = [
        key
        for key, value in native.items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        raise UserError(f"{url}: {_listed('with NaN or infinite values', bad)}")
    model.load_state_dict(native, strict=False)
    return LoadReport(scheme, notes)


def _check_heads(native: State, heads: list[str], url: str) -> None:
    """Raises UserError for inconsistent heads.

    The weights and biases of all heads must have the same, nonzero number of outputs.
    """
    counts = {key: native[key].shape[0] if native[key].dim() else 0 for key in heads}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        found = ", ".join(f"{key} {_shape(native[key])}" for key in heads)
        raise UserError(
            f"{url}: is corrupt: its classification heads differ in the number of outputs or "
            f"have none: {found}"
        )


def classes_in(weights: FittingWeights, name: str) -> int | None:
    """Returns the number of classes of the head in the weights for the network ``name``.

    Returns None if the weights have no such head.
    """
    with torch.device("meta"):
        model = build_model(name, 1)
    native = to_native_state_dict(weights.state, weights.scheme, get_model_spec(name), model)
    found = [native[key] for key in head_names(model) if key in native and native[key].dim() > 0]
    return found[0].shape[0] if found else None


def _misfits(native: State, expected: State, new: list[str], names: dict[str, str]) -> list[str]:
    """Returns how ``native`` differs from the ``expected`` state, one line per kind of mismatch.

    ``new``: names that may be missing. ``names``: maps the model's names to the file's.
    """
    missing = [k for k in expected if k not in native and k not in new and not k.endswith(_COUNTER)]
    unexpected = [key for key in native if key not in expected]
    differing = [
        key for key in native if key in expected and native[key].shape != expected[key].shape
    ]
    shapes = [
        f"{names[key]} {_shape(native[key])} for {_shape(expected[key])}" for key in differing
    ]
    integers = [
        f"{names[key]} {native[key].dtype}"
        for key in native
        if key in expected
        and expected[key].is_floating_point()
        and not native[key].is_floating_point()
    ]
    kinds = [
        ("missing", [names[key] for key in missing]),
        ("unexpected", unexpected),
        ("of another shape", shapes),
        ("not of a floating-point type", integers),
    ]
    return [_listed(kind, keys) for kind, keys in kinds if keys]


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"


def _listed(kind: str, keys: list[str]) -> str:
    more = f", and {len(keys) - _SHOWN:,} more" if len(keys) > _SHOWN else ""
    return f"{len(keys):,} keys {kind}: {', '.join(keys[:_SHOWN])}{more}"


def _likely(state: State, name: str) -> str:
    """Names the registered network that most of the file's names and shapes match.

    Returns an empty string if that is ``name`` itself, or if no network matches.
    """
    best, best_score = "", 0.5
    given = {key: tuple(value.shape) for key, value in state.items() if not key.endswith(_COUNTER)}
    for variant in list_models():
        with torch.device("meta"):
            model = build_model(variant.name, 1000)
        heads = set(head_names(model))
        shapes = {
            key: value.shape
            for key, value in model.state_dict().items()
            if not key.endswith(_COUNTER)
        }
        for scheme in schemes_of(variant.name):
            names = key_map(scheme, variant, model)
            fitting = sum(
                names[key] in given and (key in heads or _same_size(given[names[key]], shape))
                for key, shape in shapes.items()
            )
            score = fitting / max(len(shapes), len(given))
            if score > best_score:
                best, best_score = variant.name, score
    return f"; they are likely those of {best}" if best not in ("", name) else ""


def _same_size(given: tuple[int, ...], expected: torch.Size) -> bool:
    return given == tuple(expected) or (
        len(given) == 4 and len(expected) == 2 and torch.Size(given).numel() == expected.numel()
    )
