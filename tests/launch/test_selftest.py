"""The self-test holds on this machine, and each deliberate bug breaks the law that is there for it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import ROOT
from ranks.processes import Ranks

from launch.check import laws, selftest
from train.errors import UserError

# Every mutant, and a law that must fail; "training": the run itself refuses to go on.
CAUGHT_BY = {
    "doubled_example": "training",
    "dropped_example": "training",
    "dropped_tail": "training",
    "doubled_example_without_ledger": "each example once",
    "not_reshuffled": "order changes",
    "constant_dropout": "dropout changes",
    "constant_augmentation": "augmentation changes",
    "global_stream_dropout": "same losses",
    "augmentation_by_local_row": "same losses",
    "plain_allreduce": "same weights",
    "rank_order_sum": "same weights",
    "mean_of_means": "each example once",
    "rank_local_statistics": "same weights",
    "clip_by_shard": "same losses",
    "lr_times_world": "learning rate",
    "padded_evaluation": "evaluation",
    "evaluation_drops_the_rest": "evaluation",
    "ema_not_restored": "same weights",
    "momentum_not_restored": "same losses",
    "resume_repeats_a_step": "training",
    "oldest_checkpoint": "resume",
    "rows_kept_on_resume": "each step once",
    "delete_before_write": "crash points",
    "written_in_place": "crash points",
    "temporary_left": "checkpoints whole",
}


class Forked:
    """A training of the self-test on ranks from the fork server, with a mutant in them."""

    def __init__(self, module: str, world_size: int, arguments: list[str], log: Path, mutant: str) -> None:
        self.log = log
        module = {"train": "train.__main__"}.get(module, module)
        self.ranks = Ranks(world_size, arguments, log.parent / log.stem, module, MUTANT=mutant)

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.ranks.processes)

    def kill(self, rank: int) -> None:
        self.ranks.signal(signal.SIGKILL, rank)

    def wait(self) -> int:
        codes = self.ranks.wait()
        self.log.write_text(self.ranks.output())
        return next((code for code in codes if code), 0)


def judged(capsys: pytest.CaptureFixture[str], mutant: str = "") -> tuple[int, list[str]]:
    """Run the self-test on forked ranks -> (exit code, its lines)."""
    code = selftest.main([], lambda *arguments: Forked(*arguments, mutant))
    return code, capsys.readouterr().out.splitlines()


def test_all_laws_hold(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = judged(capsys)
    assert code == 0, lines
    assert [line[:4] for line in lines[1:-1]] == ["OK  "] * len(laws.LAWS)


@pytest.mark.parametrize("mutant", CAUGHT_BY)
def test_mutant_is_caught(capsys: pytest.CaptureFixture[str], mutant: str) -> None:
    code, lines = judged(capsys, mutant)
    print("\n".join(lines))
    assert code == 1, lines
    assert CAUGHT_BY[mutant] in [line[6:26].strip() for line in lines if line.startswith("FAIL")], lines


def test_every_law_has_its_mutant() -> None:
    assert set(CAUGHT_BY.values()) == {*laws.LAWS, "training"}


def test_command_trains_for_real_and_leaves_nothing(tmp_path: Path) -> None:
    env = os.environ | {"TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    command = (sys.executable, "-m", "launch", "selftest")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"all {len(laws.LAWS)} laws hold")
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "says"), [(["--device", "tpu"], "--device is tpu"), (["--keep", "."], "exists already")]
)
def test_bad_usage_is_exit_2(python: Callable[..., CompletedProcess], flags: list[str], says: str) -> None:
    done = python("-m", "launch", "selftest", *flags)
    assert done.returncode == 2
    assert says in done.stderr


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "count_gpus", lambda: 0)
    with pytest.raises(UserError, match="shows no GPU"):
        selftest.main(["--device", "cuda"])


@pytest.mark.parametrize(("gpus", "worlds"), [(1, (1, 1)), (2, (2, 1)), (8, (2, 3))])
def test_world_sizes_fit_the_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int, worlds: tuple[int, int]) -> None:
    monkeypatch.setattr(selftest, "count_gpus", lambda: gpus)
    assert selftest.world_sizes("cuda") == worlds
