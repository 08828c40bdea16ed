"""Jobs of slurm/*.sbatch and `launch slurm` on a real Slurm end with the bits of an undisturbed run, whatever happens.

Exact mode gives all world sizes the same bits, so one undisturbed run is the reference for every test.
"""

import re
import shlex
import sys
import time
from collections.abc import Iterator

import pytest
import yaml
from conftest import ROOT
from ranks.processes import rows, wait_for_step

from slurm.cluster import NEEDS_LAB, TRAIN, Cluster, running

# Print the GPU that a task would choose. The lab's GPUs are fakes, so this sets the number that torch reports.
CHOOSE = """
import os, torch
from train.config import TrainConfig
from train.world.device import choose_device
from train.world.launcher import slurm_variables
place = slurm_variables(os.environ)
torch.cuda.device_count = lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
try:
    found = choose_device(TrainConfig(), int(place["LOCAL_RANK"]), int(place["LOCAL_WORLD_SIZE"]))
except Exception as error:
    found = error
print(f"{place['LOCAL_RANK']} sees {os.environ['CUDA_VISIBLE_DEVICES']}: {found}")
"""
REFUSED = "2 processes on this machine, but 1 GPU(s). Start 1, or use --train.device cpu."

pytestmark = [*NEEDS_LAB, pytest.mark.usefixtures("quiet_cluster")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.mark.slow
def test_three_nodes_with_two_gpus_each(cluster: Cluster, undisturbed: str) -> None:
    job = cluster.submit("three", "--nodes", "3", "--gpus-per-node", "2")
    summary = cluster.finish(job, "three")
    assert (summary["world_size"], summary["weights_sha256"]) == (6, undisturbed)
    ranks = cluster.ranks(job)
    assert sorted(ranks) == list(range(6))
    for rank, facts in ranks.items():
        assert facts["host"] == f"node{rank // 2 + 1}"
        assert (facts["LOCAL_RANK"], facts["LOCAL_WORLD_SIZE"], facts["WORLD_SIZE"]) == (str(rank % 2), "2", "6")
        assert facts["CUDA_VISIBLE_DEVICES"] == "0,1"  # each sees its node's, and uses the one of its local rank
        assert facts["MASTER_ADDR"] == "node1"
    assert len({facts["MASTER_PORT"] for facts in ranks.values()}) == 1
    assert "ranks share" in cluster.log(job)  # no CPUs were asked for


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--gpus-per-node=2", ["0 sees 0,1: cuda:0", "1 sees 0,1: cuda:1"]),
        ("--gpus-per-task=1", ["0 sees 0: cuda:0", "1 sees 1: cuda:0"]),
        ("--gpus-per-node=2 --gpu-bind=single:1", ["0 sees 0: cuda:0", "1 sees 1: cuda:0"]),
        ("--gpus-per-node=1", [f"{task} sees 0: {REFUSED}" for task in range(2)]),
    ],
)
def test_each_task_chooses_a_gpu_of_its_own(cluster: Cluster, options: str, expected: list[str]) -> None:
    place = ["--quiet", "--nodes=2", "--ntasks-per-node=2", "--time=2", f"--export=ALL,PYTHONPATH={ROOT}"]
    output = cluster.run("srun", *place, *options.split(), sys.executable, "-c", CHOOSE)
    assert sorted(output.splitlines()) == sorted(expected * 2)


def test_time_limit(cluster: Cluster, undisturbed: str) -> None:
    job = cluster.submit("limit", "--nodes", "2", "--time", "1", "--signal", "USR2@20", SECONDS_PER_STEP="0.8")
    assert cluster.finish(job, "limit")["weights_sha256"] == undisturbed
    (preempted,) = rows(cluster.path("limit"), "preempted")
    starts = [row["step"] for row in rows(cluster.path("limit"), "start")]
    assert starts == [0, preempted["step"]]  # not one step is computed twice
    assert "exit code 75; requeued from" in cluster.log(job)
    assert cluster.job(job)["Restarts"] == "1"


