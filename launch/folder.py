"""A folder of pictures in class folders, or of IDX files -> Arrays.

Invariant: the arrays are a function of the files' content and of the names of the classes. A hash of the content puts
an example into a split and in its place there, so neither names nor order of files matter, equal files lie in one
split, and the end of a split is a random sample of it. numpy, torch and rich are imported in functions.
"""

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import decode
from train.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from train.storage.arrays import Arrays

SUFFIXES = (".png", ".jpg", ".jpeg")
SPLIT_FOLDERS = {"train": "train", "test": "test", "validation": "validation", "val": "validation"}
# What LeCun, Kaggle, EMNIST and QMNIST call their files: train-images-idx3-ubyte.gz, t10k-labels.idx1-ubyte, ...
IDX_NAME = re.compile(r".*(?P<split>train|test|t10k).*[-.]idx(?P<ndim>\d)-(ubyte|int)(\.gz)?")
LAYOUTS = "DIR/train/CLASS/*.png and DIR/test/CLASS/*.png, DIR/CLASS/*.png, or MNIST's four files"


@dataclass(frozen=True)
class Example:
    """An image, uint8 [H,W] (grey) or [H,W,3] (RGB), and its label."""

    digest: bytes  # SHA-256 of its file, or of its pixels in an IDX file
    label: int
    image: "NDArray[np.uint8]"


Splits = dict[str, list[Example]]
Size = tuple[int, int]  # height, width


def make(folder: Path, size: Size | None, test: float, validation: float, *, should_skip_broken: bool) -> "Arrays":
    """Read a folder, draw the shares `test` and `validation` of its training examples, and check the result.

    Prints what it found. Raises UserError.
    """
    from train.storage.arrays import check

    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory. Expected {LAYOUTS}.")
    try:
        files = find_idx_files(folder)
        class_names, splits = read_idx_files(files, size) if files else read_pictures(folder, size, should_skip_broken)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from None
    for split, share in (("test", test), ("validation", validation)):
        if share and split in splits:
            raise UserError(f"{folder} has a {split} split of its own. Leave out --{split}.")
    if not test and "test" not in splits:
        raise UserError(f"{folder} has no test images. Hold some out with --test 0.2, or add {folder}/test/CLASS/.")
    splits = draw(splits, test, validation)
    if empty := [split for split, examples in splits.items() if not examples]:
        raise UserError(f"{folder} has no images for the {empty[0]} split. Add some, or change --test or --validation.")
    arrays = stack(splits, class_names)
    check(arrays, str(folder))
    return arrays


def draw(splits: Splits, test: float, validation: float) -> Splits:
    """Move shares of the training examples into other splits, and order each split; both by the hash of the content."""
    shares = {"test": test, "validation": validation}
    drawn: Splits = {split: [] for split, share in shares.items() if share} | {**splits, "train": []}
    for example in splits["train"]:
        position = int.from_bytes(example.digest[:8], "big") / 2**64
        split = "test" if position < test else "validation" if position < test + validation else "train"
        drawn[split].append(example)
    for examples in drawn.values():
        examples.sort(key=lambda example: (example.digest, example.label))
    return drawn


def stack(splits: Splits, class_names: list[str]) -> "Arrays":
    """Put examples of one size into arrays: grey if all of them are grey, RGB otherwise."""
    import numpy as np
    import torch

    from train.storage.arrays import Arrays

    is_grey = all(example.image.ndim == 2 for examples in splits.values() for example in examples)
    tensors = {}
    for split, examples in splits.items():
        images = [example.image for example in examples]
        if not is_grey:
            images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, 2) for image in images]
        tensors[f"{split}_images"] = torch.from_numpy(np.stack(images))
        tensors[f"{split}_labels"] = torch.tensor([example.label for example in examples])
    return Arrays(tensors, class_names)


