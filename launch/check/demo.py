"""`python -m launch demo`: the promise before your eyes, in under two minutes on two cores.

Trains the same run on 1, 2 and 4 processes, kills the second one halfway and resumes it on 3, and prints the three
fingerprints of the final weights. Exits with 1 if they are not equal. Trains on the CPU where there are fewer than 4 GPUs.
"""

import json
import signal
import tempfile
import time
from pathlib import Path

from launch.run import Ranks, count_gpus
from train.cli import Parser
from train.errors import UserError

STEPS = {"cpu": 40, "cuda": 1000}  # a GPU must not be done before the kill
RECIPE = (
    "--config configs/quickstart.yaml --train.exact true --train.micro_batches 8 "
    "--train.global_batch_size 512 --model.dropout 0.2 --augment.shift 2 --checkpoint.every_steps 10 --log.every_steps 1 "
    "--log.progress false --log.report false --wandb.mode disabled"
)
WAIT_SECONDS = 60
LARGEST_WORLD = 4


def train(directory: Path, name: str, world_size: int, device: str, kill_at: int | None = None) -> None:
    """Train, or resume, one run; kill rank 1 once the run has logged step `kill_at`."""
    place = ["--train.device", device, "--run.dir", str(directory), "--run.name", name]
    arguments = [*RECIPE.split(), "--train.max_steps", str(STEPS[device]), *place]
    ranks = Ranks(world_size, arguments, 0, quiet=True)
    deadline = time.monotonic() + WAIT_SECONDS
    log = directory / name / "metrics.jsonl"
    while kill_at and time.monotonic() < deadline and ranks.processes[1].poll() is None:
        if log.exists() and f'"train", "step": {kill_at},' in log.read_text():
            ranks.processes[1].send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    if bool(code := ranks.wait()) != bool(kill_at):
        raise UserError(
            f"The training on {world_size} process(es) ended with exit code {code}. See what `launch selftest` says."
        )


def main(argv: list[str]) -> int:
    """Run the demonstration; return 0 if the weights are the same bits on all world sizes."""
    Parser(prog="python -m launch demo", description=__doc__).parse_args(argv)
    began = time.monotonic()
    device = "cuda" if count_gpus() >= LARGEST_WORLD else "cpu"
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        plan: list[tuple[str, int, int | None, str]] = [
            ("one", 1, None, "1 process"),
            ("two", 2, 15, "2 processes, rank 1 killed at step 15 ..."),
            ("two", 3, None, "        ... and resumed on 3"),
            ("four", LARGEST_WORLD, None, f"{LARGEST_WORLD} processes"),
        ]
        hashes = []
        for name, world_size, kill_at, text in plan:
            print(f"{text:45}", end="", flush=True)
            train(directory, name, world_size, device, kill_at)
            if kill_at:
                print()
                continue
            summary = json.loads((directory / name / "summary.json").read_text())
            hashes.append(summary["weights_sha256"])
            print(f"{summary['data']['name']} {summary['test_accuracy']:.2%}  weights {hashes[-1][:32]}")
    same = len(set(hashes)) == 1
    print(f"{'the same bits' if same else 'DIFFERENT BITS'}, {time.monotonic() - began:.0f} s")
    return 0 if same else 1
