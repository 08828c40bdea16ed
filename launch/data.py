"""`python -m launch data`: download and verify a data set, for machines whose compute nodes have no internet."""

from pathlib import Path
from typing import get_args, get_type_hints

from train.cli import Parser
from train.config import DataConfig


def main(argv: list[str]) -> int:
    """Prepare one data set and say where it is."""
    names = get_args(get_type_hints(DataConfig)["name"])
    parser = Parser(prog="python -m launch data", description=__doc__)
    parser.add_argument("--name", choices=names, default="mnist", help="data set (default mnist)")
    parser.add_argument(
        "--root", help="directory to look in and download to (default: $MNIST_ROOT and a cache; the cache)"
    )
    parser.add_argument("--no-download", action="store_true", help="only look")
    options = parser.parse_args(argv)
    from train.storage import data

    config = DataConfig(name=options.name, root=options.root, download=not options.no_download)
    tensors, sha256 = data.prepare(config)
    place: Path | str = data.find_folder(config) if options.name in data.FOLDERS else "built in"
    sizes = f"{len(tensors['train_labels']):,} train and {len(tensors['t10k_labels']):,} test images"
    print(f"{options.name}: {sizes}, whole, in {place}")
    print(f"sha256 {sha256}")
    return 0
