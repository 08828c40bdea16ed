"""On real processes (config, step) determines everything. Ranks, kills and resumes decide only who computes."""

import itertools
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ranks.processes import Ranks, arguments, rows, train, wait_for_step
from safetensors.torch import load_file

EVERYTHING = (
    "--model.dropout 0.2 --augment.shift 2 --augment.rotate 10 --augment.erase 0.3 --optim.ema 0.9 --optim.clip_norm 5 "
    "--optim.lr 0.05 --train.epochs 6 --checkpoint.every_steps 10 --log.every_steps 1"
)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the newest checkpoint's model."""
    return load_file(max((run / "checkpoints").glob("step-*")) / "model.safetensors")


def assert_close(run: Path, other: Path) -> None:
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(
            tensor, theirs[name], atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def trajectory_of(run: Path) -> list[dict]:
    """Return a run's rows without clocks: what must be the same on any path to the end."""
    clocks = {"time", "images_per_second", "train_seconds", "seconds_left", "rank_seconds"}
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows(run) if row["event"] in ("train", "eval")]


@pytest.mark.parametrize(
    ("model", "num_micro_batches", "global_batch_size"),
    [("tiny", 0, 64), ("tiny", 0, 62), ("tiny_bn", 8, 64)],
    ids=["dropout", "uneven shares", "batch norm"],
)
def test_world_sizes_agree_to_round_off(
    tmp_path: Path, model: str, num_micro_batches: int, global_batch_size: int
) -> None:
    flags = (EVERYTHING, f"--model.name {model} --train.num_micro_batches {num_micro_batches} --train.max_steps 15",
             "--optim.lr 0.01",
             f"--train.global_batch_size {global_batch_size} --augment.erase 0")  # fmt: skip
    for world_size in (1, 2, 3, 4):
        summary = train(world_size, tmp_path / f"world-{world_size}", *flags)
        assert summary["world_size"] == world_size
        assert summary["num_examples"] == 359
    for world_size in (2, 3, 4):
        assert_close(tmp_path / "world-1", tmp_path / f"world-{world_size}")
        losses = [[row["loss"] for row in rows(tmp_path / f"world-{n}", "train")] for n in (1, world_size)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU, two of them")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2), ("fp16", 2e-2)])
def test_two_gpus_agree_with_one(tmp_path: Path, precision: str, tolerance: float) -> None:
    flags = (
        EVERYTHING,
        f"--train.device cuda --train.precision {precision} --train.num_micro_batches 2 --optim.lr 0.01",
    )
    losses = []
    for world_size in (1, 2):
        train(world_size, tmp_path / f"{world_size}", *flags, "--train.max_steps 15")
        losses.append([row["loss"] for row in rows(tmp_path / f"{world_size}", "train")])
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("world_size", "step"), [(2, 47), (1, 12), (1, 47), (2, 12), (2, 90), (3, 47)])
@pytest.mark.parametrize(("model", "precision"), [("tiny_bn", "bf16"), ("tiny", "fp32")])
def test_killed_run_resumes_to_the_same_bits(
    tmp_path: Path, world_size: int, step: int, model: str, precision: str
) -> None:
    flags = (EVERYTHING, f"--model.name {model} --train.precision {precision} --train.num_micro_batches 4")
    undisturbed = train(world_size, tmp_path / "undisturbed", *flags)
    killed = Ranks(world_size, arguments(tmp_path / "killed", *flags), tmp_path / "killed-logs")
    wait_for_step(tmp_path / "killed", step)
    killed.signal(signal.SIGKILL)
    assert set(killed.wait()) == {-signal.SIGKILL}
    resumed = train(world_size, tmp_path / "killed", *flags)
    starts = rows(tmp_path / "killed", "start")
    assert len(starts) == 2
    assert starts[1]["step"] > 0
    for name in ("weights_sha256", "ema_weights_sha256", "results"):
        assert resumed[name] == undisturbed[name]
    assert trajectory_of(tmp_path / "killed") == trajectory_of(tmp_path / "undisturbed")


