"""Slurm as people submit: whatever asks for N ranks, CPUs or GPUs gets N on a real Slurm, or one line and exit code 2.

Most jobs here print where their ranks run instead of training, so that each takes two seconds.
"""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator

import pytest
from conftest import ROOT
from ranks.processes import rows

from slurm import lab
from slurm.cluster import NEEDS_LAB, TRAIN, Cluster, running

pytestmark = [*NEEDS_LAB, pytest.mark.usefixtures("quiet_cluster")]

PYTHON = f"""#!/bin/bash
# Ranks print their place, and train if TRAIN is set. Without training the run is finished at once.
if [ "$2" = train ]; then
    printf 'rank %s/%s of %s/%s on %s, CPUs %s, GPUs %s\\n' "$SLURM_PROCID" "$SLURM_LOCALID" "$SLURM_STEP_NUM_TASKS" \\
        "$SLURM_STEP_TASKS_PER_NODE" "$SLURMD_NODENAME" "${{SLURM_CPUS_PER_TASK:--}}" "${{CUDA_VISIBLE_DEVICES:--}}"
    run=${{@: -3:1}}/${{@: -1}}
    [ "$TRAIN" ] || {{ mkdir -p "$run" && echo '{{"outcome": "finished"}}' >"$run/summary.json" && exit 0; }}
fi
exec {sys.executable} "$@"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("submit"), nodes=2) as cluster:
        (cluster.project / "python").write_text(PYTHON)
        yield cluster


def places(cluster: Cluster, job: str) -> list[tuple[int, int, str, str, str]]:
    """Wait for a job; return (rank, local rank, node, CPUs, GPUs) of its ranks, whose step must be of that size."""
    found = cluster.wait(job, "COMPLETED", "FAILED")
    log = cluster.log(job)
    assert found["JobState"] == "COMPLETED", log
    ranks = re.findall(r"rank (\d+)/(\d+) of (\d+)/(\S+) on (\S+), CPUs (\S+), GPUs (\S+)", log)
    assert [int(rank[2]) for rank in ranks] == [len(ranks)] * len(ranks), log
    return sorted((int(rank), int(local), node, cpus, gpus) for rank, local, _, _, node, cpus, gpus in ranks)


LAYOUTS = [  # sbatch's options, ranks on each node, CPUs of a rank, whether ranks see all GPUs of their node or one
    ("--nodes 2 --gpus 3 --cpus-per-gpu 3", [2, 1], "3", "all"),
    ("--nodes 2", [1, 1], "-", "-"),
    ("--nodes 2 --exclusive", [1, 1], "-", "-"),  # Slurm gives GPUs only to steps of jobs that asked for them
    ("--nodes 2 --ntasks-per-node 4", [4, 4], "-", "-"),
    ("--nodes 2 --ntasks 8", [7, 1], "-", "-"),  # as Slurm places them
    ("--nodes 2 --ntasks 7 --ntasks-per-node 4", [4, 3], "-", "-"),
    ("--nodes 2 --ntasks 5 --exclusive", [3, 2], "-", "-"),
    ("--nodes 2 --ntasks-per-node 2 --cpus-per-task 4", [2, 2], "4", "-"),
    ("--nodes 2 --ntasks 4 --cpus-per-task 2", [3, 1], "2", "-"),
    ("--nodes 2 --gpus-per-node 2", [2, 2], "-", "all"),
    ("--nodes 2 --gres gpu:2", [2, 2], "-", "all"),
    ("--nodes 2 --gpus 3", [2, 1], "-", "all"),
    ("--nodes 2 --ntasks 3 --gpus-per-task 1 --cpus-per-task 2", [2, 1], "2", "one"),
    ("--nodes 2 --ntasks-per-node 2 --gpus-per-task 1", [2, 2], "-", "one"),
    ("--nodes 2 --ntasks-per-node 1 --gpus-per-node 2 --cpus-per-task 8", [2, 2], "4", "all"),  # as for torchrun
]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("options", "counts", "cpus", "gpus"), LAYOUTS, ids=[case[0] for case in LAYOUTS])
def test_job_gets_what_it_asks_for(cluster: Cluster, options: str, counts: list[int], cpus: str, gpus: str) -> None:
    expected = [
        (node, local, cpus, {"-": "-", "one": str(local), "all": ",".join(map(str, range(count)))}[gpus])
        for node, count in zip(cluster.lab.nodes, counts, strict=True)
        for local in range(count)
    ]
    found = places(cluster, cluster.submit("places", *options.split()))
    assert found == [(rank, local, node, *rest) for rank, (node, local, *rest) in enumerate(expected)]


@pytest.mark.slow
def test_gpus_that_another_job_leaves(cluster: Cluster) -> None:
    """Node 1 has one free GPU, node 2 has two: the first node is not the one with more ranks."""
    hold = ("sbatch", "--parsable", "-w", "node1", "--gpus=1", "-o", "/dev/null", "--wrap", "sleep 100")
    cluster.wait(cluster.run(*hold).split()[-1], "RUNNING")
    found = places(cluster, cluster.submit("left", "--nodes", "2", "--gpus", "3"))
    assert [(rank, local, node) for rank, local, node, *_ in found] == [
        (0, 0, "node1"),
        (1, 0, "node2"),
        (2, 1, "node2"),
    ]


@pytest.mark.slow
def test_uneven_ranks_train_to_the_same_bits(cluster: Cluster) -> None:
    alone = cluster.finish(cluster.submit("alone", TRAIN="1"), "alone")
    uneven = cluster.finish(cluster.submit("uneven", "--nodes", "2", "--gpus", "3", TRAIN="1"), "uneven")
    assert (alone["world_size"], uneven["world_size"]) == (1, 3)
    assert alone["weights_sha256"] == uneven["weights_sha256"]


@pytest.mark.parametrize("recipe", ["exact", "mnist"])
def test_recipe_trains_the_same_on_8_tasks(cluster: Cluster, recipe: str) -> None:
    """mnist.yaml has BatchNorm; its fast mode agrees to round-off in fp32."""
    flags = f"--config configs/{recipe}.yaml --data.name digits --train.max_steps 3 --log.every_steps 1"
    train = f"slurm/train.sbatch {flags} --log.progress false --train.precision fp32 --train.device cpu --run.name"
    jobs = {}
    for number in (1, 8):
        options = f"--nodes {min(number, 2)} --ntasks {number}"
        words = f"sbatch --parsable {options} {train} {recipe}-{number}".split()
        jobs[number] = cluster.run(*words, TRAIN="1").split()[-1]
    for number, job in jobs.items():
        assert len(places(cluster, job)) == number
    alone, eight = ([row["loss"] for row in rows(cluster.path(f"{recipe}-{number}"), "train")] for number in jobs)
    assert eight == (alone if recipe == "exact" else pytest.approx(alone, rel=1e-3))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--nodes 2 --ntasks-per-node 2 --gpus-per-node 1", "4 tasks for GPUs 1 1. Each GPU gets one rank"),
        ("--nodes 2 --ntasks-per-node 1 --gpus-per-task 2", "--gpus-per-task is 2. Each GPU gets one rank"),
    ],
)
def test_contradictions_are_refused_by_the_job(cluster: Cluster, options: str, words: str) -> None:
    job = cluster.submit("contradiction", *options.split())
    found = cluster.wait(job, "COMPLETED", "FAILED")
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0")
    assert cluster.log(job).startswith("slurm: error: ")
    assert words in cluster.log(job)
    assert cluster.log(job).count("\n") == 1
    assert not cluster.path("contradiction").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sbatch", "launch slurm"])
def test_job_submitted_from_inside_another_gets_its_own_resources(cluster: Cluster, how: str) -> None:
    """The outer step has 3 tasks with a GPU each and a CPU binding. Its variables say nothing about the new job."""
    arguments = [*TRAIN, "--run.name", f"inner-{how[:6]}"]
    inner = ["sbatch", "--parsable", "--nodes=2", "slurm/train.sbatch", *arguments]
    if how == "launch slurm":
        inner = [sys.executable, "-m", "launch", "slurm", "--nodes=2", "--", *arguments]
    outer = ["srun", "--nodes=2", "--ntasks=3", "--gpus-per-task=1", "--cpus-per-task=1", "--cpu-bind=mask_cpu:0x1"]
    first_task_only = '[ "$SLURM_PROCID" != 0 ] || PYTHONPATH=$0 SLURM_CPU_BIND=mask_cpu:0x1 "$@"'
    output = cluster.run(*outer, "bash", "-c", first_task_only, str(ROOT), *inner)
    job = re.findall(r"^(?:job )?(\d+)\b", output, re.MULTILINE)[-1]
    assert [(local, node) for _, local, node, *_ in places(cluster, job)] == [(0, "node1"), (0, "node2")]
    assert "cpu binding" not in cluster.log(job)  # srun warns where the lab cannot bind


SHORT = [*TRAIN, "--train.max_steps", "5"]


def at_prompt(cluster: Cluster, shell: str, *commands: str) -> str:
    """Type commands at the prompt of a shell on a terminal; return what the terminal showed."""
    typed = cluster.project / "typed"
    typed.write_text("".join(f"{command}\n" for command in (*commands, "exit")))
    return cluster.run("bash", "-c", f"timeout 110 script -qec {shlex.quote(shell)} /dev/null <typed", TRAIN="1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "shell",
    [
        "srun --pty --ntasks=4 bash --norc",
        "salloc --ntasks=2 bash --norc",
        # what salloc starts where LaunchParameters has use_interactive_step
        "salloc --ntasks=2 srun --interactive --preserve-env --pty bash --norc",
    ],
)
def test_at_a_prompt_one_process_trains_and_srun_starts_ranks(cluster: Cluster, shell: str) -> None:
    """The shell has the variables of its step, and so do the steps that are started from it."""
    ranks = f"srun --overlap --ntasks=2 {cluster.project}/python -m train {shlex.join(SHORT)} --run.name two </dev/null"
    alone = f"{sys.executable} -m train {shlex.join(SHORT)} --run.name alone"
    text = at_prompt(cluster, shell, f"export PYTHONPATH={ROOT} WANDB_MODE=disabled", alone, ranks)
    for name, world_size in (("alone", 1), ("two", 2)):
        path = cluster.path(name) / "summary.json"
        assert path.exists(), text
        assert json.loads(path.read_text())["world_size"] == world_size
        shutil.rmtree(path.parent)


@pytest.mark.slow
def test_rank_has_a_thread_for_each_of_its_cpus(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Slurm binds tasks, a rank whose srun did not ask for --cpus-per-task would get one core."""
    binding = lab.CONFIG.replace("task/none", "task/affinity\nTaskPluginParam=autobind=cores").replace(
        "CPUs=8", "CPUs=2"
    )
    monkeypatch.setattr(lab, "CONFIG", binding)
    flags = ("--train.exact", "false", "--train.num_threads", "0", "--train.max_steps", "5")
    with running(tmp_path_factory.mktemp("bound"), nodes=1) as bound:
        job = bound.submit("threads", "--cpus-per-task", "2", flags=flags)
        assert bound.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", bound.log(job)
        summary = json.loads((bound.path("threads") / "summary.json").read_text())
    assert summary["environment"]["num_threads"] == 2
