"""The laws of a run hold for images of any shape, any number of classes and examples, and networks of all kinds."""

import dataclasses
import itertools
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from cases import CASES, Case
from ranks.processes import Ranks, arguments, rows, train

PROOF = ("weights_sha256", "ema_weights_sha256", "num_examples", "results", "fingerprints", "ledger")
# In the default run:
KILLED = ("colour-24x40-transformer", "grey-8x8-seven-examples", "colour-8x8-of-300-classes")
FAST = ("colour-24x40-transformer", "grey-64x64-tiny_bn-bf16")


class Runs:
    """The runs of the cases, in exact mode, so that laws share them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished: dict[tuple[str, int], dict[str, Any]] = {}

    def write(self, case: Case) -> Path:
        """Return the file of a case's data, and write it if it is not there."""
        path = case.file(self.folder)
        if not path.exists():
            case.write(self.folder)
        return path

    def arguments(self, case: Case) -> str:
        """Return the options of a case, whose data are written."""
        self.write(case)
        return case.arguments(self.folder)

    def train(self, case: Case, world_size: int) -> dict[str, Any]:
        """Return the summary of a run on so many processes."""
        key = case.name, world_size
        if key not in self.finished:
            run = self.folder / f"{case.name}-{world_size}"
            self.finished[key] = train(world_size, run, self.arguments(case), "--train.exact true")
        return self.finished[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("shapes"))


def a_case(case: Case, *values: Any, is_slow: bool = False) -> Any:
    """Return parameters of a test. The tests of a case share a worker, and so its runs."""
    marks = [pytest.mark.xdist_group(case.name), *([pytest.mark.slow] if is_slow else [])]
    return pytest.param(case, *values, marks=marks, id="-".join(map(str, (case.name, *values))))


each_case = pytest.mark.parametrize("case", [a_case(case) for case in CASES])


def proof(summary: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same, to the last bit, on any path to a run's end."""
    return {name: summary[name] for name in PROOF}


@pytest.mark.parametrize(
    ("case", "world_size"),
    [
        a_case(case, world_size, is_slow=world_size not in case.world_sizes)
        for case, world_size in itertools.product(CASES, (2, 3, 4, 8))
    ],
)
def test_every_world_size_gives_the_same_bits(runs: Runs, case: Case, world_size: int) -> None:
    alone, together = runs.train(case, 1), runs.train(case, world_size)
    assert together["world_size"] == world_size
    assert alone["fingerprints"]["last"] == case.num_steps
    assert proof(together) == proof(alone)


@each_case
def test_evaluation_counts_each_example_once(runs: Runs, case: Case) -> None:
    summary = runs.train(case, 1)
    assert summary["split"] == ("validation" if case.num_validation else "test")
    assert summary["num_examples"] == case.num_evaluated
    for result in summary["results"].values():
        confusion = result["confusion"]
        assert {len(confusion), *map(len, confusion)} == {case.num_classes}
        labels = case.draw_labels(case.num_evaluated, seed=2 if case.num_validation else 1)
        assert [sum(row) for row in confusion] == labels.bincount().tolist()
        assert result["correct"] == sum(row[label] for label, row in enumerate(confusion))
        assert result["accuracy"] == result["correct"] / case.num_evaluated


@each_case
def test_an_epoch_uses_each_example_once(runs: Runs, case: Case) -> None:
    ledger = runs.train(case, 1)["ledger"]
    assert (ledger["step"], ledger["count"]) == (case.num_steps, case.num_train)


@pytest.mark.parametrize("case", [a_case(case, is_slow=case.name not in KILLED) for case in CASES])
def test_killed_on_2_and_resumed_on_3_from_a_moved_file_ends_in_the_same_bits(
    runs: Runs, case: Case, tmp_path: Path
) -> None:
    flags, run = (runs.arguments(case), "--train.exact true --checkpoint.every_steps 1"), tmp_path / "run"
    last = case.num_steps
    ranks = Ranks(2, arguments(run, *flags), tmp_path / "logs", MUTANT="accidents.hangs_alone", STEP=str(last))
    deadline = time.monotonic() + 100
    while not (run / "checkpoints" / f"step-{last - 1:08d}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks.signal(signal.SIGKILL)
    assert set(ranks.wait()) == {-signal.SIGKILL}, ranks.output()
    moved = shutil.copy(runs.write(case), tmp_path / f"moved{case.suffix}")
    resumed = train(3, run, *flags, f"--data.name {moved}")
    assert [(row["world_size"], row["step"]) for row in rows(run, "start")] == [(2, 0), (3, last - 1)]
    assert proof(resumed) == proof(runs.train(case, 1))


@pytest.mark.parametrize("case", [a_case(case, is_slow=case.name not in FAST) for case in CASES])
def test_fast_mode_agrees_on_1_and_2_processes_to_round_off(runs: Runs, case: Case, tmp_path: Path) -> None:
    losses = []
    for world_size in (1, 2):
        train(world_size, tmp_path / f"{world_size}", runs.arguments(case))
        losses.append([row["loss"] for row in rows(tmp_path / f"{world_size}", "train")])
    assert len(losses[0]) == len(losses[1]) == case.num_steps
    tolerance = 2**-8 if "bf16" in case.flags else 1e-3  # bf16 has 8 bits; with AMX 0.0013 was seen
    assert losses[1][:4] == pytest.approx(losses[0][:4], rel=tolerance)  # round-off grows from step to step


def test_a_changed_file_is_refused_at_resume(runs: Runs, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.num_train == 7)
    shutil.copy(runs.write(case), tmp_path)
    flags, run = (case.arguments(tmp_path), "--train.exact true"), tmp_path / "run"
    train(1, run, *flags)
    dataclasses.replace(case, num_train=8).write(tmp_path)
    ranks = Ranks(2, arguments(run, *flags), tmp_path / "logs")
    assert set(ranks.wait()) == {2}
    (line,) = ranks.output().splitlines()
    assert "belongs to another run: data " in line


def test_four_processes_fill_an_empty_cache_once(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.num_train == 7)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    summary = train(4, tmp_path / "run", runs.arguments(case), "--train.exact true")
    assert sorted(path.suffix for path in (tmp_path / "cache" / "lockstep").iterdir()) == [".lock", ".safetensors"]
    assert proof(summary) == proof(runs.train(case, 1))
