"""The picture of a run: drawn from its three files alone, not blank, loud about a fallback, and one line on bad input."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.report import main
from train import report
from train.config import Config, DataConfig

matplotlib = pytest.importorskip("matplotlib")

Python = Callable[..., subprocess.CompletedProcess[str]]
STEPS = 60
SHA256 = "0123456789abcdef" * 4


def confusion(correct: int, mistakes: dict[tuple[int, int], int]) -> list[list[int]]:
    counts = [[correct if label == guess else 0 for guess in range(10)] for label in range(10)]
    for (label, guess), count in mistakes.items():
        counts[label][guess] = count
    return counts


def make_rows(*, restarts: tuple[int, ...] = (), final_loss: float = 0.01) -> list[dict[str, Any]]:
    """Rows as metrics.jsonl has them: training every 10 steps, evaluations at 30 and 60, preempted and started again."""
    rows: list[dict[str, Any]] = [{"event": "start", "step": 0, "world_size": 4}]
    for step in range(10, STEPS + 1, 10):
        loss = 2.3 * (final_loss / 2.3) ** (step / STEPS)
        numbers = {"lr": 0.1 * (1 - step / 61), "grad_norm": 0.5 + step / 50, "images_per_second": 1e4, "train_seconds": step / 9}
        rows.append({"event": "train", "step": step, "epoch": step / 30, "loss": loss, **numbers})
        if step % 30 == 0:
            result = {"accuracy": 0.9 + step / 700, "loss": 2 * loss, "correct": 900 + step, "num_examples": 1000}
            rows.append({"event": "eval", "step": step, "split": "test", "ema": False, **result})
        if step in restarts:
            rows.append({"event": "preempted", "step": step, "signal": "SIGTERM"})
            rows.append({"event": "start", "step": step, "world_size": 2})
    return rows


def make_summary(**changes: Any) -> dict[str, Any]:
    summary = {"outcome": "finished", "step": STEPS, "total_steps": STEPS, "world_size": 2, "weights_sha256": SHA256}
    summary |= {"train_seconds": 6.7, "images_per_second": 12345.6, "data": {"name": "mnist", "is_fallback": False}}
    summary |= {"test_confusion": confusion(96, {(4, 9): 21, (7, 2): 13, (3, 5): 6})}
    return {**summary, **changes}


def make_run(run: Path, rows: list[dict[str, Any]], summary: dict[str, Any] | None, config: Config | None = None) -> Path:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "tra')  # a torn last line
    (run / "config.yaml").write_text((config or Config()).to_yaml())
    if summary:
        (run / "summary.json").write_text(json.dumps(summary))
    return run


def svg(tmp_path: Path, *runs: Path) -> str:
    """The text of the picture of runs."""
    assert main([*map(str, runs), "--output", str(tmp_path / "picture.svg")]) == 0
    return (tmp_path / "picture.svg").read_text()


def assert_picture(path: Path) -> None:
    """It has the size of a README picture, weighs less than 250 kB, and every part of it has something on it."""
    pixels = matplotlib.image.imread(path)[:, :, :3]
    height, width = pixels.shape[:2]
    assert (width, height >= 900) == (1400, True)
    assert path.stat().st_size < 250_000
    for row in range(3):
        for column in range(3):
            part = pixels[row * height // 3 : (row + 1) * height // 3, column * width // 3 : (column + 1) * width // 3]
            assert part.var() > 1e-3, (row, column)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "one", make_rows(restarts=(30,)), make_summary())


def test_picture_lands_in_the_run_and_is_not_blank(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.png'}\n"
    assert_picture(run / "report.png")


def test_headline_says_what_the_run_says(run: Path, tmp_path: Path) -> None:
    text = svg(tmp_path, run)
    for said in ("98.57%", "960 of 1,000", "60 of 60", "4 → 2  (1 restart)", "6.7", "12,346", SHA256[:12], "mnist", "model cnn"):
        assert f">{said}" in text or f" {said} " in text, said
    for said in ("preempted", "started again", "4 → 9", "40 of 1,000 test images wrong", "step (30 per epoch)"):
        assert f">{said}<" in text, said
    assert "FALLBACK" not in text.upper()


def test_same_run_gives_the_same_file(run: Path, tmp_path: Path) -> None:
    assert svg(tmp_path, run) == svg(tmp_path, run)


def test_several_runs_share_one_picture(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "runs" / "two", make_rows(final_loss=0.3), make_summary(weights_sha256="f" * 64))
    namesake = make_run(tmp_path / "elsewhere" / "two", make_rows(), make_summary())
    text = svg(tmp_path, run, other)
    assert all(f">{said}<" in text for said in ("2 runs", "one", "two", "f" * 12, "prediction of two"))
    assert "bit for bit" in svg(tmp_path, run, namesake)
    assert [record.name for record in report.read_all([run, other, namesake])] == ["one", str(other), str(namesake)]
    assert main([*map(str, (run, other, namesake)), "--output", str(tmp_path / "new" / "all.png")]) == 0
    assert_picture(tmp_path / "new" / "all.png")


def test_fallback_is_on_a_banner(tmp_path: Path) -> None:
    summary = make_summary(data={"name": "digits", "is_fallback": True})
    fallen = make_run(tmp_path / "fallen", make_rows(), summary)
    assert ">THIS IS NOT MNIST: trained on the fallback data set digits<" in svg(tmp_path, fallen)


def test_averaged_weights_are_the_result_where_there_are_any(tmp_path: Path) -> None:
    rows = make_rows()
    rows.append({**rows[-1], "ema": True, "accuracy": 0.992, "correct": 992})
    averaged = {"ema_weights_sha256": "e" * 64, "ema_test_confusion": confusion(99, {(8, 1): 8})}
    text = svg(tmp_path, make_run(tmp_path / "run", rows, make_summary(**averaged)))
    assert "99.20% of 1,000 mnist test images, averaged weights" in text
    assert "e" * 12 in text
    assert ">8 → 1<" in text


def test_run_without_a_current_summary_is_drawn_as_unfinished(tmp_path: Path) -> None:
    killed = make_run(tmp_path / "killed", make_rows()[:4], None)
    went_on = make_run(tmp_path / "went-on", make_rows(), make_summary(outcome="preempted", step=30, total_steps=90))
    assert ">30, unfinished<" in svg(tmp_path, killed)
    text = svg(tmp_path, went_on)
    assert ">60 of 90, unfinished<" in text
    assert "the run has not finished" in text
    assert SHA256[:12] not in text  # it is the hash of older weights


def test_extremes_are_drawn(tmp_path: Path) -> None:
    perfect = {"accuracy": 1.0, "correct": 1000, "loss": 0.0}
    rows = [{**row, **perfect} if row["event"] == "eval" else {**row, "grad_norm": None} for row in make_rows()]
    config = Config(data=DataConfig(name="fashion_mnist"))
    summary = make_summary(data={"name": "fashion_mnist", "is_fallback": False}, test_confusion=confusion(100, {}))
    perfect_run = make_run(tmp_path / "perfect", rows, summary, config)
    text = svg(tmp_path, perfect_run)
    assert all(f">{said}<" in text for said in ("100.00%", "Trouser", "none", "nothing recorded yet"))
    wrong = [{**row, "accuracy": 0.0, "correct": 0} if row["event"] == "eval" else row for row in make_rows()]
    assert "0.00% of 1,000" in svg(tmp_path, make_run(tmp_path / "wrong", wrong, None))
    assert "not evaluated" in svg(tmp_path, make_run(tmp_path / "young", make_rows()[:2], None))


@pytest.mark.parametrize(
    ("spoil", "arguments", "says"),
    [
        (None, ["nowhere"], "nowhere is not a directory. Expected the directory of a run"),
        ("{}", ["."], "has no metrics.jsonl. Expected the directory of a run"),
        ('{"event": "start", "step": 0, "world_size": 1}\n', ["run"], "has no train or eval rows"),
        ("", ["run"], "has no train or eval rows"),
        (None, ["run", "--output", "picture.pdf"], "picture.pdf. Expected a name that ends in .png or .svg"),
        (None, ["run", "--output", "run/metrics.jsonl/picture.png"], "picture.png cannot be written"),
        (None, ["damaged"], "summary.json is damaged. Expected"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: str | None,
    arguments: list,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"), make_rows(), make_summary())
    make_run(Path("damaged"), make_rows(), None)
    Path("damaged/summary.json").write_text("[1, 2")
    if spoil is not None:
        Path("run/metrics.jsonl").write_text(spoil)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err


def test_neither_torch_nor_a_display_is_needed(run: Path, python: Python) -> None:
    code = "import sys; from launch.report import main; assert main(sys.argv[1:]) == 0; print(*sys.modules)"
    done = python("-W", "error", "-c", code, str(run), DISPLAY="")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "train.data", "train.world", "matplotlib.pyplot", "wandb"}


def test_missing_matplotlib_is_one_line_with_its_remedy(run: Path, python: Python) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from launch.report import main; sys.exit(main(sys.argv[1:]))"
    done = python("-c", code, str(run))
    assert done.returncode == 2
    assert done.stderr == 'error: matplotlib is not installed, and the report needs it: pip install "lockstep[report]".\n'
