"""Print as JSON the environment variables whose names are the arguments."""

import json
import os


def main(argv: list[str]) -> int:
    print(json.dumps({name: os.environ.get(name) for name in argv}))
    return 0
