"""Run directories -> what there is to say about the runs, from metrics.jsonl, summary.json and config.yaml alone.

Invariant: every figure was written by the run. Nothing is computed again, so neither torch nor the data are needed.
This module does not draw: `charts.py` makes SVG and `page.py` HTML.
"""

import itertools
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.functional.trajectory import trajectory
from train.rundir import EXAMPLE, Row, RunDir, Summary

# The fields of the config in the page's subtitle.
RECIPE = (
    "model.name",
    "train.global_batch_size",
    "optim.name",
    "optim.lr",
    "optim.schedule",
    "train.precision",
    "train.exact",
    "seed",
)


@dataclass(frozen=True)
class Attempt:
    """One start of a run, until its end or its next start."""

    world_size: Any
    points: list[tuple[float, int]]  # (seconds since 1970, step) of its rows
    end: str  # finished, preempted (SIGNAL), or not recorded: killed, crashed or still running
    is_preempted: bool


@dataclass(frozen=True)
class Record:
    """What a run directory holds. `summary` is None where there is none, or where it is older than the last row."""

    path: Path
    name: str
    rows: list[Row]
    summary: Summary | None
    config: dict[str, Any]

    def series(self, event: str, field: str) -> dict[int, float]:
        """Return {step: value} of a field of an event's rows, where it is a number.

        If the run averages its weights, the evaluations are those of the average: their rows come last.
        """
        rows = [row for row in self.rows if row["event"] == event]
        return {row["step"]: row[field] for row in rows if isinstance(row.get(field), (int, float))}

    def last(self, event: str) -> Row:
        """Return the last row of an event, or {}. Averaged weights are evaluated after the others, so they count."""
        return next((row for row in reversed(self.rows) if row["event"] == event), {})

    @property
    def attempts(self) -> list[Attempt]:
        """The starts of the run, without those that found nothing left to do."""
        starts = [place for place, row in enumerate(self.rows) if row["event"] == "start"]
        found: list[Attempt] = []
        for start, stop in itertools.pairwise([*starts, len(self.rows)]):
            rows = self.rows[start:stop]
            is_finished = rows[-1]["step"] == self.total_steps
            signals = [row.get("signal") for row in rows if row["event"] == "preempted" and not is_finished]
            end = f"preempted ({signals[0]})" if signals else "finished" if is_finished else "not recorded"
            if not is_finished or len(rows) > 1 or not found:
                points = [(row.get("time", 0.0), row["step"]) for row in rows]
                found.append(Attempt(rows[0].get("world_size"), points, end, bool(signals)))
        return found

    def marks(self, event: str) -> list[int]:
        """Return the steps at which the run was started again (`start`) or stopped (`preempted`)."""
        if event == "start":
            return [attempt.points[0][1] for attempt in self.attempts[1:]]
        return [attempt.points[-1][1] for attempt in self.attempts if attempt.is_preempted]

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint; -1 if there is none.

        A save writes its row first, and another if it fails.
        """
        events = {row["step"]: row["event"] for row in self.rows if row["event"] in ("saved", "save_failed")}
        return max((step for step, event in events.items() if event == "saved"), default=-1)

    @property
    def saved_weights(self) -> dict[int, str]:
        """SHA-256 of the weights at each step at which they were saved, and at the end."""
        found = {row["step"]: row["weights_sha256"] for row in self.rows if row["event"] == "saved"}
        return found | ({self.summary.step: self.summary.weights_sha256} if self.summary else {})

    @property
    def last_step(self) -> int:
        """The number of steps so far."""
        return self.rows[-1]["step"]

    @property
    def total_steps(self) -> int | None:
        """The step at which the run ends, if the run recorded it."""
        return self.last("start").get("total_steps")

    @property
    def is_averaged(self) -> bool:
        """Whether the averaged weights are the run's result."""
        return bool(self.last("eval").get("ema"))

    @property
    def weights(self) -> str | None:
        """SHA-256 of the weights that are the run's result; None without a summary."""
        return self.summary.final_weights_sha256 if self.summary else None

    @property
    def data(self) -> dict[str, Any]:
        """What the run recorded of its data."""
        return self.last("start").get("data") or {}

    @property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of the files that decide the weights: data, and the user's network and first weights if any."""
        return self.last("start").get("sha256") or {}

    @property
    def data_name(self) -> str:
        """The data set that was trained on, as far as it is recorded."""
        return self.data.get("name") or self.config.get("data", {}).get("name", "")


