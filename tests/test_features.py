"""A user gets a progress bar, silence from other ranks, compilation if wanted, and a complete run directory."""

import gzip
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks.processes import arguments, rows, train
from safetensors.torch import load_file


def run_on_terminal(argv: list[str]) -> str:
    """Run `python -m train` on a pseudo-terminal and return what it showed."""
    main, replica = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *argv], stdin=replica, stdout=replica, stderr=replica, env=env
    )
    os.close(replica)
    shown = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # Linux: the other side has closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(main)
    assert process.wait(120) == 0, shown.decode()
    return shown.decode(errors="replace")


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path) -> None:
    flags = "--train.max_steps 300 --log.progress true"
    shown = run_on_terminal(arguments(tmp_path / "run", flags))
    assert "━" in shown
    assert "300/300" in shown
    assert "images/s" in shown
    assert "loss" in shown


def test_progress_is_plain_lines_elsewhere_and_other_ranks_are_silent(tmp_path: Path) -> None:
    train(2, tmp_path / "run", "--train.max_steps 30 --log.progress true")
    first, second = ((tmp_path / "run-logs" / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert "step 30/30  epoch 1.30  loss" in first
    assert "━" not in first
    assert second == ""


@pytest.mark.slow
def test_compiled_model_computes_the_same_up_to_round_off(tmp_path: Path) -> None:
    flags = "--train.max_steps 5 --optim.lr 0.01"
    train(1, tmp_path / "eager", flags)
    train(1, tmp_path / "compiled", flags, "--train.compile true")
    eager, compiled = (
        load_file(tmp_path / name / "checkpoints" / "step-00000005" / "model.safetensors")
        for name in ("eager", "compiled")
    )
    for name, tensor in eager.items():
        torch.testing.assert_close(tensor, compiled[name], atol=1e-4, rtol=1e-3)


def test_run_directory_is_complete(tmp_path: Path) -> None:
    summary = train(1, tmp_path / "run", "--train.epochs 3 --checkpoint.keep 1 --optim.ema 0.9")
    assert (summary["split"], summary["num_examples"], *summary["results"]) == ("test", 359, "raw", "ema")
    assert summary["outcome"] == "finished"
    assert summary["step"] == summary["total_steps"] == 69
    assert 0 <= summary["results"]["raw"]["accuracy"] <= 1
    sizes = {"num_train_examples": 1438, "num_test_examples": 359, "shape": [1, 28, 28]}
    facts = {"name": "digits", **sizes, "class_names": list("0123456789"), "is_fallback": False}
    assert facts.items() <= summary["data"].items()
    assert summary["data"].keys() - facts.keys() == {"mean", "std"}
    assert summary["sha256"].keys() == {"data"}
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["optim"]["ema"] == 0.9
    assert config["optim"]["schedule"] == "one_cycle"  # defaults are resolved
    steps = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert steps == {"step-00000069", f"step-{summary['best']['step']:08d}"}
    best = max(row["accuracy"] for row in rows(tmp_path / "run", "eval") if row["ema"])
    assert summary["best"]["accuracy"] == best
    json.dumps(summary)


def test_resolved_config_trains_the_same_run(tmp_path: Path) -> None:
    first = train(1, tmp_path / "first", "--train.max_steps 5 --model.dropout 0.3 --seed 3")
    ranks = train(1, tmp_path / "second", f"--config {tmp_path / 'first' / 'config.yaml'} --run.name second")
    assert ranks["weights_sha256"] == first["weights_sha256"]


def test_profiled_steps_are_a_trace(tmp_path: Path) -> None:
    """The trace has the steps after A until B of rank 0 and no others. It changes no bit. The run may end before B."""
    plain = train(2, tmp_path / "plain", "--train.max_steps 8")
    traced = train(2, tmp_path / "run", "--train.max_steps 8", "--train.profile_steps 3:5 --log.progress true")
    assert traced["weights_sha256"] == plain["weights_sha256"]
    assert "steps 4 to 5 of rank 0 are traced in" in (tmp_path / "run-logs" / "rank-0.log").read_text()
    for name, count in {"Optimizer.step#SGD.step": 2, "aten::nll_loss_backward": 2}.items():
        assert [event["name"] for event in read_trace(tmp_path / "run")].count(name) == count
    train(1, tmp_path / "end", "--train.max_steps 8", "--train.profile_steps 6:100")
    assert [event["name"] for event in read_trace(tmp_path / "end")].count("Optimizer.step#SGD.step") == 2


def read_trace(run: Path) -> list[dict[str, Any]]:
    with gzip.open(run / "trace.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]
