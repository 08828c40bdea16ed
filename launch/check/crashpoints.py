"""`python -m launch.crashpoints CHECKPOINTS TRAININGS`: train as `python -m train` does, and look at every crash point.

Before each file operation the disk is in a state that a crash would leave. An audit hook looks at CHECKPOINTS there: every
checkpoint that has its name is whole, and once there was one there always is. TRAININGS is a JSON list of command lines,
trained one after the other, so that torch is imported once. The first one's checkpoints are the ones to watch.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

OPERATIONS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "open"}
REPORT = "crash-points.json"  # beside CHECKPOINTS


def is_whole(checkpoint: Path) -> bool:
    """Whether each file of a checkpoint is what its manifest promises; independent of train.storage.checkpoint."""
    try:
        promised: dict[str, str] = json.loads((checkpoint / "manifest.json").read_bytes())["sha256"]
        found = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in promised}
    except (OSError, ValueError, KeyError):
        return False
    return found == promised and {"model.safetensors", "optimizer.safetensors", "state.json"} <= set(found)


class Watch:
    """Counts the file operations during a training, and those at which a crash would have cost a checkpoint."""

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints, self.looks, self.had_one, self.points = checkpoints, False, False, 0
        self.violations: list[str] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Look at the disk before a file operation (an audit hook, PEP 578)."""
        if event not in OPERATIONS or self.looks:
            return
        if event == "open" and (arguments[1] in ("r", "rb") or not str(arguments[0]).startswith(str(self.checkpoints))):
            return
        self.looks = True  # looking opens files
        whole = {path.name: is_whole(path) for path in self.checkpoints.glob("step-*")}
        problems = [f"{name} is not whole" for name in whole if not whole[name]]
        if self.had_one and True not in whole.values():
            problems.insert(0, "no whole checkpoint is left")
        self.points += self.had_one or bool(whole)
        self.violations += [f"{problem} before {event}" for problem in problems[:1]]
        self.had_one |= True in whole.values()
        self.looks = False


def main(argv: list[str]) -> int:
    """Train each command line, write the report, return the first exit code that is not 0."""
    checkpoints = Path(argv[0])
    watch = Watch(checkpoints)
    sys.addaudithook(watch.hook)
    from train.__main__ import main as train

    code = 0
    for training in json.loads(argv[1]):
        code = code or train(training)
    report = {"points": watch.points, "violations": watch.violations}
    (checkpoints.parent / REPORT).write_text(json.dumps(report))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