@pytest.mark.parametrize(("world_size", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR2), (2, signal.SIGINT)])
def test_signal_saves_at_an_agreed_step_and_exits_75(tmp_path: Path, world_size: int, number: signal.Signals) -> None:
    flags = (
        EVERYTHING,
        "--model.name tiny_bn --train.num_micro_batches 2 --checkpoint.every_steps 1000 --eval.every_steps 1000",
    )
    undisturbed = train(world_size, tmp_path / "undisturbed", *flags)
    ranks = Ranks(world_size, arguments(tmp_path / "stopped", *flags), tmp_path / "stopped-logs")
    wait_for_step(tmp_path / "stopped", 20)
    ranks.signal(number, rank=world_size - 1)  # one rank gets the signal, all leave
    ranks.signal(number, rank=world_size - 1)  # and a second signal changes nothing
    assert set(ranks.wait()) == {75}, ranks.output()
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["outcome"] == "preempted"
    assert 20 <= summary["step"] < summary["total_steps"]
    newest = max((tmp_path / "stopped" / "checkpoints").glob("step-*"))
    assert newest.name == f"step-{summary['step']:08d}"
    resumed = train(world_size, tmp_path / "stopped", *flags)
    assert resumed["weights_sha256"] == undisturbed["weights_sha256"]
    assert trajectory_of(tmp_path / "stopped") == trajectory_of(tmp_path / "undisturbed")
    assert rows(tmp_path / "stopped", "start")[1]["step"] == summary["step"]  # no step was computed twice


def test_resume_on_another_world_size_agrees_to_round_off(tmp_path: Path) -> None:
    flags = (EVERYTHING, "--train.max_steps 30 --optim.lr 0.01 --checkpoint.every_steps 1000")
    train(1, tmp_path / "undisturbed", *flags)
    ranks = Ranks(2, arguments(tmp_path / "moved", *flags), tmp_path / "moved-logs")
    wait_for_step(tmp_path / "moved", 5)
    ranks.signal(signal.SIGTERM)
    if set(ranks.wait()) == {75}:
        assert train(1, tmp_path / "moved", *flags)["world_size"] == 1
    assert [row["world_size"] for row in rows(tmp_path / "moved", "start")] == [2, 1]
    assert_close(tmp_path / "undisturbed", tmp_path / "moved")


@pytest.mark.parametrize(("world_size", "examples"), [(1, 359), (2, 359), (4, 3), (3, 1)])
def test_evaluation_counts_each_example_once(tmp_path: Path, world_size: int, examples: int) -> None:
    flags = [
        "--train.max_steps 3 --eval.batch_size 50 --model.name tiny_bn --train.num_micro_batches 4 --train.exact true"
    ]
    split = "test" if examples == 359 else "validation"
    flags += [f"--data.validation {examples}"] if split == "validation" else []
    summary = train(world_size, tmp_path / "run", *flags)
    alone = train(1, tmp_path / "alone", *flags)
    assert (summary["split"], summary["num_examples"]) == (split, examples)
    result = summary["results"]["raw"]
    assert sum(itertools.chain(*result["confusion"])) == examples
    correct = sum(row[label] for label, row in enumerate(result["confusion"]))
    assert (result["correct"], result["accuracy"]) == (correct, correct / examples)
    assert result == alone["results"]["raw"]


@pytest.mark.parametrize("resume", ["never", "path"])
def test_restart_continues_from_its_own_checkpoints_whatever_run_resume_is(tmp_path: Path, resume: str) -> None:
    """A launcher restarts a dead rank with the same arguments. `never` would refuse them, a path would lead back."""
    flags = "--train.max_steps 8 --checkpoint.every_steps 2 --checkpoint.keep 9"
    first = train(1, tmp_path / "first", flags)
    path = tmp_path / "first" / "checkpoints" / "step-00000002"
    again = f"{flags} --run.resume {path if resume == 'path' else 'never'}"
    assert train(1, tmp_path / "run", again)["weights_sha256"] == first["weights_sha256"]
    for step in (6, 8):  # as if it had been killed after step 4
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    (tmp_path / "run" / "summary.json").unlink()
    for name in ("LOCKSTEP_RESTART", "TORCHELASTIC_RESTART_COUNT"):
        assert train(1, tmp_path / "run", again, **{name: "1"})["weights_sha256"] == first["weights_sha256"]
        assert rows(tmp_path / "run", "start")[-1]["step"] == (4 if name == "LOCKSTEP_RESTART" else 8)


