"""An index is read only if it describes its shards exactly, and written only if it is readable."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.helpers import RunText

from trainer.data.index import Index, Shard, open_index, parse_index, write_index
from trainer.data.storage.store import open_store
from trainer.errors import UserError


def _shard(name: str = "a.tar", **changes: Any) -> Shard:
    fields = {
        "name": name,
        "samples": 2,
        "sha256": "0" * 64,
        "bytes": 10240,
        "offsets": [0, 2048, 4096],
        "keys": ["a", "b"],
    }
    return Shard.model_construct(**(fields | changes))


def _index(*shards: Shard, **changes: Any) -> dict[str, Any]:
    index = Index.model_construct(
        split="train",
        samples=2 * len(shards),
        bytes=10240 * len(shards),
        classes=["x"],
        class_ids=["x"],
        plan="",
        shards=list(shards),
    )
    return (
        json.loads(json.dumps(index.model_dump(warnings=False))) | {"digest": "sha256:0"} | changes
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"{", "is truncated"),
        (b"[1]", "is not an index"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (
            _index(_shard(), format="convoy-index/2"),
            "its format is 'convoy-index/2', but this version of Convoy reads 'convoy-index/1'",
        ),
        (
            _index(_shard(offsets=[0, -5, 4096])),
            "offsets.1: Input should be greater than or equal to 0",
        ),
        (_index(_shard(offsets=[0, 2**70, 4096])), "offsets.1: Input should be"),
        (_index(_shard(offsets=[0, 4096, 2048])), "sample 1 does not begin before the next one"),
        (_index(_shard(offsets=[0, 4096, 4096])), "sample 1 does not begin before the next one"),
        (_index(_shard(offsets=[512, 2048, 4096])), "extend from byte 512"),
        (_index(_shard(offsets=[0, 2048, 20480])), "to 20,480 of 10,240"),
        (_index(_shard(keys=["a"])), "2 samples, but 1 keys"),
        (_index(_shard("../../etc/a.tar")), "leads out of the folder"),
        (_index(_shard("/etc/a.tar")), "leads out of the folder"),
        (_index(_shard("a\nb.tar")), "control characters"),
        (_index(_shard(sha256="xyz")), "sha256"),
        (_index(_shard(), _shard()), "a shard occurs twice"),
        (_index(_shard(), samples=3), "totals"),
        (_index(_shard(), bytes=2**63), "bytes: Input should be"),
        (_index(_shard(), shards_in="../.."), "shards_in"),
        (_index(_shard(), class_ids=[]), "1 classes, but 0 class_ids"),
        (_index(), "holds no samples"),
        (_index(_shard()), "does not match its digest"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_corrupt_index_is_a_one_line_error(content: bytes | dict[str, Any], reason: str) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(UserError) as caught:
        parse_index(raw, "s3://b/train/index.json")
    assert reason in str(caught.value)
    assert str(caught.value).startswith("s3://b/train/index.json")
    assert "\n" not in str(caught.value)


def test_command_with_a_corrupt_index_prints_a_one_line_error(
    convoy_refuses: RunText, tmp_path: Path
) -> None:
    (tmp_path / "index.json").write_text(json.dumps(_index(_shard(offsets=[0, -1, 2]))))
    message = convoy_refuses(
        "order", tmp_path, "--epoch", 0, "--world-size", 1, "--rank", 0, "--batch-size", 2
    )
    assert len(message.splitlines()) == 1


def test_index_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for split, classes in (("train", ["caf\udce9"]), ("\udce9", ["x"])):
        with pytest.raises(UserError, match="not valid Unicode"):
            write_index(store, "index.json", Index.of(split, classes, ["x"], [_shard()]))
    with pytest.raises(UserError, match="leads out"):
        write_index(store, "index.json", Index.of("train", ["x"], ["x"], [_shard("../a.tar")]))
    assert not (tmp_path / "index.json").exists()
    good = Index.of("train", ["é"], ["x"], [_shard()])
    write_index(store, "index.json", good)
    assert open_index(str(tmp_path))[0] == good
    assert b"shards_in" not in (tmp_path / "index.json").read_bytes(), (
        "the default is omitted, so that existing indexes keep their bytes"
    )
