"""All ranks find NaN and infinity at the same step, before they reach the weights. The run stops or skips the step."""

import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from in_process import Run
from ranks.processes import Ranks, arguments, rows, train, wait_for_step
from safetensors.torch import load_file

from train.config import Config, DataConfig, LogConfig, ModelConfig, OptimConfig, TrainConfig
from train.errors import RunError
from train.functional import optim
from train.functional.sampler import Sampler
from train.functional.tables import StepResult
from train.tracking.alarms import Alarms
from train.tracking.journal import Journal
from train.world.world import World

EXACT = (
    "--model.name tiny_bn --model.dropout 0.2 --optim.ema 0.9 --train.exact true --train.num_micro_batches 4 "
    "--train.max_steps 24 "
    "--log.every_steps 1 --checkpoint.every_steps 5 --checkpoint.keep 9"
)


@pytest.mark.sample(2)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accident", ["broken_loss", "broken_gradient"])
def test_stop_names_step_micro_batch_and_examples(tmp_path: Path, world_size: int, accident: str) -> None:
    ranks = Ranks(world_size, arguments(tmp_path / "run", EXACT), tmp_path / "logs", MUTANT=f"accidents.{accident}")
    assert set(ranks.wait()) == {1}, ranks.output()
    (line,) = (line for line in ranks.output().splitlines() if line.startswith("error: "))
    assert "Traceback" not in ranks.output()
    assert line.startswith("error: The loss or the gradient of step 13 is not finite: ")
    if accident == "broken_loss":
        examples = (
            Sampler(1438, 64, 4, seed=0).examples(12, 32, 40).tolist()
        )  # micro-batch 2 of the batch of step 12 (from 0)
        named = ", ".join(map(str, examples))
        assert f"loss inf in micro-batch 2 of 4, whose first examples are {named}. " in line
    else:
        assert "its 4 micro-batch(es) have finite losses" in line
    assert max((tmp_path / "run" / "checkpoints").glob("step-*")).name == "step-00000010"
    assert max(row["step"] for row in rows(tmp_path / "run", "train")) == 12