def test_finished_run_is_reported_and_keeps_its_summary(tmp_path: Path) -> None:
    first = train(1, tmp_path / "run", "--train.max_steps 3")
    assert train(1, tmp_path / "run", "--train.max_steps 3") == first
    assert "This run is finished" in (tmp_path / "run-logs" / "rank-0.log").read_text()


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    flags = "--train.max_steps 12 --checkpoint.every_steps 4 --checkpoint.keep 9 --eval.every_steps 100"
    first = train(1, tmp_path / "run", flags)
    newest = tmp_path / "run" / "checkpoints" / "step-00000012" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    again = train(1, tmp_path / "run", flags)
    assert again["weights_sha256"] == first["weights_sha256"]
    assert str(newest) in (tmp_path / "run-logs" / "rank-0.log").read_text()
    assert rows(tmp_path / "run", "start")[1]["step"] == 8
    assert (tmp_path / "run" / "checkpoints" / "damaged-step-00000012-0").is_dir()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--train.global_batch_size 0", "train.global_batch_size is 0"),
        ("--optim.lrr 3", "Did you mean optim.lr?"),
        ("--model.name tiny_bn", "BatchNorm"),
        ("--train.precision fp16", "fp16 needs a GPU"),
        ("--train.device cuda", "shows no GPU"),
        ("--data.validation 1438", "data.validation is 1438"),
        ("--data.name kmnist --data.download false", "kmnist not found"),
    ],
)
@pytest.mark.filterwarnings("default")
def test_bad_input_is_one_line_and_exit_2_on_every_rank(tmp_path: Path, world_size: int, flag: str, words: str) -> None:
    if torch.cuda.is_available() and flag.split()[0] in ("--train.precision", "--train.device"):
        pytest.skip("true only without a GPU")
    ranks = Ranks(world_size, arguments(tmp_path / "run", flag), tmp_path / "logs")
    assert set(ranks.wait(30)) == {2}
    lines = [line for line in ranks.output().splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert words in lines[0]


@pytest.mark.parametrize("mode", ["", "--train.exact true --train.num_micro_batches 4"])
def test_ranks_without_any_example_take_part(tmp_path: Path, mode: str) -> None:
    flags = ("--data.validation 1437 --train.max_steps 3", mode)
    alone, together = train(1, tmp_path / "alone", *flags), train(2, tmp_path / "together", *flags)
    assert together["step"] == 3
    if mode:
        assert alone["weights_sha256"] == together["weights_sha256"]
    assert_close(tmp_path / "alone", tmp_path / "together")


def test_more_ranks_than_micro_batches_is_refused(tmp_path: Path) -> None:
    ranks = Ranks(3, arguments(tmp_path / "run", "--model.name tiny_bn --train.num_micro_batches 2"), tmp_path / "logs")
    assert set(ranks.wait()) == {2}
    assert "3 processes cannot share train.num_micro_batches 2" in ranks.output()


def test_missing_mnist_falls_back_loudly_only_when_asked(tmp_path: Path) -> None:
    flags = f"--data.name kmnist --data.root {tmp_path} --data.download false --train.max_steps 2"
    summary = train(2, tmp_path / "run", flags, "--data.fallback true")
    assert summary["data"]["is_fallback"]
    assert summary["data"]["name"] == "digits"
    log = (tmp_path / "run-logs" / "rank-0.log").read_text()
    assert log.count("warning: training on digits") == 1  # at the start
    assert log.count("!!! THIS IS NOT MNIST") == 1  # at the end


def test_accumulation_follows_the_memory_limit(tmp_path: Path) -> None:
    whole = train(1, tmp_path / "whole", "--train.max_steps 10 --optim.lr 0.01")
    cut = train(2, tmp_path / "cut", "--train.max_steps 10 --optim.lr 0.01 --train.max_micro_batch_size 10")
    assert (whole["num_micro_batches"], cut["num_micro_batches"]) == (1, 8)
    log = (tmp_path / "cut-logs" / "rank-0.log").read_text()
    assert "64 examples per step = 8 micro-batch(es) of 8, on 2 rank(s)" in log
    assert_close(tmp_path / "whole", tmp_path / "cut")


def test_passes_that_the_memory_limit_cuts_agree_to_round_off(tmp_path: Path) -> None:
    flags = "--train.max_steps 10 --optim.lr 0.01 --model.name tiny_bn --train.num_micro_batches 8"
    train(1, tmp_path / "whole", flags)
    train(2, tmp_path / "cut", flags, "--train.max_micro_batch_size 24")  # 4 of 8 on each rank, in passes of 3 and 1
    assert_close(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("mutant", ["doubled_example", "dropped_example"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_coverage_checksum_stops_a_run_that_misuses_an_example(tmp_path: Path, mutant: str, world_size: int) -> None:
    ranks = Ranks(world_size, arguments(tmp_path / "run", "--train.epochs 2"), tmp_path / "logs", MUTANT=mutant)
    assert 0 not in ranks.wait()
    assert "used twice or never" in ranks.output()
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_train_seconds_count_every_step_and_nothing_else(tmp_path: Path) -> None:
    summary = train(
        1, tmp_path / "run", "--train.max_steps 30 --log.every_steps 7 --eval.every_steps 1", MUTANT="slow_steps"
    )
    assert 30 * 0.02 <= summary["train_seconds"] <= summary["wall_seconds"]
    assert summary["images_per_second"] == pytest.approx(30 * 64 / summary["train_seconds"], rel=0.05)
    seconds = [row["train_seconds"] for row in rows(tmp_path / "run", "train")]
    assert all(later - earlier >= 0.02 for earlier, later in itertools.pairwise(seconds))
