"""Make up runs and their pages, for tests of programs that read run directories."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from launch.report import main
from train.cli import to_yaml
from train.config import Config, DataConfig, WandbConfig
from train.rundir import Evaluation, Summary

STEPS = 60
SHA256 = "0123456789abcdef" * 4
EVIL = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"
SIZES = {"num_train_examples": 60000, "num_test_examples": 10000, "shape": [1, 28, 28]}
DATA = {"name": "mnist", **SIZES, "class_names": list("0123456789"), "is_fallback": False}
MISTAKES = {(4, 9): 21, (7, 2): 13, (3, 5): 6}
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A page's tags with attributes, and its text with one blank between elements. Every tag must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def count(self, name: str, **wanted: str) -> int:
        return sum(tag == name and wanted.items() <= attributes.items() for tag, attributes in self.tags)


def confusion(correct: int, mistakes: dict[tuple[int, int], int]) -> list[list[int]]:
    counts = [[correct if label == guess else 0 for guess in range(10)] for label in range(10)]
    for (label, guess), count in mistakes.items():
        counts[label][guess] = count
    return counts


def make_rows(
    *, restarts: tuple[int, ...] = (), final_loss: float = 0.01, data: dict[str, Any] = DATA, **start: Any
) -> list[dict[str, Any]]:
    """Return rows of metrics.jsonl: training every 10 steps, evaluations at 30 and 60, a preemption and a restart."""
    start = {"event": "start", "world_size": 4, "total_steps": STEPS, "command": ["--seed", "1"], "data": data, **start}
    rows: list[dict[str, Any]] = [{**start, "step": 0, "time": 1e9}]
    for step in range(10, STEPS + 1, 10):
        at = {"step": step, "time": 1e9 + step}
        loss = 2.3 * (final_loss / 2.3) ** (step / STEPS)
        train = {"event": "train", **at, "epoch": step / 30, "loss": loss, "lr": 0.1 * (1 - step / 61)}
        train |= {"grad_norm": 0.5 + step / 50, "images_per_second": 1e4, "train_seconds": step / 9}
        rows.append({**train, "seconds_left": float(STEPS - step)})
        if step % 30 == 0:
            result = {"accuracy": 0.9 + step / 1000, "loss": 2 * loss, "correct": 900 + step, "num_examples": 1000}
            rows.append({"event": "eval", **at, "split": "test", "ema": False, **result})
        if step in restarts:
            rows.append({"event": "preempted", **at, "signal": "SIGTERM"})
            rows.append({**start, **at, "world_size": 2})
    return rows


def make_evaluation(correct: int = 96, mistakes: dict[tuple[int, int], int] = MISTAKES) -> Evaluation:
    """Return an evaluation of 1,000 images with 40 wrong. The mistakes are only those that the page can name."""
    return Evaluation(0.96, 0.02, 960, "p" * 64, confusion(correct, mistakes))


def make_summary(**changes: Any) -> Summary:
    """Return the summary of a finished run."""
    values: dict[str, Any] = {
        "outcome": "finished",
        "step": STEPS,
        "total_steps": STEPS,
        "world_size": 2,
        "split": "test",
        "num_examples": 1000,
        "results": {"raw": make_evaluation()},
        "weights_sha256": SHA256,
        "ema_weights_sha256": None,
        "train_seconds": 6.7,
        "warm_up_seconds": 0.5,
        "wall_seconds": 9.0,
        "images_per_second": 12345.6,
        "best": {"step": STEPS, "accuracy": 0.96},
        "skipped_steps": 0,
        "ledger": None,
        "exact": False,
        "num_micro_batches": 1,
        "precision": "fp32",
        "device": "cpu",
        "data": DATA,
        "sha256": {},
        "config": {},
        "environment": {"device": "x86_64", "num_threads": 2},
        "versions": {"torch": "2.15.0", "python": "3.11.2"},
        "git_commit": "c0ffee+",
        "phases": {"seconds": [9.0, 9.0], "data": [0.125, 0.25], "forward_backward": [0.875, 0.75]},
        "fingerprints": None,
    }
    return Summary(**{**values, **changes})


def make_samples(path: Path, count: int, shape: tuple[int, int, int] = (1, 28, 28)) -> None:
    confidences = np.linspace(0.99, 0.5, count, dtype=np.float32)
    labels = np.arange(count, dtype=np.int64) % 10
    images = np.arange(count * math.prod(shape), dtype=np.uint64).reshape(count, *shape).astype(np.uint8)
    tensors = {"images": images, "labels": labels, "predictions": (labels + 1) % 10, "confidences": confidences}
    named = {f"mistakes_{name}": tensor for name, tensor in {**tensors, "positions": labels * 7}.items()}
    safetensors.numpy.save_file({**named, "filters": np.linspace(-1, 1, 75, dtype=np.float32).reshape(3, 5, 5)}, path)


def make_run(
    run: Path,
    rows: list[dict[str, Any]],
    summary: Summary | None,
    config: Config | None = None,
    mistakes: int | None = None,
) -> Path:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"event": "tra'
    )  # a torn last line
    (run / "config.yaml").write_text(to_yaml(config or Config()))
    if summary:
        (run / "summary.json").write_text(summary.to_json())
    if mistakes is not None:
        make_samples(run / "samples.safetensors", mistakes)
    return run


def make_pages(directory: Path) -> dict[str, Path]:
    """Make three pages: of a run with everything, of runs with several seeds, and of one whose texts are attacks."""
    one = make_run(directory / "one", make_rows(restarts=(30,)), make_summary(), mistakes=100)
    seeds = [
        make_run(
            directory / f"seed-{seed}", make_rows(final_loss=seed / 50), make_summary(), Config(seed=seed), mistakes=30
        )
        for seed in (1, 2, 3)
    ]
    names = [EVIL] * 10
    evil_data = {"name": EVIL, "class_names": names, "is_fallback": True, "sha256": EVIL, "num_test_examples": 1000}
    evil_rows = [
        {**row, "signal": EVIL, "world_size": EVIL, "command": [EVIL], "split": EVIL}
        for row in make_rows(restarts=(30,), data=evil_data)
    ]
    config = Config(wandb=WandbConfig(notes=EVIL, tags=[EVIL]), data=DataConfig(name="fashion_mnist", root=EVIL))
    results = {"raw": make_evaluation(96, {(4, 9): 40})}
    summary = make_summary(
        data=evil_data, git_commit=EVIL, versions={EVIL: EVIL}, device=EVIL, split=EVIL, results=results
    )
    evil = make_run(directory / EVIL.replace("/", "")[:200], evil_rows, summary, config, mistakes=3)
    pages = {"one": [one], "seeds": [one, *seeds], "evil": [evil]}
    for name, runs in pages.items():
        assert main([*map(str, runs), "--output", str(directory / f"{name}.html")]) == 0
    return {name: directory / f"{name}.html" for name in pages}
