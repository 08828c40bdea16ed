"""argv -> Config -> World -> train -> exit code; nothing else.

Exit codes: 0 finished, 1 crash, 2 bad config or data, 75 preempted: saved, if there was something to save.
"""

import sys
from pathlib import Path

if not __package__:  # started as a file, so that a train.py in the current directory does not matter
    own = Path(__file__).resolve().parent
    if Path(sys.path[0]).resolve() == own:  # not with PYTHONSAFEPATH
        del sys.path[0]
    sys.path.insert(0, str(own.parent))

from train.world import signals
from train.world.process import protect_output

if __name__ == "__main__":
    signals.install()  # first: a signal must find its handler during the imports below
    protect_output(is_required=not {"-h", "--help", "--version", "--print_config"}.isdisjoint(sys.argv))

import contextlib
import faulthandler
import io
import socket
import threading
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

from train.cli import parse
from train.config import Config
from train.errors import BAD_INPUT, CRASHED, FINISHED, PREEMPTED, RunError, UserError, one_line
from train.rundir import RunDir, Summary
from train.tracking.wandb import resolve
from train.world.cores import limit_spinning
from train.world.launcher import choose_name, read_placement
from train.world.process import die_with_launcher, keep_others_from_writing, leave

if TYPE_CHECKING:
    from train.world.world import World

OTHER_RANKS_WAIT_SECONDS = 2.0
_one_at_a_time = threading.Lock()  # torch's random numbers, threads and process group are of the whole process


def complain(error: UserError | RunError, world: "World | None") -> int:
    """Print one line; return the exit code.

    Rank 0 prints it. Before there is a world, in which all ranks raise the same error, one rank of each other machine
    prints a UserError too, and every rank a RunError. Ranks that print nothing wait briefly, because launchers kill all
    ranks as soon as one exits.
    """
    rank, local_rank = 0, 0
    with contextlib.suppress(UserError):  # this error may be about the placement
        place = read_placement()
        rank, local_rank = place.rank, place.local_rank
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif world is None and (local_rank == 0 or isinstance(error, RunError)):
        print(f"error: rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
    return BAD_INPUT if isinstance(error, UserError) else CRASHED


def announce(text: str) -> None:
    """Print what a signal does before there is a run, on rank 0."""
    with contextlib.suppress(UserError):
        if read_placement().rank == 0:
            print(text, file=sys.stderr, flush=True)


def run_directory(config: Config, argv: list[str], world: "World") -> RunDir:
    """Return run.dir/run.name, the same on all ranks. Collective: every rank must call it."""
    name = ""
    with world.raising_together():
        name = choose_name(config, argv) if world.is_main else name
    return RunDir(Path(config.run.dir, world.broadcast(name)))


def main(argv: list[str]) -> int:
    """Train as the command line says; return the exit code. In another thread than the main one, without signals."""
    if not _one_at_a_time.acquire(blocking=False):
        return complain(UserError("Another training runs in this process. Use a process for each."), None)
    try:
        with signals.restoring():
            return _main(argv)
    finally:
        _one_at_a_time.release()


def _main(argv: list[str]) -> int:
    signals.announce(announce)
    die_with_launcher()
    keep_others_from_writing()
    with contextlib.suppress(io.UnsupportedOperation):  # stderr may have been replaced
        faulthandler.enable()
    try:
        try:
            config = parse(argv)
        finally:
            sys.stdout.flush()  # of --help and --print_config, whose reader may be gone
        config = replace(config, wandb=resolve(config.wandb))
        signals.leave_after(config.run.time_limit)
        limit_spinning()
        from train.world.world import World  # with torch, which takes seconds: after a bad config is refused

        world = World.open(config.train)
    except (UserError, RunError) as error:
        return complain(error, None)
    try:
        from train.loop import train

        run_dir = run_directory(config, argv, world)
        summary = train(config, world, run_dir, argv)
    except (UserError, RunError) as error:
        return complain(error, world)
    except Exception:
        if world.world_size > 1:  # NCCL would wait in close() for ranks that may never come
            traceback.print_exc()
            leave(CRASHED)
        raise
    finally:
        world.close()
    if world.is_main:
        report(run_dir, summary, write_page=config.log.report)
    return FINISHED if summary.outcome == "finished" else PREEMPTED


def page_problem(run_dir: RunDir) -> str | None:
    """Write report.html; return in one line what went wrong: no run fails for its page."""
    try:
        from train.report.page import write

        write([run_dir.path], run_dir.report)
    except Exception as error:
        return one_line(error)
    return None


def report(run_dir: RunDir, summary: Summary, *, write_page: bool) -> None:
    """Print the result and where the files are."""
    if summary.outcome == "preempted":
        print(f"preempted at step {summary.step}: saved. The same command with --run.name {run_dir.name} continues it.")
        return
    assert summary.final
    speed = f", {summary.images_per_second:,.0f} images/s" if summary.images_per_second else ""
    print(
        f"{summary.split} accuracy {summary.final.accuracy:.2%} "
        f"({summary.final.correct} of {summary.num_examples} {summary.data['name']} images)"
        f" in {summary.train_seconds:.1f} s of training{speed}"
    )
    if summary.final.correct <= max(map(sum, summary.final.confusion)):
        print("warning: no better than always answering one class: the run diverged or was too short")
    if summary.data["is_fallback"]:
        print("!!! THIS IS NOT MNIST: trained on the fallback data set digits !!!")
    print(f"weights {summary.weights_sha256[:16]}...")
    problem = page_problem(run_dir) if write_page else None
    if problem:
        print(f"no {run_dir.report.name}: {problem}")
    pages = (run_dir.report,) if write_page and not problem else ()
    for path in (run_dir.summary, run_dir.metrics, run_dir.config, run_dir.checkpoints, *pages):
        print(f"  {path}")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
