"""Every way to start a run starts the same run, with as many ranks as were asked for, and the right exit code."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from ranks.processes import free_port, rows, wait_for_step

import launch.run

BIN = Path(sys.executable).parent
SMALL = (
    "--data.name digits --model.name tiny --train.global_batch_size 64 --train.num_threads 1 --optim.lr 0.01 "
    "--log.progress false --log.report false"
)
STARTED: list[subprocess.Popen] = []


def start(run: Path, *command: str, flags: str = "--train.max_steps 20", **env: str) -> subprocess.Popen:
    """Start a launcher's command line followed by a small run's flags."""
    arguments = [*SMALL.split(), "--run.dir", str(run.parent), "--run.name", run.name, *flags.split()]
    process = subprocess.Popen(
        [*command, *arguments], env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def no_process_survives_its_test() -> Iterator[None]:
    """A test that fails halfway must not disturb the next one."""
    yield
    for process in STARTED:
        if process.poll() is None:
            for pid in (process.pid, *children_of(process.pid)):  # a killed torchrun would orphan its workers
                os.kill(pid, signal.SIGKILL)
            process.communicate()
    STARTED.clear()


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    """Return (exit code, output); a launcher that hangs fails the test."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def launch_run(nproc: int, *options: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "launch", "run", "--nproc", str(nproc), *options, "--")


