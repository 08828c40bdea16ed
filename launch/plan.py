"""`python -m launch plan`: what a run would do on N nodes of G GPUs, worked out without any of them.

The sampler gives every rank's share, and the checksum of an epoch proves that each example is used once. Bytes follow
from the config and the number of parameters. Not here: how long it takes, which depends on the machine
(docs/scaling.md), and the memory of activations, which only a real step shows.
"""

import json
import shlex
from collections import Counter
from typing import TYPE_CHECKING, Any

from train.cli import Parser, parse, split_arguments
from train.config import Config, DataConfig
from train.errors import FINISHED, UserError

if TYPE_CHECKING:
    from train.functional.layers import BatchNorm
    from train.functional.sampler import Sampler

Shares = list[tuple[range, range]]  # of each rank: its micro-batches, and its rows of the global batch


def describe_data(config: DataConfig) -> tuple[int, int, tuple[int, int, int], int]:
    """Return how many examples are trained and evaluated on, an image's shape, and the number of classes.

    The files of a data set that would be downloaded are not needed.
    """
    import torch

    from train.storage import data
    from train.storage.built_in import PUBLISHED

    if config.name not in PUBLISHED:
        source = data.split(config, data.prepare(config), torch.device("cpu"))
        return len(source.train), len(source.test), source.shape, source.num_classes
    known, held = PUBLISHED[config.name], config.validation
    if held >= known.num_train:
        raise UserError(f"data.validation is {held}, but {config.name} has {known.num_train} training examples.")
    num_test = held if held and config.eval_split != "test" else known.num_test
    return known.num_train - held, num_test, known.shape, known.num_classes


def shares(sampler: "Sampler", step: int, world_size: int) -> Shares:
    """Return what each rank computes in a step."""
    ranks = range(world_size)
    return [(sampler.own_micro_batches(r, world_size), range(*sampler.rank_rows(step, r, world_size))) for r in ranks]


def check_epoch(sampler: "Sampler", world_size: int) -> str:
    """Return the checksum of an epoch over all ranks. Raise RuntimeError unless each example is used exactly once."""
    from train.functional.sampler import coverage_checksum, expected_coverage

    total = count = 0
    for step in range(sampler.steps_per_epoch):
        for rank in range(world_size):
            examples = sampler.rank_examples(step, rank, world_size)
            total, count = (total + coverage_checksum(examples)) % 2**64, count + len(examples)
    if (total, count) != expected_coverage(sampler.num_examples, 1 << 20):
        raise RuntimeError(f"All {world_size} ranks use {count} examples, checksum {total:016x}: not an epoch.")
    return f"{total:016x}"


def traffic(config: Config, num_parameters: int, norms: "list[BatchNorm]", ranks: Shares) -> dict[str, int]:
    """Return {what: bytes} that each rank hands to torch.distributed in a step."""
    from train.world.reduce import Tree

    if len(ranks) == 1:
        return {}
    gradient_bytes, num_micro_batches = 4 * num_parameters, ranks[-1][0].stop
    columns = 2 + 2 * sum(norm.num_features for norm in norms)
    statistics = {"statistics": 8 * (num_micro_batches + 1) * columns}  # StepStatistics.summed, float64
    if not config.train.exact:
        return {"gradients": gradient_bytes} | statistics
    if num_micro_batches.bit_count() == len(ranks).bit_count() == 1:
        return {"exchange": gradient_bytes * (len(ranks).bit_length() - 1)} | statistics
    tree = Tree(num_micro_batches)
    most = max(len(tree.subtrees(own.start, own.stop)) for own, _ in ranks)
    return {"gather": gradient_bytes * most} | statistics


def state_bytes(config: Config, model: Any) -> dict[str, int]:
    """Return {what: bytes} of the tensors that a checkpoint holds."""
    parameters = list(model.parameters())
    gradients = sum(parameter.nbytes for parameter in parameters)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    if config.optim.name == "adamw":
        optimizer = 2 * gradients + 4 * len(parameters)  # two moments, and a step counter per parameter
    else:
        optimizer = gradients if config.optim.momentum else 0
    return {"weights": weights, "optimizer": optimizer, "averaged weights": weights if config.optim.ema else 0}


