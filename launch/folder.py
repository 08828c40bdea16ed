"""A folder of pictures in class folders, or of IDX files -> Arrays.

Invariant: the arrays are a function of the files' content and of the names of the classes. A hash of the content puts
an example into a split and in its place there, so neither names nor order of files matter, equal files lie in one
split, and the end of a split is a random sample of it. `launch predict` decodes pictures with the same functions.
numpy, torch, Pillow and rich are imported in functions.
"""

import hashlib
import io
import itertools
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from train.errors import UserError, refused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from train.storage.arrays import Arrays

SUFFIXES = (".png", ".jpg", ".jpeg")
SPLIT_FOLDERS = {"train": "train", "test": "test", **dict.fromkeys(("validation", "valid", "val"), "validation")}
# What LeCun, Kaggle, EMNIST and QMNIST call their files: train-images-idx3-ubyte.gz, t10k-labels.idx1-ubyte, ...
IDX_NAME = re.compile(r".*(?P<split>train|test|t10k).*-idx(?P<ndim>\d)-(ubyte|int)")
MAX_EMPTY_FRAMES = 10  # of an animation
LAYOUTS = "DIR/train/CLASS/*.png and DIR/test/CLASS/*.png, DIR/CLASS/*.png, or MNIST's four files"


class Example(NamedTuple):
    """An image, uint8 [H,W] (grey) or [H,W,3] (RGB), with its label and split."""

    digest: bytes  # SHA-256 of its file, or of its pixels in an IDX file
    label: int
    split: str
    image: "NDArray[np.uint8]"


Size = tuple[int, int]  # height, width
Found = tuple[list[str], list[Example]]  # with the names of the classes


def make(folder: Path, size: Size | None, test: float, validation: float, *, should_skip_broken: bool) -> "Arrays":
    """Read a folder, draw the shares `test` and `validation` of its training examples, and check the result.

    Prints what it leaves out. Raises UserError.
    """
    import numpy as np
    import torch

    from train.storage.arrays import Arrays, check

    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory. Expected {LAYOUTS}.")
    files = find_idx_files(folder)
    class_names, examples = read_idx_files(files, size) if files else read_pictures(folder, size, should_skip_broken)
    for split, share in (("test", test), ("validation", validation)):
        if share and any(example.split == split for example in examples):
            raise UserError(f"{folder} has a {split} split of its own. Leave out --{split}.")
    tensors = {}
    for split, drawn in draw(examples, test, validation).items():
        if not drawn:
            expected = f"Expected {LAYOUTS}, or a share to hold out, such as --test 0.2"
            raise UserError(f"{folder} has no images for the {split} split. {expected}.")
        tensors[f"{split}_images"] = torch.from_numpy(np.stack([example.image for example in drawn]))
        tensors[f"{split}_labels"] = torch.tensor([example.label for example in drawn])
    arrays = Arrays(tensors, class_names)
    check(arrays, str(folder))
    return arrays


def draw(examples: list[Example], test: float, validation: float) -> dict[str, list[Example]]:
    """Move shares of the training examples into other splits, and order each split; both by the hash of the content."""
    splits: dict[str, list[Example]] = {"train": [], "test": []}
    if validation:
        splits["validation"] = []
    for example in sorted(examples, key=lambda example: (example.digest, example.label)):
        split, position = example.split, int.from_bytes(example.digest[:8], "big") / 2**64
        if split == "train" and position < test + validation:
            split = "test" if position < test else "validation"
        splits.setdefault(split, []).append(example)
    return splits


def read_bytes(name: str) -> bytes:
    """Return the content of an image file, or of standard input for `-`. Raises UserError, naming it."""
    if name == "-":
        return sys.stdin.buffer.read()
    with refused(f"{name} cannot be read"):
        if not Path(name).is_file():  # a pipe would block
            raise UserError(f"{name} is not a file. Expected a PNG or JPEG image.")
        return Path(name).read_bytes()


