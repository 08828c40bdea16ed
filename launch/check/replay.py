"""`python -m launch replay RUN --steps A:B`: compute the steps A+1 to B of an exact run again, in one process, and compare.

Invariant: the run's directory is only read. What is compared are bits: loss and gradient norm of each step, and the weights
where the run saved. Before that the config, the data and every checkpoint are held against what the run recorded of them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.cli import Parser, parse, split_arguments
from train.config import Config, read_steps
from train.errors import UserError
from train.functional.trajectory import contract_differences, differences, trajectory
from train.report import records
from train.report.records import Record
from train.tracking import fingerprint

if TYPE_CHECKING:
    from train.run import Run
    from train.storage.checkpoint import State

Claim = tuple[str, dict[str, Any]]  # where it stands, and {mathematics, data_sha256, contract} of the run


def span(text: str, recorded: dict[int, str], run_dir: Path) -> tuple[int, int]:
    """Read `A:B`; raise UserError unless the run has a fingerprint of each of these steps."""
    first, last = read_steps("--steps", text)
    if not recorded:
        raise UserError(f"{run_dir} has no fingerprints: only a run with train.exact true can be replayed.")
    if not recorded.keys() >= set(range(first + 1, last + 1)):
        raise UserError(f"--steps is {text}, but {run_dir} recorded the steps {min(recorded)} to {max(recorded)}.")
    return first, last


def read_checkpoints(directory: Path, first: int) -> tuple[tuple[Path, "State"] | None, list[Claim], list[str]]:
    """Verify all checkpoints of a run -> (the newest whole one at or before step `first`, what all claim, who is damaged)."""
    from train.storage import checkpoint

    start, claims, problems = None, [], []
    for path in reversed(checkpoint.directories(directory)):
        try:
            state = checkpoint.decode(checkpoint.read(path))
        except checkpoint.Damaged as error:
            problems.append(str(error))
            continue
        claims.append((str(path), state.meta))
        if state.meta["step"] <= first:
            start = path, state
    return start, claims, problems


def check_claims(config: Config, data_sha256: str, claims: list[Claim], run_dir: Path) -> None:
    """Raise UserError if the config or the data are not those that the run was trained with."""
    for source, claim in claims:
        if changed := differences(claim["mathematics"], trajectory(config)):
            raise UserError(f"{run_dir / 'config.yaml'} is not what {source} was trained with: {', '.join(changed)}.")
        if (expected := claim["data_sha256"]) != data_sha256:
            raise UserError(
                f"The data are not what {source} was trained with: SHA-256 {expected[:12]} -> {data_sha256[:12]}."
            )


def summary_claim(record: Record, run_dir: Path) -> list[Claim]:
    """What summary.json claims, if it is there and of the last step."""
    summary = record.summary
    if not {"config", "contract"} <= summary.keys():
        return []
    claim = {
        "mathematics": summary["config"],
        "data_sha256": summary["data"]["sha256"],
        "contract": summary["contract"],
    }
    return [(str(run_dir / "summary.json"), claim)]


class Comparison:
    """Holds recomputed steps against a run's record, and counts."""

    def __init__(self, record: Record) -> None:
        self.bits = fingerprint.of_rows(record.rows)
        self.weights = {row["step"]: row["weights_sha256"] for row in record.rows if row["event"] == "saved"}
        if "weights_sha256" in record.summary:
            self.weights[record.summary["step"]] = record.summary["weights_sha256"]
        self.agreeing, self.differing, self.saves = 0, 0, 0

    def same_weights(self, run: "Run") -> bool | None:
        """Whether the weights are those that the run had at this step; None if it did not save then."""
        from train.storage.checkpoint import tensors_sha256

        saved = self.weights.get(run.step)
        return None if saved is None else tensors_sha256(run.module.state_dict()) == saved

    def step(self, run: "Run", here: dict[str, list[str]], *, is_asked: bool) -> None:
        """Compare the step that just ended; print it if it was asked for, or if it differs."""
        words, same = [], True
        for name, (bits,) in here.items():
            there = self.bits[name].get(run.step)
            if there is None:  # between the checkpoint and the steps that were asked for
                continue
            value = f"{name} {fingerprint.decode(bits):.9g}"
            distance = "agrees" if bits == there else f"DIFFERS from {fingerprint.decode(there):.9g}"
            words.append(
                f"{value} {distance}" + ("" if bits == there else f" by {fingerprint.ulps(bits, there):,} ulps")
            )
            same &= bits == there
        if (weights := self.same_weights(run)) is not None:
            words.append("weights agree" if weights else "weights DIFFER")
            same &= weights
            self.saves += weights and is_asked
        self.differing += not same
        self.agreeing += same and is_asked
        if is_asked or not same:
            print(f"step {run.step}: {', '.join(words)}")


