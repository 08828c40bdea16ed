"""A job that was submitted with a range of nodes continues without the nodes that it loses."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks.processes import rows, wait_for_step

from slurm import losses
from slurm.cluster import NEEDS_LAB, TRAIN, Cluster, running

pytestmark = [*NEEDS_LAB, pytest.mark.usefixtures("quiet_cluster")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("shrink"), 4) as cluster:
        yield cluster


def submit(cluster: Cluster, name: str, nodes: str, *options: str, **env: str) -> str:
    """Submit by `launch slurm`; return the job's id once it has trained for some steps."""
    code, output = cluster.launch("--nodes", nodes, *options, "--", *TRAIN, "--run.name", name, **env)
    assert code == 0, output
    wait_for_step(cluster.path(name), 12)
    return output.split("job ")[1].split(":")[0]


def starts(cluster: Cluster, name: str) -> list[tuple[int, int]]:
    """Return the step and the world size of each attempt."""
    return [(row["step"], row["world_size"]) for row in rows(cluster.path(name), "start")]


@pytest.mark.sample(1)
@pytest.mark.parametrize("loss", ["kill", "netdown"])
def test_training_continues_on_the_nodes_that_are_left(cluster: Cluster, undisturbed: str, loss: str) -> None:
    job = submit(cluster, loss, "2-3", SECONDS_PER_STEP="0.1")
    getattr(cluster.lab, loss)("node2")
    assert cluster.finish(job, loss)["weights_sha256"] == undisturbed
    assert cluster.job(job)["Restarts"] == "0"
    assert re.search(r"lost node2; 2 node\(s\) left, at least 2 asked for", cluster.log(job))
    (_, before), (resumed, after) = starts(cluster, loss)
    assert (before, resumed % 10, after) == (3, 0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kill", "netdown"])
def test_lost_first_node_has_the_job_requeued(cluster: Cluster, undisturbed: str, loss: str) -> None:
    """Slurm 22.05 leaves a --no-kill job without its batch script running for ever. The other nodes requeue it."""
    job = submit(cluster, f"first-{loss}", "2-3", SECONDS_PER_STEP="0.3")
    getattr(cluster.lab, loss)("node1")
    assert cluster.finish(job, f"first-{loss}")["weights_sha256"] == undisturbed
    assert cluster.job(job)["Restarts"] == "1"
    assert "node1" not in cluster.log(job).split("requeued 1 time")[1]
    assert [size for _, size in starts(cluster, f"first-{loss}")] == [3, 3]


@pytest.mark.slow
def test_too_few_nodes_left_has_the_job_requeued(cluster: Cluster, undisturbed: str) -> None:
    job = submit(cluster, "few", "3-4", SECONDS_PER_STEP="0.3")
    cluster.lab.kill("node2")
    cluster.lab.kill("node4")
    cluster.wait_until(job, lambda: "; requeued from" in cluster.log(job))
    assert re.search(r"lost node2,node4; 2 node\(s\) left, at least 3 asked for", cluster.log(job))
    cluster.bring_back("node4")
    assert cluster.finish(job, "few")["weights_sha256"] == undisturbed
    assert cluster.job(job)["Restarts"] == "1"


@pytest.mark.slow
def test_gpus_of_a_lost_step_are_free_for_the_next(cluster: Cluster, undisturbed: str) -> None:
    job = submit(cluster, "gpus", "1-3", "--gpus-per-node", "2", SECONDS_PER_STEP="0.2")
    cluster.lab.kill("node2")
    assert cluster.finish(job, "gpus")["weights_sha256"] == undisturbed
    assert [size for _, size in starts(cluster, "gpus")] == [6, 4]
    assert cluster.job(job)["Restarts"] == "0"
    assert all(facts["CUDA_VISIBLE_DEVICES"] == "0,1" for facts in cluster.ranks(job).values())


@pytest.mark.slow
def test_crash_without_a_lost_node_is_requeued_and_held(cluster: Cluster) -> None:
    job = submit(cluster, "crash", "2-3", POISON_STEP="25", LOCKSTEP_ATTEMPTS="2")
    cluster.wait_until_held(job)
    assert [step for step, _ in starts(cluster, "crash")] == [0, 20, 20]
    assert "lost node" not in cluster.log(job)
    assert cluster.job(job)["Restarts"] == "3"


@pytest.mark.slow
def test_time_limit_of_a_range_of_nodes(cluster: Cluster, undisturbed: str) -> None:
    limit = ("--time=1", "--signal=USR2@20")
    job = submit(cluster, "range-limit", "2-3", *limit, SECONDS_PER_STEP="0.8")
    assert cluster.finish(job, "range-limit")["weights_sha256"] == undisturbed
    (preempted,) = rows(cluster.path("range-limit"), "preempted")
    assert [step for step, _ in starts(cluster, "range-limit")] == [0, preempted["step"]]
    assert "exit code 75; requeued from" in cluster.log(job)


@pytest.mark.slow
def test_campaign_of_losses_and_returns(tmp_path: Path) -> None:
    """`tests/faults.py nodes` loses 20. The clock is not judged here."""
    result = losses.campaign(argparse.Namespace(kills=20, seed=3), tmp_path)
    found = [row | {"seconds": 0.0} for row in result["losses"]]
    assert losses.is_good(result | {"losses": found}), result
    assert len(found) == 2
    assert "silence, " in losses.table(result) or "power failure, " in losses.table(result)
