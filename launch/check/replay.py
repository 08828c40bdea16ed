"""`python -m launch replay RUN --steps A:B`: compute the steps A+1 to B of an exact run again and compare.

Invariant: the run's directory is only read. Compared are the bits of each step's loss and gradient norm, and the
weights where the run saved. Before that the config, the data and every checkpoint are compared with what the run
recorded of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.cli import Parser, parse, split_arguments
from train.config import Config, read_steps
from train.errors import UserError
from train.functional.trajectory import differences, trajectory
from train.report import records
from train.report.records import Record
from train.rundir import RunDir
from train.tracking import fingerprint
from train.world.environment import environment, environment_differences

if TYPE_CHECKING:
    from train.state import Plan, State
    from train.storage.checkpoint import Snapshot


@dataclass(frozen=True)
class Claim:
    """What one of the run's files records of the training that wrote it."""

    source: str
    trajectory: dict[str, Any]
    data_sha256: str
    environment: dict[str, Any]


def parse_steps(text: str, recorded: fingerprint.Series, run_dir: Path) -> tuple[int, int]:
    """Parse `A:B`. Raises UserError unless the run has a fingerprint of each of these steps."""
    first, last = read_steps("--steps", text)
    if not recorded:
        raise UserError(f"{run_dir} has no fingerprints. Only a run with train.exact true can be replayed.")
    if not recorded.keys() >= set(range(first + 1, last + 1)):
        raise UserError(f"--steps is {text}, but {run_dir} recorded the steps {min(recorded)} to {max(recorded)}.")
    return first, last


def read_checkpoints(directory: Path, first: int) -> tuple[tuple[Path, "Snapshot"] | None, list[Claim], list[str]]:
    """Verify all checkpoints -> (the newest intact one at or before step `first`, what each claims, damages)."""
    from train.storage import checkpoint

    start, claims, problems = None, [], []
    for path in reversed(checkpoint.directories(directory)):
        try:
            snapshot = checkpoint.decode(checkpoint.read(path))
        except checkpoint.Damaged as error:
            problems.append(str(error))
            continue
        meta = snapshot.meta
        claims.append(Claim(str(path), meta["trajectory"], meta["data_sha256"], meta["environment"]))
        if meta["step"] <= first:
            start = path, snapshot
    return start, claims, problems


def check_claims(config: Config, data_sha256: str, claims: list[Claim], record: Record) -> None:
    """Raise UserError if the config or the data are not those that the run was trained with."""
    for claim in claims:
        if changed := differences(claim.trajectory, trajectory(config)):
            config_file = RunDir(record.path).config
            raise UserError(f"{config_file} is not what {claim.source} was trained with: {', '.join(changed)}.")
    expected = {claim.source: claim.data_sha256 for claim in claims}
    for source, sha256 in (expected | {str(record.path): record.data.get("sha256", data_sha256)}).items():
        if sha256 != data_sha256:
            raise UserError(
                f"The data are not what {source} was trained with: SHA-256 {sha256[:12]} -> {data_sha256[:12]}."
            )


class Comparison:
    """Compares recomputed steps with a run's record, and counts."""

    def __init__(self, record: Record) -> None:
        self.recorded, self.weights = fingerprint.of_rows(record.rows), record.saved_weights
        self.num_equal = self.num_different = self.num_saves = 0

    def has_saved_others(self, state: "State") -> bool:
        """Return whether the run saved other weights at this step than it has now."""
        from train.storage.checkpoint import tensors_sha256

        return state.step in self.weights and tensors_sha256(state.module.state_dict()) != self.weights[state.step]

    def compare_step(self, plan: "Plan", state: "State", *, is_requested: bool) -> None:
        """Compare the step that just ended. Print it if it was asked for, or if it differs."""
        is_same, words, step = not self.has_saved_others(state), [], state.step
        if step in self.weights:
            words.append("weights agree" if is_same else "weights DIFFER")
            self.num_saves += is_same and is_requested
        for name, (value,) in fingerprint.encode(plan.tables.read_results(step - 1, step)).items():
            there = self.recorded[name].get(step, value)  # a step before those that were asked for may lack it
            is_same &= value == there
            outcome = f"{value} agrees" if value == there else f"DIFFERS: {fingerprint.difference(value, there)}"
            words.append(f"{name} {outcome}")
        self.num_different += not is_same
        self.num_equal += is_same and is_requested
        if is_requested or not is_same:
            print(f"step {step}: {', '.join(words)}")


def replay(record: Record, config: Config, first: int, last: int) -> bool:
    """Compute the steps first+1 to last again; return whether everything agrees."""
    from train import loop
    from train.state import restore, set_up
    from train.step import prepare_step, train_step
    from train.storage import data
    from train.world.world import World

    comparison, files, summary = Comparison(record), RunDir(record.path), record.summary
    start, claims, problems = read_checkpoints(files.checkpoints, first)
    if summary:
        claims.append(Claim(str(files.summary), summary.config, summary.data["sha256"], summary.environment))
        if summary.fingerprints != fingerprint.receipt(record.rows):
            problems.append(f"The fingerprints in {files.metrics} are not those of its {files.summary.name}.")
    if not start and not comparison.recorded["loss"].keys() >= set(range(1, first + 1)):
        raise UserError(f"{record.path} began after step 0 and has no intact checkpoint at or before step {first}.")
    world = World.open(config.train)
    try:
        source = data.load(config.data, world)
        check_claims(config, source.sha256, claims, record)
        if claims and (changed := environment_differences(claims[-1].environment, environment(world))):
            print(f"The bits may differ: {', '.join(changed)}.")
        plan, state = set_up(config, world, source)
        if start:
            restore(plan, state, start[1], str(start[0]))
            if comparison.has_saved_others(state):
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
            comparison.compare_step(plan, state, is_requested=state.step > first)
    finally:
        world.close()
    counted = f"{comparison.num_equal} of {last - first} steps agree bit for bit"
    damage = f"; {len(problems)} damaged, see above" if problems else ""
    print(f"{counted}, {comparison.num_saves} saved weights among them{damage}")
    return not comparison.num_different and not problems


def main(argv: list[str]) -> int:
    """Replay steps of a run; return the exit code: 0 all agree, 1 something differs or is damaged."""
    parser = Parser(
        prog="python -m launch replay",
        usage="%(prog)s RUN --steps A:B [-- TRAIN ARGUMENTS]",
        description=__doc__.split("\n")[0],
        epilog="Train arguments fit the run to this machine, such as -- --data.root DIR --train.device cpu",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run with train.exact true")
    steps = "compute A+1 to B, from the newest checkpoint until A"
    parser.add_argument("--steps", metavar="A:B", required=True, help=steps)
    own, arguments = split_arguments(argv)
    options = parser.parse_args(own)
    record = records.read(options.run, options.run.name)
    first, last = parse_steps(options.steps, fingerprint.of_rows(record.rows)["loss"], options.run)
    config_file = RunDir(options.run).require_config()
    config = parse(["--config", str(config_file), *arguments])
    if not config.train.exact:
        raise UserError(f"{config_file} has train.exact false, but the run was exact. It was changed.")
    return 0 if replay(record, config, first, last) else 1
