"""train.tracking, train.mirror, launch sync: W&B shows what metrics.jsonl says, whatever happens to the server or the run.

Against a local server (wandb_server.py), with wandb's own processes: its protocol is not ours to fake on this side.
"""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from ranks.processes import Ranks, arguments, launch, rows, train, wait_for_step
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb_server import USER, Server

from train.cli import parse, recipe_name
from train.config import Config, WandbConfig
from train.mirror import MIRRORED, end_row, wandb_id
from train.tracking import Tail, histograms, mode_of

KEY = "5ec2e7" * 7
SHORT = "--train.max_steps 20 --log.every_steps 5 --eval.every_steps 10 --checkpoint.every_steps 10"
PATIENT = "--wandb.start_seconds 100 --wandb.finish_seconds 100"  # this machine may be busy
MEDIUM = "--train.max_steps 1000 --log.every_steps 10 --eval.every_steps 500 --checkpoint.every_steps 500"
LONG = "--train.max_steps 100000 --log.every_steps 5 --eval.every_steps 1000 --checkpoint.every_steps 50"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running
    assert running.faults == []


@pytest.fixture
def env(tmp_path: Path, server: Server) -> dict[str, str]:
    """The environment of a person with a key and a server, and with a home directory of their own."""
    (tmp_path / "home").mkdir()
    return {**server.env, "WANDB_API_KEY": KEY, "HOME": str(tmp_path / "home")}


def expected(run: Path) -> list[dict[str, Any]]:
    """The numbers that W&B must show, row by row, made from metrics.jsonl and summary.json by rules of this test's own."""
    found = []
    for row in rows(run):
        if row["event"] in MIRRORED:
            group = "eval_ema" if row.get("ema") else row["event"]
            numbers = {f"{group}/{name}": value for name, value in row.items() if type(value) in (int, float) and name != "time"}
            found.append({"step": row["step"], **numbers})
            del found[-1][f"{group}/step"]
    return found


def is_end(row: dict[str, Any]) -> bool:
    """Whether a row of W&B is the one that stands for summary.json."""
    return any(name.startswith("finished/") for name in row)


