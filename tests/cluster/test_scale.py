"""ResNet-50 on hundreds of GPUs, by `convoy submit`, on nodes that kwok plays; API server, operator
and scheduler are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from kubectl import Kubectl, own_namespace
from simulated_nodes import Pool, active, gang_policy, phases, pool
from support.helpers import Run, until

NODES = 64
HELD = "convoy/held"
SECONDS = 180  # for what takes a few where nothing else runs; benchmarks/cluster.py measures


@pytest.fixture
def nodes(own_cluster: Kubectl) -> Iterator[Pool]:
    """Asked for before the namespace, so that they go after it."""
    with pool(own_cluster) as found:
        yield found


@pytest.fixture
def place(own_cluster: Kubectl, nodes: Pool) -> Iterator[Kubectl]:
    """The test's namespace, whose pods go before the nodes."""
    with own_namespace(own_cluster, wait=True) as kubectl:
        yield kubectl


def told(convoy_ok: Run, kubectl: Kubectl, job: str) -> str:
    return convoy_ok("status", job, "--namespace", kubectl.namespace)


@pytest.mark.parametrize(
    ("count", "seconds"), [(NODES, SECONDS), (512, 300)], ids=["512 GPUs", "4096 GPUs"]
)
def test_all_pods_of_a_job_run(
    nodes: Pool, place: Kubectl, convoy_ok: Run, count: int, seconds: float
) -> None:
    nodes.add(count)
    convoy_ok(*nodes.job(count, "r50", kubectl=place))
    until(lambda: active(place, "r50") == count, seconds, lambda: told(convoy_ok, place, "r50"))
    assert phases(place, "r50") == {"Running": count}
    used = place("get", "pods", "-o", "jsonpath={.items[*].spec.nodeName}").split()
    assert len(set(used)) == count


def test_without_a_gang_two_jobs_can_hold_half_of_the_nodes_each_for_ever(
    nodes: Pool, place: Kubectl, convoy_ok: Run
) -> None:
    """Which pod comes first is chance; a taint that one job tolerates plays it, and is taken away
    before anything is looked at.
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
            lambda job=job, stuck=stuck: _no_gpu_is_left(told(convoy_ok, place, job), stuck),
            SECONDS,
        )
        assert phases(place, job) == {"Running": half, "Pending": half}


def _no_gpu_is_left(line: str, stuck: str) -> bool:
    return line.startswith(stuck) and f"{NODES} Insufficient nvidia.com/gpu" in line


def test_of_two_gangs_one_runs_whole_and_the_other_waits_whole_then_runs(
    nodes: Pool, place: Kubectl, convoy_ok: Run
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
        line = f"{other}: unschedulable: {NODES} of {NODES} pods, a gang that starts whole: "
        until(
            lambda: told(convoy_ok, place, other).startswith(line),
            SECONDS,
            lambda: told(convoy_ok, place, other),
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
            lambda: told(convoy_ok, place, other),
        )
