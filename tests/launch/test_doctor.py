"""Make each check of `launch doctor` fail on purpose, on this machine as it is. The Slurm checks are in slurm/."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
import torch

import launch.run
from launch.__main__ import main
from launch.check import allreduce, checks, doctor
from launch.check.checks import Finding
from train.cli import parse
from train.config import DataConfig
from train.storage.built_in import IDX_FILES, find_file, find_folder
from train.world import environment

ALL_PACKAGES = [re.split(r"[^\w-]", text)[0] for text in requires("lockstep") or []]
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


def test_a_checkout_that_is_not_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    for name in ("metadata", "requires"):
        monkeypatch.setattr(checks, name, missing)
        finding = look(checks.packages)
        assert (finding.status, finding.remedy) == ("warn", "pip install -c constraints.txt -e .")
        assert "lockstep is not installed" in finding.text
        monkeypatch.undo()


def test_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def pretend(**versions: str) -> Finding:
        installed = {name: found for name, found in versions.items() if found}
        names = [name for name in ALL_PACKAGES if name not in versions]
        with monkeypatch.context() as patch:
            patch.setattr(checks, "versions", lambda *packages: environment.versions(*names) | installed)
            patch.setattr(checks.platform, "python_version", lambda: versions.get("python", "3.12.1"))
            return look(checks.packages)

    wrong = pretend(python="3.9.1", numpy="1.2.3", safetensors="", torch="2.99.0")
    assert wrong.status == "fail"
    assert wrong.text == "Python 3.9.1, not >=3.10; numpy 1.2.3, not >=1.26; safetensors is missing"
    assert "constraints.txt" in wrong.remedy
    untested = pretend(torch="2.99.0")
    pins = (checks.ROOT / "constraints.txt").read_text().splitlines()
    pin = next(line.split(";")[0] for line in pins if line.startswith("torch=="))
    assert (untested.status, f"torch 2.99.0, not {pin[5:]}" in untested.text) == ("warn", True)
    monkeypatch.setattr(checks, "ROOT", tmp_path)  # installed without a checkout: no pins
    finding = pretend(torch="2.99.0")
    assert (finding.status, "in the required ranges" in finding.text) == ("OK", True)
    monkeypatch.setattr(checks, "requires", lambda name: None)  # metadata that tests/gpu/check.sh makes
    assert look(checks.packages).text.startswith(f"Python {platform.python_version()}, 0 packages, torch ")


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
    finding = look(checks.gpus)
    assert (finding.status, finding.text) == ("warn", "different ones: H100, A100")


@pytest.mark.parametrize(
    ("sabotage", "seconds", "expected"),
    [
        (
            "import torch.distributed as d; real = d.all_reduce; d.all_reduce = lambda t: (real(t), t[-1:].add_(rank))",
            120,
            "2 wrong sums",  # on one rank, the last number of either size
        ),
        ("if rank: sys.exit('the cable is out')", 120, "failed: the cable is out; launch: rank 1 ended by exit code 1"),
        ("if rank: time.sleep(1000)", 8, "did not end within 8 s"),
        (  # NCCL leaves no group while a collective waits for a rank that has failed
            "import torch.distributed as d; d.destroy_process_group = lambda: time.sleep(1000); d.all_reduce = None",
            120,
            "2 processes failed: error: TypeError",
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
    answers = [{"backend": "gloo", "wrong": 0, "seconds": each} for each in (sizes, dict.fromkeys(sizes, 1e-3))]
    monkeypatch.setattr(allreduce, "run_local", lambda *arguments: answers)
    finding = look(checks.all_reduce, "--train.device cpu")
    assert (finding.status, finding.text.split("over ")[1]) == ("OK", "gloo: 25 MiB at 0.00 GB/s, 4 bytes in 1,000 us")


def test_data_missing_damaged_and_whole(tmp_path: Path) -> None:
    finding = look(checks.data, f"--data.root {tmp_path}")
    assert finding.status == "fail"
    assert finding.remedy == f"python -m launch data --name mnist --root {tmp_path}"
    for file in IDX_FILES:
        (tmp_path / file).write_bytes(b"damaged")
    finding = look(checks.data, f"--data.root {tmp_path}")
    assert finding.status == "fail"
    assert finding.text.startswith(f"{tmp_path / IDX_FILES[0]} is no whole IDX file: it begins with")
    assert look(checks.data, "--data.name digits").text.startswith("digits, 1,438 images, sha256 ")


@pytest.mark.mnist
def test_one_flipped_bit_of_mnist_is_found(tmp_path: Path, mnist_root: Path) -> None:
    shutil.copytree(mnist_root, tmp_path / "copy")
    assert look(checks.data, f"--data.root {tmp_path / 'copy'}").status == "OK"
    file = find_file(find_folder(DataConfig(root=str(tmp_path / "copy"))), "t10k-labels-idx1-ubyte.gz")
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
    for free, status in ((50_000_000, "fail"), (500_000_000, "warn"), (5_000_000_000, "OK")):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: usage(free))
        assert look(checks.disk, f"--run.dir {tmp_path}").status == status
    (tmp_path / "file").touch()
    finding = look(checks.disk, f"--run.dir {tmp_path / 'file' / 'runs'}")
    assert finding.status == "fail"
    assert "cannot be written" in finding.text


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Remove every W&B key; return the netrc file that would be read."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_wandb_key(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = look(checks.wandb)
    assert (finding.status, finding.text) == ("warn", "no key for api.wandb.ai is set")
    assert look(checks.wandb, "--wandb.mode online").status == "fail"
    assert look(checks.wandb, "--wandb.mode disabled").status == "OK"
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    no_key.write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    finding = look(checks.wandb)
    assert (finding.status, finding.text) == ("OK", "a key for 127.0.0.1 is set")
    no_key.write_text("machine\n")
    assert look(checks.wandb).status == "warn"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert look(checks.wandb, "--wandb.mode online").status == "OK"


def test_report_has_one_line_each_and_no_key(
    no_key: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://user:{KEY}@127.0.0.1:9")

    def broken(config: Any) -> Iterator[Finding]:
        yield Finding("half", "OK", "two\nlines")
        raise OSError("the disk\nis on fire")

    quick = (broken, checks.packages, checks.gpus, checks.data, checks.disk, checks.wandb)
    monkeypatch.setattr(checks, "CHECKS", quick)
    arguments = ["--", "--data.name", "digits", "--run.dir", str(tmp_path)]
    assert doctor.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(quick) + 1
    assert lines[1].startswith("fail broken        the check broke: OSError: the disk is on fire -> ")
    assert lines[-1] == f"{len(quick) + 1} checks: 1 fail, 0 warn"
    assert KEY not in "".join(lines)
    monkeypatch.setattr(checks, "CHECKS", quick[1:3])
    assert doctor.main([]) == 0


def test_command_line_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All checks print one line each. A caller's own rank variables, such as srun's, disturb none."""
    training = ("--data.name", "digits", "--run.dir", str(tmp_path / "runs"), "--train.device", "cpu")
    command = (sys.executable, "-m", "launch", "doctor", "--", *training)
    env = {**os.environ, "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=checks.ROOT, env=env, capture_output=True, text=True, timeout=580)
    found = {line[5:19].strip(): line[:5].strip() for line in done.stdout.splitlines()[:-1]}
    expected = ["packages", "gpus", "cores", "precision", "all-reduce", "deterministic", "data", "disk", "wandb"]
    assert [*found] == expected, done.stdout + done.stderr
    assert {found[name] for name in expected[3:]} == {"OK"}, done.stdout
    assert done.returncode == ("fail" in found.values())
    assert not list(tmp_path.iterdir())
    for options in (["--nodes", "0"], ["--slrum"], ["--", "--optim.lrr", "1"]):
        assert main(["doctor", *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1
