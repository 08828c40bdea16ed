"""Each check of `launch doctor` made to fail on purpose, on this machine as it is; the Slurm ones are in slurm/."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

import launch.run
from launch.check import allreduce, checks, doctor
from launch.check.checks import Finding
from train.cli import parse
from train.storage.data import FILES

KEY = "0123456789abcdef0123456789abcdef01234567"
SABOTAGED = """
import os, sys, time
rank = int(os.environ["RANK"])
{sabotage}
from launch.check.allreduce import leave, main
leave(main(sys.argv[1:]))
"""


def only(found: Iterator[Finding]) -> Finding:
    (finding,) = found
    assert finding.remedy or finding.status == "OK"
    return finding


def look(check: Callable[..., Iterator[Finding]], *flags: str, **named: Any) -> Finding:
    return only(check(parse(" ".join(flags).split()), **named))


def test_python_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(checks.packages(parse([]))).status == "OK"
    monkeypatch.setattr(checks.platform, "python_version", lambda: "3.9.1")
    finding = next(checks.packages(parse([])))
    assert (finding.name, finding.status, finding.text) == ("python", "fail", "3.9.1, needs >=3.10")


def test_a_checkout_that_is_not_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    for name in ("metadata", "requires"):
        monkeypatch.setattr(checks, name, missing)
        finding = look(checks.packages)
        assert (finding.status, finding.remedy) == ("warn", "pip install -e .")
        assert "lockstep is not installed" in finding.text
        monkeypatch.undo()


def test_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = {"numpy": "1.2.3", "torch": "2.99.0"}

    def pretended(name: str) -> str:
        if name == "safetensors":
            raise PackageNotFoundError
        return installed.get(name) or version(name)

    monkeypatch.setattr(checks, "version", pretended)
    _, wrong, other = checks.packages(parse([]))
    assert (wrong.status, wrong.text) == ("fail", "numpy 1.2.3, needs >=1.26; safetensors is missing")
    assert other.status == "warn"
    pin = next(
        line for line in (checks.ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    )
    assert other.text.startswith(f"torch 2.99.0, tested with {pin.split(';')[0][7:]}")
    assert "constraints.txt" in wrong.remedy
    monkeypatch.setattr(checks, "ROOT", tmp_path)  # installed without a checkout: no pins
    monkeypatch.setattr(checks, "version", lambda name: "2.99.0" if name == "torch" else version(name))
    _, finding = checks.packages(parse([]))
    assert finding.status == "OK"
    assert "in the required ranges" in finding.text


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [])
    assert look(checks.gpus).status == "OK"
    assert look(checks.gpus, "--train.device cuda").status == "fail"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path("/dev/nvidia0")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    finding = look(checks.gpus)
    assert finding.status == "fail"
    assert "1 on this machine, but torch" in finding.text
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: ["H100", "A100"][number])
    monkeypatch.setattr(torch.version, "cuda", "13.2")

    class Driver:
        def cuDriverGetVersion(self, number: Any) -> int:
            number._obj.value = 12080
            return 0

        def ncclGetVersion(self, number: Any) -> int:
            number._obj.value = 10203
            return 0

    monkeypatch.setattr(checks.ctypes, "CDLL", lambda name: Driver())
    cards, driver, nccl = checks.gpus(parse([]))
    assert (cards.status, cards.text) == ("warn", "different ones: H100, A100")
    assert (driver.status, driver.text) == ("fail", "driver supports CUDA 12.8, torch was built for 13.2")
    # not torch.cuda.nccl.version(), a constant of the build, which does not see a library that is put first
    assert (nccl.status, nccl.text.split(" is loaded")[0]) == ("warn", "1.2.3")


@pytest.mark.parametrize(
    ("found", "built", "status"), [(13020, "13.2", "OK"), (13010, "13.2", "warn"), (14000, "13.2", "OK")]
)
def test_driver(found: int, built: str, status: str) -> None:
    assert checks.driver(found, built).status == status


@pytest.mark.parametrize(
    ("sabotage", "seconds", "expected"),
    [
        (
            "import torch.distributed as d; real = d.all_reduce; d.all_reduce = lambda t: (real(t), t[-1:].add_(rank))",
            120,
            "2 wrong sums",  # on one rank, the last number of either size
        ),
        ("if rank: sys.exit('the cable is out')", 120, "2 processes: rank 1 ended by exit code 1: the cable is out"),
        ("if rank: time.sleep(1000)", 8, "did not end within 8 s"),
        (  # NCCL leaves no group while a collective waits for a rank that has failed
            "import torch.distributed as d; d.destroy_process_group = lambda: time.sleep(1000); d.all_reduce = None",
            120,
            "ended by exit code 1: error: TypeError",
        ),
    ],
    ids=["wrong", "crash", "hang", "failure"],
)
def test_all_reduce_that_fails(sabotage: str, seconds: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ALLREDUCE_BYTES", 4096)
    monkeypatch.setattr(launch.run, "LEAVE_SECONDS", 2)
    program = (sys.executable, "-c", SABOTAGED.format(sabotage=sabotage))
    finding = look(checks.all_reduce, "--train.device cpu", program=program, timeout=seconds)
    assert finding.status == "fail"
    assert expected in finding.text


def test_all_reduce_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    found = allreduce.run_local(checks.PROBE, 3, ["--cpu", "--bytes", "4", "400004", "--repeats", "2"], 120)
    assert sorted((item["rank"], item["world_size"], item["wrong"]) for item in found) == [(r, 3, 0) for r in range(3)]
    assert all(seconds > 0 for item in found for seconds in item["seconds"].values())
    sizes = {"4": 1e-4, str(checks.ALLREDUCE_BYTES): 100.0}
    answer = {"backend": "gloo", "wrong": 0, "seconds": sizes}
    monkeypatch.setattr(
        allreduce, "run_local", lambda *arguments: [answer, {**answer, "seconds": dict.fromkeys(sizes, 1e-3)}]
    )
    finding = look(checks.all_reduce, "--train.device cpu")
    assert finding.status == "warn"  # the slowest rank counts
    assert "right but slow" in finding.text


def test_data_missing_damaged_and_whole(tmp_path: Path) -> None:
    finding = look(checks.data, f"--data.root {tmp_path}")
    assert finding.status == "fail"
    assert finding.remedy == f"python -m launch data --name mnist --root {tmp_path}"
    for file in FILES:
        (tmp_path / f"{file}.gz").write_bytes(b"damaged")
    finding = look(checks.data, f"--data.root {tmp_path}")
    assert finding.status == "fail"
    assert "MD5" in finding.text
    assert look(checks.data, "--data.name digits").text.startswith("digits, 1,438 images, sha256 ")


@pytest.mark.mnist
def test_one_flipped_bit_of_mnist_is_found(tmp_path: Path, mnist_root: Path) -> None:
    shutil.copytree(mnist_root, tmp_path / "copy")
    assert look(checks.data, f"--data.root {tmp_path / 'copy'}").status == "OK"
    (file,) = (tmp_path / "copy").rglob("t10k-labels-idx1-ubyte.gz")
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    finding = look(checks.data, f"--data.root {tmp_path / 'copy'}")
    assert finding.status == "fail"
    assert "t10k-labels" in finding.text


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert look(checks.disk, f"--run.dir {tmp_path / 'not' / 'yet'}").status == "OK"
    assert not (tmp_path / "not").exists()
    usage = namedtuple("usage", "free")
    for free, status in ((1_000_000, "fail"), (50_000_000, "warn"), (5_000_000_000, "OK")):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: usage(free))
        assert look(checks.disk, f"--run.dir {tmp_path}").status == status
    (tmp_path / "file").touch()
    finding = look(checks.disk, f"--run.dir {tmp_path / 'file' / 'runs'}")
    assert finding.status == "fail"
    assert "cannot be written" in finding.text


@contextlib.contextmanager
def server(answer: bytes) -> Iterator[str]:
    """A local server that gives every request one answer; b"": it accepts and is silent."""
    with contextlib.ExitStack() as connections, socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = connections.enter_context(listener.accept()[0])
                    if answer:
                        connection.recv(4096)
                        connection.sendall(answer)
                        connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No W&B key anywhere; returns the netrc file that would be read."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_wandb_server_that_answers_or_not(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 404 Not Found\r\n\r\n"):
        with server(answer) as url:
            monkeypatch.setenv("WANDB_BASE_URL", url)
            finding = look(checks.wandb)
            assert (finding.status, "no key" in finding.text) == ("warn", True)
            no_key.write_text(f"machine 127.0.0.1 login user password {KEY}\n")
            finding = look(checks.wandb)
            assert (finding.status, finding.text) == ("OK", "127.0.0.1 answers; a key is set")
            no_key.unlink()
    assert look(checks.wandb).status == "warn"  # the server is gone
    assert "does not answer" in look(checks.wandb, "--wandb.mode online").text
    assert look(checks.wandb, "--wandb.mode online").status == "fail"
    assert look(checks.wandb, "--wandb.mode disabled").status == "OK"


def test_wandb_server_that_is_silent_costs_its_time_out(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(b"") as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        began = time.monotonic()
        assert look(checks.wandb).status == "warn"
        assert time.monotonic() - began < 30  # seconds; without a limit it would be for ever
    # a name server that hangs is bounded by the thread, which no socket's time-out would do
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **named: release.wait(60) and [])
    assert checks.reach("http://nowhere.invalid", 0.2) == "no answer within 0.2 s"
    release.set()


def test_report_has_one_line_each_and_no_key(
    no_key: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://user:{KEY}@127.0.0.1:9")

    def broken(config: Any) -> Iterator[Finding]:
        yield Finding("half", "OK", "two\nlines")
        raise OSError("the disk\nis on fire")

    quick = (broken, checks.packages, checks.gpus, checks.data, checks.disk, checks.wandb, checks.slurm)
    monkeypatch.setattr(checks, "CHECKS", quick)
    arguments = ["--", "--data.name", "digits", "--run.dir", str(tmp_path)]
    assert doctor.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + (1 + len(quick)) + 1
    assert lines[1].startswith("fail broken        the check broke: OSError: the disk is on fire -> ")
    assert lines[-1] == f"{len(quick) + 2} checks: 1 fail, 1 warn"
    assert doctor.main(["--json", *arguments]) == 1
    printed = capsys.readouterr().out
    report = json.loads(printed)
    assert report["status"] == "fail"
    assert [finding["status"] for finding in report["findings"]].count("fail") == 1
    assert KEY not in printed + "".join(lines)
    monkeypatch.setattr(checks, "CHECKS", quick[1:3])
    assert doctor.main(["--json"]) == 0


def test_command_line_on_this_machine(tmp_path: Path) -> None:
    """The real thing: all checks, one line each."""

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            (sys.executable, *arguments), cwd=checks.ROOT, capture_output=True, text=True, timeout=200
        )

    training = ("--data.name", "digits", "--run.dir", str(tmp_path), "--train.device", "cpu")
    done = python("-m", "launch", "doctor", "--", *training)
    found = {line[5:19].strip(): line[:5].strip() for line in done.stdout.splitlines()[:-1]}
    expected = [
        "python",
        "packages",
        "gpus",
        "fp32",
        "tf32",
        "bf16",
        "fp16",
        "all-reduce",
        "deterministic",
        "data",
        "disk",
        "wandb",
        "slurm",
    ]
    assert [name for name in found if name not in ("driver", "nccl")] == expected, done.stdout + done.stderr
    assert {found[name] for name in expected[3:]} == {"OK"}
    assert done.returncode == ("fail" in found.values())
    for options in (["--nodes", "0"], ["--slrum"], ["--", "--optim.lrr", "1"]):
        done = python("-m", "launch", "doctor", *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
