"""`python -m launch data`: get a built-in data set, describe a file of images, or make one from a folder.

`--name NAME` downloads and verifies a built-in data set, for machines whose compute nodes have no internet. `FILE`
prints what a .npz or .safetensors file holds. `--from DIR` writes such a file, for `--data.name FILE`.
"""

import argparse
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from launch import folder
from train.cli import Parser
from train.config import DATA_NAMES, DataConfig
from train.errors import FINISHED, UserError

if TYPE_CHECKING:
    from train.storage.arrays import Arrays

FOLDER_OPTIONS = ("output", "size", "test", "validation", "skip_broken")


def main(argv: list[str]) -> int:
    """Do what the command line says; return the exit code. Raises UserError."""
    parser = Parser(prog="python -m launch data", description=__doc__)
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help=".npz or .safetensors file to describe")
    parser.add_argument("--name", choices=DATA_NAMES, help="built-in data set (default mnist)")
    root = "directory to look in and download to (default: look in $MNIST_ROOT and a cache, download to the cache)"
    parser.add_argument("--root", help=root)
    parser.add_argument("--no-download", action="store_true", help="only look for the files")
    parser.add_argument("--from", dest="folder", metavar="DIR", type=Path, help=f"folder: {folder.LAYOUTS}")
    parser.add_argument("--output", metavar="FILE", type=Path, help="file to write (default: DIR's name.safetensors)")
    size = "resize every picture to SIDE or HEIGHTxWIDTH pixels, such as 24x40; the aspect ratio is not kept"
    parser.add_argument("--size", metavar="SIDE", help=size)
    for split in ("test", "validation"):
        share = f"share of the training pictures that makes the {split} split, such as 0.2; a hash of the content draws"
        parser.add_argument(f"--{split}", metavar="SHARE", type=float, help=share)
    parser.add_argument("--skip-broken", action="store_true", help="leave out pictures that cannot be read")
    options = parser.parse_args(argv)
    if sum(option is not None for option in (options.file, options.name, options.folder)) > 1:
        raise UserError("FILE, --name and --from do different things. Give one of them.")
    if options.folder:
        return make(options)
    if any(getattr(options, name) for name in FOLDER_OPTIONS):
        raise UserError("--output, --size, --test, --validation and --skip-broken need --from DIR.")
    if options.file:
        from train.storage.arrays import read

        return describe(str(options.file), read(options.file))
    return prepare(DataConfig(name=options.name or "mnist", root=options.root, download=not options.no_download))


def prepare(config: DataConfig) -> int:
    """Prepare a built-in data set, print where it is and what it holds; return the exit code. Raises UserError."""
    from train.storage import built_in, data

    arrays = data.prepare(config)[0]
    place = built_in.find_folder(config) if config.name in built_in.PUBLISHED else "built in"
    return describe(f"{config.name} ({place})", arrays)


def make(options: argparse.Namespace) -> int:
    """Write a file of the images of a folder and describe it; return the exit code. Raises UserError."""
    output = options.output or Path(f"{options.folder.resolve().name}.safetensors")
    if output.suffix != ".safetensors" or not output.parent.is_dir():
        raise UserError(f"--output is {output}. Expected the name of a .safetensors file in a directory that exists.")
    if os.path.lexists(output):
        raise UserError(f"{output} exists. Delete it or choose another --output.")
    shares = [0.0 if share is None else share for share in (options.test, options.validation)]
    if not all(share is None or 0 < share < 1 for share in (options.test, options.validation)) or sum(shares) >= 1:
        raise UserError("--test and --validation are shares between 0 and 1, whose sum is below 1, such as 0.2.")
    arrays = folder.make(options.folder, parse_size(options.size), *shares, should_skip_broken=options.skip_broken)
    from train.storage.arrays import write

    write(output, arrays)
    return describe(str(output), arrays)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Turn SIDE or HEIGHTxWIDTH into height and width in pixels. Raises UserError."""
    if text is None:
        return None
    if not (match := re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", text, re.ASCII)):
        raise UserError(f"--size is {text!a:.40}. Expected pixels: a side, such as 32, or HEIGHTxWIDTH, such as 24x40.")
    return int(match[1]), int(match[2] or match[1])


def describe(source: str, arrays: "Arrays") -> int:
    """Print what a data set holds; return the exit code."""
    import torch

    from train.storage.arrays import SPLITS
    from train.storage.data import content_sha256, moments

    tensors, names = arrays.tensors, arrays.class_names
    height, width, *colours = tensors["train_images"].shape[1:]
    print(f"{source}: {'RGB' if colours else 'grey'} images of {height} x {width} pixels in {len(names)} classes\n")
    splits = [split for split in SPLITS if f"{split}_images" in tensors]
    counts = [torch.bincount(tensors[f"{split}_labels"], minlength=len(names)).tolist() for split in splits]
    wide = max(map(len, [*names, "class"]))
    print(f"{'class':{wide}}" + "".join(f"{split:>12}" for split in splits))
    for name, *row in [*zip(names, *counts, strict=True), ("all", *map(sum, counts))]:
        print(f"{name:{wide}}" + "".join(f"{count:>12,}" for count in row))
    for what, values in zip(("mean", "deviation"), moments(tensors["train_images"]), strict=True):
        print(f"{what:10} {', '.join(f'{value:.2f}' for value in values)} (training pixels, 0 to 255)")
    print(f"duplicates {duplicates(arrays, splits)}")
    print(f"sha256     {content_sha256(tensors)}")
    return FINISHED


def duplicates(arrays: "Arrays", splits: list[str]) -> str:
    """Say how many images are equal, pixel for pixel."""
    images = {split: arrays.tensors[f"{split}_images"].numpy() for split in splits}
    digests = {split: [hashlib.sha256(image).digest() for image in images[split]] for split in splits}
    train = set(digests["train"])
    shared = [f"{sum(digest in train for digest in digests[split]):,} of {split} are in train" for split in splits[1:]]
    return ", ".join([f"{len(digests['train']) - len(train):,} within train", *shared])