def test_stop_after_a_real_divergence_leaves_finite_weights(tmp_path: Path) -> None:
    flags = "--optim.lr 900 --optim.warmup 0 --checkpoint.every_steps 1 --train.epochs 2"
    ranks = Ranks(2, arguments(tmp_path / "run", flags), tmp_path / "logs")
    assert ranks.wait() == [1, 1]
    assert "is not finite" in ranks.output()
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    for tensor in load_file(newest / "model.safetensors").values():
        assert torch.isfinite(tensor).all()


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["sgd --optim.lr 0.05", "adamw --optim.lr 0.003"])
def test_skipping_is_the_same_on_every_world_size_and_through_kills(tmp_path: Path, name: str) -> None:
    flags = (EXACT, f"--optim.nonfinite skip --optim.name {name} --optim.clip_norm 1")
    broken = {"MUTANT": "accidents.broken_loss"}
    alone = train(1, tmp_path / "alone", *flags, **broken)
    assert alone["skipped_steps"] == 2
    assert alone["weights_sha256"] != train(1, tmp_path / "sound", *flags)["weights_sha256"]
    ranks = Ranks(4, arguments(tmp_path / "killed", *flags), tmp_path / "killed-logs", **broken)
    wait_for_step(tmp_path / "killed", 14)  # after the first skip
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    for run, world_size in (("two", 2), ("killed", 2)):
        summary = train(world_size, tmp_path / run, *flags, **broken)
        for field in ("weights_sha256", "ema_weights_sha256", "results", "skipped_steps", "fingerprints"):
            assert summary[field] == alone[field], (run, field)
        assert [row["step"] for row in rows(tmp_path / run, "skipped")] == [13, 16]
        assert [row["loss"] is None for row in rows(tmp_path / run, "train")] == [
            step in (13, 16) for step in range(1, 25)
        ]
    for path in (tmp_path / "alone" / "checkpoints").glob("step-*/*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    log = (tmp_path / "two-logs" / "rank-0.log").read_text()
    assert "warning: step 13 is skipped: its loss or gradient is not finite (1 skipped so far)." in log


def test_a_skipped_first_step_leaves_no_uninitialized_momentum(tmp_path: Path) -> None:
    flags = (EXACT, "--optim.nonfinite skip")
    summaries = [train(n, tmp_path / f"{n}", *flags, MUTANT="accidents.broken_loss", STEP="1") for n in (1, 2)]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    buffers = load_file(min((tmp_path / "1" / "checkpoints").glob("step-*")) / "optimizer.safetensors")
    assert all(tensor.abs().max() < 100 for tensor in buffers.values())


def test_more_skips_than_allowed_stop_the_run_and_a_stopped_run_may_continue_with_skip(tmp_path: Path) -> None:
    skip, broken = (EXACT, "--optim.nonfinite skip"), {"MUTANT": "accidents.broken_loss"}
    ranks = Ranks(2, arguments(tmp_path / "run", *skip, "--optim.max_skips 1"), tmp_path / "logs", **broken)
    assert set(ranks.wait()) == {1}
    assert "of step 16 is not finite" in ranks.output()
    assert "after optim.max_skips 1 skipped steps" in ranks.output()
    assert max((tmp_path / "run" / "checkpoints").glob("step-*")).name == "step-00000015"
    ranks = Ranks(1, arguments(tmp_path / "stopped", EXACT), tmp_path / "stopped-logs", **broken)
    assert ranks.wait() == [1]
    whole = train(1, tmp_path / "whole", *skip, **broken)
    for run in ("run", "stopped"):  # neither field decides weights: the steps before are the same under both
        assert train(1, tmp_path / run, *skip, **broken)["weights_sha256"] == whole["weights_sha256"]


def skipped_steps(table: list[list[float]], **config: Any) -> list[int]:
    """Let a journal check steps 11, 12, ... whose rows are [is broken, *losses]; return those that it skipped."""
    results = [
        StepResult(11 + n, sum(losses), 1.0, not is_broken, losses, [0.0], 0)
        for n, (is_broken, *losses) in enumerate(table)
    ]
    world = SimpleNamespace(device=torch.device("cpu"))
    sampler = Sampler(100, 8, len(table[0]) - 1, seed=0)
    plan: Any = SimpleNamespace(config=Config(optim=OptimConfig(**config)), sampler=sampler, world=world)
    state: Any = SimpleNamespace(skipped_steps=0, step=10)
    metrics: Any = FakeMetrics()
    journal = Journal(plan, state, metrics, Alarms(LogConfig(), metrics, []))
    for result in results:
        journal._check(result)
    assert state.skipped_steps == len(metrics.rows) == len(metrics.lines)
    return [step for event, step in metrics.rows if event == "skipped"]


def test_a_late_look_finds_every_broken_step() -> None:
    """On a GPU the run checks the numbers of several steps at once, where it waits anyway."""
    table = [[0.0, 1.0, 2.0], [1.0, math.nan, 2.0], [0.0, 1.0, 1.0], [1.0, 1.0, math.inf]]
    assert skipped_steps(table, nonfinite="skip") == [12, 14]
    with pytest.raises(RunError, match="step 12 is not finite: loss nan in micro-batch 0 of 2"):
        skipped_steps(table)
    with pytest.raises(
        RunError, match=r"step 14 is not finite: loss inf in micro-batch 1 of 2.*after optim.max_skips 1 skipped"
    ):
        skipped_steps(table, nonfinite="skip", max_skips=1)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_update_is_left_out_on_the_device(name: Any) -> None:
    """`found_inf` makes the fused optimizers leave weights and state as they are. The host does not read it."""
    model = torch.nn.Linear(3, 2)
    optimizer = optim.build(OptimConfig(name=name), model)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step()
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))
    assert all(torch.count_nonzero(value) == 0 for state in optimizer.state.values() for value in state.values())


