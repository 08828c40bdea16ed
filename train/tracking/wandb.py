"""Show a run in W&B. A process of its own follows metrics.jsonl, so that nothing W&B does can reach training.

Training starts that process and tells it when the run is over. Everything else comes from the run directory, so that
`launch sync` can send at any later time what is missing.

Invariant: row i in W&B (its own `_step`) is row i of the SHOWN rows of metrics.jsonl, and the summary of a finished run
is one more row. So the number of rows in W&B tells which ones are missing, and no row is sent twice.
"""

import os
import secrets
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.config import WandbConfig
from train.errors import CRASHED, FINISHED, PREEMPTED, UserError, did_you_mean, one_line
from train.rundir import Row, RunDir, Summary, Tail
from train.world import signals
from train.world.process import die_with_parent

SHOWN = ("train", "eval", "weights")  # events whose rows W&B shows
MAX_CLASSES = 100  # of a confusion matrix with all its zeros
POLL_SECONDS, SYNC_SECONDS, FINISH_SECONDS = 0.5, 10, 120
MAX_MISTAKES = 24  # each is a file to upload
ON = ("true", "1", "yes", "on")
MODES: dict[str, Any] = {"online": "online", "offline": "offline", "disabled": "disabled"}
MODES |= {"run": "online", "dryrun": "offline", **dict.fromkeys(("false", "0", "off", "no"), "disabled")}


def resolve(config: WandbConfig) -> WandbConfig:
    """Fill in mode and project from $WANDB_MODE, $WANDB_DISABLED, $WANDB_PROJECT and $WANDB_ENTITY where unset.

    Raises UserError for a mode that does not exist.
    """
    asked, is_disabled = os.environ.get("WANDB_MODE", ""), os.environ.get("WANDB_DISABLED", "").lower() in ON
    mode: Any = {**MODES, "": "disabled" if is_disabled else "online"}.get(asked.lower())
    if config.mode == "auto" and mode is None:
        hint = did_you_mean(asked, list(MODES), "Use online, offline or disabled.")
        raise UserError(f"WANDB_MODE is {asked}. {hint}")
    project, entity = config.project or os.environ.get("WANDB_PROJECT") or "lockstep", os.environ.get("WANDB_ENTITY")
    project = f"{entity}/{project}" if entity and "/" not in project else project
    return replace(config, mode=mode if config.mode == "auto" else config.mode, project=project)


def wandb_id(run_dir: RunDir) -> str:
    """Return the run's id in W&B, from its file. The first call draws it, or takes it from a sweep's agent.

    A second training of the same trial gets one of its own.
    """
    if not run_dir.wandb_id.exists():
        taken = {path.read_text().strip() for path in run_dir.path.parent.glob(f"*/{run_dir.wandb_id.name}")}
        given = os.environ.get("WANDB_RUN_ID")
        run_dir.wandb_id.write_text(given if given and given not in taken else secrets.token_hex(4))
    return run_dir.wandb_id.read_text().strip()


def remedy(run_dir: Path) -> str:
    """Return what to do about missing rows."""
    return f"`python -m launch sync {run_dir}` sends the rest"


