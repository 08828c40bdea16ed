"""Run directories -> what there is to say about the runs, from metrics.jsonl, summary.json and config.yaml alone.

Invariant: what is said was written by the run; nothing is computed again, so neither torch nor the data are needed.
It knows the files and the words, but no format: `charts.py` draws and `page.py` writes HTML.
"""

import json
import os
import shlex
from dataclasses import dataclass
from itertools import compress, groupby
from pathlib import Path
from typing import Any

from train.cli import load_yaml
from train.errors import UserError
from train.functional.trajectory import trajectory

Row = dict[str, Any]
MOST_RANKS = 8  # that have a column of their own


@dataclass(frozen=True)
class Life:
    """What a run's processes did from one start to the next."""

    world_size: Any
    start_step: int
    end_step: int
    start_time: float  # seconds since 1970
    end_time: float  # of the last row
    end: str  # finished, preempted (SIGNAL), or "no word of its end": killed, crashed, or running still
    points: list[tuple[float, int]]  # (time, step) of the rows


@dataclass(frozen=True)
class Record:
    """What a run directory says. `summary` is empty where there is none, or where it is older than the last row."""

    path: Path
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

    @property
    def lives(self) -> list[Life]:
        """What happened between the starts; a start that found nothing left to do is none."""
        stretches: list[list[Row]] = []
        for row in self.rows:
            if row["event"] == "start":
                stretches.append([])
            if stretches:
                stretches[-1].append(row)
        found: list[Life] = []
        for rows in stretches:
            first, last = rows[0], rows[-1]
            if len(rows) == 1 and found and first["step"] == self.total_steps:
                continue
            preempted = next((row for row in rows if row["event"] == "preempted"), None)
            end = f"preempted ({preempted.get('signal')})" if preempted else "no word of its end"
            end = "finished" if last["step"] == self.total_steps else end
            points = [(row["time"], row["step"]) for row in rows if "time" in row]
            times = [time for time, _ in points] or [0.0]
            found.append(Life(first.get("world_size"), first["step"], last["step"], times[0], times[-1], end, points))
        return found

    @property
    def total_steps(self) -> int | None:
        """The step at which the run ends, if it says so."""
        return self.summary.get("total_steps", self.last("start").get("total_steps"))

    def marks(self, event: str) -> list[int]:
        """Steps at which the run was started again (`start`) or left (`preempted`)."""
        steps = [life.start_step if event == "start" else life.end_step for life in self.lives]
        preempted = [life.end.startswith("preempted") for life in self.lives]
        return sorted(set(steps[1:] if event == "start" else compress(steps, preempted)))

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
    rows = parse_rows(path.read_text(errors="replace"))
    if not any(row["event"] in ("train", "eval") for row in rows):
        raise UserError(
            f"{path} has no train or eval rows. Expected one per log.every_steps; try again when the run has some."
        )
    summary = read_mapping(run_dir / "summary.json", json.loads)
    is_current = summary.get("step") == rows[-1]["step"]
    kept: dict[str, Any] = (
        summary if is_current else {key: summary[key] for key in ("data", "total_steps") if key in summary}
    )
    return Record(run_dir, name, rows, kept, read_mapping(run_dir / "config.yaml", load_yaml))


