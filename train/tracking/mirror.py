"""A run in W&B: what it is told, and how it is kept equal to the run directory. The only home of wandb.

Invariant: W&B's row number i (its own `_step`) is the i-th mirrored row of metrics.jsonl. So the number of rows that W&B has
says which ones it lacks: a restart and `launch sync` send those, rows of steps that are computed again are rewound, and nothing
is there twice. Everything is made from the run directory's files, so that it can be sent at any later time.
"""

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config import Config
from train.errors import PREEMPTED
from train.labels import class_names

MIRRORED = ("train", "eval", "weights")  # the events of the rows that W&B shows
PATIENT_START_SECONDS, FINISH_SECONDS, TRANSMIT_SECONDS = 10, 120, 5
MOST_MISTAKES = 24  # each is two files to upload

Row = dict[str, Any]


def wandb_id(run_dir: Path) -> str:
    """The W&B id of a run, made once (by a sweep's agent, or here) and kept beside it: a resume goes on in the same W&B run."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    return path.read_text().strip()


def read_summary(run_dir: Path) -> dict[str, Any]:
    """The contents of summary.json; empty if there is none."""
    path = run_dir / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def end_row(run_dir: Path, step: int) -> Row | None:
    """The row that stands for summary.json, with its numbers, if that says that the run finished at `step`; else None."""
    summary = read_summary(run_dir)
    if summary.get("outcome") != "finished" or summary["step"] != step:
        return None
    return {
        "event": "finished",
        "step": step,
        **{name: value for name, value in summary.items() if isinstance(value, float)},
    }


def brief(error: BaseException) -> str:
    """The beginning of an error's message, in one line."""
    return " ".join(str(error).split())[:80] or type(error).__name__


def remedy(run_dir: Path) -> str:
    """What to do when W&B lacks something."""
    return f"`python -m launch sync {run_dir}` sends the rest"


