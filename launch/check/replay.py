"""`python -m launch replay RUN --steps A:B`: compute the steps A+1 to B of an exact run again and compare.

Invariant: the run's directory is only read. Compared are the bits of each step's loss and gradient norm, and the
weights where the run saved. Before that the config and the data are compared with what the run recorded of them, and
every checkpoint is verified.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.check.compare import Series, collect, difference
from train.cli import Parser, parse, split_arguments
from train.config import Config, read_steps
from train.errors import UserError
from train.functional.trajectory import differences, effective, trajectory
from train.report import records
from train.report.records import Record
from train.rundir import RunDir
from train.tracking import fingerprint
from train.world.environment import environment, environment_differences

if TYPE_CHECKING:
    from train.state import Plan, State
    from train.storage.checkpoint import Snapshot


def parse_steps(text: str, recorded: fingerprint.Series, run_dir: Path) -> tuple[int, int]:
    """Parse `A:B`. Raises UserError unless the run has a fingerprint of each of these steps."""
    first, last = read_steps("--steps", text)
    if not recorded:
        raise UserError(f"{run_dir} has no fingerprints. Only a run with train.exact true can be replayed.")
    if not recorded.keys() >= set(range(first + 1, last + 1)):
        raise UserError(f"--steps is {text}, but {run_dir} recorded the steps {min(recorded)} to {max(recorded)}.")
    return first, last


def read_checkpoints(directory: Path, first: int) -> tuple[tuple[Path, "Snapshot"] | None, list[str]]:
    """Verify all checkpoints -> (the newest intact one at or before step `first`, what is damaged)."""
    from train.storage import checkpoint

    start, problems = None, []
    for path in reversed(checkpoint.directories(directory)):
        try:
            snapshot = checkpoint.decode(checkpoint.read(path))
        except checkpoint.Damaged as error:
            problems.append(str(error))
        else:
            start = (path, snapshot) if snapshot.meta["step"] <= first else start
    return start, problems


def check_origin(record: Record, config: Config, sha256: dict[str, str]) -> None:
    """Raise UserError if the config, the data or a file are not those that the run was trained with."""
    if record.summary and (changed := differences(effective(record.summary.config), trajectory(config))):
        config_path = RunDir(record.path).config
        raise UserError(f"{config_path} is not what {record.path} was trained with: {', '.join(changed)}.")
    for name, found in sha256.items():
        if (recorded := record.sha256.get(name, found)) != found:
            change = f"SHA-256 {recorded[:12]} -> {found[:12]}"
            raise UserError(f"This is other {name} than {record.path} was trained with: {change}.")


def compare_step(recorded: dict[str, Series], plan: "Plan", state: "State") -> tuple[bool, str]:
    """Compare the step that just ended with what the run recorded -> (whether all agrees, a line about it)."""
    from train.storage.checkpoint import tensors_sha256

    step, words, is_same = state.step, [], True
    columns = fingerprint.encode(plan.tables.read_results(step - 1, step))
    found: dict[str, Any] = {name: value for name, (value,) in columns.items()}
    if step in recorded["weights"]:
        found["weights"] = tensors_sha256(state.module.state_dict())
    for name, value in found.items():
        there = recorded[name].get(step, value)  # a step before those that were asked for may lack it
        is_same &= value == there
        words.append(
            f"{name} {value} agrees" if value == there else f"{name} DIFFERS: {difference(name, value, there)}"
        )
    return is_same, f"step {step}: {', '.join(words)}"


def replay(record: Record, config: Config, first: int, last: int) -> bool:
    """Compute the steps first+1 to last again; return whether everything agrees."""
    from train import loop
    from train.state import restore, set_up
    from train.step import prepare_step, train_step
    from train.storage import checkpoint, data
    from train.world.world import World

    recorded, files, summary = collect(record), RunDir(record.path), record.summary
    start, problems = read_checkpoints(files.checkpoints, first)
    if summary and summary.fingerprints != fingerprint.receipt(record.rows):
        problems.append(f"The fingerprints in {files.metrics} are not those of its {files.summary.name}.")
    if not start and not recorded["loss"].keys() >= set(range(1, first + 1)):
        raise UserError(f"{record.path} began after step 0 and has no intact checkpoint at or before step {first}.")
    same: dict[int, bool] = {}
    world = World.open(config.train)
    try:
        plan, state = set_up(config, world, data.load(config.data, world))
        check_origin(record, config, plan.sha256)
        before = start[1].meta["environment"] if start else summary.environment if summary else {}
        if changed := environment_differences(before, environment(world)):
            print(f"The bits may differ: {', '.join(changed)}.")
        if start:
            restore(plan, state, start[1], str(start[0]))
            weights = checkpoint.tensors_sha256(start[1].model)
            if recorded["weights"].get(state.step, weights) != weights:
                problems.append(f"Checkpoint {start[0]} holds other weights than the run saved at step {state.step}.")
        for problem in problems:
            print(f"damaged: {problem}")
        print(f"{record.path}: steps {first + 1} to {last} on 1 process, from {start[0] if start else 'scratch'}")
        while state.step < last:
            prepare_step(plan, state)
            train_step(plan, state)
            state.step += 1
            if plan.is_epoch_end(state.step):
                loop.close_epoch(plan, state)
            same[state.step], line = compare_step(recorded, plan, state)
            if state.step > first or not same[state.step]:
                print(line)
    finally:
        world.close()
    equal = [step for step, is_same in same.items() if is_same and step > first]
    num_saves = sum(step in recorded["weights"] for step in equal)
    damage = f"; {len(problems)} damaged, see above" if problems else ""
    counted = f"{len(equal)} of {last - first} steps agree bit for bit, {num_saves} saved weights among them"
    print(f"{counted}{damage}")
    return all(same.values()) and not problems


def main(argv: list[str]) -> int:
    """Replay steps of a run; return the exit code: 0 all agree, 1 something differs or is damaged."""
    parser = Parser(
        prog="python -m launch replay",
        usage="%(prog)s RUN --steps A:B [-- TRAIN ARGUMENTS]",
        description=__doc__,
        epilog="Train arguments fit the run to this machine, such as -- --data.root DIR --train.device cpu",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run with train.exact true")
    steps = "compute A+1 to B, from the newest checkpoint until A"
    parser.add_argument("--steps", metavar="A:B", required=True, help=steps)
    own, arguments = split_arguments(argv)
    options = parser.parse_args(own)
    record = records.read(options.run, options.run.name)
    first, last = parse_steps(options.steps, fingerprint.of_rows(record.rows)["loss"], options.run)
    config = parse(["--config", str(RunDir(options.run).require_config()), *arguments])
    return 0 if replay(record, config, first, last) else 1
