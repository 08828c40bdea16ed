"""Show a run in W&B. A process of its own follows metrics.jsonl, so that nothing W&B does can reach training.

Training starts that process and tells it when the run is over. Everything else comes from the run directory, so that
`launch sync` can send at any later time what is missing.

Invariant: row i in W&B (its own `_step`) is row i of the SHOWN rows of metrics.jsonl, and the summary of a finished run
is one more row. So the number of rows in W&B tells which ones are missing, and no row is sent twice.
"""

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from train.config import Config, WandbConfig, class_names
from train.errors import CRASHED, FINISHED, PREEMPTED, UserError, one_line
from train.rundir import Row, RunDir, Summary, Tail
from train.world import signals
from train.world.process import die_with_parent

SHOWN = ("train", "eval", "weights")  # events whose rows W&B shows
POLL_SECONDS, SYNC_SECONDS, FINISH_SECONDS, TRANSMIT_SECONDS = 0.5, 10, 120, 5
MAX_MISTAKES = 24  # each is two files to upload


def mode_of(config: Config) -> str:
    """Return wandb.mode, or in mode auto that of $WANDB_MODE."""
    return os.environ.get("WANDB_MODE") or "auto" if config.wandb.mode == "auto" else config.wandb.mode


def wandb_id(run_dir: RunDir) -> str:
    """Return the run's id in W&B, from its file. The first call draws it, or takes it from a sweep's agent."""
    if not run_dir.wandb_id.exists():
        run_dir.wandb_id.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    return run_dir.wandb_id.read_text().strip()


def finished_summary(run_dir: RunDir, step: int) -> Summary | None:
    """Return the summary of a run that finished at `step`. None if there is none, or an older one."""
    summary = run_dir.read_summary()
    return summary if summary and summary.outcome == "finished" and summary.step == step else None


def remedy(run_dir: Path) -> str:
    """Return what to do about missing rows."""
    return f"`python -m launch sync {run_dir}` sends the rest"


