"""`python -m launch data`: download and verify a data set, for machines whose compute nodes have no internet."""

from pathlib import Path
from typing import get_args, get_type_hints

from train.cli import Parser
from train.config import DataConfig
from train.errors import FINISHED


def main(argv: list[str]) -> int:
    """Prepare one data set and print where it is; return the exit code."""
    names = get_args(get_type_hints(DataConfig)["name"])
    parser = Parser(prog="python -m launch data", description=__doc__)
    parser.add_argument("--name", choices=names, default="mnist", help="data set (default mnist)")
    root = "directory to look in and download to (default: look in $MNIST_ROOT and a cache, download to the cache)"
    parser.add_argument("--root", help=root)
    parser.add_argument("--no-download", action="store_true", help="only look for the files")
    options = parser.parse_args(argv)
    from train.storage import data

    config = DataConfig(name=options.name, root=options.root, download=not options.no_download)
    tensors, sha256 = data.prepare(config)
    place: Path | str = data.find_folder(config) if options.name in data.FOLDERS else "built in"
    sizes = f"{len(tensors['train_labels']):,} train and {len(tensors['t10k_labels']):,} test images"
    print(f"{options.name}: {sizes}, whole, in {place}")
    print(f"sha256 {sha256}")
    return FINISHED
