"""`python -m launch predict MODEL IMAGES...`: classify PNG or JPEG images.

MODEL is a file of `launch export` or the directory of a run. Invariant: an image that is refused costs one line on
stderr and exit code 2, not the other images' answers. torch is imported in functions.
"""

import json
import sys
from pathlib import Path
from typing import Any

from launch.deploy import formats, image
from launch.folder import read_bytes
from train.cli import Parser
from train.errors import BAD_INPUT, FINISHED, UserError


def predict(deployed: formats.Deployed, names: list[str]) -> list[dict[str, Any]]:
    """Classify image files. Return per image its name, label, probability, and the probability of each class.

    An image that is refused has its name and an error instead.
    """
    import numpy as np
    import torch

    facts, images = deployed.facts, []
    found: list[dict[str, Any]] = [{"image": name} for name in names]
    for row in found:
        title = "standard input" if row["image"] == "-" else row["image"]
        try:
            images.append(image.read(read_bytes(row["image"]), title, facts.data, facts.shape))
        except UserError as error:
            row["error"] = str(error)
    answered = [row for row in found if "error" not in row]
    if answered:
        probabilities = deployed.scores(torch.from_numpy(np.stack(images))).softmax(1).tolist()
        for row, numbers in zip(answered, probabilities, strict=True):
            shares = dict(zip(facts.class_names, numbers, strict=True))
            label = max(shares, key=shares.__getitem__)
            row |= {"label": label, "probability": shares[label], "probabilities": shares}
    return found


def main(argv: list[str]) -> int:
    """Predict as the command line says; return the exit code. Raises UserError."""
    parser = Parser(prog="python -m launch predict", description=__doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="file of launch export, or directory of a run")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="PNG or JPEG file; - is standard input")
    source = "FILE.py:FUNCTION of a network that is not built in (default: the file that a run used)"
    parser.add_argument("--model-file", metavar="FILE.py:FUNCTION", help=source)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of lines")
    options = parser.parse_args(argv)
    found = predict(formats.load(options.model, options.model_file), options.images)
    if options.json:
        print(json.dumps(found, indent=1))
    for row in found:
        if "error" in row:
            print(f"error: {row['error']}", file=sys.stderr)
            continue
        if row["probability"] < 0.5:
            print(f"warning: {row['image']}: no class has 50 %. The label is a guess.", file=sys.stderr)
        if not options.json:
            ranking = sorted(row["probabilities"].items(), key=lambda item: -item[1])
            print(f"{row['image']}: {row['label']}  ({', '.join(f'{name} {share:.2%}' for name, share in ranking)})")
    return BAD_INPUT if any("error" in row for row in found) else FINISHED