class Follower:
    """Training's side: start the process that follows the run, print its lines, and end it."""

    def __init__(self, config: Config, run_dir: Path, say: Callable[[str], None]) -> None:
        """Start it. metrics.jsonl must have the `start` row of this attempt."""
        self.seconds, self.run_dir, self.say = config.wandb.timeout, run_dir, say
        command = (sys.executable, "-m", "train.tracking.wandb", str(run_dir.resolve()), mode_of(config))
        root = Path(__file__).parents[2]  # W&B stores the state of git in the working directory
        self.process = subprocess.Popen(
            command,
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="backslashreplace",  # an error may name a path that is not UTF-8
        )
        self.printer = threading.Thread(target=self._print_lines, daemon=True)
        self.printer.start()

    def _print_lines(self) -> None:
        for line in self.process.stdout or ():
            self.say(line.rstrip())

    def close(self, error: BaseException | None) -> None:
        """Tell it which error, if any, ended the run, and give it wandb.timeout seconds to send what is left."""
        assert self.process.stdin
        try:
            with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
                pipe.write((one_line(error, 2000) if error else "") + "\n")
            self.process.wait(self.seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.say(f"wandb: not done after {self.seconds} s; {remedy(self.run_dir)}")
        self.printer.join(POLL_SECONDS)


class Mirror:
    """A run directory and its run in W&B."""

    def __init__(self, path: Path, mode: str) -> None:
        """Read the run directory, and start or resume the run in W&B. Mode `sync` is for a run that has ended.

        Raises one of wandb's errors if the mode is not offline and the server does not answer in time.
        """
        os.environ.pop("WANDB_MODE", None)  # we choose the mode, and wandb refuses an empty one
        os.environ["WANDB_SILENT"] = "true"
        os.environ["WANDB_X_DISABLE_VIEWER"] = "true"  # otherwise an unreachable server costs at least 16 s
        os.environ.setdefault("WANDB_DATA_DIR", str(path / "wandb"))  # artifacts wait there for their upload
        self.run_dir, self.is_live = RunDir(path), mode != "sync"
        self.config = self.run_dir.read_config() or {}
        try:
            self.options = WandbConfig(**self.config["wandb"])
        except (KeyError, TypeError):
            raise UserError(f"{self.run_dir.config} is of another lockstep version. Sync it with that.") from None
        self.tail = Tail(self.run_dir.metrics)
        self.unread = self.tail.rows()
        start = max((number for number, row in enumerate(self.unread) if row["event"] == "start"), default=0)
        self.start = self.last = self.unread[start]
        old = self.unread[: start + 1] if self.is_live else self.unread
        is_finished = finished_summary(self.run_dir, old[-1]["step"]) is not None
        self.num_old = sum(row["event"] in SHOWN for row in old) + is_finished  # rows from before this attempt
        self.num_seen = 0  # rows that W&B had or that were sent
        self.run = self._init("offline", rewind=self.num_old > 0) if mode == "offline" else self._init_online()
        self.num_had = self.num_old if mode == "offline" else self.run.starting_step  # rows in W&B before any were sent

    def _init_online(self) -> Any:
        """Start or resume the run online. If W&B has rows of steps that are computed again, remove them.

        If the server does not offer that, the rows stay and are not sent again: the same step gives the same values.
        """
        import wandb

        run = self._init("online")
        if run.starting_step > self.num_old > 0:
            run.finish()
            try:
                run = self._init("online", rewind=True)
            except wandb.errors.Error:
                run = self._init("online")
        return run

    def _init(self, mode: Literal["online", "offline"], *, rewind: bool = False) -> Any:
        import wandb

        data, tags, notes = self.start.get("data", {}), list(self.options.tags), self.options.notes
        if data.get("is_fallback"):
            tags.append("fallback-data")
            asked = self.config["data"]["name"].upper()
            notes = f"THIS IS NOT {asked}: trained on the fallback data set {data['name']}. {notes or ''}".strip()
        entity, _, project = self.options.project.rpartition("/")
        run_id = wandb_id(self.run_dir)
        settings = wandb.Settings(
            init_timeout=self.options.timeout if self.is_live else SYNC_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            console="off",
            program="-m train",
            x_stats_pid=os.getppid(),
            x_file_stream_transmit_interval=TRANSMIT_SECONDS,
        )
        run = wandb.init(
            mode=mode,
            project=project,
            entity=entity or None,
            group=self.options.group,
            tags=tags,
            notes=notes,
            config={**self.config, "dataset": data, "world_size": self.start.get("world_size")},
            name=self.run_dir.name,
            id=run_id,
            resume=None if rewind else "allow",
            resume_from=f"{run_id}?_step={self.num_old - 1}" if rewind else None,
            dir=str(self.run_dir.path),
            settings=settings,
        )
        run.define_metric("*", step_metric="step")
        return run

    def send_rows(self) -> None:
        """Log the new rows that W&B lacks."""
        rows, self.unread = self.unread + self.tail.rows(), []
        self.last = [self.last, *rows][-1]
        for row in rows:
            if row["event"] in SHOWN:
                if self.num_seen >= self.num_had:
                    self.run.log(payload(row))
                self.num_seen += 1

    def end(self, error: str = "") -> None:
        """Send the results of a finished run, and tell W&B how the run ended."""
        exit_code, step = CRASHED, self.last["step"]
        summary = finished_summary(self.run_dir, step)
        if summary and (final := summary.final):
            exit_code = FINISHED
            if self.num_seen >= self.num_had:
                fields = {**vars(summary), **vars(final)}
                fields = {name: value for name, value in fields.items() if isinstance(value, (int, float, str))}
                shown = {f"finished/{name}": value for name, value in fields.items()}
                shown |= media(self.run_dir, summary.data["name"], final.confusion) if self.options.media else {}
                self.run.log({**shown, "step": step, "_timestamp": self.last["time"]})
            self.num_seen += 1
            if self.options.artifacts:
                self._send_checkpoints(summary)
            self._alert("finished", f"accuracy {final.accuracy:.4f}", "INFO")
        elif self.last["event"] == "preempted":
            exit_code = PREEMPTED
            self.run.mark_preempting()
            self._alert("preempted", f"at step {step} by {self.last['signal']}", "WARN")
        if error:
            self._alert("failed", error, "ERROR")
        self.run.finish(exit_code=exit_code)

    def _send_checkpoints(self, summary: Summary) -> None:
        """Keep the best and the last checkpoint as artifacts. W&B stores equal ones once."""
        import wandb

        aliases = {summary.step: ["final"]}
        if summary.best:
            aliases.setdefault(summary.best["step"], []).append("best")
        for step, names in sorted(aliases.items()):
            path = self.run_dir.checkpoints / f"step-{step:08d}"
            if path.is_dir():
                artifact = wandb.Artifact(f"checkpoint-{self.run.id}", type="model", metadata={"step": step})
                artifact.add_dir(str(path), skip_cache=True, policy="immutable")
                self.run.log_artifact(artifact, aliases=names)

    def _alert(self, what: str, text: str, level: str) -> None:
        if self.is_live:
            self.run.alert(f"{self.run_dir.name[:50]} {what}", text, level)


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
            bins = np.array(counts), np.linspace(low, high, len(counts) + 1)
            shown[f"{group}/{name}"] = wandb.Histogram(np_histogram=bins)
    return shown


def media(run_dir: RunDir, data_name: str, confusion: list[list[int]]) -> dict[str, Any]:
    """Return the confusion matrix of a finished run, its most confident mistakes and the filters of its first layer."""
    import numpy as np
    import safetensors.numpy
    import wandb

    names = class_names(data_name)
    columns: list[Any] = ["Actual", "Predicted", "nPredictions"]
    cells = [[names[i], names[j], count] for i, counts in enumerate(confusion) for j, count in enumerate(counts)]
    table, axes = wandb.Table(columns, cells), {name: name for name in columns}
    matrix = wandb.plot_table("wandb/confusion_matrix/v1", table, axes, {"title": "confusion matrix"})
    if not run_dir.samples.exists():
        return {"confusion": matrix}
    tensors = safetensors.numpy.load_file(run_dir.samples)
    columns = ["images", "labels", "predictions", "confidences", "positions"]
    rows = []
    for values in zip(*(tensors[f"mistakes_{name}"][:MAX_MISTAKES] for name in columns), strict=True):
        pixels, actual, predicted, confidence = values[0], names[values[1]], names[values[2]], float(values[3])
        image = wandb.Image(pixels, caption=f"{actual} taken for {predicted}, {confidence:.1%}")
        rows.append([image, actual, predicted, confidence, int(values[4])])
    filters = np.hstack(list(tensors["filters"]))
    gray = (filters - filters.min()) / max(float(np.ptp(filters)), 1e-9) * 255
    return {
        "confusion": matrix,
        "mistakes": wandb.Table(["image", "label", "prediction", "confidence", "position"], rows),
        "mistake_images": [row[0] for row in rows],
        "filters": wandb.Image(np.kron(gray.astype(np.uint8), np.ones((8, 8), np.uint8))),
    }


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
    """Show a run that trains, until standard input has the line with the error that ended it, which may be empty."""
    import wandb

    try:
        mirror, reason = Mirror(run_dir, mode), ""
    except (wandb.errors.Error, OSError) as error:
        wandb.teardown()
        mirror, reason = Mirror(run_dir, "offline"), f" ({one_line(error, 80)})"
    url = mirror.run.url  # None if offline
    print(f"wandb: online, {url}" if url else f"wandb: offline{reason}; {remedy(run_dir)}", flush=True)
    farewell = None
    if mirror.options.artifacts:
        mirror.run.log_code(str(Path(__file__).parents[1]), name=f"source-{mirror.run.project}")
    while farewell is None:
        if select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            farewell = sys.stdin.readline()
        mirror.send_rows()  # after the farewell, all rows are there
    if farewell:  # otherwise training was killed: a restart or `launch sync` sends the rest
        mirror.end(farewell.strip())


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