def replay(run_dir: Path, record: Record, config: Config, first: int, last: int) -> bool:
    """Compute the steps first+1 to last again; return whether everything agrees."""
    from train import journal, loop
    from train.run import contract, restore, set_up
    from train.step import train_step
    from train.storage import data
    from train.world.world import World

    comparison = Comparison(record)
    start, claims, problems = read_checkpoints(run_dir / "checkpoints", first)
    claims += summary_claim(record, run_dir)
    if record.summary.get("fingerprints") not in (None, fingerprint.receipt(record.rows)):
        problems.append(f"The fingerprints in {run_dir / 'metrics.jsonl'} are not those of its summary.json.")
    if not start and not comparison.bits["loss"].keys() >= set(range(1, first + 1)):
        raise UserError(f"{run_dir} did not begin at step 0 and has no whole checkpoint at or before step {first}.")
    world = World.open(config.train)
    try:
        source = data.load(config.data, world)
        check_claims(config, source.sha256, claims, run_dir)
        if (started := record.data.get("sha256", source.sha256)) != source.sha256:
            raise UserError(
                f"The data are not the run's: SHA-256 {started[:12]} -> {source.sha256[:12]} ({source.name})."
            )
        if claims and (changed := contract_differences(claims[-1][1]["contract"], contract(world))):
            print(f"The bits may differ: {', '.join(changed)}.")
        run = set_up(config, world, source)
        if start:
            restore(run, start[1], str(start[0]))
            if comparison.same_weights(run) is False:
                problems.append(f"Checkpoint {start[0]} holds other weights than the run saved at step {run.step}.")
        print("".join(f"damaged: {problem}\n" for problem in problems), end="")
        print(f"{run_dir}: steps {first + 1} to {last} on 1 process, from {start[0] if start else 'scratch'}")
        while run.step < last:
            train_step(run)
            loop.close_epoch(run)
            comparison.step(run, journal.encode(run.tables.read(run.step - 1, run.step)), is_asked=run.step > first)
    finally:
        world.close()
    damage = f"; {len(problems)} damaged, see above" if problems else ""
    print(
        f"{comparison.agreeing} of {last - first} steps agree bit for bit, {comparison.saves} saved weights among them{damage}"
    )
    return not comparison.differing and not problems


def main(argv: list[str]) -> int:
    """Replay steps of a run; return the exit code: 0 all agree, 1 something differs or is damaged."""
    parser = Parser(
        prog="python -m launch replay",
        usage="%(prog)s RUN --steps A:B [-- TRAIN ARGUMENTS]",
        description=__doc__.split("\n")[0],
        epilog="Train arguments that are no mathematics fit the run to this machine: -- --data.root DIR --train.device cpu",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run with train.exact true")
    parser.add_argument(
        "--steps", metavar="A:B", required=True, help="compute A+1 to B, from the newest checkpoint until A"
    )
    own, arguments = split_arguments(argv)
    options = parser.parse_args(own)
    record = records.read(options.run, options.run.name)
    first, last = span(options.steps, fingerprint.of_rows(record.rows)["loss"], options.run)
    config_file = options.run / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{config_file} is missing. It is part of the run: nothing can be computed again without it.")
    config = parse(["--config", str(config_file), *arguments])
    if not config.train.exact:
        raise UserError(
            f"{config_file} says train.exact false, and the run has fingerprints of exact mode. It was changed."
        )
    return 0 if replay(options.run, record, config, first, last) else 1
