"""A rank's program that prints the environment variables that it is asked for, as JSON."""

import json
import os


def main(argv: list[str]) -> int:
    print(json.dumps({name: os.environ.get(name) for name in argv}))
    return 0
