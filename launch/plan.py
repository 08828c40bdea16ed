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
from train.config import Config
from train.errors import FINISHED, UserError

if TYPE_CHECKING:
    from train.functional.models import BatchNorm2d
    from train.functional.sampler import Sampler

Shares = list[tuple[range, range]]  # of each rank: its micro-batches, and its rows of the global batch
PIXELS = 28 * 28
EXAMPLE_BYTES = PIXELS + 8  # on the device: uint8 pixels and an int64 label


def num_examples(config: Config) -> tuple[int, int]:
    """Return how many examples are trained and evaluated on. The files are not needed."""
    from train.storage import data

    options = config.data
    if options.name in data.FOLDERS:
        train, test = data.COUNTS["train"], data.COUNTS["t10k"]
    elif options.name == "random":
        train, test = options.random_examples, options.random_examples // 6
    else:
        labels = data.read_digits()
        train, test = len(labels["train_labels"]), len(labels["t10k_labels"])
    if options.validation >= train:
        raise UserError(f"data.validation is {options.validation}, but {options.name} has {train} training examples.")
    return (train - options.validation, options.validation) if options.validation else (train, test)


def count_micro_batches(config: Config, nodes: int, per_node: int, has_norm: bool) -> int:
    """Return the micro-batches of a step. Refuse a world that is too large, naming the largest that fits."""
    from train.state import resolve_num_micro_batches

    try:
        return resolve_num_micro_batches(config.train, nodes * per_node, has_batch_norm=has_norm)
    except UserError as error:
        largest = config.train.num_micro_batches or (0 if has_norm else config.train.global_batch_size)
        if not largest:
            raise
        fits = f"--gpus-per-node {min(largest, per_node)}"
        if largest >= per_node:
            fits = f"--nodes {largest // per_node} {fits}"
        raise UserError(f"{error} The largest that fits here: {fits}.") from None


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


def traffic(config: Config, num_parameters: int, norms: "list[BatchNorm2d]", ranks: Shares) -> dict[str, int]:
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


def memory(config: Config, model: Any, ranks: Shares, sent: dict[str, int], num: tuple[int, int]) -> dict[str, int]:
    """Return {what: bytes} that the rank with most to do keeps on its device, without activations."""
    parameters = list(model.parameters())
    gradients = 4 * sum(parameter.numel() for parameter in parameters)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    moments = 2 * gradients + 4 * len(parameters) if config.optim.name == "adamw" else gradients
    most, rows = max(len(own) for own, _ in ranks), max(len(rows) for _, rows in ranks)
    # one sum for each subtree that is not whole yet, and what the other ranks send
    received = gradients if "exchange" in sent else sent.get("gather", 0) * len(ranks)
    return {
        "weights": weights,
        "gradients": gradients,
        "gradients of the exact tree": gradients * (most - 1).bit_length() + received if config.train.exact else 0,
        "optimizer": moments if config.optim.momentum or config.optim.name == "adamw" else 0,
        "averaged weights": weights if config.optim.ema else 0,
        "inputs": rows * 4 * PIXELS,
        "data set": sum(num) * EXAMPLE_BYTES,
    }


