"""`launch data --from` reads data sets in LeCun's IDX format under all their names, packed or not."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_folder import make, pixels, put, refusal, rows


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def idx(array: NDArray[Any], code: int = 8) -> bytes:
    return bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def idx_files(names: str, labels: tuple[NDArray[Any], ...], code: int = 8) -> dict[str, bytes]:
    """Return four files; `names` has the parts train images, train labels, test images, test labels."""
    train_images, train_labels, test_images, test_labels = names.split()
    return {
        train_images: idx(pixels(0, len(labels[0]), 5, 4)),
        train_labels: idx(labels[0], code),
        test_images: idx(pixels(1, len(labels[1]), 5, 4)),
        test_labels: idx(labels[1], code),
    }


PLAIN = (np.arange(12, dtype=np.uint8) % 3, np.arange(6, dtype=np.uint8) % 3)
COLUMNS = tuple(np.stack([part] * 8, 1).astype(">i4") for part in PLAIN)
LECUN = "train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte"
KAGGLE = LECUN.replace("-idx", ".idx")
IDX_FOLDERS: dict[str, dict[str, bytes]] = {
    "LeCun": idx_files(LECUN, PLAIN),
    "LeCun packed": {f"{name}.gz": gzip.compress(content) for name, content in idx_files(LECUN, PLAIN).items()},
    "Kaggle": idx_files(KAGGLE, PLAIN),
    "7-Zip": {f"{name}/{name.replace('-idx', '.idx')}": content for name, content in idx_files(LECUN, PLAIN).items()},
    "EMNIST": {
        f"emnist-letters-{name.replace('t10k', 'test')}.gz": gzip.compress(content)
        for name, content in idx_files(LECUN, tuple(part + np.uint8(1) for part in PLAIN)).items()
    },
    "QMNIST": {
        f"qmnist-{name.replace('t10k', 'test').replace('idx1-ubyte', 'idx2-int')}": content
        for name, content in idx_files(LECUN, COLUMNS, 12).items()
    },
    "Kannada": idx_files(
        "X_kannada_MNIST_train-idx3-ubyte y_kannada_MNIST_train-idx1-ubyte "
        "X_kannada_MNIST_test-idx3-ubyte y_kannada_MNIST_test-idx1-ubyte",
        PLAIN,
    ),
}
IDX_FOLDERS["packed and unpacked"] = {**IDX_FOLDERS["Kaggle"], **IDX_FOLDERS["LeCun packed"]}


@pytest.mark.parametrize("case", IDX_FOLDERS)
def test_idx_files_are_read_under_all_their_names(case: str, directory: Path) -> None:
    put(directory / "in", IDX_FOLDERS[case])
    found = make()
    for split, number, labels in (("train", 0, PLAIN[0]), ("test", 1, PLAIN[1])):
        images = pixels(number, len(labels), 5, 4)
        expected = [bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)]
        assert sorted(rows(found, split)) == sorted(expected)
    assert found.class_names == (["1", "2", "3"] if case == "EMNIST" else ["0", "1", "2"])
    assert make("--size", "3x9").tensors["test_images"].shape == (6, 3, 9)


GOOD = IDX_FOLDERS["LeCun"]
# what lies in the folder, and what the one line must contain
REFUSALS: dict[str, tuple[dict[str, bytes], str]] = {
    "three IDX files": (
        {name: GOOD[name] for name in LECUN.split()[:3]},
        "in has the IDX files t10k-images-idx3-ubyte, train-images-idx3-ubyte, train-labels-idx1-ubyte. Expected",
    ),
    "two data sets": (
        {**GOOD, **{f"emnist-{name}": content for name, content in GOOD.items()}},
        "Expected the four files of one data set",
    ),
    "damaged IDX": ({**GOOD, LECUN.split()[0]: b"text"}, "train-images-idx3-ubyte is no whole IDX file"),
    "IDX of floats": ({**GOOD, LECUN.split()[0]: idx(np.ones((12, 5, 4), ">i4"), 12)}, "expected uint8"),
    "IDX without examples": (
        idx_files(LECUN, (np.zeros(0, np.uint8),) * 2),
        "in has no images for the train split",
    ),
    "IDX with fewer labels": (
        {**GOOD, LECUN.split()[1]: idx(PLAIN[1])},
        "train-images-idx3-ubyte has 12 images, but there are 6 labels",
    ),
    "IDX of two sizes": (
        {**GOOD, LECUN.split()[2]: idx(pixels(0, 6, 4, 5))},
        "test has images [6, 4, 5] and labels [6], expected at least one image, all of [5, 4]",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_idx_files_that_do_not_fit_are_refused_in_one_line(
    case: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, words = REFUSALS[case]
    put(directory / "in", files)
    error = refusal(capsys, "--from", "in")
    assert len(error.splitlines()) == 1
    assert error.startswith("error: ")
    assert words in error
