"""ResNet-50 on hundreds of simulated GPUs (kwok), submitted with `convoy submit`.

API server, training operator and scheduler are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from kubectl import Kubectl, temporary_namespace
from simulated_nodes import Pool, active, gang_policy, phases, pool
from support.helpers import RunText, until

NODES = 64
HELD = "convoy/held"
SECONDS = 180  # it takes a few seconds on an idle machine; benchmarks/cluster.py measures the time


@pytest.fixture
def nodes(own_cluster: Kubectl) -> Iterator[Pool]:
    """Requested before the namespace, so that the nodes are deleted after it."""
    with pool(own_cluster) as found:
        yield found


@pytest.fixture
def place(own_cluster: Kubectl, nodes: Pool) -> Iterator[Kubectl]:
    """The test's namespace; its pods are deleted before the nodes."""
    with temporary_namespace(own_cluster, wait=True) as kubectl:
        yield kubectl


def status_line(convoy_ok: RunText, kubectl: Kubectl, job: str) -> str:
    return convoy_ok("status", job, "--namespace", kubectl.namespace)


@pytest.mark.parametrize(
    ("count", "seconds"), [(NODES, SECONDS), (512, 300)], ids=["512 GPUs", "4096 GPUs"]
)
def test_all_pods_of_a_job_run(
    nodes: Pool, place: Kubectl, convoy_ok: RunText, count: int, seconds: float
) -> None:
    nodes.add(count)
    convoy_ok(*nodes.job(count, "r50", kubectl=place))
    until(
        lambda: active(place, "r50") == count,
        seconds,
        lambda: status_line(convoy_ok, place, "r50"),
    )
    assert phases(place, "r50") == {"Running": count}
    used = place("get", "pods", "-o", "jsonpath={.items[*].spec.nodeName}").split()
    assert len(set(used)) == count


def test_two_jobs_without_gangs_can_block_each_other(
    nodes: Pool, place: Kubectl, convoy_ok: RunText
) -> None:
    """Each job holds half of the nodes and waits for the other half.

    On a real cluster the order of scheduling is random. Here a taint that only one job tolerates
    produces it, and is removed before the test checks the result.
    """
    half = NODES // 2
    nodes.add(half)
    convoy_ok(*nodes.job(NODES, "first", kubectl=place))
    until(lambda: phases(place, "first") == {"Running": half, "Pending": half}, SECONDS)
    held = nodes.add(half, taint=HELD)
    convoy_ok(*nodes.job(NODES, "second", "--toleration", HELD, kubectl=place))
    until(lambda: phases(place, "second") == {"Running": half, "Pending": half}, SECONDS)
    place("taint", "nodes", *held, f"{HELD}-")
    for job in ("first", "second"):
        stuck = f"{job}: unschedulable: {half} of {NODES} pods: "
        until(
            lambda job=job, stuck=stuck: _lacks_gpus(status_line(convoy_ok, place, job), stuck),
            SECONDS,
        )
        assert phases(place, job) == {"Running": half, "Pending": half}


def _lacks_gpus(line: str, stuck: str) -> bool:
    return line.startswith(stuck) and f"{NODES} Insufficient nvidia.com/gpu" in line


def test_second_gang_waits_until_the_first_is_cancelled(
    nodes: Pool, place: Kubectl, convoy_ok: RunText
) -> None:
    nodes.add(NODES)
    jobs = ["first", "second"]
    with gang_policy(place):
        with ThreadPoolExecutor() as threads:
            list(
                threads.map(
                    lambda job: convoy_ok(*nodes.job(NODES, job, "--gang", kubectl=place)), jobs
                )
            )
        until(lambda: any(phases(place, job) == {"Running": NODES} for job in jobs), SECONDS)
        jobs.sort(key=lambda job: "Running" not in phases(place, job))
        winner, other = jobs
        line = f"{other}: unschedulable: {NODES} of {NODES} pods, a gang that starts together: "
        until(
            lambda: status_line(convoy_ok, place, other).startswith(line),
            SECONDS,
            lambda: status_line(convoy_ok, place, other),
        )
        assert f"minCount ({NODES}) cannot be satisfied" in place(
            "get", "events", "--field-selector=reason=FailedScheduling"
        )
        assert phases(place, other) == {"Pending": NODES}
        assert phases(place, winner) == {"Running": NODES}
        convoy_ok("cancel", winner, "--namespace", place.namespace)
        until(
            lambda: phases(place, other) == {"Running": NODES},
            SECONDS,
            lambda: status_line(convoy_ok, place, other),
        )