def make_plan(config: Config, nodes: int, gpus_per_node: int, arguments: list[str]) -> dict[str, Any]:
    """Work everything out and return what `--json` prints. Names that end in bytes hold bytes."""
    from train.functional import models, optim
    from train.functional.sampler import Sampler

    per_node = max(gpus_per_node, 1)  # without GPUs: one rank per node
    world_size = nodes * per_node
    model = models.build(config.model, 0)
    norms, num = models.batch_norms(model), num_examples(config)
    num_micro_batches = count_micro_batches(config, nodes, per_node, bool(norms))
    sampler = Sampler(num[0], config.train.global_batch_size, num_micro_batches, config.seed)
    total_steps = config.train.max_steps or config.train.epochs * sampler.steps_per_epoch
    ranks, last_step = shares(sampler, 0, world_size), sampler.steps_per_epoch - 1
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    sent = traffic(config, num_parameters, norms, ranks)
    held = memory(config, model, ranks, sent, num)
    checkpoint_bytes = held["weights"] + held["optimizer"] + held["averaged weights"]
    rates = [optim.lr(config.optim, step, total_steps) for step in range(total_steps)]
    options = ["--nodes", str(nodes), *(["--gpus-per-node", str(gpus_per_node)] if gpus_per_node else [])]
    return {
        "world_size": world_size,
        "global_batch_size": sampler.global_batch_size,
        "num_micro_batches": num_micro_batches,
        "exact": config.train.exact,
        "ranks": [{"micro_batches": [own.start, own.stop], "rows": [rows.start, rows.stop]} for own, rows in ranks],
        "last_batch": {
            "rows": sampler.batch_rows(last_step),
            "idle_ranks": sum(not rows for _, rows in shares(sampler, last_step, world_size)),
        },
        "eval_batches": -(-num[1] // config.eval.batch_size),
        "num_train_examples": num[0],
        "ledger": check_epoch(sampler, world_size),
        "steps_per_epoch": sampler.steps_per_epoch,
        "total_steps": total_steps,
        "lr": {str(step): rates[step] for step in sorted({0, rates.index(max(rates)), total_steps - 1})},
        "num_parameters": num_parameters,
        "sent_bytes": sent,
        "checkpoint_bytes": checkpoint_bytes,
        "checkpoints_kept_bytes": checkpoint_bytes * (config.checkpoint.keep + 2),  # the best, and one being written
        "memory_bytes": held,
        "commands": [
            shlex.join(["python", "-m", "launch", "slurm", *options, *(["--", *arguments] if arguments else [])]),
            shlex.join(["sbatch", *options, "slurm/train.sbatch", *arguments]),
        ],
    }


def describe_shares(plan: dict[str, Any]) -> list[str]:
    """Return the lines about who computes what."""
    size, world_size, parts = plan["global_batch_size"], plan["world_size"], plan["num_micro_batches"]
    smallest, largest = size // parts, -(-size // parts)
    each = f"{smallest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
    lines = [f"each step     {size:,} examples = {parts:,} micro-batch(es) of {each}"]
    work = Counter((r["micro_batches"][1] - r["micro_batches"][0], r["rows"][1] - r["rows"][0]) for r in plan["ranks"])
    for (own, rows), count in sorted(work.items(), reverse=True):
        lines.append(f"              {count:,} rank(s) compute {own:,} micro-batch(es), {rows:,} example(s) each")
    most = max(rows for _, rows in work)
    if idle := 1 - size / (most * world_size):
        lines.append(f"              uneven: {idle:.1%} of all ranks' time is waiting for those with {most:,} examples")
    last = plan["last_batch"]
    if last["rows"] != size:
        idle_ranks = f"{last['idle_ranks']:,} rank(s) have none"
        lines.append(f"              an epoch's last step has {last['rows']:,} examples; {idle_ranks}")
    return lines


def describe(plan: dict[str, Any], nodes: int, per_node: int) -> str:
    """Return the plan for a person."""
    batches, held = plan["eval_batches"], plan["memory_bytes"]
    rates = ", ".join(f"{rate:.4g} at step {int(step):,}" for step, rate in plan["lr"].items())
    sent = ", ".join(f"{what} {size:,} bytes" for what, size in plan["sent_bytes"].items())
    parts = ", ".join(f"{name} {amount / 1e6:,.1f}" for name, amount in held.items() if amount)
    lines = [
        f"{plan['world_size']:,} rank(s) = {nodes:,} node(s) x {per_node}; {plan['num_parameters']:,} parameters",
        *describe_shares(plan),
        f"evaluation    {batches:,} batch(es), computed by {min(batches, plan['world_size']):,} rank(s)",
        f"coverage      {plan['num_train_examples']:,} examples, each once per epoch (checksum {plan['ledger']})",
        f"steps         {plan['steps_per_epoch']:,} per epoch, {plan['total_steps']:,} in all",
        f"lr            {rates}: the same on any world size",
        f"communicated  per step and rank: {sent or 'nothing'}",
        f"checkpoint    {plan['checkpoint_bytes']:,} bytes of tensors; "
        f"{plan['checkpoints_kept_bytes']:,} on the disk at most (kept, best, being written)",
        f"memory        {sum(held.values()) / 1e6:,.1f} MB per rank, without torch itself and activations: {parts}",
        *(f"start         {command}" for command in plan["commands"]),
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print a plan and return the exit code."""
    parser = Parser(
        prog="python -m launch plan", usage="%(prog)s [OPTIONS] -- TRAIN ARGUMENTS", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    gpus = "GPUs and ranks of each; 0: one rank on its CPU (default 1)"
    parser.add_argument("--gpus-per-node", type=int, default=1, help=gpus)
    parser.add_argument("--json", action="store_true", help="print JSON, with every rank's micro-batches and rows")
    own, arguments = split_arguments(argv)
    options = parser.parse_args(own)
    if options.nodes < 1 or options.gpus_per_node < 0:
        raise UserError(f"--nodes is {options.nodes} and --gpus-per-node {options.gpus_per_node}. Use 1 and 0 or more.")
    plan = make_plan(parse(arguments), options.nodes, options.gpus_per_node, arguments)
    print(json.dumps(plan, indent=1) if options.json else describe(plan, options.nodes, max(options.gpus_per_node, 1)))
    return FINISHED
