"""A saved checkpoint survives disks that are full, read-only, forbidden, over quota, broken or slow, and any crash."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import crashes
from ranks.processes import Ranks, arguments, rows, train, wait_for_step

from train.storage import checkpoint

FLAGS = (
    "--train.max_steps 40 --log.every_steps 1 --checkpoint.every_steps 4 --checkpoint.keep 99 --eval.every_steps 100"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and becoming another user need root")
needs_strace = pytest.mark.skipif(
    not shutil.which("strace"), reason="strace injects the faults: apt-get install strace"
)
CHANGES = ("mkdir", "write", "fsync", "rename", "unlinkat", "rmdir")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 600 KB in memory, enough for some twenty checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def warnings(ranks: Ranks) -> list[str]:
    return [line for line in ranks.output().splitlines() if line.startswith("warning: no checkpoint")]


def wait_for_warning(ranks: Ranks) -> None:
    deadline = time.monotonic() + 100
    while not warnings(ranks):
        assert time.monotonic() < deadline, ranks.output()
        time.sleep(0.01)


def check_whole(run: Path) -> list[int]:
    """Return the steps of a run's checkpoints, all of which must be whole."""
    found = checkpoint.directories(run / "checkpoints")
    assert all(checkpoint.is_whole(path) for path in found)
    return sorted(checkpoint.step_of(path) or 0 for path in found)


@needs_root
@pytest.mark.parametrize("world_size", [1, 2])
def test_full_disk_costs_checkpoints_and_rows_come_later(tmp_path: Path, disk: Path, world_size: int) -> None:
    undisturbed = train(world_size, tmp_path / "undisturbed", FLAGS)
    run = disk / "run"
    ranks = Ranks(world_size, arguments(run, FLAGS), tmp_path / "logs", MUTANT="slow_steps")
    wait_for_step(run, 6)
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
        while True:  # until no space is left
            filler.write(bytes(4096))
    wait_for_warning(ranks)
    before = check_whole(run)
    (disk / "filler").unlink()
    assert set(ranks.wait()) == {0}, ranks.output()
    assert re.fullmatch(
        r"warning: no checkpoint of step \d+: No space left on device \(.*\). Training continues.", warnings(ranks)[0]
    )
    assert json.loads((run / "summary.json").read_text())["weights_sha256"] == undisturbed["weights_sha256"]
    assert set(before) < set(check_whole(run))
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 41))
    assert len(rows(run, "save_failed")) == len(warnings(ranks))


@needs_root
@pytest.mark.parametrize("world_size", [1, 2])
def test_disk_full_to_the_end_is_one_line_and_nothing_is_lost(tmp_path: Path, disk: Path, world_size: int) -> None:
    undisturbed = train(world_size, tmp_path / "undisturbed", FLAGS)
    run = disk / "run"
    ranks = Ranks(world_size, arguments(run, FLAGS, "--checkpoint.every_steps 1"), tmp_path / "logs")
    assert set(ranks.wait()) == {1}, ranks.output()
    (line,) = (line for line in ranks.output().splitlines() if line.startswith("error: "))
    assert line.endswith("cannot be written: No space left on device. Nothing was deleted.")
    assert "Traceback" not in ranks.output()
    kept = check_whole(run)
    assert kept
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    assert train(world_size, run, FLAGS)["weights_sha256"] == undisturbed["weights_sha256"]
    assert rows(run, "start")[-1]["step"] == kept[-1]
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 41))


