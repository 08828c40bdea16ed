"""`python -m launch demo`: the same bits on 1, 2, 3 and 4 processes, in under two minutes on two cores.

Trains one run on 1 and on 4 processes. Trains it also on 2, kills one of them halfway and resumes on 3. Prints the
fingerprints of the final weights, and exits with 1 if they differ. Trains on the CPU if there are fewer than 4 GPUs.
"""

import tempfile
import time
from pathlib import Path

from launch.check import selftest
from launch.run import count_gpus
from train.cli import Parser
from train.errors import CRASHED, FINISHED, RunError
from train.rundir import RunDir

LARGEST_WORLD = 4
STEPS = {"cpu": 40, "cuda": 1000}  # a GPU must not be done before the kill
RECIPE = (
    f"--config configs/quickstart.yaml {selftest.QUIET} --train.exact true --train.num_micro_batches 8 "
    f"--train.global_batch_size 512 --model.dropout 0.2 --augment.shift 2 "
    f"--checkpoint.every_steps {selftest.SAVE_STEPS}"
)


def main(argv: list[str]) -> int:
    """Run the demonstration; return 0 if the weights are the same bits on all world sizes."""
    Parser(prog="python -m launch demo", description=__doc__).parse_args(argv)
    began, hashes = time.monotonic(), set()
    device = "cuda" if count_gpus() >= LARGEST_WORLD else "cpu"
    flags = f"{RECIPE} --train.device {device} --train.max_steps {STEPS[device]}"
    plan = [
        ("one", 1, 0, "1 process"),
        ("two", 2, 15, "2 processes, one of them killed ..."),
        ("two", 3, 0, "        ... and resumed on 3"),
        ("four", LARGEST_WORLD, 0, f"{LARGEST_WORLD} processes"),
    ]
    with tempfile.TemporaryDirectory() as directory:
        for name, world_size, kill_after, text in plan:
            print(f"{text:45}", end="", flush=True)
            run = RunDir(Path(directory) / name)
            try:
                selftest.train(run, world_size, flags, kill_after)
            except RunError as error:
                print(f"\nerror: {error}")
                return CRASHED
            summary = run.read_summary()
            if summary and summary.final:
                hashes.add(summary.weights_sha256)
                print(f"{summary.data['name']} {summary.final.accuracy:.2%}  weights {summary.weights_sha256[:32]}")
            else:
                print()
    print(f"{'the same bits' if len(hashes) == 1 else 'DIFFERENT BITS'}, {time.monotonic() - began:.0f} s")
    return FINISHED if len(hashes) == 1 else CRASHED