def test_steps_that_the_fp16_scaler_leaves_out_are_not_mistaken_for_it(world: World) -> None:
    """Gradients overflow while the scaler searches for its scale. It leaves those updates out; no step is broken."""
    config = Config(data=DataConfig(name="digits"), model=ModelConfig(name="tiny"), train=TrainConfig(device="cpu"))
    scaler = world.accelerator.scaler = torch.amp.GradScaler("cpu")
    run = Run.open(config, world)
    overflow = next(run.state.module.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    before = run.sha256()
    run.steps()
    (result,) = run.plan.tables.read_results(0, 1)
    assert not math.isfinite(result.grad_norm)
    assert run.sha256() == before
    assert scaler.get_scale() == 2.0**15  # from 2**16
    overflow.remove()
    run.steps()
    assert run.sha256() != before
    assert all(result.is_sound for result in run.plan.tables.read_results(0, 2))


class FakeMetrics:
    """A replacement for Metrics that keeps lines and rows."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.rows: list[tuple[str, int]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def record(self, event: str, step: int, **values: Any) -> None:
        self.rows.append((event, step))


def test_spike_depends_on_the_rows_before_only() -> None:
    losses = [2.0, 1.5, 1.2, 1.0, 0.8, 0.7, 9.0, 0.6, 0.5, 28.0, 0.4]

    def alarms(first: int) -> list[tuple[str, int]]:
        metrics = FakeMetrics()
        rows = [{"event": "train", "step": step, "loss": loss} for step, loss in enumerate(losses[:first])]
        watch = Alarms(LogConfig(), metrics, rows)  # type: ignore[arg-type]
        for step in range(first, len(losses)):
            watch.loss(step, losses[step])
        return metrics.rows

    assert alarms(0) == [("spike", 6), ("spike", 9)]
    assert alarms(7) == [("spike", 9)]  # a resume
    metrics = FakeMetrics()
    off = Alarms(LogConfig(spike=0.0), metrics, [])  # type: ignore[arg-type]
    for step, loss in enumerate(losses):
        off.loss(step, loss)
    assert metrics.rows == []


def test_spike_is_a_line_and_a_row_of_the_run(tmp_path: Path) -> None:
    for world_size in (1, 2):
        run = tmp_path / f"{world_size}"
        train(world_size, run, EXACT, MUTANT="accidents.spike")
        assert [row["step"] for row in rows(run, "spike")] == [13]
        assert "warning: the loss of step 13 jumped to" in (tmp_path / f"{run.name}-logs" / "rank-0.log").read_text()


def test_slow_rank_is_named_once() -> None:
    metrics = FakeMetrics()
    watch = Alarms(LogConfig(), metrics, [])  # type: ignore[arg-type]
    for step in range(10, 60, 10):
        means = watch.ranks(step, [[0.010, 0.031, 0.011]] * 10)
        assert means == pytest.approx([0.010, 0.031, 0.011])
    assert metrics.lines == ["warning: rank 1 is slow: 31.0 ms per step, median 11.0 ms. All ranks wait for it."]
    assert metrics.rows == [("slow_rank", 10)]
    assert watch.ranks(60, [[0.01]] * 10) is None


def test_seconds_that_are_not_known_yet_slow_no_rank_and_hide_none() -> None:
    """The seconds of a step on a GPU are available later, on one rank sooner than on another. Until then they are 0."""
    metrics = FakeMetrics()
    watch = Alarms(LogConfig(), metrics, [])  # type: ignore[arg-type]
    assert watch.ranks(10, [[0.0, 0.0, 0.0]] * 2 + [[0.01, 0.0, 0.0]] * 8) == [0.01, 0.0, 0.0]
    assert watch.ranks(20, [[0.01, 0.0, 0.0]] * 6 + [[0.01, 0.01, 0.01]] * 4) == [0.01, 0.01, 0.01]
    assert metrics.lines == []
    assert watch.ranks(30, [[0.01, 0.0, 0.01]] * 6 + [[0.01, 0.03, 0.01]] * 4) == [0.01, 0.03, 0.01]
    assert metrics.rows == [("slow_rank", 30)]


def test_slow_rank_is_named_in_the_log_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(2, run, "--train.max_steps 25 --log.every_steps 5", MUTANT="accidents.slow_rank")
    assert [row["rank"] for row in rows(run, "slow_rank")] == [1]
    assert "warning: rank 1 is slow" in (tmp_path / "run-logs" / "rank-0.log").read_text()
    for row in rows(run, "train"):
        assert row["rank_seconds"][1] >= 0.06 > 0.0 < row["rank_seconds"][0]
