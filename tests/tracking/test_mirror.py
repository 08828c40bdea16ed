"""W&B shows the right numbers and files, from its own client on a local server."""

import base64
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from ranks.processes import Ranks, arguments, rows, train
from safetensors.torch import load_file
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb_server import KEY, PATIENT, SHORT, USER, Server, expected, numbers, sync

from train.cli import parse, recipe_name
from train.rundir import RunDir
from train.tracking.wandb import SHOWN, wandb_id


def test_an_online_run_shows_everything_once_and_rewinds(tmp_path: Path, server: Server, env: dict[str, str]) -> None:
    run = tmp_path / "runs" / "some-run"
    flags = (
        f"{SHORT} {PATIENT} --optim.ema 0.9 --wandb.tags ['a'] --wandb.group g --wandb.notes why --wandb.project tests"
    )
    summary = train(2, run, flags, **env)  # two ranks, one W&B run
    shown, logs = server.run, (tmp_path / "runs" / "some-run-logs" / "rank-0.log").read_text()
    assert "wandb: online, http://127.0.0.1" in logs
    assert list(server.runs) == [wandb_id(RunDir(run))]
    assert numbers(shown.rows()) == expected(run)
    times = [row["time"] for row in rows(run) if row["event"] in SHOWN]
    assert [row["_timestamp"] for row in shown.history[:-1]] == pytest.approx(times, abs=0.001)
    assert [row["step"] for row in expected(run)] == [5, 10, 10, 10, 10, 15, 20, 20, 20, 20]
    assert {"train/loss", "train/lr", "train/grad_norm", "train/images_per_second", "train/epoch"} <= {*shown.rows()[0]}
    assert {"eval/accuracy", "eval_ema/accuracy"} <= {name for row in shown.rows() for name in row}
    check_fields(shown, summary)
    check_media(server, shown.rows()[-1], run, summary)
    check_artifacts(server, run)
    assert shown.exit_code == 0
    before = (len(shown.history), len(server.artifacts))
    assert f"0 of {len(shown.history)} rows sent" in sync(run, env)
    assert (len(shown.history), len(server.artifacts)) == before  # nothing doubled
    for server.rewinds in (True, False):  # the last checkpoint is lost, so that steps 11 to 20 are computed again
        shutil.rmtree(run / "checkpoints" / "step-00000020")
        del server.operations[:]
        train(1, run, flags, **env)
        assert "RewindRun" in server.operations
        same = lambda row: {name: value for name, value in row.items() if "second" not in name}  # noqa: E731
        assert [*map(same, numbers(shown.rows()))] == [*map(same, expected(run))]
        assert (numbers(shown.rows()) == expected(run)) == server.rewinds  # times differ where nothing could be rewound
        assert list(server.runs) == [wandb_id(RunDir(run))]
    assert_no_key(tmp_path, logs)


def check_fields(shown: Any, summary: dict[str, Any]) -> None:
    """Check names, config, git, system metrics and summary."""
    fields = shown.fields
    assert (fields["displayName"], fields["project"], fields["groupName"]) == ("some-run", "tests", "g")
    assert (fields["tags"], fields["notes"], fields["program"]) == (["a"], "why", "-m train")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert fields["commit"] == head
    assert (shown.config["model"]["name"], shown.config["optim"]["ema"], shown.config["world_size"]) == ("tiny", 0.9, 2)
    assert shown.config["dataset"]["name"] == "digits"
    assert any(name.startswith("system.cpu") or "system.proc" in name for row in shown.events for name in row)
    assert shown.summary["finished/weights_sha256"] == summary["weights_sha256"]
    assert shown.summary["finished/accuracy"] == summary["results"]["ema"]["accuracy"]


def check_media(server: Server, last: dict[str, Any], run: Path, summary: dict[str, Any]) -> None:
    """Check the confusion matrix, mistakes and histograms, down to the files."""
    table = json.loads(server.files[last["confusion_table"]["path"]])
    assert [row[2] for row in table["data"]] == [
        count for line in summary["results"]["ema"]["confusion"] for count in line
    ]
    assert table["data"][1][:2] == ["0", "1"]
    samples = load_file(run / "samples.safetensors")
    fields = ("labels", "predictions", "confidences")
    mistakes = list(zip(*(samples[f"mistakes_{name}"][:24].tolist() for name in fields), strict=True))
    assert mistakes
    assert last["mistakes"]["captions"] == [f"{true} taken for {guess}, {sure:.1%}" for true, guess, sure in mistakes]
    assert last["mistakes"]["count"] == len(mistakes)
    assert all(server.files[name].startswith(b"\x89PNG") for name in last["mistakes"]["filenames"])
    (row,) = [
        row for row in server.run.rows() if row["step"] == 10 and any(name.startswith("weights/") for name in row)
    ]
    (kept,) = [row for row in rows(run, "weights") if row["step"] == 10]
    for name, (low, high, counts) in ((name, value) for name, value in kept.items() if isinstance(value, list)):
        histogram = row[f"weights/{name}"]
        assert (histogram["bins"][0], histogram["bins"][-1]) == (pytest.approx(low), pytest.approx(high))
        assert histogram["values"] == counts