def ranks_of(run: Path) -> list[int]:
    """Return the process ids of the ranks that train this run now."""
    pattern = f"train.* --run.dir {re.escape(str(run.parent))} .*--run.name {run.name}( |$)"
    found = subprocess.run(["pgrep", "-f", "--", pattern], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def children_of(pid: int) -> list[int]:
    """Return the process ids of a process's children."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def wait_for_none(run: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while ranks_of(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ranks_of(run)


EXACT = (
    "--train.exact true --train.num_micro_batches 4 --train.epochs 16 --checkpoint.every_steps 20 "
    "--eval.every_steps 500"
)
LAUNCHERS = {
    "python": (1, (sys.executable, "-m", "train")),
    "torchrun": (2, (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "train")),
    "accelerate": (
        2,
        (str(BIN / "accelerate"), "launch", "--config_file", "configs/accelerate/cpu-2.yaml", "-m", "train"),
    ),
    "launch run": (2, launch_run(2)),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of the run on one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    code, output = finish(start(run, sys.executable, "-m", "train", flags="--train.max_steps 20 --log.every_steps 1"))
    assert code == 0, output
    return [row["loss"] for row in rows(run, "train")]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_trains_the_same_run(tmp_path: Path, launcher: str, alone: list[float]) -> None:
    world_size, command = LAUNCHERS[launcher]
    code, output = finish(start(tmp_path / "run", *command, flags="--train.max_steps 20 --log.every_steps 1"))
    assert code == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == world_size
    assert [row["loss"] for row in rows(tmp_path / "run", "train")] == pytest.approx(alone, rel=1e-4)
    assert "Warning" not in output.replace("Setting OMP_NUM_THREADS", "")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "launch run"])
def test_every_launcher_trains_a_recipe_with_batch_norm_on_8_ranks(tmp_path: Path, launcher: str) -> None:
    command = {
        "torchrun": (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "8", "-m", "train"),
        "accelerate": (*LAUNCHERS["accelerate"][1][:-2], "--num_processes", "8", "-m", "train"),
        "launch run": launch_run(8),
    }[launcher]
    flags = "--config configs/mnist.yaml --data.name digits --train.max_steps 3"  # it wins over SMALL
    code, output = finish(start(tmp_path / "run", *command, flags=flags))
    assert (code, "8 micro-batch(es) of 16, on 8 rank(s)" in output) == (0, True), output


def test_asking_for_more_processes_than_come_up_is_an_error(tmp_path: Path) -> None:
    command = (str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2", "-m", "train")
    code, output = finish(start(tmp_path / "run", *command))
    assert code != 0
    assert "asked for several processes and started one" in output
    assert not (tmp_path / "run").exists()


def test_file_that_accelerate_config_writes_works(tmp_path: Path) -> None:
    """It asks for bf16 by default in many a tutorial. The training's own precision wins, and one line says so."""
    written = tmp_path / "default_config.yaml"
    answers = {"distributed_type": "MULTI_GPU", "num_processes": 2, "mixed_precision": "bf16", "gpu_ids": "all"}
    always = {"compute_environment": "LOCAL_MACHINE", "use_cpu": False, "debug": False, "same_network": True}
    unused = {"downcast_bf16": "no", "tpu_env": []}
    ClusterConfig(**answers, **always, **unused, main_process_port=free_port()).to_yaml_file(written)
    command = (str(BIN / "accelerate"), "launch", "--config_file", str(written), "-m", "train")
    code, output = finish(start(tmp_path / "run", *command, flags="--train.device cpu --train.max_steps 8"))
    assert code == 0, output
    assert rows(tmp_path / "run", "start")[0]["world_size"] == 2
    assert [line for line in output.splitlines() if "accelerate launch" in line] == [
        "warning: accelerate launch asks for mixed precision bf16, train.precision is fp32: fp32 is used, because the "
        "config alone decides the result. Set --train.precision bf16 to change it."
    ]


def test_an_abort_in_the_interpreters_clean_up_does_not_reach_a_rank(tmp_path: Path) -> None:
    """Now and then a thread of gloo aborts there, after correct work."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "atexit.register(lambda: os.abort() if sys.argv[0].endswith('train/__main__.py') else None)\n"
    )
    code, output = finish(
        start(tmp_path / "run", *launch_run(2), PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    )
    assert code == 0, output
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_launch_run_restarts_after_a_killed_rank_with_the_same_bits(tmp_path: Path, victim: int) -> None:
    flags = "--train.epochs 20 --checkpoint.every_steps 20 --model.dropout 0.3 --eval.every_steps 500"
    code, output = finish(start(tmp_path / "whole", *launch_run(2), flags=flags))
    assert code == 0, output
    process = start(tmp_path / "hit", *launch_run(2, "--max-restarts", "1"), flags=flags)
    wait_for_step(tmp_path / "hit", 100)
    os.kill(sorted(children_of(process.pid))[victim], signal.SIGKILL)  # not what a rank starts itself, such as git
    code, output = finish(process)
    assert code == 0, output
    assert "ended by SIGKILL" in output
    assert "restart 1 of 1" in output
    whole, hit = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "hit"))
    assert hit["weights_sha256"] == whole["weights_sha256"]
    assert rows(tmp_path / "hit", "start")[1]["step"] > 0
    steps = [row["step"] for row in rows(tmp_path / "hit", "train")]
    assert steps == sorted(set(steps))


def test_launch_run_without_restarts_left_fails(tmp_path: Path) -> None:
    process = start(tmp_path / "run", *launch_run(2), flags="--train.epochs 2000")
    wait_for_step(tmp_path / "run", 20)
    os.kill(max(ranks_of(tmp_path / "run")), signal.SIGKILL)
    assert finish(process)[0] == 1
    wait_for_none(tmp_path / "run", 5)


@pytest.mark.sample(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_launch_run_passes_signals_and_75_on(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path / "run", *launch_run(2, "--max-restarts", "3"), flags="--train.epochs 2000")
    wait_for_step(tmp_path / "run", 20)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 75, output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["outcome"] == "preempted"
    assert "preempted at step" in output


def test_rank_that_hangs_at_exit_after_all_have_saved_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.run, "SAVE_SECONDS", 0.3)
    ranks = object.__new__(launch.run.Ranks)
    programs = ("import time; time.sleep(60)", "raise SystemExit(75)")
    ranks.processes = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    assert ranks.wait() == 75
    assert [process.returncode for process in ranks.processes] == [-signal.SIGKILL, 75]


@pytest.mark.parametrize(("first", "second", "expected"), [(2, 1, 2), (1, 2, 2), (75, -9, 75), (-9, 75, 1)])
def test_bad_input_or_else_the_rank_that_leaves_first_decides_the_code(first: int, second: int, expected: int) -> None:
    polls = [iter([None, second, second]), iter([first, first, first])]
    ranks = object.__new__(launch.run.Ranks)
    ranks.output = None
    ranks.processes = [SimpleNamespace(poll=partial(next, codes)) for codes in polls]  # type: ignore[misc]
    assert ranks.wait() == expected


def test_launch_run_killed_leaves_no_orphan(tmp_path: Path) -> None:
    process = start(tmp_path / "run", *launch_run(2), flags="--train.epochs 2000")
    wait_for_step(tmp_path / "run", 20)
    process.kill()
    process.communicate()
    wait_for_none(tmp_path / "run", 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nproc", "0", "--"], "--nproc is 0"),
        (["--max-restarts", "-1", "--"], "--max-restarts is -1"),
        (["--nproc", "2", "--min-nproc", "0", "--"], "--min-nproc is 0 of 2"),
        (["--nprocs", "2", "--"], "no option --nprocs"),
        (["--", "--optim.lr", "x"], "optim.lr"),
        (["--", "--config", "/no/such.yaml"], "/no/such.yaml"),
    ],
)
def test_launch_run_refuses_bad_input_in_one_line(options: list[str], words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "launch", "run", *options], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_launch_without_a_valid_subcommand_lists_them() -> None:
    done = subprocess.run([sys.executable, "-m", "launch", "zzz"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Use one of: run, " in done.stderr
    done = subprocess.run([sys.executable, "-m", "launch"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "report" in done.stdout


def test_launch_data_names_where_the_files_are(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", "data", "--root", str(tmp_path), "--no-download"]
    done = subprocess.run([*command, "--name", "digits"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "digits: grey images of 28 x 28 pixels in 10 classes" in done.stdout
    assert ["all", "1,438", "359"] in [line.split() for line in done.stdout.splitlines()]
    done = subprocess.run([*command, "--name", "fashion_mnist"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "FashionMNIST/raw" in done.stderr


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port}")


def agent(port: int, run: Path) -> subprocess.Popen:
    """Start a torchrun agent with one worker, as on one of one to two nodes."""
    command = (
        f"{BIN / 'torchrun'} --nnodes 1:2 --nproc-per-node 1 --max-restarts 3 --rdzv-id elastic --rdzv-backend c10d"
    )
    command += f" --rdzv-endpoint 127.0.0.1:{port} --rdzv-conf last_call_timeout=1 --local-addr 127.0.0.1 -m train"
    return start(run, *command.split(), flags=EXACT, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", GLOO_SOCKET_IFNAME="lo")


@pytest.mark.slow
def test_torchrun_continues_with_the_nodes_that_are_left(tmp_path: Path) -> None:
    """One of two elastic nodes dies. The other continues alone and ends with the bits of an undisturbed run."""
    port, run = free_port(), tmp_path / "elastic"
    first = agent(port, run)
    wait_for_port(port)  # the first agent hosts the rendezvous and must survive
    second = agent(port, run)
    deadline = time.monotonic() + 200
    while 2 not in [row["world_size"] for row in rows(run, "start")] and time.monotonic() < deadline:
        time.sleep(0.05)  # the first may have begun alone: then it starts again with two
    wait_for_step(run, rows(run, "start")[-1]["step"] + 40)
    for victim in (second.pid, *children_of(second.pid)):
        os.kill(victim, signal.SIGKILL)
    second.communicate()
    code, output = finish(first)
    assert code == 0, output
    starts = rows(run, "start")
    assert [row["world_size"] for row in starts][-2:] == [2, 1]
    assert starts[-1]["step"] > 0
    assert finish(start(tmp_path / "alone", sys.executable, "-m", "train", flags=EXACT))[0] == 0
    hit, alone = (json.loads((path / "summary.json").read_text()) for path in (run, tmp_path / "alone"))
    assert hit["weights_sha256"] == alone["weights_sha256"]


def test_torchrun_with_one_process_gives_the_bits_of_none(tmp_path: Path) -> None:
    flags = "--train.exact true --train.num_micro_batches 4 --train.max_steps 20"
    command = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "1", "-m", "train")
    assert finish(start(tmp_path / "torchrun", *command, flags=flags))[0] == 0
    assert finish(start(tmp_path / "python", sys.executable, "-m", "train", flags=flags))[0] == 0
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("torchrun", "python"))
    assert one["weights_sha256"] == other["weights_sha256"]


def test_launch_run_continues_with_fewer_processes_and_the_same_bits(tmp_path: Path) -> None:
    process = start(tmp_path / "hit", *launch_run(3, "--max-restarts", "2", "--min-nproc", "1"), flags=EXACT)
    for world_size in (3, 2):
        deadline = time.monotonic() + 200
        while len(rows(tmp_path / "hit", "start")) < 4 - world_size and time.monotonic() < deadline:
            time.sleep(0.05)
        wait_for_step(tmp_path / "hit", rows(tmp_path / "hit", "start")[-1]["step"] + 60)
        os.kill(max(ranks_of(tmp_path / "hit")), signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert [row["world_size"] for row in rows(tmp_path / "hit", "start")] == [3, 2, 1]
    assert finish(start(tmp_path / "alone", sys.executable, "-m", "train", flags=EXACT))[0] == 0
    hit, alone = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("hit", "alone"))
    assert hit["weights_sha256"] == alone["weights_sha256"]


@pytest.mark.slow
def test_demo_shows_the_same_bits() -> None:
    done = subprocess.run([sys.executable, "-m", "launch", "demo"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same bits" in done.stdout
    assert len({line.split("weights ")[1] for line in done.stdout.splitlines() if "weights " in line}) == 1
