"""`python -m launch data`: get a built-in data set, describe a file of images, or make one from a folder.

`--name NAME` downloads and verifies a built-in data set, for machines whose compute nodes have no internet. `FILE`
prints what a .npz or .safetensors file holds. `--from DIR` writes such a file, for `--data.name FILE`.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from launch import folder
from train.cli import Parser, expand_path
from train.config import DATA_NAMES, DataConfig
from train.errors import FINISHED, UserError

if TYPE_CHECKING:
    from train.storage.arrays import Arrays


def pixels(text: str) -> tuple[int, int]:
    """Turn SIDE or HEIGHTxWIDTH into height and width. Raises ValueError."""
    height, _, width = text.partition("x")
    size = int(height), int(width or height)
    if min(size) < 1:
        raise ValueError
    return size


def main(argv: list[str]) -> int:
    """Do what the command line says; return the exit code. Raises UserError."""
    parser = Parser(prog="python -m launch data", description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("file", metavar="FILE", nargs="?", help=".npz or .safetensors file to describe")
    source.add_argument("--name", choices=DATA_NAMES, help="built-in data set (default mnist)")
    source.add_argument("--from", dest="folder", metavar="DIR", type=Path, help=f"folder: {folder.LAYOUTS}")
    parser.add_argument("--root", help="directory to look in and download to (default: $MNIST_ROOT, else a cache)")
    parser.add_argument("--no-download", action="store_true", help="only look for the files")
    parser.add_argument("--output", metavar="FILE", type=Path, help="file to write (default: DIR's name.safetensors)")
    size = "resize every picture to so many pixels, such as 32, or 24x40 (height and width)"
    parser.add_argument("--size", type=pixels, help=size)
    for split in ("test", "validation"):
        share = f"share of the training pictures, such as 0.2, to hold out as the {split} split"
        parser.add_argument(f"--{split}", metavar="SHARE", type=float, default=0, help=share)
    parser.add_argument("--skip-broken", action="store_true", help="leave out pictures that cannot be read")
    options = parser.parse_args(argv)
    if options.folder:
        from train.storage.arrays import write

        output = options.output or Path(f"{options.folder.resolve().name}.safetensors")
        if output.suffix != ".safetensors" or output.exists() or not output.parent.is_dir():
            raise UserError(
                f"--output is {output}. Expected a .safetensors file that does not exist yet, in a directory that does."
            )
        shares = options.test, options.validation
        found = folder.make(options.folder, options.size, *shares, should_skip_broken=options.skip_broken)
        write(output, found)
        describe(str(output), found)
        return FINISHED
    if options.output or options.size or options.test or options.validation or options.skip_broken:
        raise UserError("--output, --size, --test, --validation and --skip-broken need --from DIR.")
    from train.storage import built_in, data

    name = options.file or options.name or "mnist"
    root = options.root and expand_path("--root", options.root)
    config = DataConfig(name=name, root=root, download=not options.no_download)
    found = data.prepare(config)[0]
    describe(built_in.title(config), found)
    return FINISHED


def describe(source: str, arrays: "Arrays") -> None:
    """Print what a data set holds. Duplicates are equal pixel for pixel."""
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
    train = {hashlib.sha256(image).digest() for image in tensors["train_images"].numpy()}
    shared = [f"{len(tensors['train_images']) - len(train):,} within train"]
    for split in splits[1:]:
        is_shared = [hashlib.sha256(image).digest() in train for image in tensors[f"{split}_images"].numpy()]
        shared.append(f"{sum(is_shared):,} of {split} are in train")
    print(f"duplicates {', '.join(shared)}")
    print(f"sha256     {content_sha256(tensors)}")
