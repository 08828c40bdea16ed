"""Train as `python -m train` does, slower, and record where the rank runs.

ENVIRONMENT  SECONDS_PER_STEP: sleep that long before each step until the job is requeued. SECONDS_PER_STEP_ALWAYS: also
after that. POISON_STEP: die in that step.
"""

import json
import os
import sys
import time
from pathlib import Path

import train.__main__
import train.loop
from train.state import Plan, State
from train.world.process import leave

SHOWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")


def main(argv: list[str]) -> int:
    prepare = train.loop.prepare_step
    seen = False

    def prepare_step(plan: Plan, state: State) -> None:
        nonlocal seen
        if not seen:
            seen = True
            facts = {name: os.environ.get(name) for name in SHOWN} | {"host": os.uname().nodename}
            folder = Path("ranks") / os.environ.get("SLURM_JOB_ID", "no-job")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{os.environ.get('SLURM_RESTART_COUNT', '0')}-{plan.world.rank}.json").write_text(
                json.dumps(facts)
            )
        pace = "SECONDS_PER_STEP_ALWAYS" if "SLURM_RESTART_COUNT" in os.environ else "SECONDS_PER_STEP"
        time.sleep(float(os.environ.get(pace, "0")))
        if state.step == int(os.environ.get("POISON_STEP", "-1")):
            os._exit(9)
        prepare(plan, state)

    train.loop.prepare_step = prepare_step
    return train.__main__.main(argv)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))  # sys.exit would restore the default signal handlers
