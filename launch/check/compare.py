"""`python -m launch compare RUN RUN`: find where two runs differ, from their files; nothing is computed again.

Compared are the configs, the data, the environments, and, at every step that both runs recorded, the bits of loss,
gradient norm, evaluation and weights. A run in exact mode recorded every step, one in fast mode those of its log.
"""

import math
from pathlib import Path
from typing import Any

from train.cli import Parser
from train.errors import UserError
from train.functional.trajectory import differences, trajectory
from train.report import records
from train.report.records import Record
from train.tracking import fingerprint
from train.world.environment import environment_differences

Series = dict[int, Any]  # step -> number, or SHA-256 of the weights


def collect(record: Record) -> dict[str, Series]:
    """Return what a run computed, by quantity. Raises UserError if no run writes such rows."""
    found: dict[str, Series] = {"loss": {}, "grad_norm": {}}
    try:
        for row in record.rows:
            if row["event"] == "train":
                for name in fingerprint.QUANTITIES:
                    found[name][row["step"]] = row[name]
            elif row["event"] == "eval":
                name = f"{'averaged weights, ' if row['ema'] else ''}{row['split']} loss"
                is_finite = math.isfinite(row["loss"])  # NaN would differ from itself
                found.setdefault(name, {})[row["step"]] = row["loss"] if is_finite else None
        for name, values in fingerprint.of_rows(record.rows).items():
            found[name] |= values
        return found | {"weights": record.saved_weights}
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__} {error}"
        raise UserError(f"metrics.jsonl of {record.name} holds rows that no run writes: {problem}.") from None


def difference(name: str, mine: Any, theirs: Any) -> str:
    """Return two values of a quantity, and how far they are from each other."""
    if name == "weights":
        return f"{mine[:12]}... and {theirs[:12]}..."
    return fingerprint.difference(mine, theirs)


def compare_series(name: str, mine: Series, theirs: Series) -> tuple[str, bool]:
    """Compare a quantity at the steps of both runs -> (line, whether all agree)."""
    common = sorted(mine.keys() & theirs.keys())
    differing = [step for step in common if mine[step] != theirs[step]]
    if not common:
        return "no step recorded by both", True
    if not differing:
        return f"the same bits at {len(common)} of {len(common)} recorded steps, the last {common[-1]}", True
    step = differing[0]
    what = difference(name, mine[step], theirs[step])
    return f"first differs at step {step}: {what}; at {len(differing)} of {len(common)} recorded steps", False


def compare_end(first: Record, second: Record) -> tuple[str, bool]:
    """Compare the weights after the last step -> (line, whether they are the same)."""
    steps = (first.last_step, second.last_step)
    mine, theirs = first.saved_weights.get(steps[0]), second.saved_weights.get(steps[1])
    if steps[0] != steps[1] or not mine or not theirs:
        return f"not compared: the runs are at steps {steps[0]} and {steps[1]}, or did not record them", False
    if mine == theirs:
        return f"the same bits after step {steps[0]}: {mine}", True
    return f"they differ after step {steps[0]}: {difference('weights', mine, theirs)}", False


def heading(record: Record) -> str:
    """Describe a run in one line."""
    sizes = [str(attempt.world_size) for attempt in record.attempts]
    mode = "exact" if record.config.get("train", {}).get("exact") else "fast"
    return f"{record.name}: {mode} mode, {' then '.join(sizes) or '?'} process(es), {record.last_step} steps"


def compare_setup(records: list[Record]) -> list[tuple[str, str]]:
    """Compare configs, data and environments; return a line for each."""
    if missing := [record.name for record in records if not record.config]:
        config = f"not compared: {' and '.join(missing)} has no config.yaml"
    else:
        config = ", ".join(differences(*(trajectory(record.config) for record in records))) or "the same trajectory"
    lines = [("config", config)]
    for name in sorted({"data", *records[0].sha256, *records[1].sha256}):
        mine, theirs = (record.sha256.get(name) for record in records)
        lines.append((name, "the same" if mine == theirs else f"A and B differ: {mine} and {theirs}"))
    environments = [record.summary.environment for record in records if record.summary]
    if len(environments) == 2:
        lines.append(("environment", ", ".join(environment_differences(*environments)) or "the same"))
    return lines


def compare(records: list[Record]) -> bool:
    """Print how two runs differ; return whether all that they computed agrees and they end in the same weights."""
    first, second = map(collect, records)
    print(f"A  {heading(records[0])}\nB  {heading(records[1])}")
    found = {name: compare_series(name, first[name], second[name]) for name in first if name in second}
    found["final weights"] = compare_end(*records)
    lines = [*compare_setup(records), *((name, line) for name, (line, _) in found.items())]
    lines.append(("last common step", str(min(record.last_step for record in records))))
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:{width}}  {line}" for name, line in lines))
    return all(is_same for _, is_same in found.values())


def main(argv: list[str]) -> int:
    """Compare two runs; return the exit code: 0, or with --assert-equal 1 unless they are the same."""
    parser = Parser(prog="python -m launch compare", description=__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs=2, help="directory of a run, such as runs/mnist")
    strict = "exit 1 if anything computed differs, or if the final weights cannot be compared"
    parser.add_argument("--assert-equal", action="store_true", help=strict)
    options = parser.parse_args(argv)
    is_equal = compare(records.read_all(options.runs))
    return 1 if options.assert_equal and not is_equal else 0