def parse_rows(text: str) -> list[Row]:
    """The rows of a metrics.jsonl; a torn line, which a kill can leave, is none."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        rows += [row] if isinstance(row, dict) and {"event", "step"} <= row.keys() else []
    return rows


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
        read(run_dir, name if names.count(name) == 1 else str(run_dir))
        for run_dir, name in zip(run_dirs, names, strict=True)
    ]


def spread(values: list[float], form: str) -> str:
    """A value, or the mean of several and their range, each formatted by `form`; a dash if there is none."""
    if not values:
        return "-"
    low, high = format(min(values), form), format(max(values), form)
    return format(sum(values) / len(values), form) + (f"\n({low} to {high})" if low != high else "")


def facts(records: list[Record]) -> dict[str, str]:
    """What there is to say of one run, or of several that are alike, in a few figures, by heading."""
    results = [result for record in records if (result := record.last("eval"))]
    ends = sorted({record.rows[-1]["step"] for record in records})
    total = {record.total_steps for record in records}
    steps = " to ".join(f"{end:,}" for end in ends[:: max(len(ends) - 1, 1)])
    outcomes = {record.summary.get("outcome", "unfinished") for record in records} - {"finished"}
    seconds = [record.summary.get("train_seconds", record.last("train").get("train_seconds")) for record in records]
    speeds = [
        record.summary.get("images_per_second") or record.last("train").get("images_per_second") for record in records
    ]
    wrong = [result["num_examples"] - result["correct"] for result in results]
    sizes: list[str] = [
        size for record in records for size, _ in groupby(str(life.world_size) for life in record.lives)
    ]
    sizes = list(dict.fromkeys(sizes)) if len(records) > 1 else sizes
    restarts = sum(max(len(record.lives) - 1, 0) for record in records)
    restarted = f" ({restarts} restart{'s'[: restarts > 1]})" if restarts else ""
    hashes = {record.weights for record in records}
    return {
        "accuracy": spread([result["accuracy"] for result in results], ".2%"),
        "wrong": f"{spread(wrong, '.4g')} of {results[-1]['num_examples']:,}" if results else "not evaluated",
        "loss": spread([result["loss"] for result in results], ".4f"),
        "steps": steps
        + (f" of {total.pop():,}" if len(total) == 1 and None not in total else "")
        + "".join(f", {o}" for o in sorted(outcomes)),
        "seconds of training": spread([value for value in seconds if value is not None], ",.1f"),
        "images/s": spread([value for value in speeds if value], ",.0f"),
        "processes": (" → ".join(sizes if len(sizes) <= 4 else [sizes[0], "...", sizes[-1]]) or "-") + restarted,
        "weights": (hashes.pop() or "-")[:12] if len(hashes) == 1 else f"{len(hashes)} different",
    }


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed, or a single one: a line in each chart."""

    records: list[Record]

    @property
    def name(self) -> str:
        """The run's name, or what the names have in common."""
        if len(self.records) == 1:
            return self.records[0].short_name
        names = [record.name for record in self.records]
        common = os.path.commonprefix(names).rstrip("-_.=+") or names[0]  # noqa: RUF071 - of characters
        return f"{common}, {len(self.records)} seeds"

    def series(self, event: str, field: str, ema: bool | None = None) -> tuple[list[int], list[list[float]]]:
        """The steps that all runs have, and at each the runs' values."""
        runs = [dict(zip(*record.series(event, field, ema), strict=True)) for record in self.records]
        steps = sorted(set.intersection(*map(set, runs)))
        return steps, [[run[step] for run in runs] for step in steps]


def groups(records: list[Record]) -> list[Group]:
    """Put runs together that differ in nothing but the seed. The same seed twice is a comparison: such runs stay apart."""
    alike: dict[str, list[Record]] = {}
    for record in records:
        fields = trajectory(record.config) | {"seed": None, "data_sha256": record.data.get("sha256")}
        alike.setdefault(json.dumps(fields, sort_keys=True, default=str) if record.config else record.name, []).append(
            record
        )
    found = []
    for same in alike.values():
        distinct = len({record.config.get("seed") for record in same}) == len(same)
        found += [Group(same)] if distinct else [Group([record]) for record in same]
    return found


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


def step_label(records: list[Record]) -> str:
    """The label of the axis of steps: with the steps of an epoch, if all runs have the same."""
    lengths = {round(row["step"] / row["epoch"]) for record in records if (row := record.last("train")).get("epoch")}
    return f"step ({lengths.pop()} per epoch)" if len(lengths) == 1 else "step"


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """`{"section.field": value}` of what config.yaml holds."""
    sections = {name: value if isinstance(value, dict) else {"": value} for name, value in config.items()}
    return {
        f"{name}.{field}".rstrip("."): value for name, fields in sections.items() for field, value in fields.items()
    }


def phases(records: list[Record]) -> dict[str, dict[str, str]]:
    """{column: {phase: share of the last life's time}}: a column per rank of one run on a few, else per run, over its ranks."""
    columns: dict[str, dict[str, str]] = {}
    for record in records:
        shares = {name: values for name, values in record.summary.get("phases", {}).items() if name != "seconds"}
        num_ranks = max(map(len, shares.values()), default=0)
        if len(records) == 1 and 1 < num_ranks <= MOST_RANKS:
            columns |= {
                f"rank {rank}": {name: f"{shares[name][rank]:.1%}" for name in shares} for rank in range(num_ranks)
            }
        else:
            columns[record.name] = {name: spread(values, ".1%") for name, values in shares.items()}
    return columns


def environment(record: Record) -> dict[str, str]:
    """Where and with what a run was trained, by heading."""
    summary, data, start = record.summary, record.data, record.last("start")
    contract = summary.get("contract", {})
    versions = {"lockstep": "", "python": "", **summary.get("versions", {})}
    sizes = [f"{data[name]:,} {name[4:-9]}" for name in data if name.startswith("num_")]
    device = " ".join(filter(None, (summary.get("device"), contract.get("device"))))
    threads = f", {contract['num_threads']} thread(s) per process" if contract.get("num_threads") else ""
    found = {
        "data": f"{record.data_name}: {', '.join(sizes)} images" if sizes else record.data_name,
        "data SHA-256": data.get("sha256", "")[:16],
        "fallback data": "YES" if data.get("is_fallback") else "no",
        "device": device + threads if device else "",
        "processes": " → ".join(str(life.world_size) for life in record.lives),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
        "commit": summary.get("git_commit") or "",
        "command": shlex.join(["python", "-m", "train", *map(str, start.get("command", []))]),
        "weights SHA-256": record.weights or "",
    }
    return {name: text for name, text in found.items() if text}