@pytest.mark.slow
def test_scontrol_requeue(cluster: Cluster, undisturbed: str) -> None:
    job = cluster.submit("requeue", "--nodes", "2", "--ntasks-per-node", "2", SECONDS_PER_STEP="0.1")
    wait_for_step(cluster.path("requeue"), 15)
    cluster.run("scontrol", "requeue", job)
    assert cluster.finish(job, "requeue")["weights_sha256"] == undisturbed
    assert [row["world_size"] for row in rows(cluster.path("requeue"), "start")] == [4, 4]
    assert rows(cluster.path("requeue"), "start")[1]["step"] >= 10


@pytest.mark.slow
def test_preemption(cluster: Cluster, undisturbed: str) -> None:
    job = cluster.submit("preempted", "--nodes", "2", "--ntasks-per-node", "2", SECONDS_PER_STEP="0.1")
    wait_for_step(cluster.path("preempted"), 12)
    urgent = ["-p", "urgent", "--nodes", "3", "--ntasks-per-node", "8", "--output", "/dev/null"]
    cluster.run("sbatch", *urgent, "--wrap", "sleep 2")
    assert cluster.finish(job, "preempted")["weights_sha256"] == undisturbed
    (preempted,) = rows(cluster.path("preempted"), "preempted")
    assert [row["step"] for row in rows(cluster.path("preempted"), "start")] == [0, preempted["step"]]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["batch node", "other node"])
def test_node_dies(cluster: Cluster, undisturbed: str, which: str) -> None:
    name = which.replace(" ", "-")
    job = cluster.submit(name, "--nodes", "2", SECONDS_PER_STEP="0.1")
    wait_for_step(cluster.path(name), 15)
    cluster.lab.kill("node1" if which == "batch node" else "node2")
    assert cluster.finish(job, name)["weights_sha256"] == undisturbed
    assert [row["step"] for row in rows(cluster.path(name), "start")] == [0, 10]


@pytest.mark.slow
def test_silent_node_is_fenced(cluster: Cluster, undisturbed: str) -> None:
    """A node is cut off and its rank keeps training. The job's next attempt takes over; the old one cannot write."""
    job = cluster.submit("silent", SECONDS_PER_STEP="2")
    wait_for_step(cluster.path("silent"), 3)
    cluster.lab.netdown("node1")
    cluster.wait_until(job, lambda: len(rows(cluster.path("silent"), "start")) > 1)
    alive = cluster.lab.run_on("node1", "pgrep", "-f", "rank.py", check=False)
    assert alive.strip(), "the old attempt has ended by itself: nothing is proven"
    assert cluster.finish(job, "silent")["weights_sha256"] == undisturbed
    assert cluster.ranks(job, 0)[0]["host"] == "node1"
    assert cluster.ranks(job, 1)[0]["host"] != "node1"
    cluster.wait_until(job, lambda: "train.storage.lease.Fenced: fenced: " in cluster.log(job))  # at its next save
    assert cluster.summary("silent")["weights_sha256"] == undisturbed


@pytest.mark.slow
def test_scancel_ends_a_job_for_good_and_the_same_name_resumes(cluster: Cluster, undisturbed: str) -> None:
    job = cluster.submit("cancelled", "--nodes", "2", SECONDS_PER_STEP="0.1")
    wait_for_step(cluster.path("cancelled"), 12)
    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED")
    time.sleep(3)
    found = cluster.job(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), cluster.log(job)
    assert cluster.finish(cluster.submit("cancelled"), "cancelled")["weights_sha256"] == undisturbed


@pytest.mark.slow
def test_poison_is_held_after_its_attempts(cluster: Cluster) -> None:
    job = cluster.submit("poison", POISON_STEP="25", LOCKSTEP_ATTEMPTS="2")
    found = cluster.wait_until_held(job)
    assert found["JobState"] == "PENDING"
    assert re.search(r"held: 2 attempts from runs/poison/checkpoints/step-00000020 without", found["Comment"])
    # the first attempt got from the start to step 20, which refills the budget: two more attempts from there
    assert [row["step"] for row in rows(cluster.path("poison"), "start")] == [0, 20, 20]


