"""Run directories -> what there is to say about the runs, from metrics.jsonl, summary.json and config.yaml alone.

Invariant: what is said was written by the run; nothing is computed again, so neither torch nor the data are needed.
It knows the files and the words, but no format: `picture.py` draws.
"""

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from train import yamlfile
from train.config import UserError, class_names

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What a run directory says. `summary` is empty where there is none, or where it is older than the last row."""

    name: str
    rows: list[Row]
    summary: dict[str, Any]
    config: dict[str, Any]

    def series(self, event: str, field: str, ema: bool | None = None) -> tuple[list[int], list[float]]:
        """Steps and values of a field of the rows of an event, where it is a number; `ema` chooses among eval rows."""
        rows = [row for row in self.rows if row["event"] == event and ema in (None, row.get("ema"))]
        rows = [row for row in rows if isinstance(row.get(field), (int, float))]
        return [row["step"] for row in rows], [row[field] for row in rows]

    def last(self, event: str) -> Row:
        """The last row of an event; empty if there is none. Averaged weights are evaluated last, so they count if there are."""
        return next((row for row in reversed(self.rows) if row["event"] == event), {})

    def marks(self, event: str) -> list[int]:
        """Steps at which the run was started again (`start`) or left (`preempted`)."""
        steps = [row["step"] for row in self.rows if row["event"] == event]
        return sorted(set(steps[1:] if event == "start" else steps))

    @property
    def averages(self) -> bool:
        """Whether the averaged weights are the run's result."""
        return bool(self.last("eval").get("ema"))

    @property
    def weights(self) -> str | None:
        """SHA-256 of the weights that are the run's result; None if the run does not say."""
        return self.summary.get("ema_weights_sha256" if self.averages else "weights_sha256")

    @property
    def short_name(self) -> str:
        """The name, cut in the middle where it is long."""
        return self.name if len(self.name) <= 28 else f"{self.name[:13]}...{self.name[-12:]}"

    @property
    def data(self) -> dict[str, Any]:
        """What the run says of its data: in its summary, or at its start."""
        return self.summary.get("data") or self.last("start").get("data") or {}

    @property
    def data_name(self) -> str:
        """The data set that was trained on, as far as the files say."""
        return self.data.get("name") or self.config.get("data", {}).get("name", "")


def read(run_dir: Path, name: str) -> Record:
    """Read a run directory. Raises UserError if it is none or holds nothing to draw."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        problem = "has no metrics.jsonl" if run_dir.is_dir() else "is not a directory"
        raise UserError(f"{run_dir} {problem}. Expected the directory of a run, such as runs/mnist-20260101-120000.")
    rows = list(filter(None, map(parse_row, path.read_text(errors="replace").splitlines())))
    if not any(row["event"] in ("train", "eval") for row in rows):
        raise UserError(f"{path} has no train or eval rows. Expected one per log.every_steps; try again when the run has some.")
    summary = read_mapping(run_dir / "summary.json", json.loads)
    is_current = summary.get("step") == rows[-1]["step"]
    kept: dict[str, Any] = summary if is_current else {key: summary[key] for key in ("data", "total_steps") if key in summary}
    return Record(name, rows, kept, read_mapping(run_dir / "config.yaml", yamlfile.load))


def parse_row(line: str) -> Row | None:
    """Parse a line of metrics.jsonl; None for a torn one, which a kill can leave."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and {"event", "step"} <= row.keys() else None


