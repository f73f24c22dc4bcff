"""Reads weights files without running code, and finds the sets of weights in them.

A training checkpoint contains more than one model's weights: the trained ones, their exponential
moving average (EMA), an optimizer's state, a teacher. Each dictionary of tensors in the file is one
``WeightSet``.
"""

import argparse
import io
import json
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from trainer.data.storage.store import open_store, parse_storage_url
from trainer.errors import UserError
from trainer.export.exported_model import METADATA_NAME, WEIGHTS_NAME

State = dict[str, Tensor]

_DEPTH = 4
"""Levels of nested dictionaries that are searched."""
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""Components that torch.compile, FSDP and activation checkpointing insert anywhere in a name."""
_AVERAGE = re.compile(r"(?:^|[^a-z])(?:ema|swa|averaged?|moving_average|shadow)(?:$|[^a-z])")
_INERT: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)),
    *(
        (np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
        for core in ("core", "_core")
    ),
]
"""Types that may accompany the weights in checkpoints; constructing them runs no code of the file.

They occur in the checkpoints of timm (``args``), torchvision and many scripts (``best_acc``).
"""
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True)
class WeightSet:
    """One dictionary of tensors in a file.

    ``key``: its dotted path in the file, empty at the top level.
    """

    key: str
    tensors: State


def is_average(path: str) -> bool:
    """Whether a key or prefix denotes averaged weights.

    Examples: ``state_dict_ema``, ``model_ema``, ``ema.``.
    """
    return _AVERAGE.search(_CAMEL.sub("_", path).lower()) is not None


def read_weight_sets(url: str) -> list[WeightSet]:
    """Returns every set of weights in the file at a path or URL.

    For a run's output folder, these are its model's weights. Components of wrappers, such as
    ``_orig_mod``, are removed from the names. Raises UserError for a file that cannot be read, is
    corrupt, is a pickle with more than tensors, or contains no tensors.
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
    sets = [
        WeightSet(key, _unwrapped(tensors, url))
        for key, tensors in _dictionaries(_parse(content, url))
    ]
    if not sets:
        raise UserError(f"{url}: does not hold tensors by name")
    for one in sets:
        for name, value in one.tensors.items():
            if value.is_meta or value.layout is not torch.strided:
                kind = (
                    "meta tensor, which has no values"
                    if value.is_meta
                    else "sparse tensor, which is not supported"
                )
                raise UserError(f"{url}: {name} is a {kind}; save the model's dense weights")
    return sets


def saved_class_names(url: str) -> list[str] | None:
    """Returns the class names of a model that Convoy saved; None for any other file.

    ``url``: the model's folder or its weights file. Raises UserError for a corrupt ``model.json``.
    """
    location = parse_storage_url(url)
    path = Path(location.prefix)
    if location.is_remote:
        folder, _, file = location.url.rpartition("/")
        content = (
            open_store(folder).read_small(METADATA_NAME)
            if location.prefix and file == WEIGHTS_NAME
            else None
        )
    else:
        metadata = (path if path.is_dir() else path.parent) / METADATA_NAME
        is_model = (path / WEIGHTS_NAME if path.is_dir() else path).is_file() and (
            path.is_dir() or path.name == WEIGHTS_NAME
        )
        content = metadata.read_bytes() if is_model and metadata.is_file() else None
    if content is None:
        return None
    try:
        return [str(name) for name in json.loads(content)["classes"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{url}: the {METADATA_NAME} next to the weights is corrupt; it must list the model's "
            "classes"
        ) from None


def _parse(content: bytes, url: str) -> Any:
    # The 8 bytes before hold the length of a safetensors header; checked first, because their first
    # byte can equal a pickle's.
    if content[8:9] == b"{":
        try:
            return load_safetensors(content)
        except SafetensorError as error:
            raise UserError(f"{url}: is corrupt: {error}") from None
    # torch's zip format, and the bare pickle format before it
    if content[:4] != b"PK\x03\x04" and content[:1] != b"\x80":
        raise UserError(f"{url}: is neither a .safetensors nor a .pth file")
    _check_zip(content, url)
    try:
        with torch.serialization.safe_globals(_INERT):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|Unsupported (?:operand|class) (\S+)", str(error))
        reason = f"it holds {found[1] or found[2]}" if found else "it holds more than tensors"
        raise UserError(
            f"{url}: is a pickle that could run code ({reason}); save only the weights: "
            "torch.save(model.state_dict(), FILE)"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{url}: is corrupt: {' '.join(str(error).split())[:200]}") from None


def _check_zip(content: bytes, url: str) -> None:
    """Rejects changed bytes, which torch.load does not notice, and TorchScript.

    Raises UserError.
    """
    if content[:2] != b"PK":
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [member.filename.partition("/")[2] for member in archive.infolist()]
            has_sums = any(member.CRC for member in archive.infolist())  # torch can omit them
            changed = archive.testzip() if has_sums else None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise UserError(f"{url}: is corrupt: {error}; copy it again") from None
    if changed:
        raise UserError(
            f"{url}: is corrupt: the checksum of {changed} in it is wrong; copy it again"
        )
    if "constants.pkl" in names:
        raise UserError(
            f"{url}: is a TorchScript program; save only the weights: "
            "torch.save(model.state_dict(), FILE)"
        )


def _dictionaries(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Yields dictionaries with at least one tensor under a string key, outer ones first."""
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
