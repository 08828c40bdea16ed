"""Each event has one row, a resume doubles and loses none, and other ranks are silent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from train.config import LogConfig, WandbConfig
from train.rundir import RunDir
from train.tracking.metrics import Metrics, histogram

TRAIN = {"loss": 0.5, "lr": 0.1, "epoch": 0.25, "images_per_second": 1000.0, "seconds_left": 1.0, "grad_norm": None}
EVAL = {"split": "test", "ema": False, "accuracy": 0.9912, "loss": 0.03, "correct": 9912, "num_examples": 10_000}


def opened(run_dir: Path, *, is_main: bool = True, progress: bool = True) -> Metrics:
    return Metrics(LogConfig(progress=progress), WandbConfig(mode="disabled"), RunDir(run_dir), is_main=is_main)


def rows_of(steps: list[tuple[str, int]]) -> list[dict[str, Any]]:
    return [{"event": event, "step": step, "value": number} for number, (event, step) in enumerate(steps)]


def write_rows(path: Path, rows: list[dict[str, Any]], tail: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_record_writes_one_row_per_event_at_once(tmp_path: Path) -> None:
    with opened(tmp_path) as metrics:
        assert metrics.open(0, 100) == []
        metrics.record("start", 0, world_size=1, command=["--seed", "1"])
        metrics.record("train", 10, **TRAIN)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before anything is closed
        assert len(lines) == 2
        metrics.record("eval", 10, **EVAL)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["event"], row["step"]) for row in rows] == [("start", 0), ("train", 10), ("eval", 10)]
    assert rows[0]["command"] == ["--seed", "1"]
    assert {name: rows[1][name] for name in TRAIN} == TRAIN
    assert {name: rows[2][name] for name in EVAL} == EVAL
    assert all(row["time"] > 1.7e9 for row in rows)
    assert RunDir(tmp_path).read_rows() == rows


def test_other_ranks_are_silent_and_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path / "nowhere", is_main=False) as metrics:
        assert metrics.open(0, 100) == []
        metrics.say("hello")
        metrics.record("train", 10, **TRAIN)
        metrics.record("eval", 10, **EVAL)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("progress", [True, False])
def test_console_shows_evaluations_always_and_steps_if_wanted(
    progress: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path, progress=progress) as metrics:
        metrics.open(0, 100)
        metrics.record("train", 100, **TRAIN)
        metrics.record("eval", 100, **EVAL)
        metrics.record("eval", 100, **{**EVAL, "ema": True})
        metrics.say("[bold]not markup[/bold] " + "long " * 60)
    shown = capsys.readouterr().out
    assert ("step 100/100" in shown) == progress
    assert "step 100: test accuracy 99.12%, loss 0.0300\n" in shown
    assert "averaged weights, test accuracy 99.12%" in shown
    assert "[bold]not markup[/bold] " + "long " * 60 + "\n" in shown


EVENTS = [
    ("start", 0),
    ("train", 10),
    ("eval", 10),
    ("train", 20),
    ("start", 20),
    ("train", 30),
    ("preempted", 30),
    ("start", 30),
]


KEPT = [(100, range(8)), (30, range(8)), (29, [0, 1, 2, 3, 4, 6, 7]), (10, [0, 1, 2, 4, 6, 7]), (0, [0, 4, 6, 7])]


@pytest.mark.parametrize(("step", "kept"), KEPT)
@pytest.mark.parametrize("tail", ["", '{"event": "train", "st', '{"event": "train", "step": 7', "\0\0\0", "\n\n"])
def test_remove_rows_after_removes_exactly_the_later_steps(
    step: int, kept: list[int], tail: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, rows_of(EVENTS), tail)
    expected = [row for row in rows_of(EVENTS) if row["value"] in kept]
    assert RunDir(tmp_path).remove_rows_after(step) == expected
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert RunDir(tmp_path).remove_rows_after(step) == expected


def test_resume_after_a_torn_line_continues_in_a_new_one(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.jsonl", rows_of(EVENTS), '{"event": "train", "st')
    with opened(tmp_path) as metrics:
        assert len(metrics.open(10, 100)) == 6
        metrics.record("train", 20, **TRAIN)
    rows = RunDir(tmp_path).read_rows()
    assert len(rows) == len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7
    assert [row["step"] for row in rows if row["event"] == "train"] == [10, 20]


def test_read_rows_of_no_file_is_empty(tmp_path: Path) -> None:
    assert RunDir(tmp_path).read_rows() == []


def test_histogram_counts_every_value_and_leaves_out_tensors_without_one() -> None:
    low, high, counts = histogram(torch.tensor([[0.0, 1.0], [1.0, 0.5]])) or []
    assert (low, high, sum(counts), counts[0], counts[32], counts[-1]) == (0.0, 1.0, 4, 1, 1, 2)
    assert histogram(torch.zeros(3)) is None
    assert histogram(torch.tensor([1.0, float("nan")])) is None
