"""If a rank hangs, dies or fails, all end in time. One line names the rank, step, collective and reason."""

import dataclasses
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from ranks.processes import Ranks, arguments, rows, train

from train.world.clock import SIZE, Clock, Record
from train.world.watchdog import Watchdog, judge, process_state

HOST = socket.gethostname()
SHORT = "--train.timeout 2 --train.max_steps 40 --log.every_steps 1"


def errors(ranks: Ranks, rank: int) -> list[str]:
    return [line for line in ranks.logs[rank].read_text().splitlines() if line.startswith("error: ")]


def hang(tmp_path: Path, accident: str, world_size: int, *flags: str) -> tuple[Ranks, list[int]]:
    ranks = Ranks(
        world_size, arguments(tmp_path / "run", SHORT, *flags), tmp_path / "logs", MUTANT=f"accidents.{accident}"
    )
    began = time.monotonic()
    codes = ranks.wait(60)
    assert time.monotonic() - began < 60
    return ranks, codes


def missed(tmp_path: Path) -> str:
    """Return the collective that rank 1 did not reach. Its record remains after its end."""
    left = Record.unpack(1, (tmp_path / "run" / ".ranks" / "rank-1").read_bytes())
    return f"collective {left.sequence + 1} of step 13"


@pytest.mark.parametrize("mode", ["", "--train.exact true --train.num_micro_batches 4"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_stopped_rank_is_named_by_the_others_and_ended(tmp_path: Path, mode: str, world_size: int) -> None:
    ranks, codes = hang(tmp_path, "stopped", world_size, mode)
    assert codes[1] == -9  # a stopped process cannot end by itself
    expected = f"error: rank 1 on {HOST} did not reach {missed(tmp_path)}: it is in augment, stopped for N s"
    for rank in {0, world_size - 1} - {1}:
        assert codes[rank] == 1
        (line,) = errors(ranks, rank)
        assert re.sub(r"\d+ s$", "N s", line) == expected
        assert "in train_step" in ranks.logs[rank].read_text()  # the stacks
    assert max(row["step"] for row in rows(tmp_path / "run", "train")) == 12


@pytest.mark.parametrize(("accident", "state", "code"), [("silent", "sleeping", 1), ("deaf", "frozen", -6)])
def test_a_hanging_rank_is_named_and_all_ranks_print_stacks(
    tmp_path: Path, accident: str, state: str, code: int
) -> None:
    ranks, codes = hang(tmp_path, accident, 2, "--train.timeout 6")
    assert codes == [1, code]
    (line,) = errors(ranks, 0)
    found = re.fullmatch(
        rf"error: rank 1 on {HOST} did not reach collective \d+ of step 13: it is in augment, (\w+) for \d+ s", line
    )
    assert found, line
    assert found[1] == state
    for log in ranks.logs:
        assert "in train_step" in log.read_text()
    assert "accidents.py" in ranks.logs[1].read_text()  # where it hangs


def test_a_single_process_that_hangs_ends(tmp_path: Path) -> None:
    ranks = Ranks(1, arguments(tmp_path / "run", SHORT), tmp_path / "logs", MUTANT="accidents.hangs_alone")
    assert ranks.wait(60) == [1]
    line = re.sub(r"\d+ s$", "N s", errors(ranks, 0)[0])
    assert line == f"error: rank 0 on {HOST} did not finish step 13: it is in augment, sleeping for N s"


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_leaves_early_is_named_at_once(tmp_path: Path, world_size: int) -> None:
    ranks, codes = hang(tmp_path, "leaves", world_size, "--train.timeout 100")
    assert codes[1] == 0
    assert codes[0] == codes[world_size - 1 if world_size == 3 else 0] == 1
    pid = ranks.processes[1].pid
    expected = f"error: rank 1 on {HOST} did not reach {missed(tmp_path)}: its process {pid} ended in augment"
    for rank in {0, world_size - 1} - {1}:
        assert errors(ranks, rank) == [expected]


def test_a_rank_with_an_error_of_its_own_is_named(tmp_path: Path) -> None:
    ranks, codes = hang(tmp_path, "fails", 2, "--train.timeout 100")
    assert codes == [1, 1]
    expected = f"error: rank 1 on {HOST} did not reach {missed(tmp_path)}: it failed with an error of its own"
    assert errors(ranks, 0) == [expected]
    assert errors(ranks, 1) == []
    assert "ValueError: only here" in ranks.logs[1].read_text()


def test_a_failing_rank_prints_why_and_ends_although_the_group_cannot_be_left(tmp_path: Path) -> None:
    began = time.monotonic()
    ranks, codes = hang(tmp_path, "fails_and_cannot_close", 2, "--train.timeout 100")
    assert time.monotonic() - began < 30
    assert codes == [1, 1]
    assert "ValueError: only here" in ranks.logs[1].read_text()
    assert "Traceback" in ranks.logs[0].read_text()  # gloo's error about the lost connection


def test_nothing_is_left_of_the_watchdog_after_a_run(tmp_path: Path) -> None:
    train(2, tmp_path / "run", "--train.max_steps 3")
    assert not (tmp_path / "run" / ".ranks").exists()
    ranks = Ranks(2, arguments(tmp_path / "refused", "--data.validation 1438"), tmp_path / "logs")
    assert set(ranks.wait()) == {2}
    assert not (tmp_path / "refused").exists()


def record(rank: int, sequence: int, phase: str = "reduce", **values: Any) -> Record:
    found: dict[str, Any] = {
        "step": 613,
        "since": 59.0,
        "heartbeat": 100.0,
        "pid": 77,
        "host": "node2",
    }
    return Record(rank=rank, sequence=sequence, phase=phase, **(found | values))


WAITS, DATA = record(0, 1842, host="node1"), record(1, 1841, "data", heartbeat=59.0)
RANK_1, STEP = "rank 1 on node2", "collective 1842 of step 613"
VERDICTS = {
    # name: (records, states by rank, world size, ranks to blame, line)
    "stopped": (
        [WAITS, DATA], ["sleeping", "stopped"], 2,
        [1], f"{RANK_1} did not reach {STEP}: it is in data, stopped for 41 s",
    ),
    "frozen": (
        [WAITS, record(1, 1842, heartbeat=90.0)], ["sleeping", "frozen"], 2,
        [1], f"{RANK_1} did not finish {STEP}: it is in reduce, frozen for 10 s",
    ),
    "ended": (
        [WAITS, record(1, 1842)], ["sleeping", "ended"], 2,
        [1], f"{RANK_1} did not finish {STEP}: its process 77 ended in reduce",
    ),
    "failed": (
        [WAITS, record(1, 1841, "failed")], ["sleeping", "ended"], 2,
        [1], f"{RANK_1} did not reach {STEP}: it failed with an error of its own",
    ),
    "one killed, and another failed for that reason": (
        [record(0, 1842, "failed"), DATA], ["ended", "ended"], 2,
        [1], f"{RANK_1} did not reach {STEP}: its process 77 ended in data",
    ),
    "two behind": (
        [WAITS, DATA, record(2, 1841, "augment")], ["sleeping", "stopped", "sleeping"], 3,
        [1, 2], f"{RANK_1} did not reach {STEP}: it is in data, stopped for 41 s (nor did rank 2)",
    ),
    "one further behind than another": (
        [WAITS, record(1, 1840, "log"), record(2, 1841, "augment")], ["sleeping"] * 3, 3,
        [1], f"{RANK_1} did not reach {STEP}: it is in log, sleeping for 41 s",
    ),
    "two without a record": (
        [WAITS, DATA], ["sleeping", "running"], 4,
        [1], f"{RANK_1} did not reach {STEP}: it is in data, running for 41 s; no record of rank 2, 3",
    ),
    "all wait": ([WAITS, record(1, 1842)], ["sleeping", "sleeping"], 2, [], f"all ranks wait in {STEP} for 41 s"),
    "one waits for one without a record": (
        [WAITS], ["sleeping"], 2,
        [], f"rank 0 waits in {STEP} for 41 s; no record of rank 1",
    ),
    "alone": (
        [record(0, 3, "save")], ["running"], 1,
        [0], "rank 0 on node2 did not finish step 613: it is in save, running for 41 s",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("records", "states", "world_size", "to_blame", "line"), VERDICTS.values(), ids=VERDICTS.keys()
)
def test_verdict_names_the_rank_to_blame_and_why(
    records: list[Record], states: list[str], world_size: int, to_blame: list[int], line: str
) -> None:
    seen = [dataclasses.replace(each, state=state) for each, state in zip(records, states, strict=True)]
    verdict = judge(seen, world_size, now=100.0)
    assert [culprit.rank for culprit in verdict.culprits] == to_blame
    assert verdict.line == line
    assert verdict.is_certain == any(word in line for word in ("ended", "failed"))


def test_phases_of_a_clock_add_up_and_other_ranks_can_read_its_record(tmp_path: Path) -> None:
    began, clock = time.perf_counter(), Clock()
    with Watchdog(clock, tmp_path / ".ranks", 3, 4) as watchdog:
        clock.step = 9
        clock.enter("data")
        with clock.collective():
            time.sleep(0.05)
        clock.enter("log")
        (found,) = [found for found in watchdog.records() if found.rank == 3]
        assert (found.step, found.sequence, found.phase) == (9, 1, "log")
        assert (found.pid, found.host) == (os.getpid(), HOST)
        assert abs(found.since - time.time()) < 5
        assert found.state == process_state(found.pid) in ("running", "sleeping")
        read = Record.unpack(3, (tmp_path / ".ranks" / "rank-3").read_bytes())
        assert dataclasses.replace(read, state=found.state) == found
        assert (tmp_path / ".ranks" / "rank-3").stat().st_size == SIZE
    assert clock.seconds["reduce"] >= 0.05
    clock.enter("finish")
    assert sum(clock.seconds.values()) == pytest.approx(clock.since - began, abs=0.01)
    assert process_state(2**22 + 1) == "ended"


def test_a_clock_costs_little() -> None:
    """A step enters about ten phases: 1 % of a step of 3 ms is 30 us. The best of many rounds, for a busy machine."""
    clock, best = Clock(), 1.0
    for _ in range(50):
        began = time.perf_counter()
        for _ in range(100):
            clock.enter("data")
        best = min(best, (time.perf_counter() - began) / 100)
    assert best < 20e-6


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "phase", ["data", "augment", "forward_backward", "optimizer", "log", "evaluate", "save", "reduce"]
)
def test_injected_sleeps_land_in_the_right_share(tmp_path: Path, phase: str) -> None:
    """A phase takes what was slept in it, within 10 %, and what an undisturbed run spends there."""
    world_size = 2 if phase == "reduce" else 1
    every = 1 if phase in ("evaluate", "save") else 1000  # rank 1 would continue while rank 0 saves, and wait less
    flags = f"--train.max_steps 20 --log.every_steps 1 --eval.every_steps {every} --checkpoint.every_steps {every}"
    plain = train(world_size, tmp_path / "plain", flags)["phases"]
    place = {"PHASE": phase, "SLEPT": str(tmp_path / "slept")}
    phases = train(world_size, tmp_path / "run", flags, MUTANT="accidents.sleeps", **place)["phases"]
    slept = sum(map(float, (tmp_path / "slept").read_text().split()))
    assert slept >= 20 * 0.04
    assert sum(shares[0] for name, shares in phases.items() if name != "seconds") == pytest.approx(1, abs=0.002)
    found, usual = (table[phase][0] * table["seconds"][0] for table in (phases, plain))
    assert 0.9 * slept <= found <= 1.1 * slept + max(2 * usual, 0.1)
    if phase == "reduce":
        assert phases["augment"][1] * phases["seconds"][1] >= 0.9 * slept  # rank 1 works, rank 0 waits
        assert phases["reduce"][1] * phases["seconds"][1] < 0.5 * slept
