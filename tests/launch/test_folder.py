"""`launch data --from` turns a folder of pictures into one file, which depends on their content only."""

import io
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from launch import folder
from launch.__main__ import main
from train.storage import arrays
from train.storage.arrays import Arrays

CLASSES = ("ant", "bee", "cat")


def png(pixels: NDArray[np.uint8], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(number: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, shape or (6, 8, 3), dtype=np.uint8)


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def pictures(prefix: str = "", count: int = 20, first: int = 0, **shape: Any) -> dict[str, bytes]:
    """Return files of `count` different pictures per class."""
    return {
        f"{prefix}{name}/{number}.png": png(pixels(first + 1000 * label + number, *shape.get("shape", ())))
        for label, name in enumerate(CLASSES)
        for number in range(count)
    }


SPLIT = {**pictures("train/", 4), **pictures("test/", 2, 100)}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*options: str) -> Arrays:
    """Make out.safetensors of the folder `in` and read it."""
    Path("out.safetensors").unlink(missing_ok=True)
    assert main(["data", "--from", "in", "--output", "out.safetensors", *options]) == 0
    return arrays.read(Path("out.safetensors"))


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Make a file, which must be refused without leaving any, and return the lines on stderr."""
    before = sorted(Path().iterdir())
    assert main(["data", *options]) == 2
    assert sorted(Path().iterdir()) == before
    return capsys.readouterr().err


def rows(found: Arrays, split: str) -> list[bytes]:
    images, labels = found.tensors[f"{split}_images"].numpy(), found.tensors[f"{split}_labels"].tolist()
    return [bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)]


def test_splits_of_a_folder_are_those_of_the_file(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(directory / "in", {**SPLIT, **pictures("val/", 1, 200)})
    found = make()
    assert found.class_names == list(CLASSES)
    for split, first, count in (("train", 0, 4), ("test", 100, 2), ("validation", 200, 1)):
        expected = [
            bytes([label]) + pixels(first + 1000 * label + number).tobytes()
            for label in range(3)
            for number in range(count)
        ]
        assert sorted(rows(found, split)) == sorted(expected)
    printed = capsys.readouterr().out
    assert "out.safetensors: RGB images of 6 x 8 pixels in 3 classes" in printed
    assert ["all", "12", "6", "3"] in [line.split() for line in printed.splitlines()]
    assert "0 within train, 0 of test are in train, 0 of validation are in train" in printed


def test_draw_depends_on_the_content_only(directory: Path) -> None:
    files = pictures()
    put(directory / "in", files)
    make("--test", "0.3", "--validation", "0.2")
    first = Path("out.safetensors").read_bytes()
    (directory / "in").rename(directory / "old")
    contents = list(files.items())
    random.Random(0).shuffle(contents)  # other names, in another order of writing
    renamed = {
        f"{name.split('/')[0]}/{len(contents) - at}x.PNG": content for at, (name, content) in enumerate(contents)
    }
    put(directory / "in", renamed)
    make("--test", "0.3", "--validation", "0.2")
    assert Path("out.safetensors").read_bytes() == first


def test_draw_keeps_its_shares_and_stays_when_pictures_are_added(directory: Path) -> None:
    put(directory / "in", pictures(count=100))
    found = make("--test", "0.3", "--validation", "0.2")
    sizes = [len(rows(found, split)) for split in ("train", "validation", "test")]
    assert sum(sizes) == 300
    assert np.abs(np.array(sizes) - (150, 60, 90)).max() < 30
    put(directory / "in", {name.replace("/", "/new-"): content for name, content in pictures(first=500).items()})
    more = make("--test", "0.3", "--validation", "0.2")
    for split in ("train", "validation", "test"):
        assert set(rows(found, split)) < set(rows(more, split))


def test_equal_files_lie_in_one_split_and_are_counted(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = pictures()
    put(directory / "in", {**files, **{name.replace("/", "/copy-"): content for name, content in files.items()}})
    found = make("--test", "0.3")
    assert not set(rows(found, "train")) & set(rows(found, "test"))
    train = rows(found, "train")
    assert f"duplicates {len(train) - len(set(train))} within train, 0 of test are in train" in capsys.readouterr().out


def test_the_end_of_a_split_is_a_random_sample(directory: Path) -> None:
    put(directory / "in", {**pictures("train/"), **pictures("test/", 2, 100)})
    labels = make().tensors["train_labels"]
    assert len(set(labels[-15:].tolist())) == 3


def test_training_pictures_make_a_validation_split_beside_given_test_pictures(directory: Path) -> None:
    put(directory / "in", {**pictures("train/"), **pictures("test/", 2, 100)})
    found = make("--validation", "0.3")
    assert len(rows(found, "train")) + len(rows(found, "validation")) == 60
    assert len(rows(found, "test")) == 6


def test_images_are_grey_only_if_all_are(directory: Path) -> None:
    grey = {name: png(pixels(at, 6, 8)) for at, name in enumerate(SPLIT)}
    grey["train/ant/0.png"] = png(np.repeat(pixels(0, 6, 8)[..., None], 3, 2))  # grey, stored as RGB
    put(directory / "in", grey)
    assert make().tensors["train_images"].shape == (12, 6, 8)
    put(directory / "in", {"train/ant/0.png": png(pixels(0))})
    found = make().tensors["train_images"]
    assert found.shape == (12, 6, 8, 3)
    assert sum(bool((image == image[..., :1]).all()) for image in found) == 11


def test_pictures_are_upright_on_white_and_of_eight_bits(directory: Path) -> None:
    corner = np.zeros((6, 8, 4), np.uint8)
    corner[:3, :, 3] = 255  # the lower half is transparent
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.ascontiguousarray(np.rot90(pixels(1)))
    deep = pixels(2, 6, 8).astype(np.uint16) * 257
    special = {"train/ant/0.png": png(corner), "train/bee/0.png": png(turned, exif=exif), "train/cat/0.png": png(deep)}
    put(directory / "in", {**SPLIT, **special})
    found = rows(make(), "train")
    half = np.concatenate([np.zeros((3, 8, 3), np.uint8), np.full((3, 8, 3), 255, np.uint8)])
    for label, image in enumerate((half, pixels(1), np.repeat(pixels(2, 6, 8)[..., None], 3, 2))):
        assert bytes([label]) + image.tobytes() in found


@pytest.mark.parametrize(("size", "shape"), [("5", (5, 5)), ("4x7", (4, 7))])
def test_size_resizes_whole_pictures_of_any_size(size: str, shape: tuple[int, int], directory: Path) -> None:
    files = {name: png(pixels(at, 9 + at, 20 - at, 3)) for at, name in enumerate(SPLIT)}
    files["train/ant/0.png"] = png(np.repeat(np.repeat(pixels(0, *shape, 3), 3, 0), 3, 1))
    put(directory / "in", files)
    assert make("--size", size).tensors["train_images"].shape == (12, *shape, 3)
    checkers = np.tile(np.uint8([[0, 255], [255, 0]]), (60, 60))
    averaged = np.asarray(folder.picture(png(checkers), "x", shape)).astype(int)
    assert np.abs(averaged - 128).max() < 12  # antialiased: without, it is black and white


def test_hidden_and_other_files_are_left_out(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hidden = dict.fromkeys((".DS_Store", "train/ant/._0.png", "train/.git/x.png"), b"x")
    other = dict.fromkeys(("train/ant/notes.txt", "train/bee/Thumbs.db"), b"x")
    put(directory / "in", {**SPLIT, **hidden, **other})
    assert len(rows(make(), "train")) == 12
    assert "ignored 2 other files, such as " in capsys.readouterr().out


BROKEN = {"train/ant/7.png": b"", "train/bee/7.jpg": b"text", "test/cat/7.jpeg": png(pixels(0), "JPEG")[:90]}


def test_unreadable_pictures_are_all_listed_and_refused(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(directory / "in", {**SPLIT, **BROKEN})
    os.mkfifo("in/train/ant/8.png")
    lines = refusal(capsys, "--from", "in").splitlines()
    assert len(lines) == 5
    for name in [*BROKEN, "train/ant/8.png"]:
        assert sum(line.startswith(f"in/{name} ") for line in lines) == 1
    assert lines[-1] == "error: 4 of 22 images cannot be read. Repair them or pass --skip-broken."
    assert len(rows(make("--skip-broken"), "train")) == 12
    assert "skipped 4 of 22 images" in capsys.readouterr().out


# what lies in the folder, the options, and what the one line must contain
REFUSALS: dict[str, tuple[dict[str, bytes], str, str]] = {
    "no folder": ({}, "--from absent", "absent is not a directory"),
    "file": ({"x": b""}, "--from in/x", "in/x is not a directory"),
    "empty folder": ({".hidden": b""}, "--from in", "in has no images for the train split. Expected DIR/train/CLASS"),
    "pictures without classes": (
        {"a.png": png(pixels(0))},
        "--from in",
        "in has no images for the train split. Expected DIR/train/CLASS",
    ),
    "no test": (pictures(), "--from in", "in has no images for the test split"),
    "a second test": (SPLIT, "--from in --test 0.2", "has a test split of its own"),
    "a second validation": (
        {**SPLIT, **pictures("validation/")},
        "--from in --validation 0.2",
        "has a validation split of its own",
    ),
    "one picture": ({"ant/0.png": png(pixels(0))}, "--from in --test 0.5", "in has no images for the test split"),
    "one class": (
        {name: content for name, content in pictures().items() if name.startswith("ant/")},
        "--from in --test 0.5",
        "in: the classes are ['ant'], expected a list of at least 2",
    ),
    "class without a test": (
        {name: content for name, content in SPLIT.items() if not name.startswith("test/bee")},
        "--from in",
        "class 1 ('bee') has no example in test_labels",
    ),
    "empty class": ({**SPLIT, "train/dog/.keep": b""}, "--from in", "class 3 ('dog') has no example in train_labels"),
    "strange class": (
        {**SPLIT, "train/\x07/0.png": png(pixels(0)), "test/\x07/0.png": png(pixels(1))},
        "--from in",
        r"class_names has '\x07'",
    ),
    "two sizes": (
        {**SPLIT, "train/bee/2.png": png(pixels(0, 6, 9, 3))},
        "--from in",
        "in/train/bee/2.png has 6 x 9 pixels and others 6 x 8. Give all one size: --size 32.",
    ),
    "size zero": (SPLIT, "--from in --size 0", "--size: invalid pixels value: '0'"),
    "size of text": (SPLIT, "--from in --size small", "--size: invalid pixels value: 'small'"),
    "share one": (pictures(), "--from in --test 1", "in has no images for the train split"),
    "share zero": (pictures(), "--from in --test 0", "such as --test 0.2"),
    "share nan": (pictures(), "--from in --test nan", "such as --test 0.2"),
    "shares": (pictures(), "--from in --test 0.5 --validation 0.5", "in has no images for the train split"),
    "output of another kind": (SPLIT, "--from in --output x.npz", "--output is x.npz"),
    "output nowhere": (SPLIT, "--from in --output absent/x.safetensors", "in a directory that does"),
    "output exists": (
        {**SPLIT, "in.safetensors": b""},
        "--from in --output in/in.safetensors",
        "Expected a .safetensors file that does not exist yet",
    ),
    "options without a folder": ({}, "--test 0.2", "need --from DIR"),
    "two jobs": (SPLIT, "--from in --name digits", "not allowed with argument --from"),
    "unknown name": ({}, "--name mnits", "Did you mean mnist?"),
    "file of another kind": ({"x.csv": b"1"}, "in/x.csv", "is 'in/x.csv'. Use mnist, "),
    "damaged file": ({"x.npz": b"text"}, "in/x.npz", "not a zip file"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_launch_data_refuses_in_one_line(case: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, options, words = REFUSALS[case]
    put(directory / "in", files)
    error = refusal(capsys, *options.split())
    assert len(error.splitlines()) == 1
    assert error.startswith("error: ")
    assert words in error


def test_an_interrupted_write_leaves_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(directory / "in", SPLIT)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    assert main(["data", "--from", "in"]) == 130
    assert [path.name for path in directory.iterdir()] == ["in"]


def test_launch_data_describes_a_file(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.zeros((4, 2, 2, 3), np.uint8)
    images[:, 0, 0] = [[40, 0, 0], [80, 0, 4], [0, 0, 0], [0, 0, 0]]
    labels = np.array([0, 1, 0, 1])
    np.savez("x.npz", train_images=images, train_labels=labels, test_images=images[1:], test_labels=labels[1:])
    assert main(["data", "x.npz"]) == 0
    *lines, sha256 = capsys.readouterr().out.splitlines()
    assert lines == [
        "x.npz: RGB images of 2 x 2 pixels in 2 classes",
        "",
        "class       train        test",
        "0               2           1",
        "1               2           2",
        "all             4           3",
        "mean       7.50, 0.00, 0.25 (training pixels, 0 to 255)",
        f"deviation  {np.std([40, 80, *[0] * 14]):.2f}, 0.00, 0.97 (training pixels, 0 to 255)",
        "duplicates 1 within train, 3 of test are in train",
    ]
    assert len(sha256.removeprefix("sha256     ")) == 64
