"""Weights files: read without running code, and the sets of weights that they hold.

A training checkpoint holds more than one model's weights: the trained ones, their moving average
(EMA), an optimizer's state, a teacher. Each dictionary of tensors in the file is one ``WeightSet``.
"""

import io
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from trainer.data.storage import open_store, parse_storage_url
from trainer.errors import UserError
from trainer.export import WEIGHTS_NAME

State = dict[str, Tensor]

_DEPTH = 4
"""Levels of nested dictionaries that are searched."""
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""Components that torch.compile, FSDP and activation checkpointing insert anywhere in a name."""
_AVERAGE = re.compile(r"(?:^|[^a-z])(?:ema|swa|averaged?|moving_average|shadow)(?:$|[^a-z])")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True)
class WeightSet:
    """One dictionary of tensors in a file; ``key``: its path there, with dots, empty at the top."""

    key: str
    tensors: State


def is_average(path: str) -> bool:
    """Whether a key or prefix names averaged weights: ``state_dict_ema``, ``model_ema``, ``ema.``."""
    return _AVERAGE.search(_CAMEL.sub("_", path).lower()) is not None


def read_weight_sets(url: str) -> list[WeightSet]:
    """Every set of weights in the file at a path or URL; of a run's output folder, its model's.

    Wrappers' components are removed from the names: ``_orig_mod`` and the like. Raises UserError for
    a file that cannot be read, is corrupt, is a pickle with more than tensors, or holds no tensors.
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
    sets = [WeightSet(key, _unwrapped(tensors, url)) for key, tensors in _dictionaries(_parse(content, url))]
    if not sets:
        raise UserError(f"{url}: does not hold tensors by name")
    return sets


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


def _dictionaries(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Dictionaries with at least one tensor under a string key, outer ones first."""
    if not isinstance(value, dict) or depth > _DEPTH:
        return
    named = {key: item for key, item in value.items() if isinstance(key, str)}
    tensors = {key: item for key, item in named.items() if isinstance(item, Tensor)}
    if tensors:
        yield path, tensors
    for key, item in named.items():
        yield from _dictionaries(item, f"{path}.{key}".removeprefix("."), depth + 1)


def _unwrapped(tensors: State, url: str) -> State:
    found: State = {}
    for key, value in tensors.items():
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in found:
            raise UserError(f"{url}: holds {name} twice, with and without a wrapper's name in it")
        found[name] = value
    return found
