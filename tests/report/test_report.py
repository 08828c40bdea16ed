"""A run's page needs only its files, is complete, shows a fallback clearly, and is safe whatever names contain."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import (
    DATA,
    EVIL,
    SHA256,
    STEPS,
    Page,
    make_evaluation,
    make_pages,
    make_rows,
    make_run,
    make_summary,
)
from ranks.processes import train

from launch.__main__ import main as launch
from launch.report import main
from train.config import Config, DataConfig, OptimConfig
from train.report import records

pytest.importorskip("matplotlib")

Python = Callable[..., subprocess.CompletedProcess[str]]


def page(tmp_path: Path, *runs: Path) -> Page:
    assert main([*map(str, runs), "--output", str(tmp_path / "page.html")]) == 0
    return Page((tmp_path / "page.html").read_text())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "one", make_rows(restarts=(30,)), make_summary(), mistakes=100)


def test_page_is_written_into_the_run_and_shows_what_the_run_recorded(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    found = Page((run / "report.html").read_text())
    headline = (
        "96.00% of 1,000 mnist test images",
        "40 of 1,000",
        "60 of 60",
        "4 → 2 (1 restart)",
        "6.7",
        "12,346",
        SHA256[:12],
    )
    curves = (
        "loss",
        "accuracy",
        "learning rate",
        "images per second",
        "gradient norm",
        "time line",
        "step (30 per epoch)",
    )
    attempts = (
        "2001-09-09 01:46:40 UTC",
        "0:00:30",
        "0 to 30",
        "preempted (SIGTERM)",
        "30 to 60",
        "finished",
        "started again",
    )
    mistakes = ("100 mistakes, the most confident first", "0 → 1 99.0%", "82.1% 21 wrong", "the 3 filters")
    environment = (
        "torch 2.15.0",
        "device cpu x86_64 CPU threads per process 2",
        "c0ffee+",
        "data.num_train_examples 60000 data.num_test_examples 10000",
        "python -m train --seed 1",
    )
    phases = ("data 18.8% (12.5% to 25.0%) forward_backward 81.2% (75.0% to 87.5%)",)
    for words in (*phases, *headline, *curves, *attempts, *mistakes, *environment, "model.name cnn"):
        assert words in found.text, words
    assert (found.count("svg"), found.count("table", **{"class": "matrix"})) == (6, 1)
    assert found.count("img") == 100 + 3
    assert "FALLBACK" not in found.text.upper().replace("DATA.IS_FALLBACK FALSE", "")


def test_page_needs_no_other_file(tmp_path: Path) -> None:
    """It has no script, request or handler, whatever names, notes and data contain, and it stays small."""
    for name, path in make_pages(tmp_path).items():
        html = path.read_text()
        found = Page(html)
        assert path.stat().st_size < 3_000_000 / 5, name
        assert {tag for tag, _ in found.tags} & {"script", "iframe", "object", "base", "form"} == set()
        for tag, attributes in found.tags:
            assert not [attribute for attribute in attributes if attribute.startswith("on")], (tag, attributes)
            for attribute in ("src", "href", "xlink:href", "action", "srcset"):
                assert (attributes.get(attribute) or "data:").startswith(("data:", "#")), (tag, attributes)
        assert re.findall(r"@import|url\((?!#)", html) == []
        assert set(re.findall(r"https?://[\w./]*", html)) <= {
            "http://www.w3.org/1999/xlink",
            "http://www.w3.org/2000/svg",
        }
    assert EVIL in Page((tmp_path / "evil.html").read_text()).text
    assert "alert(1)" in html
    assert "49" not in found.text  # {{ 7*7 }}


def test_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    contents = set()
    for _ in range(2):
        page(tmp_path, run)
        contents.add((tmp_path / "page.html").read_bytes())
    assert len(contents) == 1


def test_ids_are_unique(tmp_path: Path) -> None:
    found = Page(make_pages(tmp_path)["seeds"].read_text())
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 10


def test_runs_that_differ_in_the_seed_alone_are_a_mean_with_a_band(tmp_path: Path) -> None:
    rows = make_rows()
    wrong = [
        {**row, "correct": 950, "accuracy": 0.95} if row["event"] == "eval" and row["step"] == STEPS else row
        for row in rows
    ]
    first = make_run(tmp_path / "recipe-s1", rows, make_summary(weights_sha256="a" * 64), Config(seed=1))
    other = make_run(tmp_path / "recipe-s2", wrong, make_summary(), Config(seed=2))
    faster = make_run(tmp_path / "fast", make_rows(final_loss=0.3), make_summary(), Config(optim=OptimConfig(lr=0.2)))
    found_groups = records.groups(records.read_all([first, other, faster]))
    assert [[record.name for record in group.records] for group in found_groups] == [
        ["recipe-s1", "recipe-s2"],
        ["fast"],
    ]
    steps, values = found_groups[0].series("eval", "accuracy")
    assert (steps, values) == ([30, 60], [[0.93, 0.93], [0.96, 0.95]])
    found = page(tmp_path, first, other, faster)
    for words in (
        "recipe-s, 2 seeds",
        "95.50% (95.00% to 96.00%)",
        "45 (40 to 50) of 1,000",
        "2 different",
        "band: least to greatest",
    ):
        assert words in found.text, words
    assert "optim.lr 0.1 0.1 0.2" in found.text  # the config's difference, a column per run
    assert "fill-opacity: 0.2" in (tmp_path / "page.html").read_text()
    assert "augment" not in found.text
    assert "band" not in page(tmp_path, first, faster).text


def test_same_seed_twice_is_a_comparison(tmp_path: Path) -> None:
    one = make_run(tmp_path / "runs" / "one", make_rows(), make_summary())
    namesake = make_run(tmp_path / "elsewhere" / "one", make_rows(), make_summary())
    assert [len(group.records) for group in records.groups(records.read_all([one, namesake]))] == [1, 1]
    text = page(tmp_path, one, namesake).text
    assert "2 runs, the same weights bit for bit" in text
    assert "The configs are equal." in text
    assert str(namesake) in text
    assert "data 18.8% (12.5% to 25.0%)" in text  # over the ranks of each, the same of both
    assert [record.name for record in records.read_all([one, namesake])] == [str(one), str(namesake)]


def test_fallback_is_on_a_banner(tmp_path: Path) -> None:
    fallen = make_run(tmp_path / "fallen", make_rows(data={"name": "digits", "is_fallback": True}), make_summary())
    found = page(tmp_path, fallen)
    assert "THIS IS NOT MNIST: trained on the fallback data set digits" in found.text
    assert found.count("div", **{"class": "banner"}) == 1
    assert "NOT WHAT WAS ASKED" in found.text


def test_averaged_weights_are_the_result_where_there_are_any(tmp_path: Path) -> None:
    rows = make_rows()
    rows.append({**rows[-1], "ema": True, "accuracy": 0.992, "correct": 992})
    results = {"raw": make_evaluation(), "ema": make_evaluation(99, {(8, 1): 8})}
    averaged = {"ema_weights_sha256": "e" * 64, "results": results}
    text = page(tmp_path, make_run(tmp_path / "run", rows, make_summary(**averaged))).text
    for words in ("99.20% of 1,000 mnist test images, averaged weights", "e" * 12, "8 wrong", "test, averaged weights"):
        assert words in text, words


def test_run_without_a_current_summary_is_shown_as_unfinished(tmp_path: Path) -> None:
    killed = make_run(tmp_path / "killed", make_rows()[:4], None, mistakes=5)
    resumed = make_run(tmp_path / "resumed", make_rows(total_steps=90), make_summary(outcome="preempted", step=30))
    assert "30 of 60, unfinished" in page(tmp_path, killed).text
    found = page(tmp_path, resumed)
    assert "60 of 90, unfinished" in found.text
    assert "the run has not finished" in found.text
    assert SHA256[:12] not in found.text  # it is the hash of older weights
    assert page(tmp_path, killed).count("img") == 0  # samples of an earlier end
    assert "0 to 30 not recorded" in page(tmp_path, killed).text


def test_start_that_found_nothing_to_do_is_no_restart(run: Path, tmp_path: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps({"event": "start", "step": STEPS, "world_size": 1, "total_steps": STEPS}) + "\n")
    assert "4 → 2 (1 restart)" in page(tmp_path, run).text


def test_extremes_are_drawn(tmp_path: Path) -> None:
    perfect = {"accuracy": 1.0, "correct": 1000, "loss": 0.0}
    rows = make_rows(data={**DATA, "name": "fashion_mnist"})
    rows = [{**row, **perfect} if row["event"] == "eval" else {**row, "grad_norm": None} for row in rows]
    config = Config(data=DataConfig(name="fashion_mnist"))
    names = ["Trouser", *"123456789"]
    summary = make_summary(results={"raw": make_evaluation(100, {})}, data={**DATA, "class_names": names})
    text = page(tmp_path, make_run(tmp_path / "perfect", rows, summary, config, mistakes=0)).text
    assert all(words in text for words in ("100.00%", "Trouser", "100.0% 0 wrong", "nothing recorded yet"))
    wrong = [{**row, "accuracy": 0.0, "correct": 0} if row["event"] == "eval" else row for row in make_rows()]
    assert "0.00% of 1,000" in page(tmp_path, make_run(tmp_path / "wrong", wrong, None)).text
    assert "not evaluated" in page(tmp_path, make_run(tmp_path / "young", make_rows()[:2], None)).text


def test_long_run_stays_small(tmp_path: Path) -> None:
    rows = [{**row, "step": step} for step, row in enumerate(make_rows()[1:2] * 20_000)]
    page(tmp_path, make_run(tmp_path / "long", rows, None))
    assert (tmp_path / "page.html").stat().st_size < 400_000


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (None, ["nowhere"], "nowhere is not a directory. Expected the directory of a run"),
        ("{}", ["."], "has no metrics.jsonl. Expected the directory of a run"),
        ('{"event": "start", "step": 0, "world_size": 1}\n', ["run"], "has no train or eval rows"),
        ("", ["run"], "has no train or eval rows"),
        (None, ["run", "--output", "page.pdf"], "page.pdf. Expected a name that ends in .html"),
        (None, ["run", "--output", "run/metrics.jsonl/page.html"], "page.html cannot be written"),
        (None, ["damaged"], "summary.json cannot be read: "),
        (None, ["old"], "summary.json cannot be read: it was written by lockstep 0.9, in format 1, not 3"),
        (None, ["torn"], "samples.safetensors is damaged"),
        ('{"event": "eval", "step": 1, "split": "test", "accuracy": "all"}\n', ["run"], "rows that no run writes"),
        (
            '{"event": "train", "step": 1, "loss": 1}\n{"event": "eval", "step": 1}\n',
            ["run"],
            "rows that no run writes",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: str | None,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"), make_rows(), make_summary())
    make_run(Path("damaged"), make_rows(), None)
    Path("damaged/summary.json").write_text("[1, 2")
    make_run(Path("old"), make_rows(), None)
    Path("old/summary.json").write_text('{"step": 60, "test_accuracy": 0.9, "versions": {"lockstep": "0.9"}}')
    make_run(Path("torn"), make_rows(), make_summary())
    Path("torn/samples.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    if spoil is not None:
        Path("run/metrics.jsonl").write_text(spoil)
        Path("run/summary.json").unlink()
    assert launch(["report", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_neither_torch_nor_a_display_is_needed(run: Path, python: Python) -> None:
    code = "import sys; from launch.report import main; assert main(sys.argv[1:]) == 0; print(*sys.modules)"
    done = python("-W", "error", "-c", code, str(run), DISPLAY="")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "train.storage.data", "train.world.world", "matplotlib.pyplot", "wandb"}


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_missing_package_is_one_line_with_its_remedy(run: Path, python: Python, package: str) -> None:
    code = f"import sys; sys.modules['{package}'] = None; from launch.__main__ import main; "
    code += "sys.exit(main(['report', sys.argv[1]]))"
    done = python("-c", code, str(run))
    assert done.returncode == 2
    assert done.stderr == 'error: A report needs matplotlib and jinja2: pip install "lockstep[report]".\n'
    code = f"import pathlib, sys; sys.modules['{package}'] = None; from train.__main__ import RunDir, page_problem; "
    done = python("-c", code + "print(page_problem(RunDir(pathlib.Path(sys.argv[1]))))", str(run))
    assert done.stdout == 'A report needs matplotlib and jinja2: pip install "lockstep[report]".\n'


def test_end_of_a_run_writes_its_page(tmp_path: Path) -> None:
    """The page of a real run of two ranks shows the accuracy in the summary."""
    run = tmp_path / "run"
    summary = train(2, run, "--train.max_steps 12 --eval.every_steps 6 --log.report true --optim.ema 0.5")
    found = Page((run / "report.html").read_text())
    result = summary["results"]["ema"]
    assert f"{result['accuracy']:.2%} of 359 digits test images, averaged weights" in found.text
    assert f"{summary['ema_weights_sha256']}" in found.text
    assert "12 of 12" in found.text
    assert found.count("img") == min(359 - result["correct"], 100) + 4
    printed = (tmp_path / "run-logs" / "rank-0.log").read_text()
    assert f"  {run / 'report.html'}\n" in printed


def test_page_that_fails_fails_no_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "report.html").mkdir(parents=True)
    train(1, run, "--train.max_steps 2 --log.report true")  # exit code 0
    printed = (tmp_path / "run-logs" / "rank-0.log").read_text()
    assert f"no report.html: {run / 'report.html'} cannot be written" in printed
    shutil.rmtree(run)
    train(1, run, "--train.max_steps 2")
    assert not (run / "report.html").exists()
