"""Matches a model's outputs to a dataset's classes: by name, never by position."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from trainer.data.index import Index
from trainer.errors import UserError

_SHOWN = 5


def match_classes(
    outputs: Sequence[Collection[str]], index: Index, model: str, data: str
) -> list[int]:
    """Returns the model's output index for each class of the dataset, in the dataset's order.

    ``outputs``: the names by which each output is known. ``model``, ``data``: their names in error
    messages.

    A dataset's class is matched by its id (``n01440764``), otherwise by its name. 1,000 classes
    that are plain numbers, as in third-party ImageNet shards, are the outputs of these numbers.
    Raises UserError that names the classes which match no output, several outputs, or an output
    that another class has matched.
    """
    if len(index.classes) == len(outputs) == 1000 and index.classes == [
        str(number) for number in range(1000)
    ]:
        return list(range(1000))
    known: dict[str, list[int]] = defaultdict(list)
    for number, names in enumerate(outputs):
        for name in set(names):
            known[name].append(number)
    found: list[int] = []
    unmatched: list[str] = []
    for class_id, name in zip(index.class_ids, index.classes, strict=True):
        hits = next((known[key] for key in (class_id, name) if len(known.get(key, [])) == 1), [])
        if not hits or hits[0] in found:
            unmatched.append(name if name == class_id else f"{class_id} ({name})")
        found += hits
    if unmatched:
        more = f" and {len(unmatched) - _SHOWN:,} more" if len(unmatched) > _SHOWN else ""
        raise UserError(
            f"{data}: {len(unmatched):,} of its {len(index.classes):,} classes are not among "
            f"the {len(outputs):,} classes of {model}: {', '.join(unmatched[:_SHOWN])}{more}"
        )
    return found


def output_names(classes: Sequence[str], num_outputs: int) -> list[set[str]]:
    """Returns the names by which each output of a model with these class names is known.

    Classes in ImageNet's order of 1,000 are also known by their WordNet ids and synonyms. An output
    without a class name has no names.
    """
    names = [{name} for name in classes] + [set() for _ in range(num_outputs - len(classes))]
    if len(classes) == 1000 and list(classes) in (_imagenet_categories(), _imagenet_ids()):
        return imagenet_output_names()
    return names


def imagenet_output_names() -> list[set[str]]:
    """Returns the names of ImageNet's 1,000 classes in their usual order.

    The names of a class are its WordNet id, its synonyms and torchvision's category.
    """
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo("imagenet-1k")
    rows = zip(
        _imagenet_ids(),
        info.label_descriptions(detailed=False),
        _imagenet_categories(),
        strict=True,
    )
    return [
        {wordnet_id, described, described.partition(",")[0], category}
        for wordnet_id, described, category in rows
    ]


def _imagenet_ids() -> list[str]:
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo("imagenet-1k")
    return list(info.label_names())


def _imagenet_categories() -> list[str]:
    import torchvision

    return list(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
