"""A run leaves no secret on the disk, nothing that others may change, and nothing that they can reach by network."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
from ranks.processes import arguments, rows

ROOT = Path(__file__).parent.parent
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_QwErTyUiOpAsDfGhJkLzXcVbNm",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    "DATABASE_URL": "postgres://ann:correct-horse-battery@db/runs",
}


def run_everything(place: Path, **env: str) -> Path:
    """Train from a shell without a mask, be preempted, resume, export and report; return the run's directory."""
    run = place / "run"
    flags = [*arguments(run, "--train.max_steps 40 --checkpoint.every_steps 10 --log.report true")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(place), "TMPDIR": str(place)} | env

    def do(code: int, *command: str) -> None:
        line = [sys.executable, "-m", *command]
        done = subprocess.run(line, env=environment, cwd=place, text=True, capture_output=True, umask=0)
        assert done.returncode == code, done.stderr
        with open(place / "printed", "a") as file:
            file.write(done.stdout + done.stderr)

    do(75, "train", *flags, "--run.time_limit", "0.000001")
    do(0, "train", *flags)
    do(0, "launch", "report", str(run))
    do(0, "launch", "export", str(run))
    return run


def test_no_file_of_a_run_holds_a_secret_or_can_be_changed_by_others(tmp_path: Path) -> None:
    """No file holds a secret of the environment, W&B's own included. None is writable by others, whatever the mask."""
    run = run_everything(tmp_path, **SECRETS, WANDB_MODE="offline")
    assert rows(run, "preempted")[0]["signal"] == "run.time_limit"
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"summary.json", "report.html", "model.safetensors", "printed"} <= {path.name for path in files}
    assert [path for path in files if path.suffix == ".wandb"]
    found = {
        f"{name} in {path}"
        for path in files
        for name, secret in SECRETS.items()
        if secret.encode() in path.read_bytes()
    }
    assert found == set()
    written = [path for path in [run, *run.rglob("*")] if not path.is_symlink()]
    assert [path for path in written if path.stat().st_mode & stat.S_IWOTH] == []


def test_launch_run_listens_on_the_loopback_interface_only(tmp_path: Path) -> None:
    """torch's store listens on all interfaces by default, whatever address its clients use."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "run", "--nproc", "2", "--", *arguments(run, "--train.epochs 1000")]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not rows(run, "train"):
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = {launcher.pid, *(child.pid for child in psutil.Process(launcher.pid).children(recursive=True))}
        sockets = [s for s in psutil.net_connections("inet") if s.pid in pids and s.status == psutil.CONN_LISTEN]
        assert {s.pid for s in sockets} == pids - {launcher.pid}
        assert {s.laddr.ip for s in sockets} == {"127.0.0.1"}
    finally:
        launcher.terminate()
        assert launcher.wait(60) == 75
    assert json.loads((run / "summary.json").read_text())["outcome"] == "preempted"
