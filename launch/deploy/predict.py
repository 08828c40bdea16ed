"""`python -m launch predict MODEL IMAGES...`: classify PNG or JPEG images.

MODEL is a file of `launch export` or the directory of a run. An image of `-` is read from standard input. Invariant:
all images are read and checked before anything is printed, so the output is complete or empty. torch is imported in
functions.
"""

import json
from pathlib import Path
from typing import Any

from launch.decode import read_bytes
from launch.deploy import formats, image
from launch.deploy.formats import Deployed
from train.cli import Parser
from train.errors import FINISHED, UserError


def predict(deployed: Deployed, names: list[str]) -> list[dict[str, Any]]:
    """Classify image files. Return per image its name, label, probability, and the probability of each class."""
    import numpy as np
    import torch

    facts = deployed.facts
    titles = {"-": "standard input"}
    images = [image.read(read_bytes(name), titles.get(name, name), facts.data, facts.shape) for name in names]
    probabilities = deployed.scores(torch.from_numpy(np.stack(images))).softmax(1)
    return [
        {
            "image": name,
            "label": facts.class_names[int(row.argmax())],
            "probability": float(row.max()),
            "probabilities": dict(zip(facts.class_names, row.tolist(), strict=True)),
        }
        for name, row in zip(names, probabilities, strict=True)
    ]


def main(argv: list[str]) -> int:
    """Predict as the command line says; return the exit code. Raises UserError."""
    parser = Parser(prog="python -m launch predict", description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL", type=Path, help="file of launch export, or directory of a run")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="PNG or JPEG file; - is standard input")
    source = "FILE.py:FUNCTION of a network that is not built in (default: the file that a run used)"
    parser.add_argument("--model-file", metavar="FILE.py:FUNCTION", help=source)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of lines")
    options = parser.parse_args(argv)
    if options.images.count("-") > 1:
        raise UserError("The image - was given twice. Standard input can be read once.")
    model = formats.load(options.model, options.model_file)
    found = predict(model, options.images)
    if options.json:
        print(json.dumps(found, indent=1))
        return FINISHED
    for row in found:
        ranking = sorted(row["probabilities"].items(), key=lambda item: -item[1])
        print(f"{row['image']}: {row['label']}  ({', '.join(f'{name} {share:.2%}' for name, share in ranking)})")
    return FINISHED
