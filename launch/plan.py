"""`python -m launch plan`: what a run would do on N nodes of G GPUs, worked out without any of them.

Who computes what is asked of the sampler for every rank and checked by the ledger of an epoch; bytes are counted in a
step that one rank makes on torch's fake process group (dryrun.py). Deliberately not here: how long it takes, which depends
on the machine; docs/scaling.md models that (`--scaling` prints its tables).
"""

import json
import shlex
from collections import Counter
from typing import TYPE_CHECKING, Any

from launch import dryrun
from train.cli import Parser, parse, split_arguments
from train.config import Config
from train.errors import UserError

if TYPE_CHECKING:
    from train.functional.sampler import Sampler

IMAGE_BYTES, LABEL_BYTES = 28 * 28, 8  # of an example on the device: uint8 pixels and an int64


def num_examples(config: Config) -> tuple[int, int]:
    """How many examples are trained and evaluated on; the files are not needed."""
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


def plan_ranks(config: Config, nodes: int, per_node: int) -> int:
    """Return the micro-batches of a step; refuse a world that is too large, naming the largest that fits."""
    from train.functional import models
    from train.run import plan_micro_batches

    has_norm = bool(models.norms(models.build(config.model, 0)))
    try:
        return plan_micro_batches(config, nodes * per_node, has_norm)
    except UserError as error:
        largest = config.train.micro_batches or (0 if has_norm else config.train.global_batch_size)
        if not largest:
            raise
        fits = (
            f"--nodes {largest // per_node} --gpus-per-node {per_node}"
            if largest >= per_node
            else f"--gpus-per-node {largest}"
        )
        raise UserError(f"{error} The largest that fits here: {fits}.") from None


def shares(sampler: "Sampler", step: int, world_size: int) -> list[tuple[range, range]]:
    """For each rank: its micro-batches, and its rows of the global batch of a step."""
    ranks = range(world_size)
    return [(sampler.own_micro_batches(r, world_size), range(*sampler.rank_rows(step, r, world_size))) for r in ranks]


def check_epoch(sampler: "Sampler", world_size: int) -> str:
    """Ask every rank for its examples of every step of an epoch; raise RuntimeError unless each is used exactly once."""
    from train.functional.sampler import expected_ledger, ledger_sum

    total = count = 0
    for step in range(sampler.steps_per_epoch):
        for rank in range(world_size):
            examples = sampler.rank_examples(step, rank, world_size)
            total, count = (total + ledger_sum(examples)) % 2**64, count + len(examples)
    if (total, count) != expected_ledger(sampler.num_examples, 1 << 20):
        raise RuntimeError(
            f"The ledger over all {world_size} ranks has {count} examples, sum {total:016x}: not an epoch."
        )
    return f"{total:016x}"


