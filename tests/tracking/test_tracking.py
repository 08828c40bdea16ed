"""W&B shows what is in metrics.jsonl, whatever happens to the server or the run.

The server is local (wandb_server.py), and the client side runs wandb's own processes.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks.processes import Ranks, arguments, launch, rows, train, wait_for_step
from wandb_server import PATIENT, SHORT, Server, expected, is_end, numbers, sync

from train.config import WandbConfig
from train.rundir import Evaluation, RunDir, Summary, Tail
from train.tracking.wandb import Follower, Mirror, wandb_id

MEDIUM = "--train.max_steps 1000 --log.every_steps 10 --eval.every_steps 500 --checkpoint.every_steps 500"
LONG = "--train.max_steps 100000 --log.every_steps 5 --eval.every_steps 1000 --checkpoint.every_steps 50"


def followers(run: Path) -> list[int]:
    """Return the processes that mirror a run."""
    command = f"train.tracking.wandb\0{run}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(path.parent.name)] if command in path.read_bytes() else []
        except OSError:  # it has ended
            continue
    return found


def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Wait for a condition; fail if it never holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def leet(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records of an offline run by type, as wandb itself reads them."""
    wandb = shutil.which("wandb", path=str(Path(sys.executable).parent))
    assert wandb is not None
    shown = subprocess.run(
        [wandb, "leet", "inspect", "--json", str(directory)], capture_output=True, text=True, check=True
    )
    records = [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def test_without_a_key_it_is_offline_across_a_preemption_and_can_be_sent_later(
    tmp_path: Path, server: Server, env: dict[str, str]
) -> None:
    run = tmp_path / "runs" / "r"
    no_key = {name: value for name, value in env.items() if name != "WANDB_API_KEY"}
    ranks = Ranks(1, arguments(run, LONG, PATIENT), tmp_path / "logs", **no_key)
    wait_for_step(run, 60)
    until(lambda: "wandb: offline" in ranks.output())
    ranks.signal(signal.SIGTERM)
    assert ranks.wait() == [75]
    assert "(No API key configured" in ranks.output()
    last = rows(run)[-1]["step"]
    config = run / "config.yaml"
    ranks = Ranks(1, arguments(run, LONG, PATIENT, "--wandb.media false"), tmp_path / "logs-2", **no_key)
    wait_for_step(run, last + 50)
    ranks.signal(signal.SIGTERM)
    assert ranks.wait() == [75]
    first, second = sorted((run / "wandb").glob(f"offline-run-*-{wandb_id(RunDir(run))}"))
    records = [leet(first), leet(second)]
    kept = [
        {name: value for name, value in row["item"].items() if name[0] != "_"}
        for found in records
        for row in found["history"]
    ]
    assert numbers(kept) == expected(run)
    steps = [row["item"]["_step"] for found in records for row in found["history"]]
    assert steps == list(
        range(len(expected(run)))
    )  # the second attempt continues the first, so that both can be merged
    assert records[0]["run"][0]["config"]["update"]["seed"] == 0
    assert [found["exit"][0]["exit_code"] for found in records] == [75, 75]
    assert server.runs == {}
    assert "seed: 0" in config.read_text()
    assert f"{len(kept)} of {len(kept)} rows sent" in sync(run, env)
    assert numbers(server.run.rows()) == expected(run)
    assert (server.run.exit_code, server.run.preempting) == (75, True)
    assert "0 of" in sync(run, env)
    assert numbers(server.run.rows()) == expected(run)


def test_a_sigkilled_run_leaves_no_process_and_is_sent_later(
    tmp_path: Path, server: Server, env: dict[str, str]
) -> None:
    run = tmp_path / "runs" / "r"
    ranks = Ranks(1, arguments(run, LONG, PATIENT), tmp_path / "logs", **env)
    until(lambda: "wandb: online" in ranks.output())
    until(lambda: server.run.history)
    (follower,) = followers(run)
    os.kill(follower, signal.SIGSTOP)  # so that it does not keep up
    wait_for_step(run, rows(run)[-1]["step"] + 50)
    ranks.signal(signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL]
    until(lambda: not followers(run))
    had = len(server.run.history)
    assert 0 < had < len(expected(run))
    assert f"{len(expected(run)) - had} of {len(expected(run))} rows sent" in sync(run, env)
    assert numbers(server.run.rows()) == expected(run)
    assert server.run.exit_code == 1
    assert "0 of" in sync(run, env)
    assert numbers(server.run.rows()) == expected(run)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the weights of the same run without W&B."""
    return train(1, tmp_path_factory.mktemp("runs") / "r", MEDIUM)["weights_sha256"]


@pytest.mark.sample(2)
@pytest.mark.parametrize("fate", ["silent from the start", "silent later", "wandb dies", "gone later"])
def test_a_server_that_fails_is_not_in_the_way(
    fate: str, undisturbed: str, tmp_path: Path, server: Server, env: dict[str, str]
) -> None:
    run = tmp_path / "runs" / "r"
    patience = "--wandb.timeout 20"  # a busy machine needs some time to go online
    if fate == "silent from the start":
        server.awake.clear()
        patience = "--wandb.timeout 1"
    elif fate != "wandb dies":  # without an answer wandb soon gives up on files, but not on rows
        patience += " --wandb.media false --wandb.artifacts false"
    ranks = Ranks(1, arguments(run, MEDIUM, patience), tmp_path / "logs", **env)
    if fate == "silent from the start":
        until(lambda: followers(run))
        ranks.signal(signal.SIGSTOP)  # so that training does not end before
        until(lambda: list((run / "wandb").glob("offline-*")))
        ranks.signal(signal.SIGCONT)
    else:
        until(lambda: "wandb: online" in ranks.output())
    assert not (run / "summary.json").exists()
    if fate == "silent later":
        server.awake.clear()
    elif fate == "gone later":
        server.stop()
    elif fate == "wandb dies":
        (follower,) = followers(run)
        core = int(Path(f"/proc/{follower}/task/{follower}/children").read_text().split()[0])
        os.kill(core, signal.SIGKILL)
    assert ranks.wait() == [0]
    warning = {"silent from the start": "wandb: offline (", "wandb dies": "wandb: stopped ("}.get(
        fate, "wandb: not done after 20 s"
    )
    assert warning in ranks.output()
    assert f"`python -m launch sync {run}`" in ranks.output()
    assert json.loads((run / "summary.json").read_text())["weights_sha256"] == undisturbed
    until(lambda: not followers(run))
    if fate == "gone later":
        code, shown = launch(tmp_path / "sync.log", f"sync {run}", **env)
        assert (code, "nothing is lost" in shown, "Traceback" in shown) == (1, True, False)
        server.start()
    server.awake.set()
    assert "rows sent" in sync(run, env)
    assert numbers(server.run.rows()) == expected(run)
    assert is_end(server.run.rows()[-1])
    assert server.run.exit_code == 0


def test_disabled_starts_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    train(1, run, SHORT, "--wandb.mode disabled", WANDB_MODE="online")
    assert not list(run.glob("wandb*"))
    assert rows(run, "weights") == []


def test_wandb_id_is_made_once_or_by_the_agent_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [RunDir(tmp_path / name) for name in "abc"]
    for run in runs:
        run.path.mkdir()
    assert wandb_id(runs[0]) == wandb_id(runs[0]) != wandb_id(runs[1])
    monkeypatch.setenv("WANDB_RUN_ID", "sweep123")
    assert wandb_id(runs[2]) == "sweep123"
    assert wandb_id(runs[0]) != "sweep123"


def test_tail_gives_whole_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert Tail(path).rows() == []
    path.write_text('{"event": "a", "step": 1}\n{"event": "a", "ste')
    tail = Tail(path)
    assert tail.rows() == [{"event": "a", "step": 1}]
    with path.open("a") as file:
        file.write('p": 2}\ntorn\n')
    assert (tail.rows(), tail.rows()) == ([{"event": "a", "step": 2}], [])


class Logged(Mirror):
    """A mirror without a connection to W&B."""

    def __init__(self, run_dir: RunDir, step: int) -> None:
        self.run_dir, self.last, self.run = run_dir, {"event": "train", "step": step, "time": 0.0}, self
        self.options = WandbConfig(media=False, artifacts=False)
        self.shown: list[dict[str, Any]] = []

    def _log(self, shown: dict[str, Any]) -> None:
        self.shown.append(shown)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.mark.parametrize(("step", "exit_code"), [(20, 0), (10, 1)])
def test_a_summary_that_is_older_than_the_rows_is_not_the_end(tmp_path: Path, step: int, exit_code: int) -> None:
    fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(Summary) if field.name != "schema"}
    fields |= {"step": 20, "results": {"raw": Evaluation(0.5, 1.0, 5, "", [])}}
    RunDir(tmp_path).summary.write_text(Summary(**fields).to_json())
    mirror = Logged(RunDir(tmp_path), step)
    mirror.end()
    assert mirror.exit_code == exit_code
    assert [row["finished/accuracy"] for row in mirror.shown] == ([0.5] if exit_code == 0 else [])


def test_sync_refuses_what_is_no_run(tmp_path: Path) -> None:
    code, shown = launch(tmp_path / "log", f"sync {tmp_path}")
    assert (code, shown.count("\n")) == (2, 1)
    assert "config.yaml is missing" in shown
    (tmp_path / "config.yaml").touch()
    code, shown = launch(tmp_path / "log", f"sync {tmp_path}")
    assert (code, shown.count("\n")) == (2, 1)
    assert "has no rows" in shown


def test_sync_refuses_a_run_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("wandb: {mode: auto, entity: me}\n")
    (tmp_path / "metrics.jsonl").write_text('{"event": "start", "step": 0}\n')
    code, shown = launch(tmp_path / "log", f"sync {tmp_path}")
    assert (code, shown.count("\n")) == (2, 1)
    assert "is of another lockstep version" in shown


def test_a_follower_that_cannot_start_is_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    follower = Follower(WandbConfig(), tmp_path, lines.append)  # ends at once: there is no run
    follower.close()
    assert follower.process.stdout
    follower.process.stdout.close()
    assert any("wandb: stopped" in line for line in lines)
