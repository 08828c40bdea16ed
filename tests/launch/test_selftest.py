"""All laws of the self-test hold on this machine, and each deliberate bug breaks its law."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from conftest import ROOT
from ranks.processes import Forked

from launch.__main__ import main
from launch.check import selftest
from train.errors import UserError

# A law that must fail for each mutant; "training": the run itself refuses to continue. More mutants: test_mutants.py.
CAUGHT_BY = {
    "doubled_example": "training",
    "dropped_example": "training",
    "dropped_tail": "training",
    "doubled_example_without_coverage_checksum": "each example once",
    "global_stream_dropout": "same losses",
    "augmentation_by_local_row": "same losses",
    "plain_allreduce": "same weights",
    "rank_order_sum": "same weights",
    "rank_local_statistics": "same weights",
    "clip_by_shard": "same losses",
    "lr_times_world": "same losses",
    "padded_evaluation": "evaluation",
    "evaluation_drops_the_rest": "evaluation",
    "ema_not_restored": "same weights",
    "momentum_not_restored": "same losses",
    "resume_repeats_a_step": "training",
    "oldest_checkpoint": "resume",
    "damage_not_noticed": "resume",
    "rows_kept_on_resume": "each step once",
}


@pytest.fixture
def judge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, list[str]]]:
    """Run the self-test on forked ranks with a mutant; return (exit code, its lines)."""
    cache = os.environ["XDG_CACHE_HOME"]
    for name in ("XDG_CACHE_HOME", "TMPDIR"):  # the self-test sets them for its process
        monkeypatch.setenv(name, cache)

    def run(mutant: str) -> tuple[int, list[str]]:
        def start(world_size: int, arguments: list[str], output: IO[str]) -> Forked:
            os.environ["XDG_CACHE_HOME"] = cache  # digits that are prepared already
            return Forked(mutant, world_size, arguments, output)

        monkeypatch.setattr(selftest, "Ranks", start)
        code = selftest.main([])
        return code, capsys.readouterr().out.splitlines()

    return run


def test_all_laws_hold(judge: Callable[[str], tuple[int, list[str]]]) -> None:
    code, lines = judge("")
    assert code == 0, lines
    assert [line[:4] for line in lines[1:-1]] == ["OK  "] * len(lines[1:-1])
    laws = [line[6:26].strip() for line in lines[1:-1]]
    assert {*laws, "training"} == set(CAUGHT_BY.values()), "every law has its mutant"


@pytest.mark.sample(3)
@pytest.mark.parametrize("mutant", CAUGHT_BY)
def test_mutant_is_caught(judge: Callable[[str], tuple[int, list[str]]], mutant: str) -> None:
    code, lines = judge(mutant)
    print("\n".join(lines))
    assert code == 1, lines
    assert CAUGHT_BY[mutant] in [line[6:26].strip() for line in lines if line.startswith("FAIL")], lines


def test_command_trains_for_real_and_leaves_nothing(tmp_path: Path) -> None:
    env = os.environ | {"TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    command = (sys.executable, "-m", "launch", "selftest")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("all 6 laws hold")
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


def test_bad_usage_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", "tpu"]) == 2
    assert "--device is tpu" in capsys.readouterr().err


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "count_gpus", lambda: 0)
    with pytest.raises(UserError, match="shows no GPU"):
        selftest.main(["--device", "cuda"])


@pytest.mark.parametrize(("gpus", "worlds"), [(1, (1, 1)), (2, (2, 1)), (8, (2, 3))])
def test_world_sizes_fit_the_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int, worlds: tuple[int, int]) -> None:
    monkeypatch.setattr(selftest, "count_gpus", lambda: gpus)
    assert selftest.world_sizes("cuda") == worlds