class Follower:
    """Training's side: start the process that follows the run, print its lines, and end it."""

    def __init__(self, config: WandbConfig, run_dir: Path, say: Callable[[str], None]) -> None:
        """Start it. metrics.jsonl must have the `start` row of this attempt."""
        self.seconds, self.run_dir, self.say = config.timeout, run_dir, say
        self.process = subprocess.Popen(
            (sys.executable, "-m", "train.tracking.wandb", str(run_dir.resolve()), config.mode),
            cwd=Path(__file__).parents[2],  # W&B stores the state of git in the working directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="backslashreplace",
        )
        self.printer = threading.Thread(target=self._print_lines, daemon=True)
        self.printer.start()

    def _print_lines(self) -> None:
        for line in self.process.stdout or ():
            self.say(line.rstrip())

    def close(self) -> None:
        """Tell it that the run is over, and give it wandb.timeout seconds to send what is left."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(self.seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.say(f"wandb: not done after {self.seconds} s; {remedy(self.run_dir)}")
        self.printer.join(POLL_SECONDS)


class Mirror:
    """A run directory and its run in W&B."""

    def __init__(self, path: Path, mode: str) -> None:
        """Read the run directory, and start or resume the run in W&B. Mode `sync` is for a run that has ended.

        If W&B has rows of steps that are computed again, they are removed. If the server does not offer that, they stay
        and are not sent again: the same step gives the same values. Raises one of wandb's errors if the mode is not
        offline and the server does not answer in time.
        """
        import wandb

        os.environ.pop("WANDB_MODE", None)  # we choose the mode, and wandb refuses an empty one
        os.environ["WANDB_SILENT"] = "true"
        os.environ["WANDB_X_DISABLE_VIEWER"] = "true"  # otherwise an unreachable server costs at least 16 s
        os.environ.setdefault("WANDB_DATA_DIR", str(path / "wandb"))  # artifacts wait there for their upload
        self.run_dir = RunDir(path)
        self.config = self.run_dir.read_config() or {}
        try:
            self.options = WandbConfig(**self.config["wandb"])
        except (KeyError, TypeError):
            raise UserError(f"{self.run_dir.config} is of another lockstep version. Sync it with that.") from None
        self.tail = Tail(self.run_dir.metrics)
        rows = self.run_dir.read_rows()
        start = max((number for number, row in enumerate(rows) if row["event"] == "start"), default=0)
        self.start = self.last = rows[start]
        old = [] if mode == "sync" else rows[:start]  # of earlier attempts, which this one continues
        num_old = sum(row["event"] in SHOWN for row in old)
        self.run = self._init(mode, num_old if mode == "offline" else 0)
        if self.run.starting_step > num_old > 0:
            self.run.finish()
            try:
                self.run = self._init(mode, num_old)
            except wandb.errors.Error:
                self.run = self._init(mode)
        self.num_had = self.run.starting_step  # rows in W&B before any were sent
        self.num_seen = 0  # rows that W&B had or that were sent

    def _init(self, mode: str, num_rows: int = 0) -> Any:
        """Start the run in W&B or resume it; after `num_rows` rows, unless that is 0."""
        import wandb

        data = self.start.get("data", {})
        entity, _, project = (self.options.project or "").rpartition("/")
        run_id = wandb_id(self.run_dir)
        settings = wandb.Settings(
            init_timeout=SYNC_SECONDS if mode == "sync" else self.options.timeout,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            console="off",
            program="-m train",
            x_stats_pid=os.getppid(),
        )
        run = wandb.init(
            mode="offline" if mode == "offline" else "online",
            project=project,
            entity=entity or None,
            group=self.options.group or None,
            tags=[*self.options.tags, "fallback-data"] if data.get("is_fallback") else self.options.tags,
            notes=self.options.notes or None,
            config={**self.config, "dataset": data, "world_size": self.start.get("world_size")},
            name=self.run_dir.name,
            id=run_id,
            resume=None if num_rows else "allow",
            resume_from=f"{run_id}?_step={num_rows - 1}" if num_rows else None,
            dir=str(self.run_dir.path),
            settings=settings,
        )
        run.define_metric("*", step_metric="step")
        return run

    def send_rows(self) -> None:
        """Log the new rows that W&B lacks."""
        for row in self.tail.rows():
            self.last = row
            if row["event"] in SHOWN:
                self._log(payload(row))

    def _log(self, shown: dict[str, Any]) -> None:
        """Log the next row, unless W&B has it."""
        if self.num_seen >= self.num_had:
            self.run.log(shown)
        self.num_seen += 1

    def end(self) -> None:
        """Send the results of a finished run, and tell W&B how the run ended."""
        exit_code, step, summary = CRASHED, self.last["step"], self.run_dir.read_summary()
        if summary and summary.final and summary.step == step:  # otherwise it is of an earlier attempt
            exit_code = FINISHED
            fields = {**vars(summary), **vars(summary.final)}
            shown = {
                f"finished/{name}": value for name, value in fields.items() if isinstance(value, (int, float, str))
            }
            if self.options.media:
                shown |= media(self.run_dir, summary.data["class_names"], summary.final.confusion)
            self._log({**shown, "step": step, "_timestamp": self.last["time"]})
            if self.options.artifacts:
                self._send_checkpoints(summary)
        elif self.last["event"] == "preempted":
            exit_code = PREEMPTED
            self.run.mark_preempting()
        self.run.finish(exit_code=exit_code)

    def _send_checkpoints(self, summary: Summary) -> None:
        """Keep the best and the last checkpoint as artifacts. W&B stores equal ones once."""
        import wandb

        steps = {"final": summary.step, "best": summary.best["step"] if summary.best else summary.step}
        for step in sorted(set(steps.values())):
            path = self.run_dir.checkpoints / f"step-{step:08d}"
            if path.is_dir():
                artifact = wandb.Artifact(f"checkpoint-{self.run.id}", type="model", metadata={"step": step})
                artifact.add_dir(str(path), skip_cache=True, policy="immutable")
                self.run.log_artifact(artifact, aliases=[alias for alias in steps if steps[alias] == step])


def payload(row: Row) -> dict[str, Any]:
    """Return what W&B shows of a row over its step: its numbers and histograms, as `event/name`."""
    import numpy as np
    import wandb

    group = "eval_ema" if row.get("ema") else row["event"]  # raw and averaged weights are evaluated at the same step
    shown: dict[str, Any] = {"step": row["step"], "_timestamp": row["time"]}
    for name, value in row.items():
        if type(value) in (int, float) and name not in ("step", "time"):
            shown[f"{group}/{name}"] = value
        elif group == "weights" and isinstance(value, list):
            low, high, counts = value
            edges = np.linspace(low, high, len(counts) + 1)
            shown[f"{group}/{name}"] = wandb.Histogram(np_histogram=(np.array(counts), edges))
    return shown


def media(run_dir: RunDir, names: list[str], confusion: list[list[int]]) -> dict[str, Any]:
    """Return the confusion matrix of a finished run and images of its most confident mistakes."""
    import safetensors.numpy
    import wandb

    columns: list[Any] = ["Actual", "Predicted", "nPredictions"]
    counts = [(i, j, count) for i, row in enumerate(confusion) for j, count in enumerate(row)]
    cells = [[names[i], names[j], count] for i, j, count in counts if count or len(names) <= MAX_CLASSES]
    table, axes = wandb.Table(columns, cells), {name: name for name in columns}
    title = {"title": "confusion matrix"}
    shown: dict[str, Any] = {"confusion": wandb.plot_table("wandb/confusion_matrix/v1", table, axes, title)}
    if run_dir.samples.exists():
        tensors = safetensors.numpy.load_file(run_dir.samples)
        fields = ("images", "labels", "predictions", "confidences")
        mistakes = zip(*(tensors[f"mistakes_{field}"][:MAX_MISTAKES] for field in fields), strict=True)
        shown["mistakes"] = [
            wandb.Image(pixels.transpose(1, 2, 0), caption=f"{names[label]} taken for {names[guess]}, {confidence:.1%}")
            for pixels, label, guess, confidence in mistakes
        ]
    return shown


def sync(run_dir: Path) -> str:
    """Send the missing rows of a run that has ended; return one line. Raises ConnectionError if that fails."""
    try:
        mirror = Mirror(run_dir.resolve(), "sync")
        mirror.send_rows()
        mirror.end()
    except UserError:
        raise
    except Exception as error:
        raise ConnectionError(one_line(error, 80)) from error
    num_missing = max(0, mirror.num_seen - mirror.num_had)
    return f"{run_dir}: {num_missing} of {mirror.num_seen} rows sent, W&B had the others; {mirror.run.url}"


def follow(run_dir: Path, mode: str) -> None:
    """Show a run that trains, until training closes standard input."""
    import wandb

    try:
        mirror, reason = Mirror(run_dir, mode), ""
    except (wandb.errors.Error, OSError) as error:
        wandb.teardown()
        mirror, reason = Mirror(run_dir, "offline"), f" ({one_line(error, 80)})"
    url = mirror.run.url  # None if offline
    print(f"wandb: online, {url}" if url else f"wandb: offline{reason}; {remedy(run_dir)}", flush=True)
    if mirror.options.artifacts:
        mirror.run.log_code(str(Path(__file__).parents[1]), name=f"source-{mirror.run.project}")
    is_over = False
    while not is_over:
        is_over = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
        mirror.send_rows()  # once it is over, all rows are there
    mirror.end()


def main(run_dir: Path, mode: str) -> None:
    """Follow a run, as a process. A signal to all processes of a job does not end it: training decides when it ends."""
    die_with_parent(os.getppid())
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        follow(run_dir, mode)
    except Exception as error:  # whatever it is, it must not reach training
        print(f"wandb: stopped ({one_line(error, 80)}); {remedy(run_dir)}", flush=True)
    os._exit(FINISHED)  # at exit wandb would wait for a server that does not answer


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