def read_mapping(path: Path, parse: Any) -> dict[str, Any]:
    """Read a file that holds one mapping; empty if there is no such file. Raises UserError if it holds anything else."""
    try:
        content = parse(path.read_text()) if path.exists() else {}
    except (ValueError, OSError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged. Expected what a run writes there; delete it to draw the run without it.")
    return content


def read_all(run_dirs: list[Path]) -> list[Record]:
    """Read run directories; each is named by its last part, or by its whole path where that part is not unique."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    return [
        read(run_dir, name if names.count(name) == 1 else str(run_dir)) for run_dir, name in zip(run_dirs, names, strict=True)
    ]


def facts(record: Record) -> dict[str, str]:
    """The cells of a run's row in the table, by heading."""
    summary, trained, evaluated = record.summary, record.last("train"), record.last("eval")
    outcome = summary.get("outcome", "unfinished")
    steps = f"{record.rows[-1]['step']:,}" + (f" of {summary['total_steps']:,}" if "total_steps" in summary else "")
    sizes: list[Any] = [size for size, _ in groupby(row["world_size"] for row in record.rows if row["event"] == "start")]
    sizes = sizes if len(sizes) <= 4 else [sizes[0], "...", sizes[-1]]
    restarts = sum(row["event"] == "start" for row in record.rows) - 1
    seconds = summary.get("train_seconds", trained.get("train_seconds"))
    speed = summary.get("images_per_second") or trained.get("images_per_second")
    return {
        "run": record.short_name,
        "accuracy": f"{evaluated['accuracy']:.2%}" if evaluated else "-",
        "correct": f"{evaluated['correct']:,} of {evaluated['num_examples']:,}" if evaluated else "not evaluated",
        "steps": steps + ("" if outcome == "finished" else f", {outcome}"),
        "ranks": " → ".join(map(str, sizes)) + (f"  ({restarts} restart{'s'[: restarts > 1]})" if restarts > 0 else ""),
        "seconds": f"{seconds:,.1f}" if seconds is not None else "-",
        "images/s": f"{speed:,.0f}" if speed else "-",
        "weights": record.weights[:12] if record.weights else "-",
    }


def title(records: list[Record]) -> str:
    """What the picture says, in a few words."""
    record, hashes = records[-1], {each.weights for each in records}
    if len(records) > 1:
        same = len(hashes) == 1 and None not in hashes
        return f"{len(records)} runs" + (", the same weights bit for bit" if same else "")
    evaluated = record.last("eval")
    if not evaluated:
        return f"{record.name}: not evaluated yet"
    weights = ", averaged weights" if evaluated.get("ema") else ""
    return f"{evaluated['accuracy']:.2%} of {evaluated['num_examples']:,} {record.data_name} {evaluated['split']} images{weights}"


def subtitle(records: list[Record]) -> str:
    """How the runs were trained, in one line: what their configs have in common."""
    recipes = [recipe(record) for record in records]
    return "   ·   ".join(part for part in recipes[-1] if all(part in parts for parts in recipes))


def recipe(record: Record) -> list[str]:
    """How a run was trained, in a few short parts; empty without its config."""
    config = record.config
    if not {"model", "optim", "train"} <= config.keys():
        return []
    train, optim = config["train"], config["optim"]
    parts = [
        record.data_name,
        f"model {config['model']['name']}",
        f"{train['global_batch_size']} examples per step",
        f"{optim['name']}, lr {optim['lr']:g}, {optim['schedule']}",
        train["precision"],
        f"exact, {train['micro_batches']} micro-batches" if train["exact"] else "",
        f"seed {config.get('seed')}",
    ]
    return list(filter(None, parts))


def banner(records: list[Record]) -> str:
    """The warning that a run was not trained on what was asked for; empty if all were."""
    fallen = [record for record in records if record.data.get("is_fallback")]
    if not fallen:
        return ""
    asked = fallen[0].config.get("data", {}).get("name", "mnist").upper()
    which = f" ({', '.join(record.name for record in fallen)})" if len(records) > 1 else ""
    return f"THIS IS NOT {asked}: trained on the fallback data set {fallen[0].data_name}{which}"


@dataclass(frozen=True)
class Confusion:
    """How often each label was read as each class, and what these are called."""

    counts: list[list[int]]  # [label][prediction]
    names: list[str]
    heading: str

    def pairs(self, limit: int) -> list[tuple[str, int]]:
        """The most frequent mistakes, as `4 → 9` and its count, the most frequent first."""
        found = [
            (f"{self.names[label]} → {self.names[guess]}", count)
            for label, row in enumerate(self.counts)
            for guess, count in enumerate(row)
            if label != guess and count
        ]
        return sorted(found, key=lambda pair: -pair[1])[:limit]


def confusion(record: Record) -> Confusion | None:
    """The confusion matrix of a run's summary; None if it has none."""
    evaluated = record.last("eval")
    counts = record.summary.get(f"{'ema_' if record.averages else ''}{evaluated.get('split')}_confusion")
    if not counts:
        return None
    heading = (
        f"{evaluated['num_examples'] - evaluated['correct']:,} of {evaluated['num_examples']:,} {evaluated['split']} images wrong"
    )
    return Confusion(counts, class_names(record.data_name), heading)


def step_label(records: list[Record]) -> str:
    """The label of the axis of steps: with the steps of an epoch, if all runs have the same."""
    lengths = {round(row["step"] / row["epoch"]) for record in records if (row := record.last("train")).get("epoch")}
    return f"step ({lengths.pop()} per epoch)" if len(lengths) == 1 else "step"
