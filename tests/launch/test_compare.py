"""`launch compare` finds equal runs equal, and names the first step at which another seed or rate differs."""

import json
import math
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ranks.processes import Ranks, arguments, launch, rows, train, wait_for_step

from launch.check.compare import collect, compare_series
from launch.report import main as report
from train.errors import UserError
from train.tracking import fingerprint

EXACT = "--model.name tiny_bn --train.exact true --train.num_micro_batches 4 --optim.ema 0.9 --model.dropout 0.2"
SHORT = "--train.max_steps 30 --log.every_steps 7 --checkpoint.every_steps 5 --eval.every_steps 12 --optim.lr 0.02"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the same exact run on 1 and 2 processes, one with another seed, one with another rate, and a fast one."""
    directory = tmp_path_factory.mktemp("runs")
    train(1, directory / "one", EXACT, SHORT)
    train(2, directory / "two", EXACT, SHORT, "--log.every_steps 4 --checkpoint.every_steps 10")
    train(1, directory / "seed", EXACT, SHORT, "--seed 1")
    train(1, directory / "rate", EXACT, SHORT, "--optim.lr 0.03")
    train(1, directory / "fast", EXACT, SHORT, "--train.exact false")
    return directory


def compare(runs: Path, first: str, second: str, *options: str) -> tuple[int, str]:
    return launch(runs / "log", "compare", str(runs / first), str(runs / second), *options)


def stretches(run: Path) -> list[tuple[int, int]]:
    return [(row["first"], row["step"]) for row in rows(run, "fingerprint")]


def test_every_step_has_one_fingerprint_and_every_save_its_weights(runs: Path) -> None:
    written = stretches(runs / "one")
    assert [step for first, last in written for step in range(first, last + 1)] == list(range(1, 31))
    ends = {row["step"] for event in ("train", "saved") for row in rows(runs / "one", event)}
    assert {last for _, last in written} == ends >= {5, 7, 10, 14, 15, 20, 21, 25, 28, 30}
    assert written != stretches(runs / "two")
    assert fingerprint.of_rows(rows(runs / "one")) == fingerprint.of_rows(rows(runs / "two"))
    found = fingerprint.of_rows(rows(runs / "one"))
    for row in rows(runs / "one", "train"):
        assert found["loss"][row["step"]] == row["loss"]
        assert found["grad_norm"][row["step"]] == row["grad_norm"]
    summary = json.loads((runs / "one" / "summary.json").read_text())
    saved = rows(runs / "one", "saved")
    assert [row["step"] for row in saved] == sorted({5, 10, 15, 20, 25, 30, *(row["step"] for row in saved)})
    assert saved[-1]["weights_sha256"] == summary["weights_sha256"]
    assert not rows(runs / "fast", "fingerprint")
    assert rows(runs / "fast", "saved")


def test_summary_is_a_receipt(runs: Path) -> None:
    one, two, fast = (json.loads((runs / name / "summary.json").read_text()) for name in ("one", "two", "fast"))
    assert one["fingerprints"] == two["fingerprints"] == fingerprint.receipt(rows(runs / "one"))
    assert (one["fingerprints"]["first"], one["fingerprints"]["last"]) == (1, 30)
    assert fast["fingerprints"] is None
    assert one["ledger"] == two["ledger"] == fast["ledger"]
    assert (one["ledger"]["step"], one["ledger"]["count"]) == (23, 1438)
    assert (one["config"]["optim.lr"], one["config"]["seed"], one["config"]["train.exact"]) == (0.02, 0, True)
    assert one["environment"]["num_threads"] == 1
    assert one["environment"]["versions"]["torch"] == one["versions"]["torch"]


def test_equal_runs_are_equal(runs: Path) -> None:
    code, output = compare(runs, "one", "two", "--assert-equal")
    assert code == 0, output
    for line in (
        "config +the same trajectory",
        "loss +the same bits at 30 of 30 rec",
        "grad_norm +the same bits at 30 of",
        "final weights +the same bits after step 30: [0-9a-f]{64}",
        "last common step +30",
    ):
        assert re.search(f"^{line}", output, re.MULTILINE), (line, output)


@pytest.mark.parametrize(
    ("other", "config", "loss", "norm"),
    [
        ("seed", "seed 0 -> 1", 1, 1),
        ("rate", "optim.lr 0.02 -> 0.03", 2, 2),
        ("fast", "train.exact True -> False", 0, 0),
    ],
)
def test_other_runs_are_told_apart_at_their_first_step(
    runs: Path, other: str, config: str, loss: int, norm: int
) -> None:
    code, output = compare(runs, "one", other)
    assert code == 0, output
    assert f"  {config}\n" in output
    lines = {line.split("  ")[0]: line for line in output.splitlines()}
    for name, step in (("loss", loss), ("grad_norm", norm)):
        assert not step or f"first differs at step {step}: " in lines[name]
        assert not step or " apart" in lines[name]
    assert "first differs at step 5: " in lines["weights"]
    assert "they differ after step 30" in lines["final weights"]
    assert compare(runs, "one", other, "--assert-equal")[0] == 1


def test_first_step_with_another_rate_starts_from_the_same_weights(runs: Path) -> None:
    one, rate = (fingerprint.of_rows(rows(runs / name)) for name in ("one", "rate"))
    assert one["loss"][1] == rate["loss"][1]
    assert one["loss"][2] != rate["loss"][2]


def test_difference_shows_all_digits() -> None:
    assert fingerprint.difference(1.0, 1 + 2**-52) == "1.0 and 1.0000000000000002, 2.22e-16 apart"
    assert fingerprint.difference(None, 1.5) == "None and 1.5 (None: not finite)"


def test_evaluations_that_are_not_finite_are_equal() -> None:
    rows = [{"event": "eval", "step": 1, "split": "test", "ema": False, "loss": math.nan}]
    record = SimpleNamespace(rows=rows, saved_weights={}, name="a")
    found = collect(record)["test loss"]  # type: ignore[arg-type]
    assert compare_series("test loss", found, dict(found))[1] is True


def test_fingerprints_are_numbers_that_read_back_exactly() -> None:
    numbers = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, math.nan, math.inf]
    steps = [SimpleNamespace(loss=number, grad_norm=float(np.float32(0.1))) for number in numbers]
    row = json.loads(json.dumps(fingerprint.encode(steps), allow_nan=False))
    assert row["loss"] == [*numbers[:4], None, None]
    assert row["grad_norm"] == [0.10000000149011612] * 6


def test_receipt_does_not_depend_on_how_steps_are_cut_into_rows() -> None:
    def row(first: int, last: int) -> dict:
        numbers = [step / 3 for step in range(first, last + 1)]
        return {"event": "fingerprint", "first": first, "step": last, "loss": numbers, "grad_norm": numbers}

    whole = fingerprint.receipt([row(1, 6)])
    assert whole
    assert fingerprint.receipt([row(1, 2), {"event": "train", "step": 2}, row(3, 6)]) == whole
    changed = row(1, 6)
    changed["loss"][3] = math.nextafter(changed["loss"][3], 2)
    assert fingerprint.receipt([changed]) != whole


@pytest.mark.sample(1)
@pytest.mark.parametrize(("world_size", "number"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGTERM)])
def test_resumed_run_has_each_fingerprint_once(tmp_path: Path, world_size: int, number: signal.Signals) -> None:
    flags = (EXACT, "--train.epochs 4 --log.every_steps 7 --checkpoint.every_steps 10 --optim.lr 0.02")
    train(1, tmp_path / "whole", *flags)
    ranks = Ranks(world_size, arguments(tmp_path / "hit", *flags), tmp_path / "logs")
    wait_for_step(tmp_path / "hit", 35)
    ranks.signal(number)
    ranks.wait()
    train(3 - world_size, tmp_path / "hit", *flags)
    assert len(rows(tmp_path / "hit", "start")) == 2
    assert fingerprint.of_rows(rows(tmp_path / "hit")) == fingerprint.of_rows(rows(tmp_path / "whole"))
    assert sorted(fingerprint.of_rows(rows(tmp_path / "hit"))["loss"]) == list(range(1, 93))
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "hit")]
    for name in ("fingerprints", "ledger", "weights_sha256", "config"):
        assert summaries[0][name] == summaries[1][name]
    code, output = compare(tmp_path, "whole", "hit", "--assert-equal")
    assert code == 0, output


def test_unfinished_run_agrees_as_far_as_it_goes_but_is_not_equal(runs: Path, tmp_path: Path) -> None:
    part = shutil.copytree(runs / "one", tmp_path / "part")
    (part / "summary.json").unlink()
    lines = [line for line in (part / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 15]
    (part / "metrics.jsonl").write_text("\n".join(lines) + '\n{"event": "tra')
    code, output = compare(runs, "one", str(part))
    assert (code, "last common step             15\n" in output) == (0, True), output
    assert "the runs are at steps 30 and 15" in output
    assert "loss                         the same bits at 15 of 15 recorded steps" in output
    assert compare(runs, "one", str(part), "--assert-equal")[0] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: shutil.rmtree(run), "is not a directory"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text("\0\0\n7\n"), "has no train or eval rows"),
        (lambda run: (run / "config.yaml").write_text("a: [\n"), "config.yaml cannot be read: "),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"event": "train", "step": 3, "loss": "x"}\n'),
            "that no run writes",
        ),
    ],
)
def test_bad_input_is_one_line(runs: Path, tmp_path: Path, change: Callable[[Path], object], words: str) -> None:
    change(shutil.copytree(runs / "one", tmp_path / "bad"))
    code, output = compare(runs, "one", str(tmp_path / "bad"), "--assert-equal")
    assert (code, output.count("\n")) == (2, 1), output
    assert output.startswith("error: ")
    assert words in output


def test_doubled_fingerprint_is_refused() -> None:
    row = {"event": "fingerprint", "step": 2, "first": 1, "loss": [0.5, None], "grad_norm": [0.5, 0.5]}
    assert fingerprint.of_rows([row])["loss"] == {1: 0.5, 2: None}
    other_version = {**row, "loss": ["3fe0000000000000"] * 2}
    for damaged in ([row, row], [{**row, "loss": [0.5]}], [row, {**row, "step": 3, "first": 2}], [other_version]):
        with pytest.raises(UserError, match="damaged"):
            fingerprint.of_rows(damaged)


def test_report_draws_a_run_with_fingerprints(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert report([str(runs / "one"), str(runs / "two"), "--output", str(tmp_path / "two.html")]) == 0
    assert "2 runs, the same weights bit for bit" in (tmp_path / "two.html").read_text()


def test_compare_imports_no_torch(runs: Path, python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    script = (
        "import sys; from launch.__main__ import main; code = main(sys.argv[1:])\n"
        "assert not {'torch', 'numpy', 'accelerate'} & set(sys.modules), 'heavy'; sys.exit(code)"
    )
    done = python("-c", script, "compare", str(runs / "one"), str(runs / "two"), "--assert-equal")
    assert done.returncode == 0, done.stderr