def numbers(shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The numbers of W&B's rows, without the one that stands for summary.json."""
    return [{name: value for name, value in row.items() if type(value) in (int, float)} for row in shown if not is_end(row)]


def sync(run: Path, env: dict[str, str]) -> str:
    """What `python -m launch sync RUN` prints."""
    code, shown = launch(run.parent / "sync.log", f"sync {run}", **env)
    assert code == 0, shown
    return shown


def followers(run: Path) -> list[int]:
    """The processes that mirror a run."""
    command = f"train.tracking\0{run}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(path.parent.name)] if command in path.read_bytes() else []
        except OSError:  # it has ended
            continue
    return found


def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Wait for a condition; fail if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def test_an_online_run_shows_everything_once_and_rewinds(tmp_path: Path, server: Server, env: dict[str, str]) -> None:
    run = tmp_path / "runs" / "some-run"
    flags = f"{SHORT} {PATIENT} --optim.ema 0.9 --wandb.tags ['a'] --wandb.group g --wandb.notes why --wandb.project tests"
    summary = train(2, run, flags, **env)  # two ranks, one W&B run
    shown, logs = server.run, (tmp_path / "runs" / "some-run-logs" / "rank-0.log").read_text()
    assert "wandb: online, http://127.0.0.1" in logs
    assert list(server.runs) == [wandb_id(run)]
    assert numbers(shown.rows()) == expected(run)
    times = [row["time"] for row in rows(run) if row["event"] in MIRRORED]
    assert [row["_timestamp"] for row in shown.history[:-1]] == pytest.approx(times, abs=0.001)
    assert [row["step"] for row in expected(run)] == [5, 10, 10, 10, 10, 15, 20, 20, 20, 20]
    assert {"train/loss", "train/lr", "train/grad_norm", "train/images_per_second", "train/epoch"} <= {*shown.rows()[0]}
    assert {"eval/accuracy", "eval_ema/accuracy"} <= {name for row in shown.rows() for name in row}
    check_fields(shown, summary)
    check_media(server, shown.rows()[-1], run, summary)
    check_artifacts(server, run)
    assert shown.exit_code == 0
    assert [(alert["title"], alert["severity"]) for alert in server.alerts] == [("some-run finished", "INFO")]
    before = (len(shown.history), len(server.artifacts), len(server.alerts))
    assert f"0 of {len(shown.history)} rows sent" in sync(run, env)
    assert (len(shown.history), len(server.artifacts), len(server.alerts)) == before  # nothing doubled
    for server.rewinds in (True, False):  # the last checkpoint is lost, so that steps 11 to 20 are computed again
        shutil.rmtree(run / "checkpoints" / "step-00000020")
        del server.operations[:]
        train(1, run, flags, **env)
        assert "RewindRun" in server.operations
        same = lambda row: {name: value for name, value in row.items() if "second" not in name}  # noqa: E731
        assert [*map(same, numbers(shown.rows()))] == [*map(same, expected(run))]
        assert (numbers(shown.rows()) == expected(run)) == server.rewinds  # times differ where nothing could be rewound
        assert list(server.runs) == [wandb_id(run)]
    assert_no_key(tmp_path, logs)


def check_fields(shown: Any, summary: dict[str, Any]) -> None:
    """Names, config, git, system metrics and summary."""
    fields = shown.fields
    assert (fields["displayName"], fields["project"], fields["groupName"]) == ("some-run", "tests", "g")
    assert (fields["tags"], fields["notes"], fields["program"]) == (["a"], "why", "-m train")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert fields["commit"] == head
    assert (shown.config["model"]["name"], shown.config["optim"]["ema"], shown.config["world_size"]) == ("tiny", 0.9, 2)
    assert shown.config["dataset"]["name"] == "digits"
    assert any(name.startswith("system.cpu") or "system.proc" in name for row in shown.events for name in row)
    assert shown.summary["weights_sha256"] == summary["weights_sha256"]
    assert shown.summary["finished/ema_test_accuracy"] == summary["ema_test_accuracy"]


def check_media(server: Server, last: dict[str, Any], run: Path, summary: dict[str, Any]) -> None:
    """Confusion matrix, mistakes, filters and histograms, down to the files."""
    from safetensors.torch import load_file

    table = json.loads(server.files[last["confusion_table"]["path"]])
    assert [row[2] for row in table["data"]] == [count for line in summary["ema_test_confusion"] for count in line]
    assert table["data"][1][:2] == ["0", "1"]
    exhibits = load_file(run / "exhibits.safetensors")
    table = json.loads(server.files[last["mistakes"]["path"]])
    assert table["columns"] == ["image", "label", "prediction", "confidence", "position"]
    assert [row[4] for row in table["data"]] == exhibits["mistakes_positions"][:24].tolist()
    assert [int(row[1]) for row in table["data"]] == exhibits["mistakes_labels"][:24].tolist()
    assert last["mistake_images"]["count"] == len(table["data"]) > 0
    assert all(server.files[name].startswith(b"\x89PNG") for name in last["mistake_images"]["filenames"])
    assert server.files[last["filters"]["path"]].startswith(b"\x89PNG")
    (row,) = [row for row in server.run.rows() if row["step"] == 10 and any(name.startswith("weights/") for name in row)]
    (kept,) = [row for row in rows(run, "weights") if row["step"] == 10]
    for name, (low, high, counts) in ((name, value) for name, value in kept.items() if isinstance(value, list)):
        histogram = row[f"weights/{name}"]
        assert (histogram["bins"][0], histogram["bins"][-1]) == (pytest.approx(low), pytest.approx(high))
        assert histogram["values"] == counts


def check_artifacts(server: Server, run: Path) -> None:
    """The best and the last checkpoint, and the code, byte by byte."""
    models = [artifact for artifact in server.artifacts if artifact["artifactTypeName"] == "model"]
    aliases = {alias["alias"] for model in models for alias in model["aliases"]}
    assert aliases == {"best", "final", "latest"}
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        kept = [(path / name).read_bytes() for path in (run / "checkpoints").iterdir()]
        assert server.files[f"artifact/{name}"] in kept
    assert server.files["artifact/loop.py"] == (Path(__file__).parent.parent / "train" / "loop.py").read_bytes()


def assert_no_key(directory: Path, *texts: str) -> None:
    """No file below a directory, wandb's own among them, holds the key, plain or as HTTP sends it."""
    import base64

    forms = [KEY.encode(), base64.b64encode(f"api:{KEY}".encode())]
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts and path.suffix == ".log" for path in files)
    found = [path for path in files for form in forms if form in path.read_bytes()]
    assert found == []
    assert not any(KEY in text for text in texts)


