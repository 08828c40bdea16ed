"""Ranks of mpirun, Kubernetes and other launchers train the same run, or are refused in one line."""

from pathlib import Path

import pytest
from ranks.processes import Ranks, arguments, train

EXACT = "--train.exact true --train.num_micro_batches 4 --train.max_steps 8"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the weights' SHA-256 of the run on one process."""
    return train(1, tmp_path_factory.mktemp("alone") / "run", EXACT)["weights_sha256"]


def refused_line(tmp_path: Path, **env: str) -> str:
    """Start ranks that must all be refused in one line; return it."""
    ranks = Ranks(2, arguments(tmp_path / "run", EXACT), tmp_path / "logs", **env)
    assert set(ranks.wait(60)) == {2}, ranks.output()
    (line,) = set(ranks.output().splitlines())
    assert line.startswith("error: ")
    assert not (tmp_path / "run").exists()
    return line


@pytest.mark.sample(1)
@pytest.mark.parametrize("asked", ["bf16", "fp16", "no"])
def test_accelerates_precision_does_not_change_the_bits(tmp_path: Path, alone: str, asked: str) -> None:
    assert train(2, tmp_path / "run", EXACT, ACCELERATE_MIXED_PRECISION=asked)["weights_sha256"] == alone
    log = (tmp_path / "run-logs" / "rank-0.log").read_text()
    assert log.count("fp32 is used") == (asked != "no")
    assert "fp32 is used" not in (tmp_path / "run-logs" / "rank-1.log").read_text()


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "use --train.compile true"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", "use --train.max_micro_batch_size N"),
        ("ACCELERATE_USE_FSDP", "true", "use accelerate's distributed_type: MULTI_GPU"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "use accelerate's distributed_type: MULTI_GPU"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "use accelerate's distributed_type: MULTI_GPU"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "use accelerate's distributed_type: MULTI_GPU"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "Use no, bf16 or fp16"),
    ],
)
def test_what_accelerate_would_compute_otherwise_is_refused(tmp_path: Path, name: str, value: str, words: str) -> None:
    line = refused_line(tmp_path, **{name: value})
    assert value in line
    assert words in line


@pytest.mark.parametrize("launcher", ["open_mpi", "mpich", "open_mpi_in_a_slurm_job", "pytorchjob", "slurm_script"])
def test_ranks_of_other_launchers_give_the_same_bits(tmp_path: Path, alone: str, launcher: str) -> None:
    summary = train(2, tmp_path / "run", EXACT, MUTANT=f"launchers.{launcher}")
    assert (summary["world_size"], summary["weights_sha256"]) == (2, alone)


def test_ranks_that_share_a_machine_without_local_rank_are_refused(tmp_path: Path) -> None:
    ranks = Ranks(3, arguments(tmp_path / "run", EXACT), tmp_path / "logs", MUTANT="launchers.without_local_rank")
    assert set(ranks.wait(60)) == {2}, ranks.output()
    assert "error: 3 ranks are on " in ranks.output()
    assert ranks.output().count("LOCAL_RANK and LOCAL_WORLD_SIZE are unset") == 3
    assert "Traceback" not in ranks.output()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is unset and MASTER_PORT is "),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is http"),
    ],
)
def test_missing_address_of_rank_0_is_refused(tmp_path: Path, changed: dict[str, str], words: str) -> None:
    assert words in refused_line(tmp_path, **changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"MASTER_ADDR": "nowhere.invalid"}, "at nowhere.invalid, port "),
        ({"GLOO_SOCKET_IFNAME": "nope"}, "Unable to find address for: nope"),
    ],
)
def test_ranks_that_do_not_find_each_other_say_where_they_looked(
    tmp_path: Path, changed: dict[str, str], words: str
) -> None:
    given = arguments(tmp_path / "run", "--train.timeout 2")
    ranks = Ranks(2, given, tmp_path / "logs", MUTANT="launchers.impatient", **changed)
    assert ranks.wait(60) == [1, 1], ranks.output()
    lines = [line for line in ranks.output().splitlines() if line.startswith("error: ")]
    assert [f"rank {rank} could not join 2 ranks" in line and words in line for rank, line in enumerate(lines)] == [
        True
    ] * 2
    assert "Traceback" not in ranks.output()


def test_torchrun_may_restart_a_run_that_has_a_name(tmp_path: Path) -> None:
    assert train(1, tmp_path / "run", "--train.max_steps 1", TORCHELASTIC_MAX_RESTARTS="3")["step"] == 1