@pytest.fixture
def open_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a directory that another user may enter and write to, with its own data cache."""
    place = Path(tempfile.mkdtemp(prefix="lockstep-test-"))
    place.chmod(0o777)
    cache = place / "cache"
    shutil.copytree(Path(os.environ["XDG_CACHE_HOME"]), cache, dirs_exist_ok=True)
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    yield place
    shutil.rmtree(place)


@pytest.mark.sample(4)
@needs_root
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("what", ["run.dir", "run", "checkpoints", "metrics.jsonl", "a file"])
def test_forbidden_directory_is_one_line_and_exit_2(
    tmp_path: Path, open_place: Path, world_size: int, what: str
) -> None:
    run = open_place / "runs" / "run"
    if what == "a file":
        run.parent.touch(mode=0o666)
    else:
        (run / "checkpoints").mkdir(parents=True)
        (run / "metrics.jsonl").touch()
        for path in (run.parent, run, run / "checkpoints", run / "metrics.jsonl"):
            path.chmod(0o777)
        if what == "run.dir":
            shutil.rmtree(run)
        {"run.dir": run.parent, "run": run, "checkpoints": run / "checkpoints", "metrics.jsonl": run}[what].chmod(0o555)
    ranks = Ranks(world_size, arguments(run, FLAGS), tmp_path / "logs", MUTANT="accidents.nobody")
    assert set(ranks.wait(60)) == {2}, ranks.output()
    lines = [line for line in ranks.output().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "cannot be written: " + ("Not a directory" if what == "a file" else "Permission denied") in lines[0]
    assert str(open_place / "runs") in lines[0]
    assert "Traceback" not in ranks.output()


@needs_root
def test_permission_lost_on_the_way_costs_checkpoints(tmp_path: Path, open_place: Path) -> None:
    run = open_place / "runs" / "run"
    ranks = Ranks(1, arguments(run, FLAGS), tmp_path / "logs", MUTANT="accidents.nobody_and_slow")
    wait_for_step(run, 6)
    kept = check_whole(run)
    (run / "checkpoints").chmod(0o555)
    wait_for_warning(ranks)
    assert "Permission denied" in warnings(ranks)[0]
    (run / "checkpoints").chmod(0o755)
    assert ranks.wait() == [0]
    assert set(kept) < set(check_whole(run))


@needs_strace
@needs_root
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("fsync:error=EDQUOT", "Disk quota exceeded"),
        ("fsync:error=EIO", "Input/output error"),
        ("mkdir:error=EROFS", "Read-only file system"),
        ("fsync:delay_enter=400000", None),
    ],
)
def test_disk_that_fails_or_is_slow_for_a_while(tmp_path: Path, fault: str, words: str | None) -> None:
    undisturbed, run = train(1, tmp_path / "undisturbed", FLAGS), tmp_path / "run"
    ranks = Ranks(1, arguments(run, FLAGS), tmp_path / "logs", MUTANT="slow_steps")
    wait_for_step(run, 5)
    command = ["strace", "-f", "-qq", "-p", str(ranks.processes[0].pid), "-o", str(tmp_path / "strace")]
    with subprocess.Popen([*command, "-e", f"trace={fault.split(':')[0]}", "-e", f"inject={fault}"]) as strace:
        if words:
            wait_for_warning(ranks)
        else:
            wait_for_step(run, 14)
        strace.send_signal(signal.SIGTERM)  # the disk works again
    assert ranks.wait() == [0], ranks.output()
    assert json.loads((run / "summary.json").read_text())["weights_sha256"] == undisturbed["weights_sha256"]
    assert words is None or words in warnings(ranks)[0]
    assert bool(warnings(ranks)) == bool(words)
    assert "INJECTED" in (tmp_path / "strace").read_text() or "DELAYED" in (tmp_path / "strace").read_text()
    check_whole(run)
    assert not list((run / "checkpoints").glob(".writing*"))


@needs_strace
def test_killed_at_every_call_that_changes_the_disk_a_whole_checkpoint_stays(tmp_path: Path) -> None:
    """The other calls are in `tests/faults.py crash-points`."""
    points = crashes.points(tmp_path / "run")
    assert {name for name, _ in points} >= {*CHANGES}
    found = {point: crashes.crash(tmp_path / "run", *point) for point in points if point[0] in CHANGES}
    assert {point: problem for point, problem in found.items() if problem} == {}
