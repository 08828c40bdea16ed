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


def compare_series(name: str, mine: Series, theirs: Series) -> tuple[str, bool | None]:
    """Compare a quantity at the steps of both runs -> (line, whether all agree; None without such a step)."""
    common = sorted(mine.keys() & theirs.keys())
    if not common:
        return "no step recorded by both", None
    differing = [step for step in common if mine[step] != theirs[step]]
    if not differing:
        return f"the same bits at {len(common)} of {len(common)} recorded steps, the last {common[-1]}", True
    step = differing[0]
    if name == "weights":
        what = f"{mine[step][:12]}... and {theirs[step][:12]}..."
    else:
        what = fingerprint.difference(mine[step], theirs[step])
    return f"first differs at step {step}: {what}; at {len(differing)} of {len(common)} recorded steps", False


def compare_end(first: Record, second: Record) -> tuple[str, bool]:
    """Compare the weights after the last step -> (line, whether they are the same)."""
    step = first.last_step
    if step != second.last_step:
        return f"not compared: the runs are at steps {step} and {second.last_step}", False
    mine, theirs = first.saved_weights.get(step), second.saved_weights.get(step)
    if not mine or not theirs:
        return f"not compared: not recorded at step {step}", False
    if mine == theirs:
        return f"the same bits after step {step}: {mine}", True
    return f"they differ after step {step}: {mine[:12]}... and {theirs[:12]}...", False


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
    mine, theirs = (record.data.get("sha256") for record in records)
    data = "the same" if mine == theirs else f"A and B differ: {mine} and {theirs}"
    lines = [("config", config), ("data", data if mine and theirs else "not recorded by both")]
    environments = [record.summary.environment for record in records if record.summary]
    if len(environments) == 2:
        lines.append(("environment", ", ".join(environment_differences(*environments)) or "the same"))
    return lines


def compare(records: list[Record]) -> bool:
    """Print how two runs differ; return whether all that they computed agrees and they end in the same weights."""
    first, second = map(collect, records)
    print(f"A  {heading(records[0])}\nB  {heading(records[1])}")
    lines, verdicts = compare_setup(records), []
    for name in [name for name in first if name in second]:
        line, is_same = compare_series(name, first[name], second[name])
        lines.append((name, line))
        verdicts += [is_same] if is_same is not None else []
    end, is_same_end = compare_end(*records)
    last_steps = [record.last_step for record in records]
    lines += [("last common step", str(min(last_steps))), ("final weights", end)]
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:{width}}  {line}" for name, line in lines))
    return bool(verdicts) and all(verdicts) and is_same_end


def main(argv: list[str]) -> int:
    """Compare two runs; return the exit code: 0, or with --assert-equal 1 unless they are the same."""
    parser = Parser(prog="python -m launch compare", description=__doc__.split("\n")[0])
    parser.add_argument("runs", metavar="RUN", type=Path, nargs=2, help="directory of a run, such as runs/mnist")
    strict = "exit 1 if anything computed differs, or if the final weights cannot be compared"
    parser.add_argument("--assert-equal", action="store_true", help=strict)
    options = parser.parse_args(argv)
    is_equal = compare(records.read_all(options.runs))
    return 1 if options.assert_equal and not is_equal else 0
