"""`python -m launch predict MODEL IMAGES...`: classify PNG or JPEG images.

MODEL is a file of `launch export` or the directory of a run. Invariant: all images are read and checked before anything
is printed, so the output is complete or empty. torch is imported in functions.
"""

import json
from pathlib import Path
from typing import Any

from launch.deploy import formats, image
from launch.folder import read_bytes
from train.cli import Parser
from train.errors import FINISHED


def predict(deployed: formats.Deployed, names: list[str]) -> list[dict[str, Any]]:
    """Classify image files. Return per image its name, label, probability, and the probability of each class."""
    import numpy as np
    import torch

    facts, images = deployed.facts, []
    for name in names:
        title = "standard input" if name == "-" else name
        images.append(image.read(read_bytes(name), title, facts.data, facts.shape))
    found = []
    for name, row in zip(names, deployed.scores(torch.from_numpy(np.stack(images))).softmax(1), strict=True):
        shares = dict(zip(facts.class_names, row.tolist(), strict=True))
        label = facts.class_names[int(row.argmax())]
        found.append({"image": name, "label": label, "probability": shares[label], "probabilities": shares})
    return found


def main(argv: list[str]) -> int:
    """Predict as the command line says; return the exit code. Raises UserError."""
    parser = Parser(prog="python -m launch predict", description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL", type=Path, help="file of launch export, or directory of a run")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="PNG or JPEG file; - is standard input")
    source = "FILE.py:FUNCTION of a network that is not built in (default: the file that a run used)"
    parser.add_argument("--model-file", metavar="FILE.py:FUNCTION", help=source)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of lines")
    options = parser.parse_args(argv)
    found = predict(formats.load(options.model, options.model_file), options.images)
    if options.json:
        print(json.dumps(found, indent=1))
        return FINISHED
    for row in found:
        ranking = sorted(row["probabilities"].items(), key=lambda item: -item[1])
        print(f"{row['image']}: {row['label']}  ({', '.join(f'{name} {share:.2%}' for name, share in ranking)})")
    return FINISHED