class Mirror:
    """A run in W&B, and how far it is: of the rows that it is given, it logs those that W&B lacks."""

    def __init__(self, config: Config, run_dir: Path, start: Row, say: Callable[[str], None]) -> None:
        """Import wandb. `start` is the row that says what this life of the run is about."""
        os.environ.pop("WANDB_MODE", None)  # we choose; and wandb refuses an empty one
        os.environ["WANDB_X_DISABLE_VIEWER"] = "true"  # else an unreachable server costs 16 s and more
        os.environ["WANDB_SILENT"] = "true"
        os.environ.setdefault("WANDB_DATA_DIR", str(run_dir / "wandb"))  # artifacts wait there for their upload
        import wandb

        self.wandb, self.config, self.run_dir, self.start, self.say = wandb, config, run_dir, start, say
        self.given = 0  # mirrored rows so far
        self.position = 0  # how many W&B has
        self.run: Any = None
        self.is_live = False

    def begin(self, mode: str, count: int) -> None:
        """Start or resume the run, online if that is wanted and possible, else offline; metrics.jsonl has kept `count` rows.

        Raises wandb's errors in mode `sync`, which takes nothing but a server.
        """
        self.is_live = mode != "sync"
        try:
            if mode != "offline":
                self._begin_online(self.config.wandb.start_seconds if mode == "auto" else PATIENT_START_SECONDS, count)
                self.say(f"wandb: online, {self.run.url}")
                return
            why = ""
        except (self.wandb.errors.Error, OSError) as error:
            if not self.is_live:
                raise
            self.wandb.teardown()
            why = f" ({brief(error)})"
        how = {"resume_from": f"{wandb_id(self.run_dir)}?_step={count - 1}"} if count else {}
        self.run, self.position = self._init(PATIENT_START_SECONDS, mode="offline", **how), count
        self.say(f"wandb: offline{why}; {remedy(self.run_dir)}")

    def _begin_online(self, seconds: int, count: int) -> None:
        """If W&B has more than `count` rows, those of steps that are computed again, rewind it.

        Where a server cannot, they stay and are not sent again: a step that is computed twice has the same values.
        """
        self.run = self._init(seconds, mode="online", resume="allow")
        if self.run.starting_step > count > 0:
            self.run.finish()
            try:
                self.run = self._init(seconds, mode="online", resume_from=f"{self.run.id}?_step={count - 1}")
            except self.wandb.errors.Error:
                self.run = self._init(seconds, mode="online", resume="allow")
        self.position = self.run.starting_step

    def _init(self, seconds: int, **how: Any) -> Any:
        options, dataset = self.config.wandb, self.start.get("data", {})
        tags, notes = list(options.tags), options.notes
        if dataset.get("is_fallback"):
            tags.append("fallback-data")
            loud = f"THIS IS NOT {self.config.data.name.upper()}: trained on the fallback data set {dataset['name']}."
            notes = f"{loud} {notes or ''}".strip()
        settings = self.wandb.Settings(
            init_timeout=seconds,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            console="off",
            program="-m train",
            x_disable_stats=not options.system,
            x_stats_pid=os.getppid(),
            x_file_stream_transmit_interval=TRANSMIT_SECONDS,
        )
        run = self.wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group,
            tags=tags,
            notes=notes,
            config={**dataclasses.asdict(self.config), "dataset": dataset, "world_size": self.start.get("world_size")},
            name=self.run_dir.name,
            id=wandb_id(self.run_dir),
            dir=str(self.run_dir),
            settings=settings,
            **how,
        )
        run.define_metric("*", step_metric="step")
        return run

    def send(self, row: Row) -> None:
        """Log a row, if it is one for W&B and W&B lacks it."""
        self.last = row
        if row["event"] in (*MIRRORED, "finished"):
            self.given += 1
            if self.given > self.position:
                self.run.log(self._payload(row))

    def _payload(self, row: Row) -> dict[str, Any]:
        """What W&B is told of a row: its numbers as `event/name` beside `step`, histograms and media as W&B's types."""
        event = "eval_ema" if row.get("ema") else row["event"]  # both are evaluated at one step
        shown = {f"{event}/{name}": value for name, value in row.items() if type(value) in (int, float)}
        shown |= {"step": row["step"], "_timestamp": shown.pop(f"{event}/time", time.time())}
        del shown[f"{event}/step"]
        if event == "weights":
            import numpy as np

            for name, value in row.items():
                if isinstance(value, list):
                    low, high, counts = value
                    bins = np.array(counts), np.linspace(low, high, len(counts) + 1)
                    shown[f"weights/{name}"] = self.wandb.Histogram(np_histogram=bins)
        if event == "finished":
            shown |= self._media()
        return shown

    def _media(self) -> dict[str, Any]:
        """The pictures and tables of a finished run, from its summary.json and samples.safetensors."""
        options, summary = self.config.wandb, read_summary(self.run_dir)
        shown: dict[str, Any] = {}
        names = class_names(summary["data"]["name"])
        order = ("ema_test_confusion", "test_confusion", "ema_validation_confusion", "validation_confusion")
        confusion = next((summary[name] for name in order if name in summary), None)
        if options.confusion and confusion:
            fields: list[Any] = ["Actual", "Predicted", "nPredictions"]
            cells = [[names[i], names[j], count] for i, row in enumerate(confusion) for j, count in enumerate(row)]
            table = self.wandb.Table(columns=fields, data=cells)
            title = {"title": "confusion matrix"}
            shown["confusion"] = self.wandb.plot_table(
                "wandb/confusion_matrix/v1", table, dict(zip(fields, fields, strict=True)), title
            )
        path = RunDir(self.run_dir).samples
        if options.mistakes and path.exists():
            import numpy as np
            import safetensors.numpy

            tensors = safetensors.numpy.load_file(path)
            columns = ("images", "labels", "predictions", "confidences", "positions")
            mistakes = zip(*(tensors[f"mistakes_{name}"][:MOST_MISTAKES] for name in columns), strict=True)
            rows, images = [], []
            for image, label, predicted, confidence, position in mistakes:
                rows.append([self.wandb.Image(image), names[label], names[predicted], float(confidence), int(position)])
                text = f"{names[label]} taken for {names[predicted]}, {confidence:.1%}"
                images.append(self.wandb.Image(image, caption=text))
            fields = ["image", "label", "prediction", "confidence", "position"]
            shown["mistakes"] = self.wandb.Table(columns=fields, data=rows)
            shown["mistake_images"] = images
            filters = tensors["filters"]
            gray = (np.hstack(list(filters)) - filters.min()) / max(float(np.ptp(filters)), 1e-9) * 255
            shown["filters"] = self.wandb.Image(np.kron(gray.astype(np.uint8), np.ones((8, 8), np.uint8)))
        return shown

    def _send_results(self) -> None:
        """Send a finished run's summary, and its best and its last checkpoint as artifacts (W&B keeps equal ones once)."""
        summary = read_summary(self.run_dir)
        self.run.summary.update(
            {name: value for name, value in summary.items() if isinstance(value, (int, float, str, bool))}
        )
        aliases: dict[int, list[str]] = {summary["step"]: ["final"]}
        if summary["best"]:
            aliases.setdefault(summary["best"]["step"], []).append("best")
        for step, names in sorted(aliases.items()):
            path = self.run_dir / "checkpoints" / f"step-{step:08d}"
            if self.config.wandb.checkpoints and path.is_dir():
                artifact = self.wandb.Artifact(f"checkpoint-{self.run.id}", type="model", metadata={"step": step})
                artifact.add_dir(str(path), skip_cache=True, policy="immutable")
                self.run.log_artifact(artifact, aliases=names)

    def send_code(self) -> None:
        """Keep the source code as an artifact, if that is wanted."""
        if self.config.wandb.code:
            self.run.log_code(str(Path(__file__).parents[1]), name=f"source-{self.config.wandb.project}")

    def end(self) -> None:
        """Send what a finished run has at its end; tell W&B how the run ended."""
        exit_code = PREEMPTED if self.last["event"] == "preempted" else 1
        if row := end_row(self.run_dir, self.last["step"]):
            exit_code = 0
            self.send(row)
            self._send_results()
            self.alert(
                "finished", ", ".join(f"{name} {row[name]:.4f}" for name in row if name.endswith("accuracy")), "INFO"
            )
        if exit_code == PREEMPTED:
            self.run.mark_preempting()
        self.run.finish(exit_code=exit_code)

    def alert(self, what: str, text: str, level: str) -> None:
        """Send an alert, if that is wanted and not late."""
        if self.config.wandb.alerts and self.is_live:
            self.run.alert(f"{self.run_dir.name}"[:50] + f" {what}", text, level)