def read(run_dir: Path, name: str) -> Record:
    """Read a run directory. Raises UserError if it is none or holds nothing to draw."""
    files = RunDir(run_dir)
    if not files.metrics.is_file():
        problem = f"has no {files.metrics.name}" if run_dir.is_dir() else "is not a directory"
        raise UserError(f"{run_dir} {problem}. Expected the directory of a run, such as {EXAMPLE}.")
    rows = files.read_rows()
    if not any(row["event"] in ("train", "eval") for row in rows):
        raise UserError(f"{files.metrics} has no train or eval rows yet. Expected one per log.every_steps.")
    summary = files.read_summary()
    is_current = summary is not None and summary.step == rows[-1]["step"]
    return Record(run_dir, name, rows, summary if is_current else None, files.read_config() or {})


def read_all(run_dirs: list[Path]) -> list[Record]:
    """Read run directories. Each is named by its last part, or by its whole path where that part is not unique."""
    names = [RunDir(run_dir).name for run_dir in run_dirs]
    names = [name if names.count(name) == 1 else str(path) for path, name in zip(run_dirs, names, strict=True)]
    return [read(run_dir, name) for run_dir, name in zip(run_dirs, names, strict=True)]


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    whole = max(round(seconds), 0)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def spread(values: list[float], form: str) -> str:
    """Return a value, or the mean of several and their range, each formatted by `form`; a dash if there is none."""
    if not values:
        return "-"
    low, high = format(min(values), form), format(max(values), form)
    return format(sum(values) / len(values), form) + (f"\n({low} to {high})" if low != high else "")


def facts(records: list[Record]) -> dict[str, str]:
    """Return the main figures of one run, or of several that differ in the seed, by heading."""
    results = [result for record in records if (result := record.last("eval"))]
    wrong = [result["num_examples"] - result["correct"] for result in results]
    measured = [vars(record.summary) if record.summary else record.last("train") for record in records]
    seconds, speeds = (
        [values[name] for values in measured if values.get(name) is not None]
        for name in ("train_seconds", "images_per_second")
    )
    steps = [f"{record.last_step:,} of {record.total_steps or 0:,}" for record in records]
    outcomes = {record.summary.outcome if record.summary else "unfinished" for record in records} - {"finished"}
    attempts = [attempt for record in records for attempt in record.attempts]
    num_restarts = max(len(attempts) - len(records), 0)
    sizes = " → ".join(size for size, _ in itertools.groupby(str(attempt.world_size) for attempt in attempts))
    hashes = {record.weights for record in records}
    return {
        "accuracy": spread([result["accuracy"] for result in results], ".2%"),
        "wrong": f"{spread(wrong, '.4g')} of {results[-1]['num_examples']:,}" if results else "not evaluated",
        "loss": spread([result["loss"] for result in results], ".4f"),
        "steps": ", ".join([*dict.fromkeys(steps), *sorted(outcomes)]),
        "seconds of training": spread(seconds, ",.1f"),
        "images/s": spread(speeds, ",.0f"),
        "processes": f"{sizes} ({num_restarts} restart{'s' if num_restarts > 1 else ''})" if num_restarts else sizes,
        "weights": (hashes.pop() or "-")[:12] if len(hashes) == 1 else f"{len(hashes)} different",
    }


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed, or a single one: a line in each chart."""

    records: list[Record]

    @property
    def name(self) -> str:
        """The run's name, or the beginning that the names share."""
        if len(self.records) == 1:
            return self.records[0].name
        names = [record.name for record in self.records]
        common = os.path.commonprefix(names).rstrip("-_.=+") or names[0]  # noqa: RUF071 - of characters
        return f"{common}, {len(self.records)} seeds"

    def series(self, event: str, field: str) -> tuple[list[int], list[list[float]]]:
        """Return the steps that all runs have, and at each step the runs' values."""
        runs = [record.series(event, field) for record in self.records]
        steps = sorted(set.intersection(*map(set, runs)))
        return steps, [[run[step] for run in runs] for step in steps]


