"""Hardware fault records next to a run's checkpoints: which node failed, how often, and how.

A job restarts its pods on any node. A node with a failing GPU passes every readiness check, so it
is likely to get the next pod as well. Each fault is one small object
``faults/TIME-NODE-rank-N.json``, so that ranks write without coordination.
"""

import json
import os
import re
import threading
import time
from collections import defaultdict
from contextlib import suppress
from typing import Any

from trainer.data.storage.store import Store, open_store
from trainer.errors import RetryableError, ServiceUnreachable, UserError
from trainer.faults.hardware_errors import NODE_VARIABLE, node_name

FOLDER = "faults"
_MAX_RECORDS = 200
_WRITE_SECONDS = 10.0
"""Time that a rank with a failed device waits for its record to be written, in seconds.

The other ranks wait until it exits.
"""


def record_fault(url: str, rank: int, fault: str) -> str:
    """Writes a fault record below the checkpoint URL; returns advice on the node.

    The advice is empty for the node's first fault. Never raises and returns within seconds, even if
    the store is unreachable.
    """
    advice: list[str] = []

    def work() -> None:
        with suppress(UserError, RetryableError, ServiceUnreachable, OSError):
            store = open_store(url, create=True)
            node = node_name()
            now = time.time()
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
            name = (
                f"{FOLDER}/{stamp}-{re.sub(r'[^A-Za-z0-9._-]', '_', node)[:100]}-rank-{rank}.json"
            )
            record = {"node": node, "rank": rank, "time": now, "fault": fault}
            store.write(name, (json.dumps(record) + "\n").encode())
            # Ranks of one node fail together, so incidents are counted instead of records.
            incidents = _incidents(_read(store)).get(node, [])
            if len(incidents) > 1:
                advice.append(
                    f"this is hardware fault {len(incidents)} of node {node} in this run; "
                    f"{_node_advice(node)}"
                )

    thread = threading.Thread(target=work, name="fault-record", daemon=True)
    thread.start()
    thread.join(_WRITE_SECONDS)
    return advice[0] if advice else ""


def repeated_faults(store: Store) -> list[str]:
    """Returns one line per node with more than one hardware fault, most faults first."""
    lines = []
    for node, incidents in sorted(_incidents(_read(store)).items(), key=lambda item: -len(item[1])):
        if len(incidents) > 1:
            last = incidents[-1]
            when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(last["time"]))
            lines.append(
                f"node {node}: {len(incidents)} hardware faults in this run, the last one at "
                f"{when} ({str(last['fault'])[:200]}); {_node_advice(node)}"
            )
    return lines


def _node_advice(node: str) -> str:
    if os.environ.get(NODE_VARIABLE):
        return f"take it out of service: kubectl cordon {node}"
    return "have it checked before it is used again"


def _read(store: Store) -> list[dict[str, Any]]:
    """Returns the newest 200 records, oldest first, and deletes older ones."""
    names = sorted(name for name in store.sizes() if name.startswith(f"{FOLDER}/"))
    if len(names) > _MAX_RECORDS:
        store.delete(names[:-_MAX_RECORDS])
    records = []
    for name in names[-_MAX_RECORDS:]:
        # Records are only advice, so a corrupt one is skipped.
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(store.read_small(name) or b"")
            records.append(
                {
                    "node": str(record["node"]),
                    "time": float(record["time"]),
                    "fault": str(record["fault"]),
                }
            )
    return records


def _incidents(
    records: list[dict[str, Any]], seconds: float = 60.0
) -> dict[str, list[dict[str, Any]]]:
    """Groups the records by node; records within ``seconds`` of one another count once."""
    nodes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record["time"]):
        known = nodes[record["node"]]
        if not known or record["time"] - known[-1]["time"] > seconds:
            known.append(record)
    return dict(nodes)
