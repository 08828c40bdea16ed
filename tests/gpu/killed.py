"""Kill one of two ranks: the other one must end too, and `launch run` must exit with 1.

Usage: `python -m gpu.killed DEVICE DIRECTORY`.
"""

import signal
import sys
import time
from pathlib import Path

from launch.run import Ranks

FLAGS = (
    "--data.name digits --model.name tiny --train.global_batch_size 64 --train.num_micro_batches 2 "
    "--train.max_steps 1000000 --train.timeout 15 --log.every_steps 20 --log.progress false "
    "--wandb.mode disabled --run.name killed"
)
START_SECONDS = 45
END_SECONDS = 40  # train.timeout, the launcher's patience, and some


def main(argv: list[str]) -> int:
    """Start two ranks, kill one once they train, and return 0 if the attempt ends with exit code 1 in time."""
    device, directory = argv
    ranks = Ranks(2, [*FLAGS.split(), "--train.device", device, "--run.dir", directory], restart=0)
    began, metrics = time.monotonic(), Path(directory, "killed", "metrics.jsonl")
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        if time.monotonic() - began > START_SECONDS or any(each.poll() is not None for each in ranks.processes):
            ranks.send(signal.SIGKILL)
            print(f"the training did not start within {START_SECONDS} s, or ended: exit code {ranks.wait()}")
            return 1
        time.sleep(0.05)
    ranks.processes[1].kill()
    killed_at = time.monotonic()
    code, seconds = ranks.wait(), time.monotonic() - killed_at
    print(f"rank 1 was killed; the attempt ended {seconds:.1f} s later with exit code {code}")
    return 0 if code == 1 and seconds < END_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