def groups(records: list[Record]) -> list[Group]:
    """Group runs that differ in nothing but the seed. Runs with the same seed are a comparison and stay apart."""
    alike: dict[str, list[Record]] = {}
    for record in records:
        fields = trajectory(record.config) | {"seed": None, "sha256": record.sha256}
        key = json.dumps(fields, sort_keys=True, default=str) if record.config else record.name
        alike.setdefault(key, []).append(record)
    found = []
    for same in alike.values():
        has_distinct_seeds = len({record.config.get("seed") for record in same}) == len(same)
        found += [Group(same)] if has_distinct_seeds else [Group([record]) for record in same]
    return found


def title(records: list[Record]) -> str:
    """Return the result in a few words."""
    record, hashes = records[-1], {each.weights for each in records}
    if len(records) > 1:
        same = ", the same weights bit for bit" if len(hashes) == 1 and None not in hashes else ""
        return f"{len(records)} runs{same}"
    result = record.last("eval")
    if not result:
        return f"{record.name}: not evaluated yet"
    text = f"{result['accuracy']:.2%} of {result['num_examples']:,} {record.data_name} {result['split']} images"
    return f"{text}, averaged weights" if record.is_averaged else text


def subtitle(records: list[Record]) -> str:
    """Return in one line how the runs were trained: what their configs have in common."""
    configs = [flat(record.config) for record in records]
    shared = [name for name in RECIPE if name in configs[0] and len({str(config.get(name)) for config in configs}) == 1]
    return "   ·   ".join([records[-1].data_name, *(f"{name} {configs[0][name]}" for name in shared)])


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return `{"section.field": value}` of what config.yaml holds, without the section `run`."""
    found = {"seed": config.get("seed")} if config else {}
    for section, fields in config.items():
        if isinstance(fields, dict) and section != "run":
            found |= {f"{section}.{name}": value for name, value in fields.items()}
    return found


def banner(records: list[Record]) -> str:
    """Return the warning that a run was not trained on the data that was asked for; "" if all were."""
    fallen = [record for record in records if record.data.get("is_fallback")]
    if not fallen:
        return ""
    asked = fallen[0].config.get("data", {}).get("name", "mnist").upper()
    which = f" ({', '.join(record.name for record in fallen)})" if len(records) > 1 else ""
    return f"THIS IS NOT {asked}: trained on the fallback data set {fallen[0].data_name}{which}"


def step_label(records: list[Record]) -> str:
    """Return the label of the axis of steps: with the steps of an epoch, if all runs have the same."""
    lengths = {round(row["step"] / row["epoch"]) for record in records if (row := record.last("train")).get("epoch")}
    return f"step ({lengths.pop()} per epoch)" if len(lengths) == 1 else "step"


def phases(record: Record) -> dict[str, str]:
    """Return each phase's share of the last attempt's time, with its range over the ranks."""
    shares = record.summary.phases if record.summary else {}
    return {name: spread(values, ".1%") for name, values in shares.items() if name != "seconds"}


def environment(record: Record) -> dict[str, Any]:
    """Return where and with what a run was trained, by name."""
    command = map(str, record.last("start").get("command", []))
    found = {f"data.{name}": value for name, value in record.data.items() if name != "class_names"}
    found |= {f"{name} SHA-256": value for name, value in record.sha256.items()}
    found["command"] = shlex.join(["python", "-m", "train", *command])
    if record.summary:
        machine = record.summary.environment
        found["device"] = f"{record.summary.device} {machine.get('device', '')}"
        found["CPU threads per process"] = machine.get("num_threads")
        found |= record.summary.versions
        found |= {"commit": record.summary.git_commit, "weights SHA-256": record.weights}
    return found