def make_plan(config: Config, nodes: int, gpus_per_node: int, arguments: list[str]) -> dict[str, Any]:
    """Work everything out -> what `--json` prints; bytes in names that end in bytes."""
    from train.functional import optim
    from train.functional.sampler import Sampler

    per_node = max(gpus_per_node, 1)  # without GPUs: one rank per node
    world_size = nodes * per_node
    micro_batches, num = plan_ranks(config, nodes, per_node), num_examples(config)
    sampler = Sampler(num[0], config.train.global_batch_size, micro_batches, config.seed)
    total_steps = config.train.max_steps or config.train.epochs * sampler.steps_per_epoch
    ranks = shares(sampler, 0, world_size)
    sizes = dryrun.measure(config, 0, world_size, per_node, micro_batches, num)
    rates = [optim.lr(config.optim, step, total_steps) for step in range(total_steps)]
    highest = rates.index(max(rates))
    options = ["--nodes", str(nodes), *(["--gpus-per-node", str(gpus_per_node)] if gpus_per_node else [])]
    return {
        "world_size": world_size,
        "global_batch_size": sampler.global_batch_size,
        "micro_batches": micro_batches,
        "exact": config.train.exact,
        "ranks": [{"micro_batches": [own.start, own.stop], "rows": [rows.start, rows.stop]} for own, rows in ranks],
        "last_batch": {
            "rows": sampler.batch_rows(sampler.steps_per_epoch - 1),
            "idle_ranks": idle_ranks(sampler, world_size),
        },
        "eval_portions": -(-num[1] // config.eval.batch_size),
        "num_train_examples": num[0],
        "ledger": check_epoch(sampler, world_size),
        "steps_per_epoch": sampler.steps_per_epoch,
        "total_steps": total_steps,
        "lr": {str(step): rates[step] for step in sorted({0, highest, total_steps - 1})},
        "num_parameters": sizes.num_parameters,
        "traffic": [{"what": what, "bytes": size} for what, size in sizes.traffic],
        "checkpoint_files": sizes.checkpoint,
        "checkpoint_bytes": sum(sizes.checkpoint.values()),
        "checkpoints_kept_bytes": sum(sizes.checkpoint.values())
        * (config.checkpoint.keep + 2),  # the best, and one being written
        "memory_bytes": memory(config, sizes, ranks, num),
        "commands": [
            shlex.join(["python", "-m", "launch", "slurm", *options, *(["--", *arguments] if arguments else [])]),
            shlex.join(["sbatch", *options, "slurm/train.sbatch", *arguments]),
        ],
    }


def idle_ranks(sampler: "Sampler", world_size: int) -> int:
    """How many ranks have no example in the last, shorter batch of an epoch."""
    return sum(not rows for _, rows in shares(sampler, sampler.steps_per_epoch - 1, world_size))


def memory(
    config: Config, sizes: dryrun.Sizes, ranks: list[tuple[range, range]], num: tuple[int, int]
) -> dict[str, int]:
    """What the rank with most to do keeps in its device's memory when its last backward pass begins."""
    micro_batch = max(-(-len(rows) // max(len(own), 1)) for own, rows in ranks)
    most, rows = max(len(own) for own, _ in ranks), max(len(rows) for _, rows in ranks)
    gradients = 4 * sizes.num_parameters
    received = [
        size * (len(ranks) if what == "gather" else 1) for what, size in sizes.traffic if what in ("exchange", "gather")
    ]
    return {
        "weights": sizes.parameters,
        "gradients": gradients,
        # sums of earlier micro-batches, one for each subtree that is not whole yet; and what other ranks send
        "gradients of the exact tree": gradients * (most - 1).bit_length() + max(received, default=0)
        if config.train.exact
        else 0,
        "optimizer": sizes.optimizer,
        "averaged weights": sizes.ema,
        "activations": sizes.saved_fixed + sizes.saved_per_example * micro_batch,
        "inputs of the other micro-batches": (rows - micro_batch) * 4 * IMAGE_BYTES,
        "data set": sum(num) * (IMAGE_BYTES + LABEL_BYTES),
    }


def span(values: list[int]) -> str:
    """`3` or `3 to 4`."""
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def text(plan: dict[str, Any], nodes: int, per_node: int) -> str:
    """The plan for a person."""
    size, world_size, parts = plan["global_batch_size"], plan["world_size"], plan["micro_batches"]
    work = Counter((r["micro_batches"][1] - r["micro_batches"][0], r["rows"][1] - r["rows"][0]) for r in plan["ranks"])
    most = max(rows for _, rows in work)
    lines = [
        f"{world_size:,} rank(s) = {nodes:,} node(s) x {per_node}; {plan['num_parameters']:,} parameters",
        f"each step     {size:,} examples = {parts:,} micro-batch(es) of {span([size // parts, -(-size // parts)])}",
    ]
    for (own, rows), count in sorted(work.items(), reverse=True):
        lines.append(f"              {count:,} rank(s) compute {own:,} micro-batch(es), {rows:,} example(s) each")
    if idle := 1 - size / (most * world_size):
        lines.append(f"              uneven: {idle:.1%} of all ranks' time is waiting for those with {most:,} examples")
    last = plan["last_batch"]
    if last["rows"] != size:
        lines.append(
            f"              an epoch's last step has {last['rows']:,} examples; {last['idle_ranks']:,} rank(s) have none"
        )
    portions = plan["eval_portions"]
    lines.append(f"evaluation    {portions:,} portion(s), computed by {min(portions, world_size):,} rank(s)")
    lines.append(
        f"ledger        {plan['num_train_examples']:,} examples, each once per epoch over all ranks (sum {plan['ledger']})"
    )
    lines.append(f"steps         {plan['steps_per_epoch']:,} per epoch, {plan['total_steps']:,} in all")
    rates = ", ".join(f"{rate:.4g} at step {int(step):,}" for step, rate in plan["lr"].items())
    lines.append(f"lr            {rates}: the same on any world size")
    sent = Counter((item["what"], item["bytes"]) for item in plan["traffic"])
    payloads = ", ".join(f"{what} {count} x {size:,} bytes" for (what, size), count in sent.items())
    lines.append(f"communicated  per step and rank: {payloads or 'nothing'}")
    kept = plan["checkpoints_kept_bytes"]
    lines.append(
        f"checkpoint    {plan['checkpoint_bytes']:,} bytes; {kept:,} on the disk at most (kept, best, being written)"
    )
    held = plan["memory_bytes"]
    parts_text = ", ".join(f"{name} {amount / 1e6:,.1f}" for name, amount in held.items() if amount)
    lines.append(f"memory        {sum(held.values()) / 1e6:,.1f} MB per rank beside torch itself: {parts_text}")
    return "\n".join([*lines, *(f"start         {command}" for command in plan["commands"])])


def main(argv: list[str]) -> int:
    """Print a plan, or the tables of docs/scaling.md."""
    parser = Parser(
        prog="python -m launch plan", usage="%(prog)s [OPTIONS] -- TRAIN ARGUMENTS", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=1, help="GPUs and ranks of each; 0: one rank on its CPU (default 1)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every rank's micro-batches and rows")
    parser.add_argument("--scaling", action="store_true", help="print the modelled tables of docs/scaling.md instead")
    own, arguments = split_arguments(argv)
    options, wrong = parser.parse_known_args(own)
    if wrong:
        raise UserError(f"launch plan has no option {wrong[0]}. The training's arguments stand behind `--`.")
    if options.scaling:
        from launch import scaling

        print(scaling.page())
        return 0
    if options.nodes < 1 or options.gpus_per_node < 0:
        raise UserError(f"--nodes is {options.nodes} and --gpus-per-node {options.gpus_per_node}. Use 1 and 0 or more.")
    plan = make_plan(parse(arguments), options.nodes, options.gpus_per_node, arguments)
    print(json.dumps(plan, indent=1) if options.json else text(plan, options.nodes, max(options.gpus_per_node, 1)))
    return 0