def decode(content: bytes, name: str, side: int = 0) -> "Image":
    """Decode PNG or JPEG into RGBA, upright, 8 bits per channel. Raises UserError, naming the image.

    With `side`, a photo of a shape: a JPEG is reduced while it is decoded, to no less than that many pixels; the
    brightest of 16 bits becomes white, as a camera may use 12 of them; and empty frames of an animation are skipped.
    """
    import numpy as np
    from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

    with refused(f"{name} cannot be decoded"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd but readable files
        try:
            image: Any = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        except UnidentifiedImageError:
            raise UserError(f"{name} is neither PNG nor JPEG. Convert it to one of them.") from None
        if side:
            image.draft(image.mode, (side, side))
            frames: Any = ImageSequence.Iterator(image) if getattr(image, "is_animated", False) else []
            for frame in itertools.islice(frames, MAX_EMPTY_FRAMES):
                if frame.convert("RGBA").getcolors(1) is None:  # more than one colour
                    break
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bit; convert() would cut off at 255
            levels = np.asarray(image).astype(np.int64)
            brightest = int(levels.max()) if side else 0xFFFF
            image = Image.fromarray((levels * 256 // (brightest + 1)).clip(0, 255).astype(np.uint8))
        return image.convert("RGBA")


def picture(content: bytes, name: str, size: Size | None) -> "Image":
    """Decode PNG or JPEG into RGB, on white, resized to (height, width) if that is given. Raises UserError."""
    from PIL import Image

    found = decode(content, name)
    found = Image.alpha_composite(Image.new("RGBA", found.size, "white"), found).convert("RGB")
    return found.resize(size[::-1], Image.Resampling.BILINEAR) if size else found


def find_pictures(folder: Path) -> tuple[list[str], list[tuple[Path, int, str]]]:
    """Return the names of the classes, sorted, and path, label and split of every picture that is not hidden."""
    splits = {folder / name: split for name, split in SPLIT_FOLDERS.items()}
    if not any(path.is_dir() for path in folder.glob("train/[!.]*")):
        splits = {folder: "train"}
    names = sorted({path.name for root in splits for path in root.glob("[!.]*") if path.is_dir()})
    files = sorted(path for root in splits for path in root.glob("[!.]*/[!.]*"))
    if others := [path.name for path in files if path.suffix.lower() not in SUFFIXES]:
        print(f"ignored {len(others):,} other files, such as {others[0]!a}")
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    return names, [(path, names.index(path.parent.name), splits[path.parents[1]]) for path in pictures]


def read_pictures(folder: Path, size: Size | None, should_skip_broken: bool) -> Found:
    """Decode the pictures of a folder, to grey if all are. Prints what cannot be read on stderr. Raises UserError."""
    import numpy as np
    import psutil
    from rich.console import Console
    from rich.progress import track

    from train.storage.arrays import check_fits

    names, files = find_pictures(folder)
    examples: list[Example] = []
    is_grey = True
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    for path, label, split in track(files, "decoding", console=console, disable=not console.is_terminal):
        try:
            content = read_bytes(str(path))
            image = np.asarray(picture(content, str(path), size))
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        if not examples:  # three times: as pictures, as arrays, and as the content of a file
            check_fits(3 * len(files) * image.nbytes, psutil.virtual_memory().available, str(folder), "memory")
        examples.append(Example(hashlib.sha256(content).digest(), label, split, image))
        is_grey = is_grey and bool((image == image[..., :1]).all())
        if image.shape != examples[0].image.shape:
            sizes = [f"{height} x {width}" for height, width, _ in (image.shape, examples[0].image.shape)]
            raise UserError(f"{path} has {sizes[0]} pixels and others {sizes[1]}. Give all one size: --size 32.")
    if len(examples) < len(files):
        broken = f"{len(files) - len(examples):,} of {len(files):,} images"
        if not should_skip_broken:
            raise UserError(f"{broken} cannot be read. Repair them or pass --skip-broken.")
        print(f"skipped {broken}")
    if is_grey:
        examples = [example._replace(image=example.image[..., 0]) for example in examples]
    return names, examples


def find_idx_files(folder: Path) -> dict[str, Path]:
    """Return the IDX files of a folder by the names of their arrays; none if it has none. Raises UserError.

    7-Zip unpacks a file into a folder of the same name. A file that is there both packed and unpacked counts once.
    """
    paths = [path for pattern in ("[!.]*idx*", "[!.]*/[!.]*idx*") for path in folder.glob(pattern) if path.is_file()]
    files = {path.name.removesuffix(".gz").replace(".", "-"): path for path in sorted(paths)}
    found = []
    for name, path in files.items():
        if match := IDX_NAME.fullmatch(name):
            kind = "images" if int(match["ndim"]) > 2 else "labels"
            found.append((f"{match['split'].replace('t10k', 'test')}_{kind}", path))
    if found and not len(found) == len(dict(found)) == 4:
        names = ", ".join(path.name for _, path in found)
        raise UserError(f"{folder} has the IDX files {names:.200}. Expected the four files of one data set.")
    return dict(found)


def read_idx_files(files: dict[str, Path], size: Size | None) -> Found:
    """Read IDX files of images and labels. The labels name the classes and may begin above 0. Raises UserError."""
    import numpy as np
    from PIL import Image

    from train.storage.arrays import read_idx, to_tensor

    arrays = {}
    for name, path in files.items():
        array = read_idx(read_bytes(str(path)), str(path))
        if array.ndim == 2:  # QMNIST's other columns tell who wrote a digit
            array = array[..., 0]
        arrays[name] = to_tensor(name, array, path).numpy()
    classes = np.unique(np.concatenate([arrays["train_labels"], arrays["test_labels"]]))
    examples = []
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], np.searchsorted(classes, arrays[f"{split}_labels"])
        if len(images) != len(labels):
            raise UserError(f"{files[f'{split}_images']} has {len(images)} images, but there are {len(labels)} labels.")
        for image, label in zip(images, labels.tolist(), strict=True):
            resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR) if size else image
            examples.append(Example(hashlib.sha256(image).digest(), label, split, np.asarray(resized)))
    return [str(name) for name in classes], examples
