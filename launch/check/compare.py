"""`python -m launch compare RUN RUN`: say where two runs differ, from what they wrote; nothing is computed, torch not needed.

Compared are the configs' mathematics, the data, and at every step that both runs recorded the bits of loss, gradient norm,
evaluation and weights. A run in exact mode recorded every step, one in fast mode those of its log.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from train.cli import Parser
from train.errors import UserError
from train.functional.trajectory import contract_differences, differences, trajectory
from train.report import records
from train.report.records import Record
from train.tracking import fingerprint

STEP_EVENTS = ("train", "eval", "fingerprint", "saved")


@dataclass(frozen=True)
class Computed:
    """What a run computed, by quantity and step; floats as bits in hex, weights as their SHA-256."""

    series: dict[str, dict[int, str]]
    last_step: int

    @property
    def final_weights(self) -> str | None:
        """SHA-256 of the weights after the run's last step; None if it recorded none."""
        return self.series["weights"].get(self.last_step)


def computed(record: Record) -> Computed:
    """Collect what a run computed. Raises UserError where its rows are not what a run writes."""
    series: dict[str, dict[int, str]] = {"loss": {}, "grad_norm": {}, "weights": {}}
    try:
        for row in record.rows:
            if row["event"] == "train":
                for name in ("loss", "grad_norm"):
                    if row[name] is not None:
                        series[name][row["step"]] = fingerprint.encode(name, row[name])
            elif row["event"] == "eval":
                name = f"{'averaged weights, ' if row['ema'] else ''}{row['split']} loss"
                series.setdefault(name, {})[row["step"]] = fingerprint.encode("loss", row["loss"])
            elif row["event"] == "saved":
                series["weights"][row["step"]] = row["weights_sha256"]
        for name, bits in fingerprint.of_rows(record.rows).items():
            series[name] |= bits
        if "weights_sha256" in record.summary:
            series["weights"][record.summary["step"]] = record.summary["weights_sha256"]
        return Computed(series, max(row["step"] for row in record.rows if row["event"] in STEP_EVENTS))
    except (KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        raise UserError(
            f"metrics.jsonl of {record.name} holds rows that no run writes: {type(error).__name__} {error}."
        ) from None


def apart(bits: str, other: str) -> str:
    """How far two values are from each other, in words; hashes are only named."""
    if len(bits) == 64:
        return f"{bits[:12]}... and {other[:12]}..."
    here, there = fingerprint.decode(bits), fingerprint.decode(other)
    distance = f"{fingerprint.ulps(bits, other):,} ulps of float{4 * len(bits)}"
    return f"{here:.9g} and {there:.9g}, {abs(here - there):.3g} apart ({distance})"


def lines_of_series(first: Computed, second: Computed) -> tuple[list[tuple[str, str]], bool]:
    """Say for each quantity whether the bits agree -> (lines, whether there is something to compare and all of it agrees)."""
    lines, agreed, found = [], True, False
    for name in [name for name in first.series if name in second.series]:
        mine, theirs = first.series[name], second.series[name]
        common = sorted(mine.keys() & theirs.keys())
        if not common:
            lines.append((name, "no step recorded by both"))
            continue
        found = True
        differ = [step for step in common if mine[step] != theirs[step]]
        if differ:
            agreed = False
            what = f"first differs at step {differ[0]}: {apart(mine[differ[0]], theirs[differ[0]])}; "
            lines.append((name, f"{what}at {len(differ)} of {len(common)} recorded steps"))
        else:
            lines.append(
                (name, f"the same bits at {len(common)} recorded step{'s'[: len(common) > 1]}, the last {common[-1]}")
            )
    return lines, agreed and found


def line_of_end(first: Computed, second: Computed) -> tuple[str, bool]:
    """Compare the weights after the last step -> (line, whether they are the same)."""
    mine, theirs = first.final_weights, second.final_weights
    if first.last_step != second.last_step:
        return f"not compared: the runs are at steps {first.last_step} and {second.last_step}", False
    if not mine or not theirs:
        return f"not compared: not recorded at step {first.last_step}", False
    if mine == theirs:
        return f"the same bits after step {first.last_step}: {mine}", True
    return f"they differ after step {first.last_step}: {apart(mine, theirs)}", False


def heading(record: Record, end: Computed) -> str:
    """Which run it is, in one line."""
    sizes = [str(row["world_size"]) for row in record.rows if row["event"] == "start" and "world_size" in row]
    mode = "exact" if record.config.get("train", {}).get("exact") else "fast"
    return f"{record.name}: {mode} mode, {' then '.join(sizes) or '?'} process(es), {end.last_step} steps"


def line_of_config(records: list[Record]) -> str:
    """How the configs' mathematics differ, in one line."""
    missing = [record.name for record in records if not record.config]
    if missing:
        return f"not compared: {' and '.join(missing)} has no config.yaml"
    return ", ".join(differences(*(trajectory(record.config) for record in records))) or "the same mathematics"


def compare(records: list[Record]) -> bool:
    """Print how two runs differ; return whether all that they computed agrees and they end in the same weights."""
    first, second = map(computed, records)
    print(f"A  {heading(records[0], first)}\nB  {heading(records[1], second)}")
    sources = [record.data.get("sha256") for record in records]
    data = "the same" if sources[0] == sources[1] else f"A and B differ: {sources[0]} and {sources[1]}"
    contracts = [record.summary.get("contract", {}) for record in records]
    series, agreed = lines_of_series(first, second)
    end, same_end = line_of_end(first, second)
    lines = [("config", line_of_config(records)), ("data", data if all(sources) else "not recorded by both")]
    lines += [("contract", ", ".join(contract_differences(*contracts)) or "the same")] if all(contracts) else []
    lines += [*series, ("last common step", str(min(first.last_step, second.last_step))), ("final weights", end)]
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:{width}}  {text}" for name, text in lines))
    return agreed and same_end


def main(argv: list[str]) -> int:
    """Compare two runs; return the exit code: 0, or with --assert-equal 1 unless they are the same."""
    parser = Parser(prog="python -m launch compare", description=__doc__.split("\n")[0])
    parser.add_argument("runs", metavar="RUN", type=Path, nargs=2, help="directory of a run, such as runs/mnist")
    parser.add_argument(
        "--assert-equal",
        action="store_true",
        help="exit 1 if anything computed differs, if there is nothing to compare, or if the final weights cannot be compared",
    )
    options = parser.parse_args(argv)
    equal = compare(records.read_all(options.runs))
    return 1 if options.assert_equal and not equal else 0
