"""Weights files: read safely, checked against the network that they are for, in whosever names they are."""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from trainer.data.storage import open_store, parse_storage_url
from trainer.errors import UserError
from trainer.export import WEIGHTS_NAME
from trainer.models.naming import Scheme, State, auxiliary_names, detect, head_names, names_in, own_state, schemes_of
from trainer.models.registry import build_model, find_variant, variants

_SHOWN = 10
"""Keys of each kind that a refusal names."""
_COUNTER = "num_batches_tracked"
"""Of batch norm, which files of before 2018 lack."""


@dataclass(frozen=True)
class Loaded:
    """What came of a weights file: whose names it has, and what it did not give, a line each."""

    scheme: Scheme
    notes: list[str]


def load_weights(model: nn.Sequential, name: str, url: str, state: State | None = None) -> Loaded:
    """Fill ``model``, built as ``name``, from the weights file at ``url``: .safetensors, or .pth with tensors alone.

    Names may be ours, torchvision's or timm's. A file for another number of classes leaves the heads as they are, new; so
    does one without auxiliary heads. ``state``: the file's content where it was read already.

    Raises UserError for all else that does not fit, and for NaN or infinite weights.
    """
    state = read_state(url) if state is None else state
    variant = find_variant(name)
    scheme = detect(state, variant, model)
    own = own_state(state, scheme, variant, model)
    expected = model.state_dict()
    notes = []
    heads = [key for key in head_names(model) if key in own and own[key].shape != expected[key].shape]
    if heads and all(own[key].shape[1:] == expected[key].shape[1:] for key in heads):
        classes, wanted = (own[heads[0]].shape[0], expected[heads[0]].shape[0])
        notes.append(f"{url}: has {classes:,} classes, so the head for {wanted:,} is made new")
        own = {key: value for key, value in own.items() if key not in heads}
    else:
        heads = []
    auxiliary = auxiliary_names(model)
    if auxiliary and not any(key in own for key in auxiliary):
        notes.append(f"{url}: has no auxiliary heads, so they are made new")
        heads = heads + auxiliary
    faults = _misfits(own, expected, heads, names_in(scheme, variant, model))
    if faults:
        first = f"{url}: does not hold the weights of {name}{_likely(state, name)}"
        raise UserError(first, *(f"{url}: {fault}" for fault in faults))
    bad = [key for key, value in own.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise UserError(f"{url}: {_listed('with NaN or infinite values', bad)}")
    model.load_state_dict(own, strict=False)
    return Loaded(scheme, notes)


def classes_in(state: State, name: str) -> int | None:
    """Classes of the head in a state dict for the network ``name``; None where it has no such head."""
    with torch.device("meta"):
        model = build_model(name, 1)
    variant = find_variant(name)
    own = own_state(state, detect(state, variant, model), variant, model)
    found = [own[key] for key in head_names(model) if key in own and own[key].dim() > 0]
    return found[0].shape[0] if found else None


def _misfits(own: State, expected: State, new: list[str], names: dict[str, str]) -> list[str]:
    """What keeps ``own`` from being the ``expected`` state, a line a kind, in the file's ``names``; ``new`` need not be there."""
    missing = [k for k in expected if k not in own and k not in new and not k.endswith(_COUNTER)]
    unexpected = [key for key in own if key not in expected]
    differing = [key for key in own if key in expected and own[key].shape != expected[key].shape]
    shapes = [f"{names[key]} {_shape(own[key])} for {_shape(expected[key])}" for key in differing]
    kinds = [("missing", [names[key] for key in missing]), ("unexpected", unexpected), ("of another shape", shapes)]
    return [_listed(kind, keys) for kind, keys in kinds if keys]


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"


def _listed(kind: str, keys: list[str]) -> str:
    more = f", and {len(keys) - _SHOWN:,} more" if len(keys) > _SHOWN else ""
    return f"{len(keys):,} keys {kind}: {', '.join(keys[:_SHOWN])}{more}"


def _likely(state: State, name: str) -> str:
    """The registered network, beside ``name``, that most of the file's names and shapes fit."""
    best, best_score = "", 0.5
    given = {key: tuple(value.shape) for key, value in state.items() if not key.endswith(_COUNTER)}
    for variant in variants():
        with torch.device("meta"):
            model = build_model(variant.name, 1000)
        heads = set(head_names(model))
        shapes = {key: value.shape for key, value in model.state_dict().items() if not key.endswith(_COUNTER)}
        for scheme in schemes_of(variant.name):
            names = names_in(scheme, variant, model)
            fitting = sum(
                names[key] in given and (key in heads or _same_size(given[names[key]], shape)) for key, shape in shapes.items()
            )
            score = fitting / max(len(shapes), len(given))
            if variant.name != name and score > best_score:
                best, best_score = variant.name, score
    return f"; they are likely those of {best}" if best else ""


def _same_size(given: tuple[int, ...], own: torch.Size) -> bool:
    return given == tuple(own) or (len(given) == 4 and len(own) == 2 and torch.Size(given).numel() == own.numel())


def read_state(url: str) -> State:
    """The tensors of a weights file at a path or URL, by name; of a run's output folder, its model's.

    Raises UserError where it cannot be read, is no such file, or is a pickle that holds more than tensors.
    """
    location = parse_storage_url(url)
    path = Path(location.prefix)
    if not location.is_remote:
        path = path / WEIGHTS_NAME if path.is_dir() else path
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
    else:
        folder, _, file = location.url.rpartition("/")
        found = open_store(folder).read_small(file) if location.prefix else None
        if found is None:
            raise UserError(f"{url}: there is no such file")
        content = found
    return _strip(_parse(content, url), url)


def _parse(content: bytes, url: str) -> Any:
    if content[8:9] == b"{":  # after the length of a safetensors header, whose first byte can be a pickle's
        try:
            return load_safetensors(content)
        except SafetensorError as error:
            raise UserError(f"{url}: is damaged: {error}") from None
    if content[:4] != b"PK\x03\x04" and content[:1] != b"\x80":  # torch's zip file, and the bare pickle before it
        raise UserError(f"{url}: is neither a .safetensors nor a .pth file")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = [line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        reason = " ".join(found[0].split())[:200] if found else "it is no file of tensors alone"
        raise UserError(f"{url}: refused, a pickle that could run code: {reason}") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{url}: is damaged: {' '.join(str(error).split())[:200]}") from None


def _strip(state: Any, url: str) -> State:
    """Out of a checkpoint's ``model`` or ``state_dict``, and without the ``module.`` that data parallelism puts before names."""
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{url}: does not hold tensors by name")
    return {str(key).removeprefix("module."): value for key, value in state.items()}