def visible(folder: Path) -> list[Path]:
    """Return what a folder holds, hidden files left out, in the order of names; nothing if there is no folder."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def find_pictures(folder: Path) -> tuple[list[str], list[tuple[str, int, Path]]]:
    """Return the names of the classes, sorted, and split, label and path of every picture. Raises UserError."""
    roots = {"train": folder}
    if any(path.is_dir() for path in visible(folder / "train")):
        roots = {split: folder / name for name, split in SPLIT_FOLDERS.items() if (folder / name).is_dir()}
        if others := [path.name for path in visible(folder) if path.is_dir() and path not in roots.values()]:
            raise UserError(
                f"{folder} has train/ and also {others[:8]!a}. Expected train/, test/ and validation/ only."
            )
    entries = {split: visible(root) for split, root in roots.items()}
    names = sorted({path.name for paths in entries.values() for path in paths if path.is_dir()})
    found, ignored = [], [path for paths in entries.values() for path in paths if not path.is_dir()]
    for split, root in roots.items():
        for label, name in enumerate(names):
            for path in visible(root / name):
                if path.suffix.lower() in SUFFIXES:
                    found.append((split, label, path))
                else:
                    ignored.append(path)
    if ignored:
        print(f"ignored {len(ignored):,} other files, such as {str(ignored[0])!a}")
    if not found:
        raise UserError(f"{folder} has no images in class folders. Expected {LAYOUTS}.")
    return names, found


def read_pictures(folder: Path, size: Size | None, should_skip_broken: bool) -> tuple[list[str], Splits]:
    """Decode the pictures of a folder. Lists all that cannot be read on stderr. Raises UserError."""
    import numpy as np
    import psutil
    from rich.console import Console
    from rich.progress import track

    from train.storage.arrays import check_fits

    names, found = find_pictures(folder)
    splits: Splits = {split: [] for split, _, _ in found}
    num_broken, first, console = 0, None, Console(stderr=True)
    for split, label, path in track(found, "decoding", console=console, disable=not console.is_terminal):
        try:
            content = decode.read_bytes(str(path))
            image = np.asarray(decode.picture(content, str(path), size))
        except UserError as error:
            print(error, file=sys.stderr)
            num_broken += 1
            continue
        if first is None:
            first = path, image.shape
            # Three times: as examples, as one array, and as the content of a file.
            check_fits(3 * len(found) * image.nbytes, psutil.virtual_memory().available, str(folder), "memory")
        if image.shape != first[1]:
            sizes = [f"{height} x {width}" for height, width, _ in (first[1], image.shape)]
            raise UserError(f"{first[0]} has {sizes[0]} pixels and {path} {sizes[1]}. Give all one size: --size 32.")
        if (image == image[..., :1]).all():
            image = image[..., 0].copy()
        splits[split].append(Example(hashlib.sha256(content).digest(), label, image))
    if num_broken and not should_skip_broken:
        raise UserError(f"{num_broken:,} of {len(found):,} images cannot be read. Mend them or pass --skip-broken.")
    if num_broken:
        print(f"skipped {num_broken:,} of {len(found):,} images")
    return names, splits


def find_idx_files(folder: Path) -> dict[tuple[str, str], Path]:
    """Return the IDX files of a folder by split and kind; none if it has none. Raises UserError if any is missing.

    7-Zip unpacks a file into a folder of the same name. A file that is there both packed and unpacked counts once.
    """
    found: dict[tuple[str, str], Path] = {}
    for path in [path for entry in visible(folder) for path in (visible(entry) if entry.is_dir() else [entry])]:
        match = IDX_NAME.fullmatch(path.name)
        if not match or not path.is_file():
            continue
        key = match["split"].replace("t10k", "test"), "images" if int(match["ndim"]) > 2 else "labels"
        if key in found and plain_name(path) != plain_name(found[key]):
            raise UserError(f"{folder} has {found[key].name} and {path.name}. Put each data set into its own folder.")
        found[key] = path
    missing = [f"{split} {kind}" for split in ("train", "test") for kind in ("images", "labels")]
    missing = [name for name in missing if tuple(name.split()) not in found]
    if found and missing:
        raise UserError(f"{folder} has {len(found)} IDX files and lacks {', '.join(missing)}. Expected four files.")
    return found


def plain_name(path: Path) -> str:
    """Return the name of an IDX file as if it were not packed and LeCun had named it."""
    return path.name.removesuffix(".gz").replace(".", "-")


def read_idx_files(files: dict[tuple[str, str], Path], size: Size | None) -> tuple[list[str], Splits]:
    """Read IDX files of images and labels. Labels that begin above 0 are shifted. Raises UserError."""
    import numpy as np
    from PIL import Image

    from train.storage.arrays import label_names, read_idx, to_tensor

    tensors: dict[str, Any] = {}
    for (split, kind), path in files.items():
        array = read_idx(path.read_bytes(), str(path))
        if kind == "labels" and array.ndim == 2:  # QMNIST's other columns tell who wrote a digit
            array = array[..., 0]
        tensors[f"{split}_{kind}"] = to_tensor(f"{split}_{kind}", array, path)
    first = max(min(tensors["train_labels"].tolist() + tensors["test_labels"].tolist(), default=0), 0)
    if first:
        print(f"labels begin at {first}: shifted to begin at 0, and the classes keep their numbers as names")
    splits: Splits = {}
    for split in ("train", "test"):
        images, labels = tensors[f"{split}_images"].numpy(), (tensors[f"{split}_labels"] - first).tolist()
        if len(images) != len(labels):
            raise UserError(f"{files[split, 'images']} has {len(images)} images, but there are {len(labels)} labels.")
        digests = [hashlib.sha256(image).digest() for image in images]
        if size:
            images = [np.asarray(decode.resize(Image.fromarray(image), size)) for image in images]
        splits[split] = [Example(*example) for example in zip(digests, labels, images, strict=True)]
    return label_names(tensors, first), splits