@pytest.mark.slow
def test_bad_input_is_neither_queued_nor_requeued(cluster: Cluster) -> None:
    for arguments, word in (
        (["--nodes", "4", "--", *TRAIN], "sbatch failed"),
        (["--partition=none", "--", *TRAIN], "invalid partition"),
    ):
        code, output = cluster.launch(*arguments)
        assert code == 2, output
        assert word in output
        assert output.count("\n") == 1, output
    assert cluster.run("squeue", "--noheader").strip() == ""
    typo = cluster.submit("typo", flags=("--optim.lrr", "1"))
    mnist = ("--data.name", "mnist", "--data.download", "false")
    data = cluster.submit("nodata", "--nodes", "2", "--ntasks-per-node", "2", flags=mnist)
    for job, word in ((typo, "optim.lr"), (data, "python -m launch data --name mnist --root DIR")):
        found = cluster.wait(job, "FAILED")
        assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0"), cluster.log(job)
        assert cluster.log(job).count("error:") == 1 + cluster.log(job).count("srun: error:"), cluster.log(job)
        assert word in cluster.log(job)


def test_launch_slurm_passes_hostile_arguments_and_follows(cluster: Cluster, undisturbed: str) -> None:
    hostile = 'it\'s "quoted", $(touch broken) `touch broken`; a\\b *\nnext line, ü && true'
    arguments = ["--nodes=2", "--follow", "--time=5", "--", *TRAIN, "--run.name=followed", f"--wandb.notes={hostile}"]
    code, shown = cluster.launch("--dry-run", *arguments)
    assert code == 0
    assert "--ntasks-per-node 1 --time=5 --signal=USR2@60 slurm/train.sbatch --data.name digits" in shown
    assert shlex.split(shown)[-1] == f"--wandb.notes={hostile}"
    code, shown = cluster.launch(*arguments)
    assert code == 0, shown
    assert "slurm: finished" in shown
    assert re.search(r"job \d+: RUNNING", shown)
    assert re.search(r"job \d+: COMPLETED", shown)
    assert cluster.summary("followed")["weights_sha256"] == undisturbed
    config = yaml.safe_load((cluster.path("followed") / "config.yaml").read_text())
    assert config["wandb"]["notes"] == hostile
    assert not (cluster.project / "broken").exists()


@pytest.mark.slow
def test_sweep(cluster: Cluster) -> None:
    """Its file has Windows line ends, and its recipe a directory of its own for runs."""
    (cluster.project / "own.yaml").write_text("run: {dir: mine}\n")
    short = ["--config", "own.yaml", *TRAIN, "--train.max_steps", "5"]
    lines = b"--seed 1 --wandb.notes 'two words, one flag'\r\n--optim.lr 0.02\r\n"
    (cluster.project / "lines.txt").write_bytes(lines)
    output = cluster.run(sys.executable, "-m", "launch", "slurm", "--sweep", "seeds", "--array=1-2%1", "--", *short)
    seeds = re.search(r"job (\d+): .* run mine/sweep-(\d+);", output)
    assert seeds, output
    assert seeds[1] == seeds[2]
    by_hand = cluster.run("sbatch", "--parsable", "--array", "1-2", "slurm/sweep.sbatch", "lines.txt", *short).split()[
        -1
    ]
    cluster.wait_until(by_hand, lambda: not cluster.run("squeue", "--noheader").strip())
    config = {}
    for job, names in ((seeds[1], ("seed-1", "seed-2")), (by_hand, ("line-1", "line-2"))):
        logs = "".join(path.read_text() for path in cluster.project.glob(f"slurm-{job}_*.log"))
        assert re.search(r"2 of 2 runs: mean [\d.]+% \+- [\d.]+% \(standard deviation\)", logs), logs
        for name in names:
            run = cluster.project / "mine" / f"sweep-{job}" / name
            config[name] = yaml.safe_load((run / "config.yaml").read_text())
        assert not cluster.path(f"sweep-{job}").exists()
    assert [config[name]["seed"] for name in config] == [1, 2, 1, 0]
    assert config["line-1"]["wandb"]["notes"] == "two words, one flag"
    assert config["line-2"]["optim"]["lr"] == 0.02
