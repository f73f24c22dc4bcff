"""The guide's store, a web server, against the same files in a folder."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from guide import follow_guide, run_python
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

COMPARE = """
import json, sys
from trainer.data.index import check_digests, check_shards, open_index
web, folder = sys.argv[1:]
(index, store), (_, local) = open_index(web), open_index(folder)
check_shards(index, store)  # lists them
check_digests(index, store, range(len(index.shards)))
for shard in index.shards:
    starts, ends = shard.offsets[:-1], shard.offsets[1:]
    found = store.read_ranges(shard.name, starts, ends)
    assert found == local.read_ranges(shard.name, starts, ends), shard.name
    assert store.size(shard.name) == shard.bytes
assert store.size("missing") is None and store.read_small("missing") is None
print(json.dumps(vars(store.counts)["retries"]))
"""


class BreakingServer:
    """Serves files with byte ranges; ends each third answer to a range in the middle."""

    def __init__(self, folder: Path) -> None:
        self.answers, self.broken = 0, 0
        self._files = Starlette(routes=[Mount("/", StaticFiles(directory=folder))])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_range = b"range" in dict(scope["headers"])
        self.answers += is_range
        breaks = is_range and self.answers % 3 == 0

        async def send_part(message: dict[str, Any]) -> None:
            if breaks and message["type"] == "http.response.body" and len(message["body"]) > 1:
                self.broken += 1
                half = message["body"][: len(message["body"]) // 2]
                await send({**message, "body": half, "more_body": True})
                raise ConnectionError("broken on purpose")
            await send(message)

        await self._files(scope, receive, send_part)


@pytest.fixture
def web(digits: Path) -> Iterator[tuple[str, BreakingServer]]:
    """A web server of the packed digits: its address, and the application."""
    application = BreakingServer(digits)
    server = uvicorn.Server(uvicorn.Config(application, log_level="critical", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", application
        server.should_exit = True
        thread.join()


def test_the_store_serves_the_same_samples_as_a_folder_and_a_training_run(
    tmp_path: Path, digits: Path, web: tuple[str, BreakingServer]
) -> None:
    (url, server), tree = web, tmp_path / "tree"
    follow_guide("add-a-store", tree)
    retries = json.loads(run_python(tree, "-c", COMPARE, f"{url}/train", digits / "train"))
    assert retries == server.broken > 0, "each broken answer is completed by one more request"

    convoy = ("-m", "pipelines.cli")
    run = tmp_path / "run"
    keys = [f"data.train={url}/train", f"data.val={url}/val", "data.log_keys=true"]
    keys += ["train.max_steps=3", "schedule.warmup_epochs=0", f"train.output_dir={run}"]
    run_python(tree, *convoy, "train", "digits-resnet8", *keys)
    logged = [
        json.loads(line)
        for file in (run / "samples").iterdir()
        for line in file.read_text().splitlines()
    ]
    order = run_python(
        tree, *convoy, "order", digits / "train", "--epoch", 0, "--world-size", 1, "--rank", 0,
        "--batch-size", 64, "--limit", 3, "--json",
    )  # fmt: skip
    expected = [json.loads(line) for line in order.splitlines()]
    assert [sorted(step["keys"]) for step in logged] == [sorted(step["keys"]) for step in expected]
    assert json.loads((run / "result.json").read_text())["steps"] == 3


def test_a_store_that_cannot_delete_holds_no_checkpoints(
    tmp_path: Path, digits: Path, web: tuple[str, BreakingServer]
) -> None:
    tree = tmp_path / "tree"
    follow_guide("add-a-store", tree)
    script = (
        "import sys\nfrom trainer.data.storage.store import open_store\n"
        "from trainer.errors import UserError\nstore = open_store(sys.argv[1])\n"
        "for call in (store.check_mutable, lambda: store.write('x', b'')):\n"
        "    try: call()\n    except UserError as error: print(error)\n"
    )
    lines = run_python(tree, "-c", script, web[0]).splitlines()
    assert "HttpStore cannot delete objects" in lines[0]
    assert "a web server is read-only" in lines[1]