def leet(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of an offline run, as wandb itself reads them, by type."""
    wandb = shutil.which("wandb", path=str(Path(sys.executable).parent))
    assert wandb is not None
    shown = subprocess.run([wandb, "leet", "inspect", "--json", str(directory)], capture_output=True, text=True, check=True)
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
    ranks = Ranks(1, arguments(run, LONG, PATIENT, "--wandb.histograms false"), tmp_path / "logs-2", **no_key)
    wait_for_step(run, last + 50)
    ranks.signal(signal.SIGTERM)
    assert ranks.wait() == [75]
    first, second = sorted((run / "wandb").glob(f"offline-run-*-{wandb_id(run)}"))
    records = [leet(first), leet(second)]
    kept = [
        {name: value for name, value in row["item"].items() if name[0] != "_"} for found in records for row in found["history"]
    ]
    assert numbers(kept) == expected(run)
    steps = [row["item"]["_step"] for found in records for row in found["history"]]
    assert steps == list(range(len(expected(run))))  # the second life goes on behind the first, so that both can be merged
    assert records[0]["run"][0]["config"]["update"]["seed"] == 0
    assert [alert["title"] for found in records for alert in found["alert"]] == ["r preempted"] * 2
    assert [found["exit"][0]["exit_code"] for found in records] == [75, 75]
    assert server.runs == {}
    assert "seed: 0" in config.read_text()
    assert f"{len(kept)} of {len(kept)} rows sent" in sync(run, env)
    assert numbers(server.run.rows()) == expected(run)
    assert (server.run.exit_code, server.run.preempting, server.alerts) == (75, True, [])
    assert "0 of" in sync(run, env)
    assert numbers(server.run.rows()) == expected(run)


def test_a_sigkilled_run_leaves_no_process_and_is_sent_later(tmp_path: Path, server: Server, env: dict[str, str]) -> None:
    run = tmp_path / "runs" / "r"
    ranks = Ranks(1, arguments(run, LONG, PATIENT), tmp_path / "logs", **env)
    until(lambda: "wandb: online" in ranks.output())
    until(lambda: server.run.history)
    assert len(followers(run)) == 1
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
    """The weights of the same run without W&B."""
    return train(1, tmp_path_factory.mktemp("runs") / "r", MEDIUM)["weights_sha256"]


@pytest.mark.parametrize("fate", ["silent from the start", "silent later", "gone later", "wandb dies"])
def test_a_server_that_fails_is_not_in_the_way(
    fate: str, undisturbed: str, tmp_path: Path, server: Server, env: dict[str, str]
) -> None:
    run = tmp_path / "runs" / "r"
    patience = "--wandb.start_seconds 100"
    if fate == "silent from the start":
        server.awake.clear()
        patience = "--wandb.finish_seconds 100"
    ranks = Ranks(1, arguments(run, MEDIUM, patience), tmp_path / "logs", **env)
    if fate != "silent from the start":
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
    said = {"silent from the start": "wandb: offline (", "wandb dies": "wandb: stopped ("}.get(fate, "wandb: not done after 5 s")
    assert said in ranks.output()
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


def test_a_fallback_and_a_loss_that_is_not_finite_are_announced(tmp_path: Path, server: Server, env: dict[str, str]) -> None:
    run = tmp_path / "runs" / "r"
    off = " ".join(f"--wandb.{name} false" for name in ("histograms", "confusion", "mistakes", "checkpoints", "code", "system"))
    fallback = f"--data.name mnist --data.root {tmp_path}/none --data.download false --data.fallback true"
    ranks = Ranks(1, arguments(run, SHORT, "--optim.lr 900 --optim.warmup 0", fallback, off, PATIENT), tmp_path / "logs", **env)
    assert ranks.wait() == [1], ranks.output()
    (alert,) = server.alerts
    assert (alert["title"], alert["severity"]) == ("r failed", "ERROR")
    assert "The loss of step" in alert["text"]
    assert server.run.exit_code == 1
    assert server.run.fields["tags"] == ["fallback-data"]
    assert server.run.fields["notes"].startswith("THIS IS NOT MNIST: trained on the fallback data set digits.")
    assert server.run.config["dataset"]["is_fallback"] is True
    assert (server.artifacts, server.run.events) == ([], [])


def test_a_sweep_trains_what_its_agent_says(tmp_path: Path, server: Server, env: dict[str, str]) -> None:
    """By wandb's own `sweep` and `agent`, which write the command lines."""
    bin_dir = Path(sys.executable).parent
    os_env = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    path = {"PATH": f"{bin_dir}:{os.environ['PATH']}", "WANDB_DIR": str(tmp_path / "agent")}
    full = {**os_env, **{name: value for name, value in env.items() if value}, **path}
    (tmp_path / "agent").mkdir()

    def wandb(*arguments: str) -> str:
        command = [str(bin_dir / "wandb"), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=full, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "sweep-id" in wandb("sweep", "configs/sweep.yaml")
    values = {"optim.lr": 0.0123, "optim.schedule": "one_cycle", "optim.label_smoothing": 0, "train.exact": True}
    values |= {
        "train.micro_batches": 2,
        "train.max_steps": 10,
        "wandb.tags": ["a", "b"],
        "wandb.notes": "two words",
        "wandb.finish_seconds": 100,
    }
    values |= {"wandb.start_seconds": 100}
    values |= {"run.dir": str(tmp_path / "runs"), "data.name": "digits", "data.validation": 100, "model.name": "tiny"}
    arguments = {name: {"value": value} for name, value in values.items()}
    server.commands = [{"type": "run", "run_id": "swept-1", "program": "train/__main__.py", "args": arguments}, {"type": "exit"}]
    shown = wandb("agent", f"{USER}/lockstep/sweep-id")
    run = tmp_path / "runs" / "quickstart-swept-1"  # the agent's id names it, so that it resumes when the agent gets it again
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["outcome"], summary["exact"], summary["config"]["optim.lr"]) == ("finished", True, 0.0123), shown
    assert list(server.runs) == ["swept-1"]
    assert server.run.fields["sweep"] == "sweep-id"
    assert server.run.fields["tags"] == ["a", "b"]
    metric = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())["metric"]["name"]
    assert server.run.summary[metric] == summary["validation_accuracy"]


