"""What a run directory holds: the names of its files, its rows and its summary. No other module spells them.

metrics.jsonl has one JSON object per line, a row. Each row has an `event`, the `step` after which it was written and
the `time` in seconds since 1970. A kill can leave a torn last line, which is not a row. summary.json is a Summary.
"""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.cli import load_yaml
from train.errors import UserError

Row = dict[str, Any]
SCHEMA = 3  # of summary.json
ATTEMPT_EVENTS = ("start", "preempted", "save_failed")  # their rows stay when steps are computed again
# of file systems that cannot sync: many network and FUSE ones
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
NO_DIRECTORY_SYNC = (*NO_SYNC, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF)
EXAMPLE = "runs/mnist-20260101-120000"


@dataclass(frozen=True)
class Evaluation:
    """Counts over a split, and what proves which predictions were made."""

    accuracy: float  # share of examples whose label was predicted, 0..1
    loss: float  # mean cross entropy
    correct: int
    predictions_sha256: str
    confusion: list[list[int]]  # [label][prediction]


@dataclass(frozen=True)
class Summary:
    """What a run says at its end, or when it was preempted."""

    outcome: str  # finished | preempted
    step: int
    total_steps: int
    world_size: int
    split: str  # test | validation: the split that was evaluated
    num_examples: int  # of that split
    results: dict[str, Evaluation]  # of the weights, "raw", and of their average, "ema"; of the last step, else empty
    weights_sha256: str
    ema_weights_sha256: str | None
    train_seconds: float
    warm_up_seconds: float
    wall_seconds: float
    images_per_second: float | None
    best: dict[str, Any] | None  # step and accuracy of the best evaluation
    skipped_steps: int
    ledger: dict[str, Any] | None  # coverage checksum of the last finished epoch
    exact: bool
    num_micro_batches: int
    precision: str
    device: str  # cpu | cuda
    data: dict[str, Any]
    sha256: dict[str, str]  # of "data", and of "network" and "initial_weights" if they come from files
    config: dict[str, Any]  # the fields that decide the weights
    environment: dict[str, Any]  # what exact mode depends on besides the config
    versions: dict[str, str]
    git_commit: str | None
    phases: dict[str, list[float]]  # where the time went, by rank
    fingerprints: dict[str, Any] | None  # first and last step, SHA-256; in exact mode
    schema: int = SCHEMA

    @property
    def final(self) -> Evaluation | None:
        """The evaluation that counts: of the averaged weights, if the run averages them."""
        return self.results.get("ema") or self.results.get("raw")

    @property
    def final_weights_sha256(self) -> str:
        """SHA-256 of the weights that are the run's result."""
        return self.ema_weights_sha256 or self.weights_sha256

    def to_json(self) -> str:
        """Return the text of summary.json."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Summary":
        """Read the text of summary.json. Raises ValueError if a run of this version did not write it."""
        try:
            content = json.loads(text)
            if content.get("schema") != SCHEMA:
                version = content.get("versions", {}).get("lockstep", "another version")
                raise ValueError(
                    f"it was written by lockstep {version}, in format {content.get('schema', 1)}, not {SCHEMA}"
                )
            results = {name: Evaluation(**result) for name, result in content["results"].items()}
            return cls(**{**content, "results": results})
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is damaged: {type(error).__name__} {error}"[:200]) from None


class RunDir:
    """The files of one run.

    Only a process that holds the lease may write any of them, except `report` and `exports`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.resolve().name
        self.config = path / "config.yaml"  # all fields, resolved
        self.metrics = path / "metrics.jsonl"  # the rows
        self.summary = path / "summary.json"
        self.samples = path / "samples.safetensors"  # images and filters to look at
        self.report = path / "report.html"
        self.network = path / "network"  # the source of the user's network
        self.checkpoints = path / "checkpoints"
        self.exports = path / "export"
        self.trace = path / "trace.json.gz"  # of torch.profiler
        self.lock = path / ".lock"  # of the process that may write
        self.heartbeats = path / ".ranks"  # a file per rank
        self.wandb = path / "wandb"  # what W&B keeps of an offline run
        self.wandb_id = path / "wandb_id"  # the run's id in W&B

    def read_rows(self) -> list[Row]:
        """Return the whole rows; none if there is no file. Raises UserError if it cannot be read."""
        return _read(self.metrics, parse_rows) or []

    def remove_rows_after(self, step: int, staging: Path | None = None) -> list[Row]:
        """Remove the rows of later steps, which a resume computes again, and a torn last line; return the rest."""
        rows = [row for row in self.read_rows() if row["step"] <= step or row["event"] in ATTEMPT_EVENTS]
        content = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.metrics, content.encode(), staging, should_sync=True)
        return rows

    def read_summary(self) -> Summary | None:
        """Return the summary, or None if there is none. Raises UserError if it cannot be read."""
        return _read(self.summary, Summary.from_json)

    def read_config(self) -> dict[str, Any] | None:
        """Return the content of config.yaml, or None if there is none. Raises UserError if it cannot be read."""
        return _read(self.config, _mapping)

    def require_config(self) -> Path:
        """Return the path of config.yaml. Raises UserError if there is none."""
        if not self.config.is_file():
            raise UserError(f"{self.config} is missing. Expected the directory of a run, such as {EXAMPLE}.")
        return self.config


