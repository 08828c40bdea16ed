"""`launch plan` prints what a run does: its shares, lr, bytes and refusals are those of real runs."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import MNIST, ROOT
from ranks.processes import Ranks, arguments, rows, train
from safetensors.torch import load_file

from launch import plan, slurm
from launch.__main__ import main
from train.cli import parse
from train.config import ModelConfig
from train.functional.models import build
from train.functional.sampler import Sampler

SMALL = ["--data.name", "digits", "--model.name", "tiny", "--train.num_threads", "1"]


def make(nodes: int, per_node: int, *flags: str) -> dict[str, Any]:
    argv = " ".join(flags).split()
    return plan.make_plan(parse(argv), nodes, per_node, argv)


@pytest.mark.parametrize(
    ("nodes", "per_node", "flags"),
    [
        (1, 1, ""),
        (1, 8, ""),
        (1, 7, "--train.global_batch_size 100"),
        (2, 4, "--train.exact true --train.num_micro_batches 8"),
        (3, 2, "--train.exact true --train.num_micro_batches 10 --train.global_batch_size 500 --model.name vgg"),
        (512, 8, "--train.global_batch_size 6000"),
        (512, 8, "--train.exact true --train.num_micro_batches 4096 --train.global_batch_size 8192"),
        (512, 8, "--train.num_micro_batches 4096 --train.global_batch_size 4096 --model.name tiny_bn"),
    ],
)
def test_ranks_share_each_step_and_bytes_follow_from_the_parameters(nodes: int, per_node: int, flags: str) -> None:
    made = make(nodes, per_node, flags)
    world_size, size = nodes * per_node, made["global_batch_size"]
    assert made["world_size"] == world_size == len(made["ranks"])
    for what, total in (("rows", size), ("micro_batches", made["num_micro_batches"])):
        bounds = [rank[what] for rank in made["ranks"]]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == total
        assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))
        sizes = [stop - start for start, stop in bounds]
        # contiguous shares of micro-batches that differ by a row differ by a micro-batch and its row at most
        assert max(sizes) - min(sizes) <= (1 if what == "micro_batches" else -(-size // made["num_micro_batches"]))
    gradient_bytes = 4 * made["num_parameters"]
    sent = made["sent_bytes"]
    if world_size == 1:
        assert sent == {}
    elif not made["exact"]:
        assert sent["gradients"] == gradient_bytes
    elif made["num_micro_batches"] & (made["num_micro_batches"] - 1) == 0:
        assert sent["exchange"] == gradient_bytes * (world_size.bit_length() - 1)
    else:
        assert sent["gather"] == gradient_bytes * 2  # 10 leaves on 6 ranks: a rank owns two subtrees at most
    assert made["last_batch_rows"] == 60000 - (made["steps_per_epoch"] - 1) * size


@pytest.mark.parametrize(
    "flags", ["", "--optim.name adamw --optim.ema 0.9 --model.name tiny_bn --train.num_micro_batches 4"]
)
def test_checkpoint_steps_and_lr_are_those_of_a_real_run(tmp_path: Path, flags: str) -> None:
    limits = "--train.max_steps 7 --log.every_steps 1"
    train(2, tmp_path / "run", limits, flags)
    argv = arguments(tmp_path / "run", limits, flags)
    made = plan.make_plan(parse(argv), 2, 1, argv)
    files = (tmp_path / "run" / "checkpoints" / "step-00000007").glob("*.safetensors")
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert sum(made["state_bytes"].values()) == sum(tensor.nbytes for tensor in tensors)
    rates = {str(row["step"] - 1): row["lr"] for row in rows(tmp_path / "run", "train")}
    assert made["total_steps"] == len(rates) == 7
    assert {step: rates[step] for step in made["lr"]} == made["lr"]
    assert max(rates.values()) in made["lr"].values()


@pytest.mark.parametrize(
    "flags",
    [
        "--model.name tiny --train.global_batch_size 11",
        "--model.name vgg_wide --train.num_micro_batches 2 --train.global_batch_size 10 --optim.momentum 0",
        "--train.exact true --model.name tiny_bn --train.num_micro_batches 4 --train.global_batch_size 8 "
        "--optim.name adamw",
        "--train.exact true --model.name tiny --train.num_micro_batches 5 --train.global_batch_size 10",
    ],
)
def test_shares_steps_and_bytes_are_those_of_two_real_ranks(tmp_path: Path, flags: str) -> None:
    argv = arguments(tmp_path / "run", flags)
    ranks = Ranks(2, argv, tmp_path / "logs", module="ranks.traffic")
    assert ranks.wait() == [0, 0], ranks.output()
    made = plan.make_plan(parse(argv), 1, 2, argv)
    for log, planned in zip(ranks.logs, made["ranks"], strict=True):
        found = json.loads(log.read_text().splitlines()[-1])
        assert found == {
            "sent": made["sent_bytes"],
            "micro_batches": planned["micro_batches"],
            "num_rows": planned["rows"][1] - planned["rows"][0],
            "total_steps": made["total_steps"],
            "num_parameters": made["num_parameters"],
            "optimizer_bytes": made["state_bytes"]["optimizer"],
        }


def test_a_sampler_that_repeats_an_example_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(100, 10, 5, 0)
    assert len(plan.check_epoch(sampler, 5)) == 16
    original = Sampler.rank_examples

    def repeating(self: Sampler, step: int, rank: int, world_size: int) -> Any:
        return original(self, step, 0 if (step, rank) == (3, 4) else rank, world_size)

    monkeypatch.setattr(Sampler, "rank_examples", repeating)
    with pytest.raises(RuntimeError, match="not an epoch"):
        plan.check_epoch(sampler, 5)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--nodes 512 --gpus-per-node 8", "512, fewer than 4096 ranks. Use 4096 or more."),
        ("--nodes 3 --gpus-per-node 8 -- --train.num_micro_batches 8", "Use at most 8 processes"),
        ("--nodes 3 -- --model.name vgg", "Set it to the largest world size"),
        (
            "--nodes 2 -- --train.exact true --train.num_micro_batches 7",
            "Use 511 or 518, or train.num_micro_batches 4.",
        ),
        ("--nodes 2 -- --optim.lrr 1", "Did you mean optim.lr?"),
        ("--nodes 2 -- --data.validation 60000", "60000 training examples"),
        ("--nodes 0", "--nodes is 0"),
        ("--nodse 2", "no option --nodse"),
    ],
)
def test_refusals_are_one_line(argv: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *argv.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALL, "--train.num_micro_batches", "8", "--wandb.notes", "a b"]
    assert main(["plan", "--nodes", "2", "--gpus-per-node", "3", "--", *flags]) == 0
    printed = capsys.readouterr().out
    for line in (
        "6 rank(s); ",
        "2 rank(s) compute 2 micro-batch(es), 128 example(s) each",
        "4 rank(s) compute 1 micro-batch(es), 64 example(s) each",
        "uneven: 33.3% of all ranks' time is waiting",
        "communicated  per step and rank: gradients ",
        "python -m launch slurm --nodes 2 --gpus-per-node 3 -- --data.name digits",
        "--wandb.notes 'a b'",
    ):
        assert line in printed
    assert main(["plan", "--json", "--gpus-per-node", "0", "--", *SMALL, "--data.name", "random"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["command"].startswith("python -m launch slurm --nodes 1 -- --data.name")
    model = build(ModelConfig(name="tiny"), *MNIST, 0)
    assert made["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_cluster_commands_of_the_docs_name_trainings_that_so_many_ranks_can_share() -> None:
    """This checks each `launch slurm`, `launch plan` and `sbatch` line of the docs and scripts."""
    found = 0
    for name in ("README.md", "docs/scaling.md", "slurm/README.md", "slurm/train.sbatch", "slurm/sweep.sbatch"):
        for line in (ROOT / name).read_text().splitlines():
            config = re.search(r"--config (configs/[\w.]+)", line)
            counts = dict(re.findall(r"--(nodes|gpus-per-node|ntasks-per-node)[ =](\d+)", line))
            if config and counts:
                nodes = int(counts.pop("nodes", 1))
                slurm.check_world(parse(["--config", str(ROOT / config[1])]), nodes * int(*counts.values()))
                found += 1
    assert found >= 8
