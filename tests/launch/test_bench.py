"""The benchmark's arithmetic, tables and command line work, and each measure measures. No figure is judged."""

import functools
import json
import os
import sys
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.bench import harness, measures, peers
from launch.bench.measures import Row
from train.errors import UserError

ABOUT = {
    "cpu": "a CPU",
    "cores": 2,
    "gpus": ["a GPU"],
    "n": 3,
    "versions": {"torch": "2.15.0"},
    "commit": "0123+",
    "command": "python -m launch bench exact",
}
ROWS = [Row("fast", "images/s", [100.0, 50.0, 90.0]), Row("exact", "images/s", [80.0, 50.0, 60.0], "fast")]


def test_ratio_is_the_median_of_ratios_within_a_turn() -> None:
    assert harness.ratios(ROWS[1], ROWS) == pytest.approx([0.8, 1.0, 2 / 3])
    text = harness.table(ROWS, ABOUT)
    assert "| exact | images/s | 60 | 50 | 80 | 63.33 ± 15.28 | 0.800 of fast |" in text
    for fact in ("`python -m launch bench exact`", "a CPU, 2 cores, a GPU", "torch 2.15.0", "commit 0123+", "n = 3"):
        assert fact in text


def test_facts_name_hardware_versions_commit_and_command() -> None:
    about = harness.facts(["exact", "--repeats", "3"], 3)
    assert about["command"] == "python -m launch bench exact --repeats 3"
    assert about["versions"].keys() >= {"python", "torch", "accelerate", "lockstep"}
    assert about["cores"] >= 1
    json.dumps(about)


def test_figures_are_measured_in_turns_and_printed_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    printed: list[str] = []
    figures = iter(range(1, 9))

    def work() -> float:
        printed.append(capsys.readouterr().err)
        return next(figures)

    rows = measures.in_turns({"fast": work, "exact": work}, 2, "s", "fast")
    assert rows == [Row("fast", "s", [1, 3]), Row("exact", "s", [2, 4], "fast")]
    lines = ["turn 1 of 2: fast: 1\n", "turn 1 of 2: exact: 2\n", "turn 2 of 2: fast: 3\n"]
    assert printed == ["", *lines]


def test_trainings_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[int, str]] = []

    def speed(world_size: int, batch: int, flags: str) -> float:
        turns.append((world_size, flags))
        return 100.0 * world_size + int(flags.split()[-1] if "micro" in flags else 0)

    monkeypatch.setattr(measures, "images_per_second", speed)
    rows = {row.name: row for row in measures.exact(2)}
    assert len(rows) == len(set(turns)) == 5 + 4  # two processes cannot share one micro-batch
    assert turns[:5] == turns[5:10]
    assert turns[10:14] == turns[14:]
    assert rows["2 processes, exact, 8 x 64"].values == [208.0, 208.0]
    assert rows["2 processes, exact, 8 x 64"].base == "2 processes, fast"
    turns.clear()
    assert [row.values for row in measures.micro_batches(1)] == [[101.0], [102.0], [108.0], [116.0], [108.0]]
    assert len(set(turns)) == 5
    assert {row.base for row in measures.scaling(1)} <= {row.name for row in measures.scaling(1)} | {None}


def test_a_real_training_is_measured() -> None:
    assert 50 < measures.images_per_second(2, 64, "--train.exact true --train.num_micro_batches 2") < 1e6


def test_throughput_compares_our_step_with_a_bare_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measures, "STEPS", 2)
    monkeypatch.setattr(measures, "LOOP", measures.LOOP.replace("cnn", "tiny") + " --data.random_examples 3600")
    assert main(["bench", "throughput", "--repeats", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["about"]["n"] == 2
    assert [row["name"] for row in shown["rows"]] == ["bare loop", "lockstep"]
    assert all(len(row["values"]) == 2 and min(row["values"]) > 0 for row in shown["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("peer", peers.PEERS)
def test_peer_trains_in_its_own_idiom(peer: str) -> None:
    flags = measures.LOOP.replace("cnn", "tiny") + " --data.random_examples 1024"
    assert peers.speed(functools.partial(peers.peer_seconds, peer, flags, 1)) > 0


def test_each_measurement_of_peers_has_a_process_of_its_own() -> None:
    pids = {round(peers.NUM_EXAMPLES / peers.speed(os.getpid)) for _ in range(2)}
    assert len(pids - {os.getpid()}) == 2


def test_peers_are_compared_with_their_fastest_number_of_workers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def speed(work: functools.partial) -> float:
        return 100.0 if work.func is measures.epoch_seconds else {0: 1.0, 1: 3.0, 2: 2.0}[work.args[2]]

    monkeypatch.setattr(peers, "speed", speed)
    monkeypatch.setattr(peers, "worker_counts", lambda: [0, 1, 2])
    rows = peers.peers(2)
    names = ["lockstep", "bare loop", *(f"{peer}, 1 worker(s)" for peer in peers.PEERS)]
    assert [row.name for row in rows] == names
    assert [row.values[0] for row in rows] == [100, 100, 3, 3, 3]
    assert len(capsys.readouterr().err.splitlines()) == 3 * 3 + 2 * 5


def test_startup_measures_whole_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "train", lambda *arguments: ([], None, 4.0))
    rows = {row.name: row.values[0] for row in measures.startup(1)}
    assert rows.pop("a training of one step") == 4
    assert len(rows) == 3
    assert min(rows.values()) > 0


def test_time_to_accuracy_trains_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    data = "data: {name: digits, random_examples: 640}"  # of the bare loop
    recipe.write_text(f"{data}\nmodel: {{name: tiny}}\ntrain: {{max_steps: 5, global_batch_size: 64}}\n")
    rows = {row.name: row for row in measures.time_to_accuracy(2, str(recipe))}
    assert 0 < rows["test accuracy"].values[0] < 100
    assert rows["test accuracy"].values[0] != rows["test accuracy"].values[1]  # two seeds
    assert rows["the whole command"].values[0] > rows["training"].values[0]


REFUSALS = {
    "exact --repeats 0": "--repeats is 0",
    "nothing": "WHAT is nothing",
    "time-to-accuracy --recipe /no.yaml": "/no.yaml does not exist",
}


@pytest.mark.parametrize("options", REFUSALS)
def test_bench_refuses_bad_options(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert REFUSALS[options] in line


def test_missing_lightning_is_refused_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(UserError, match=r"pip install 'lockstep\[bench\]'"):
        peers.peers(1)
