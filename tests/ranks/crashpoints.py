"""Train as `python -m train` does, and check the checkpoints before each file operation.

The first argument is the directory of the checkpoints. Before each operation the disk is in a state that a crash would
leave. Then each checkpoint with a final name must be whole, and once there was one there must always be one.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

OPERATIONS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "open"}
REPORT = "crash-points.json"  # next to the checkpoints


def is_whole(checkpoint: Path) -> bool:
    """Return whether each file has the SHA-256 in the manifest, independently of train.storage.checkpoint."""
    try:
        sums: dict[str, str] = json.loads((checkpoint / "manifest.json").read_bytes())["sha256"]
        found = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in sums}
    except (OSError, ValueError, KeyError):
        return False
    return found == sums and {"model.safetensors", "optimizer.safetensors", "state.json"} <= set(found)


class Watch:
    """Count the file operations during a training, and those at which a crash would have lost a checkpoint."""

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints, self.is_looking, self.had_one, self.points = checkpoints, False, False, 0
        self.violations: list[str] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Check the disk before a file operation (an audit hook, PEP 578)."""
        if event not in OPERATIONS or self.is_looking:
            return
        if event == "open" and (arguments[1] in ("r", "rb") or not str(arguments[0]).startswith(str(self.checkpoints))):
            return
        self.is_looking = True  # the check itself opens files
        whole = {path.name: is_whole(path) for path in self.checkpoints.glob("step-*")}
        problems = [f"{name} is not whole" for name in whole if not whole[name]]
        if self.had_one and True not in whole.values():
            problems.insert(0, "no whole checkpoint is left")
        self.points += self.had_one or bool(whole)
        self.violations += [f"{problem} before {event}" for problem in problems[:1]]
        self.had_one |= True in whole.values()
        self.is_looking = False


def main(argv: list[str]) -> int:
    """Train, and write the report."""
    checkpoints = Path(argv[0])
    watch = Watch(checkpoints)
    sys.addaudithook(watch.hook)
    from train.__main__ import main as train

    code = train(argv[1:])
    report = {"points": watch.points, "violations": watch.violations}
    (checkpoints.parent / REPORT).write_text(json.dumps(report))
    return code