def test_every_value_of_the_sweep_is_one_that_the_config_takes() -> None:
    sweep = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())
    choices = {name: choice.get("values") or [choice["min"], choice["max"]] for name, choice in sweep["parameters"].items()}
    for chosen in itertools.zip_longest(*choices.values()):
        values = {name: value for name, value in zip(choices, chosen, strict=True) if value is not None}
        flags = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})["args"]
        config = dataclasses.asdict(parse(["--config=configs/quickstart.yaml", *flags]))
        assert {name: config[name.split(".")[0]][name.split(".")[1]] for name in values} == values
    assert recipe_name(sweep["command"]) == "quickstart"


def test_disabled_starts_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    train(1, run, SHORT, "--wandb.mode disabled", WANDB_MODE="online")
    assert not list(run.glob("wandb*"))
    assert rows(run, "weights") == []


@pytest.mark.parametrize(
    ("config", "environment", "mode"),
    [("auto", None, "auto"), ("auto", "", "auto"), ("auto", "offline", "offline"), ("offline", "online", "offline")],
)
def test_mode(config: Any, environment: str | None, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert mode_of(Config(wandb=WandbConfig(mode=config))) == mode


def test_wandb_id_is_made_once_or_by_the_agent_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tmp_path / name for name in "abc"]
    for run in runs:
        run.mkdir()
    assert wandb_id(runs[0]) == wandb_id(runs[0]) != wandb_id(runs[1])
    monkeypatch.setenv("WANDB_RUN_ID", "sweep123")
    assert wandb_id(runs[2]) == "sweep123"
    assert wandb_id(runs[0]) != "sweep123"


def test_tail_gives_whole_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert Tail(path).rows() == []
    path.write_text('{"step": 1}\n{"ste')
    tail = Tail(path)
    assert tail.rows() == [{"step": 1}]
    with path.open("a") as file:
        file.write('p": 2}\ntorn\n')
    assert (tail.rows(), tail.rows()) == ([{"step": 2}], [])


def test_histograms_count_every_value_and_leave_out_what_has_none() -> None:
    tensors = {"a": torch.tensor([[0.0, 1.0], [1.0, 0.5]]), "constant": torch.zeros(3), "bad": torch.tensor([1.0, float("nan")])}
    ((name, (low, high, counts)),) = histograms(tensors).items()
    assert (name, low, high, sum(counts), counts[0], counts[32], counts[-1]) == ("a", 0.0, 1.0, 4, 1, 1, 2)


def test_a_summary_that_is_older_than_the_rows_is_not_the_end(tmp_path: Path) -> None:
    assert end_row(tmp_path, 20) is None
    (tmp_path / "summary.json").write_text('{"outcome": "finished", "step": 20, "test_accuracy": 0.5}')
    assert end_row(tmp_path, 20) == {"event": "finished", "step": 20, "test_accuracy": 0.5}
    assert end_row(tmp_path, 10) is None
    (tmp_path / "summary.json").write_text('{"outcome": "preempted", "step": 20}')
    assert end_row(tmp_path, 20) is None


def test_sync_refuses_what_is_no_run(tmp_path: Path) -> None:
    code, shown = launch(tmp_path / "log", f"sync {tmp_path}")
    assert (code, shown.count("\n")) == (2, 1)
    assert "is no run with rows" in shown
