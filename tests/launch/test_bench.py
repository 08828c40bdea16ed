"""The benchmark's arithmetic, its tables and its command line, and that each measure measures; figures are their own business."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.bench import harness, measures, peers
from launch.bench.harness import Row
from train.errors import UserError

ABOUT = {
    "cpu": "a CPU",
    "cores": 2,
    "gpus": ["a GPU, 350.00 W"],
    "n": 3,
    "versions": {"torch": "2.15.0"},
    "commit": "0123456789abcdef+",
    "command": "python -m launch bench exact",
}
ROWS = [Row("fast", "images/s", [100.0, 50.0, 90.0]), Row("exact", "images/s", [80.0, 50.0, 60.0], "fast")]


def test_ratio_is_the_median_of_ratios_within_a_turn() -> None:
    assert harness.ratios(ROWS[1], ROWS) == pytest.approx([0.8, 1.0, 2 / 3])
    text = harness.table(ROWS, ABOUT)
    assert "| exact | images/s | 60 | 50 | 80 | 63.33 ± 15.28 | 0.800 of fast |" in text
    for fact in (
        "`python -m launch bench exact`",
        "a CPU, 2 cores, a GPU, 350.00 W",
        "torch 2.15.0",
        "commit 0123456789ab+",
        "n = 3",
    ):
        assert fact in text


def test_plot_shows_every_row(tmp_path: Path) -> None:
    harness.plot([*ROWS, Row("size", "MB", [3.0, 3.0, 3.0])], ABOUT, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    for shown in ("fast", "exact", "size", "images/s", "MB", "python -m launch bench exact"):
        assert shown in text


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

    assert harness.in_turns({"fast": work, "exact": work}, 2) == {"fast": [1, 3], "exact": [2, 4]}
    lines = ["turn 1 of 2: fast: 1\n", "turn 1 of 2: exact: 2\n", "turn 2 of 2: fast: 3\n"]
    assert printed == ["", *lines]


def test_trainings_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[int, str]] = []

    def speed(world_size: int, batch: int, flags: str) -> float:
        turns.append((world_size, flags))
        return 100.0 * world_size + int(flags.split()[-1] if "micro" in flags else 0)

    monkeypatch.setattr(measures, "images_per_second", speed)
    rows = {row.name: row for row in measures.exact(2)}
    assert len(rows) == 5 + 4  # two processes cannot share one micro-batch
    assert turns[:9] == turns[9:]
    assert len(set(turns)) == 9
    assert rows["2 processes, exact, 8 x 64"].values == [208.0, 208.0]
    assert rows["2 processes, exact, 8 x 64"].base == "2 processes, fast"
    for measure in (measures.scaling, measures.wandb):
        assert {row.base for row in measure(1)} <= {row.name for row in measure(1)} | {None}


def test_a_real_training_is_measured() -> None:
    assert 50 < measures.images_per_second(2, 64, "--train.exact true --train.num_micro_batches 2") < 1e6


@pytest.mark.parametrize("measure", [measures.throughput, measures.data, measures.sampler, measures.checkpoint])
def test_measures_of_one_process_measure(monkeypatch: pytest.MonkeyPatch, measure: Callable[[int], list[Row]]) -> None:
    monkeypatch.setattr(measures, "STEPS", 2)
    monkeypatch.setattr(measures, "TEST_EXAMPLES", 600)
    monkeypatch.setattr(measures, "LOOP", measures.LOOP.replace("cnn", "tiny") + " --data.random_examples 3600")
    rows = measure(2)
    assert all(len(row.values) == 2 and min(row.values) > 0 for row in rows)
    harness.table(rows, ABOUT)  # every base is there


def test_peers_are_measured_in_their_own_idiom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "NUM_EXAMPLES", 1536)
    monkeypatch.setattr(peers, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(peers, "worker_counts", lambda: [1])
    monkeypatch.setattr(peers, "LOOP", peers.LOOP.replace("cnn", "tiny"))
    rows = peers.peers(1)
    names = [row.name for row in rows]
    assert names[:2] == ["lockstep", "bare loop"]
    assert len(rows) == 5
    assert all(row.values[0] > 0 for row in rows)
    progress = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines() if line.startswith("turn 1 of 1")]
    assert progress == names[2:] + names  # which number of workers is fastest, then the comparison


def test_startup_measures_whole_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "command_seconds", lambda *arguments: float(len(arguments)))
    rows = {row.name: row.values for row in measures.startup(1)}
    assert rows.pop("a training of one step")[0] > 0
    assert list(rows.values()) == [[2.0], [3.0], [4.0]]


def test_every_name_of_the_command_line_is_a_measure(capsys: pytest.CaptureFixture[str]) -> None:
    for name, (module, _, _) in harness.MEASURES.items():
        assert callable(getattr(importlib.import_module(f"launch.bench.{module}"), name.replace("-", "_")))
    assert harness.main(["sampler", "--repeats", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [len(row["values"]) for row in shown["rows"]] == [2] * 6
    assert shown["about"]["n"] == 2


def test_time_to_accuracy_trains_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    data = "data: {name: digits, random_examples: 640}"  # of the bare loop
    recipe.write_text(f"{data}\nmodel: {{name: tiny}}\ntrain: {{max_steps: 5, global_batch_size: 64}}\n")
    rows = {row.name: row for row in measures.time_to_accuracy(2, str(recipe))}
    assert 0 < rows["test accuracy"].values[0] < 100
    assert rows["test accuracy"].values[0] != rows["test accuracy"].values[1]  # two seeds
    assert rows["the whole command"].values[0] > rows["training"].values[0]


@pytest.mark.parametrize(
    "options",
    [
        ["exact", "--repeats", "0"],
        ["nothing"],
        ["time-to-accuracy", "--recipe", "/no.yaml"],
        ["exact", "--plot", "x.gif"],
    ],
)
def test_bench_refuses_bad_options(options: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "launch", "bench", *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_peers_without_lightning_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(UserError, match=r"pip install 'lockstep\[bench\]'"):
        peers.peers(1)