def make_plan(config: Config, nodes: int, gpus_per_node: int, arguments: list[str]) -> dict[str, Any]:
    """Work everything out and return what `--json` prints. Names that end in bytes hold bytes."""
    from train.functional import layers, optim
    from train.functional.sampler import Sampler
    from train.state import resolve_num_micro_batches
    from train.storage import network

    world_size = nodes * max(gpus_per_node, 1)  # without GPUs: one rank per node
    num_train, num_test, shape, num_classes = describe_data(config.data)
    model = network.build(config.model, shape, num_classes, config.seed, config.train.channels_last).module
    norms = layers.batch_norms(model)
    num_micro_batches = resolve_num_micro_batches(config.train, world_size, has_batch_norm=bool(norms))
    sampler = Sampler(num_train, config.train.global_batch_size, num_micro_batches, config.seed)
    total_steps = config.train.max_steps or config.train.epochs * sampler.steps_per_epoch
    ranks = shares(sampler, 0, world_size)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    rates = [optim.lr(config.optim, step, total_steps) for step in range(total_steps)]
    options = ["--nodes", str(nodes), *(["--gpus-per-node", str(gpus_per_node)] if gpus_per_node else [])]
    return {
        "world_size": world_size,
        "global_batch_size": sampler.global_batch_size,
        "num_micro_batches": num_micro_batches,
        "exact": config.train.exact,
        "ranks": [{"micro_batches": [own.start, own.stop], "rows": [rows.start, rows.stop]} for own, rows in ranks],
        "last_batch_rows": sampler.batch_rows(sampler.steps_per_epoch - 1),
        "eval_batches": -(-num_test // config.eval.batch_size),
        "num_train_examples": num_train,
        "ledger": check_epoch(sampler, world_size),
        "steps_per_epoch": sampler.steps_per_epoch,
        "total_steps": total_steps,
        "lr": {str(step): rates[step] for step in sorted({0, rates.index(max(rates)), total_steps - 1})},
        "num_parameters": num_parameters,
        "sent_bytes": traffic(config, num_parameters, norms, ranks),
        "gradient_bytes": 4 * num_parameters,
        "state_bytes": state_bytes(config, model),
        "command": shlex.join(
            ["python", "-m", "launch", "slurm", *options, *(["--", *arguments] if arguments else [])]
        ),
    }


def describe(plan: dict[str, Any]) -> str:
    """Return the plan for a person."""
    size, world_size, batches = plan["global_batch_size"], plan["world_size"], plan["eval_batches"]
    work = Counter((r["micro_batches"][1] - r["micro_batches"][0], r["rows"][1] - r["rows"][0]) for r in plan["ranks"])
    most = max(rows for _, rows in work)
    rates = ", ".join(f"{rate:.4g} at step {int(step):,}" for step, rate in plan["lr"].items())
    sent = ", ".join(f"{what} {size:,} bytes" for what, size in plan["sent_bytes"].items())
    saved = sum(plan["state_bytes"].values())
    lines = [
        f"{world_size:,} rank(s); {plan['num_parameters']:,} parameters",
        f"each step     {size:,} examples in {plan['num_micro_batches']:,} micro-batch(es); "
        f"an epoch's last step has {plan['last_batch_rows']:,}",
    ]
    for (own, rows), count in sorted(work.items(), reverse=True):
        lines.append(f"              {count:,} rank(s) compute {own:,} micro-batch(es), {rows:,} example(s) each")
    if idle := 1 - size / (most * world_size):
        lines.append(f"              uneven: {idle:.1%} of all ranks' time is waiting for those with {most:,} examples")
    lines += [
        f"evaluation    {batches:,} batch(es), computed by {min(batches, world_size):,} rank(s)",
        f"coverage      {plan['num_train_examples']:,} examples, each once per epoch (checksum {plan['ledger']})",
        f"steps         {plan['steps_per_epoch']:,} per epoch, {plan['total_steps']:,} in all",
        f"lr            {rates}: the same on any world size",
        f"communicated  per step and rank: {sent or 'nothing'}",
        f"checkpoint    {saved:,} bytes of tensors: weights, optimizer and averaged weights",
        f"memory        {saved + plan['gradient_bytes']:,} bytes per rank for these and the gradients",
        f"start         {plan['command']}",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print a plan and return the exit code."""
    parser = Parser(prog="python -m launch plan", usage="%(prog)s [OPTIONS] -- TRAIN ARGUMENTS", description=__doc__)
    parser.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    gpus = "GPUs and ranks of each; 0: one rank on its CPU (default 1)"
    parser.add_argument("--gpus-per-node", type=int, default=1, help=gpus)
    parser.add_argument("--json", action="store_true", help="print JSON, with every rank's micro-batches and rows")
    own, arguments = split_arguments(argv)
    options = parser.parse_args(own)
    if options.nodes < 1 or options.gpus_per_node < 0:
        raise UserError(f"--nodes is {options.nodes} and --gpus-per-node {options.gpus_per_node}. Use 1 and 0 or more.")
    plan = make_plan(parse(arguments), options.nodes, options.gpus_per_node, arguments)
    print(json.dumps(plan, indent=1) if options.json else describe(plan))
    return FINISHED
