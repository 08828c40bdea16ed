"""The lab with a copy of the project: submit a training by hand or by `launch slurm`, and wait for it."""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ranks.processes import rows

from slurm.lab import Lab, lab, why_not

ROOT = Path(__file__).parent.parent.parent
PYTHON = """#!/bin/bash
# Runs the training slower (tests/slurm/rank.py); everything else as it is.
if [ "$2" = train ]; then exec {python} {root}/tests/slurm/rank.py "${{@:3}}"; fi
exec {python} "$@"
"""

STEPS = 60
TRAIN = f"""
--data.name digits --model.name tiny --train.global_batch_size 64 --train.exact true --train.num_micro_batches 8
--train.num_threads 1 --train.max_steps {STEPS} --checkpoint.every_steps 10 --log.every_steps 1 --eval.every_steps 1000
--log.progress false --train.device cpu
""".split()
WAIT_SECONDS = 180.0
NEEDS_LAB = [  # one lab at a time
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.xdist_group("slurm"),
]


class Cluster:
    """The lab, and a copy of the project to submit from."""

    def __init__(self, running: Lab, project: Path) -> None:
        self.lab, self.project = running, project

    def tidy(self) -> None:
        """Leave no job and no dead node for the next test."""
        self.run("scancel", "--user", "root")
        for node in self.lab.nodes:
            self.bring_back(node)
        deadline = time.monotonic() + 60
        idle = ("sinfo", "-h", "-t", "idle", "-p", "main", "-o", "%D")
        while self.run("squeue", "--noheader").strip() or self.run(*idle).strip() != str(len(self.lab.nodes)):
            assert time.monotonic() < deadline, self.run("squeue") + self.run("sinfo")
            time.sleep(0.3)

    def bring_back(self, node: str) -> None:
        """Boot a node that was killed, or connect it again."""
        if node not in self.lab.processes:
            self.lab.start(node)
        self.lab.netup(node)

    def run(self, *command: str, check: bool = True, **env: str) -> str:
        variables = [f"{name}={value}" for name, value in env.items()]
        return self.lab.sh("env", *variables, *command, check=check, cwd=self.project)

    def launch(self, *argv: str, **env: str) -> tuple[int, str]:
        """Run `python -m launch slurm` on the head; return (exit code, output)."""
        command = (sys.executable, "-m", "launch", "slurm", *argv)
        text = self.run("bash", "-c", '"$@"; echo "code $?"', "bash", *command, **env)
        output, code = text.rstrip().rsplit("code ", 1)
        return int(code), output

    def submit(self, name: str, *options: str, flags: tuple[str, ...] = (), **env: str) -> str:
        """Submit by hand, as the script's first lines describe; return the job's id."""
        arguments = [*TRAIN, "--run.name", name, *flags]
        return self.run("sbatch", "--parsable", *options, "slurm/train.sbatch", *arguments, **env).split()[-1]

    def job(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\S+?)=(.*?)(?= \S+?=|$)", self.run("scontrol", "show", "job", "-o", job).strip()))

    def wait_until(self, job: str, is_reached: Callable[[], bool]) -> None:
        """Wait until something has happened to a job, WAIT_SECONDS at most."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_reached():
            assert time.monotonic() < deadline, f"{self.job(job)}\n{self.log(job)}"
            time.sleep(0.3)

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """Wait until a job has one of these states; return what Slurm says about it."""
        self.wait_until(job, lambda: self.job(job)["JobState"] in states)
        return self.job(job)

    def wait_until_held(self, job: str) -> dict[str, str]:
        """Wait until a job is held; return what Slurm says about it."""
        self.wait_until(job, lambda: "held" in self.job(job)["Reason"].lower())
        return self.job(job)

    def finish(self, job: str, name: str) -> dict[str, Any]:
        """Wait for the job's end; return the summary of its run, whose directory must be tidy."""
        found = self.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert found["JobState"] == "COMPLETED", f"{found}\n{self.log(job)}"
        return self.summary(name)

    def summary(self, name: str) -> dict[str, Any]:
        run = self.path(name)
        steps = [row["step"] for row in rows(run, "train")]
        assert steps == list(range(1, STEPS + 1))
        assert not list(run.rglob(".*")), "something temporary is left"
        return json.loads((run / "summary.json").read_text())

    def path(self, name: str) -> Path:
        return self.project / "runs" / name

    def log(self, job: str) -> str:
        path = self.project / f"slurm-{job}.log"
        return path.read_text() if path.exists() else "no log"

    def ranks(self, job: str, attempt: int = 0) -> dict[int, dict[str, str]]:
        """Return what the ranks of one attempt of a job recorded about themselves."""
        found = [json.loads(path.read_text()) for path in (self.project / "ranks" / job).glob(f"{attempt}-*.json")]
        return {int(facts["RANK"] or 0): facts for facts in found}


@contextmanager
def running(place: Path, nodes: int = 3) -> Iterator[Cluster]:
    """Start a cluster with a copy of the project."""
    project = place / "project"
    shutil.copytree(ROOT / "slurm", project / "slurm")
    for package in ("train", "launch", "configs"):
        (project / package).symlink_to(ROOT / package)
    (project / "python").write_text(PYTHON.format(python=sys.executable, root=ROOT))
    (project / "python").chmod(0o755)
    # Shell options, Windows line ends and a last command that fails must not change what the scripts do.
    exports = f"PYTHONPATH={ROOT} XDG_CACHE_HOME={place}/cache WANDB_MODE=disabled"
    site = f"set -euo pipefail\nPYTHON={project}/python\nexport {exports}\nfalse\n"
    (project / "slurm" / "site.env").write_bytes(site.replace("\n", "\r\n").encode())
    with lab(place / "lab", nodes) as started:
        yield Cluster(started, project)