def check_artifacts(server: Server, run: Path) -> None:
    """Check the best and the last checkpoint, and the code, byte by byte."""
    models = [artifact for artifact in server.artifacts if artifact["artifactTypeName"] == "model"]
    aliases = {alias["alias"] for model in models for alias in model["aliases"]}
    assert aliases == {"best", "final", "latest"}
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        kept = [(path / name).read_bytes() for path in (run / "checkpoints").iterdir()]
        assert server.files[f"artifact/{name}"] in kept
    assert server.files["artifact/loop.py"] == (Path(__file__).parents[2] / "train" / "loop.py").read_bytes()


def assert_no_key(directory: Path, *texts: str) -> None:
    """Check that no file below a directory, even of wandb, holds the key, plain or as HTTP sends it."""
    forms = [KEY.encode(), base64.b64encode(f"api:{KEY}".encode())]
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts and path.suffix == ".log" for path in files)
    found = [path for path in files for form in forms if form in path.read_bytes()]
    assert found == []
    assert not any(KEY in text for text in texts)


def test_a_fallback_and_a_loss_that_is_not_finite_are_announced(
    tmp_path: Path, server: Server, env: dict[str, str]
) -> None:
    run = tmp_path / "runs" / "r"
    off = "--wandb.media false --wandb.artifacts false"
    fallback = f"--data.name mnist --data.root {tmp_path}/none --data.download false --data.fallback true"
    ranks = Ranks(
        1,
        arguments(run, SHORT, "--optim.lr 900 --optim.warmup 0", fallback, off, PATIENT),
        tmp_path / "logs",
        WANDB_X_DISABLE_STATS="true",
        **env,
    )
    assert ranks.wait() == [1], ranks.output()
    assert "is not finite" in ranks.output()
    assert server.run.exit_code == 1
    assert server.run.fields["tags"] == ["fallback-data"]
    assert server.run.config["dataset"]["is_fallback"] is True
    assert (server.artifacts, server.run.events) == ([], [])


def test_a_sweep_trains_what_its_agent_requests(tmp_path: Path, server: Server, env: dict[str, str]) -> None:
    """wandb's own `sweep` and `agent` write the command lines."""
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
        "train.num_micro_batches": 2,
        "train.max_steps": 10,
        "wandb.tags": ["a", "b"],
        "wandb.notes": "two words",
        "wandb.timeout": 100,
    }
    values |= {"run.dir": str(tmp_path / "runs"), "data.name": "digits", "data.validation": 100, "model.name": "tiny"}
    arguments = {name: {"value": value} for name, value in values.items()}
    server.commands = [
        {"type": "run", "run_id": "swept-1", "program": "train/__main__.py", "args": arguments},
        {"type": "exit"},
    ]
    shown = wandb("agent", f"{USER}/lockstep/sweep-id")
    run = (
        tmp_path / "runs" / "quickstart-swept-1"
    )  # the agent's id names it, so that it resumes when the agent gets it again
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["outcome"], summary["exact"], summary["config"]["optim.lr"]) == ("finished", True, 0.0123), shown
    assert list(server.runs) == ["swept-1"]
    assert server.run.fields["sweep"] == "sweep-id"
    assert server.run.fields["tags"] == ["a", "b"]
    metric = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())["metric"]["name"]
    assert server.run.summary[metric] == summary["results"]["raw"]["accuracy"]


def test_every_value_of_the_sweep_is_one_that_the_config_takes() -> None:
    sweep = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())
    choices = {
        name: choice.get("values") or [choice["min"], choice["max"]] for name, choice in sweep["parameters"].items()
    }
    for chosen in itertools.zip_longest(*choices.values()):
        values = {name: value for name, value in zip(choices, chosen, strict=True) if value is not None}
        flags = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})["args"]
        config = dataclasses.asdict(parse(["--config=configs/quickstart.yaml", *flags]))
        assert {name: config[name.split(".")[0]][name.split(".")[1]] for name in values} == values
    assert recipe_name(sweep["command"]) == "quickstart"