def reserve(parent: Path, name: str) -> str:
    """Make a new directory for a run and return its name: `name`, or with -2, -3 ... if that is taken.

    Raises UserError if it cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for candidate in _numbered(name):
            with contextlib.suppress(FileExistsError):
                (parent / candidate).mkdir()
                return candidate
    except OSError as error:
        raise UserError(f"{parent / name} cannot be made: {error.strerror}. Use another run.dir.") from error
    raise AssertionError("the numbers do not end")


def find_started(parent: Path, name: str, command: Sequence[str]) -> str | None:
    """Return the newest of the runs `name`, `name`-2 ... that this command started, or None.

    A run without rows counts: its start was interrupted.
    """
    found = None
    for candidate in itertools.takewhile(lambda candidate: (parent / candidate).exists(), _numbered(name)):
        rows = RunDir(parent / candidate).read_rows()
        commands = [row.get("command") for row in rows if row["event"] == "start"]
        # `launch run` appends the name that it has found or made
        if not rows or list(command) in commands or [*command, "--run.name", candidate] in commands:
            found = candidate
    return found


def _numbered(name: str) -> Iterator[str]:
    """Yield NAME, NAME-2, NAME-3 and so on."""
    return itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))


def parse_rows(text: str) -> list[Row]:
    """Return the whole rows of a text of lines."""
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and {"event", "step"} <= row.keys() else []
    return rows


class Tail:
    """The rows of a growing metrics.jsonl, each returned once."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0

    def rows(self) -> list[Row]:
        """Return the whole rows since the last call; none if there is no file."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.offset += len(whole + newline)
        return parse_rows(whole.decode(errors="replace"))


def write_atomically(path: Path, content: bytes, staging: Path | None = None, *, should_sync: bool = False) -> None:
    """Write a file under a temporary name, in `staging` or next to it, and rename it into place.

    `should_sync` puts the content on the disk first, so that the file is whole after a loss of power too.
    """
    with replacing(path, staging) as temporary, open(temporary, "wb") as file:
        file.write(content)
        if should_sync:
            file.flush()
            sync(file.fileno())


def sync(descriptor: int) -> None:
    """Put an open file on the disk, if the file system can. Raises OSError if the disk fails or is full."""
    with ignoring(NO_SYNC):
        os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Put the names in a directory on the disk, if the file system can. Raises OSError like `sync`."""
    with ignoring(NO_DIRECTORY_SYNC):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def ignoring(numbers: tuple[int, ...]) -> Iterator[None]:
    """Ignore an OSError of the block that has one of these error numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise


@contextlib.contextmanager
def replacing(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """Give a temporary path, in `staging` or next to `path`; rename it to `path` unless the block raises."""
    temporary = (staging or path.parent) / f".writing-{path.name}"
    try:
        yield temporary
        try:
            os.replace(temporary, path)
        except (FileExistsError, PermissionError):  # some network file systems do not rename over a file
            if not path.exists():
                raise
            before = path.with_name(f".before-{path.name}")
            before.unlink(missing_ok=True)
            path.rename(before)
            temporary.rename(path)
            before.unlink()
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _mapping(text: str) -> dict[str, Any]:
    content = load_yaml(text)
    if not isinstance(content, dict):
        raise ValueError("it is no mapping")
    return content


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(errors="replace")) if path.exists() else None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {str(error).rstrip('.')}. Delete it to continue without it.") from None
