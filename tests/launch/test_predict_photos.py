"""`launch predict` sees pictures that are no digits as `launch data --from` stored the training images."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_folder import SPLIT, make, pixels, png, put

from launch.deploy import image, predict

FILES = {name: png(pixels(at, 20 + at, 50 - at, 3)) for at, name in enumerate(SPLIT)}
GREY = {name: png(pixels(at, 20 + at, 50 - at)) for at, name in enumerate(SPLIT)}


@pytest.mark.parametrize(("files", "channels"), [(FILES, 3), (GREY, 1)])
def test_predict_sees_the_pixels_of_the_file(
    files: dict[str, bytes], channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "in", files)
    stored = {found.numpy().tobytes() for found in make("--size", "24x40").tensors["train_images"]}
    for name in (name for name in files if name.startswith("train/")):
        seen = image.read(files[name], name, "cells.npz", (channels, 24, 40))
        assert (seen.dtype, seen.shape) == (np.uint8, (channels, 24, 40))
        assert np.ascontiguousarray(seen.transpose(1, 2, 0)).tobytes() in stored


def test_colours_become_grey_for_a_grey_model_and_grey_becomes_three_channels_for_a_colour_model() -> None:
    red, grey = np.uint8([[[255, 0, 0]]]), np.uint8([[90]])
    assert image.read(png(red), "x", "cells.npz", (1, 1, 1)).tolist() == [[[76]]]
    assert image.read(png(grey), "x", "cells.npz", (3, 1, 1)).tolist() == [[[90]], [[90]], [[90]]]


@pytest.mark.parametrize("data_name", ["cells.npz", "cifar10", "random"])
def test_a_blank_picture_is_refused_for_digits_only(data_name: str) -> None:
    white = png(np.full((9, 9, 3), 255, np.uint8))
    assert image.read(white, "x", data_name, (3, 8, 8)).min() == 255
    with pytest.raises(ValueError, match="x is blank"):
        image.read(white, "x", "mnist", (1, 28, 28))


def test_predict_gives_the_model_a_batch_of_its_shape(tmp_path: Path) -> None:
    for name, colour in (("dark", 10), ("light", 240)):
        Image.new("RGB", (30, 20), (colour, colour, colour)).save(tmp_path / f"{name}.png")

    def scores(images: torch.Tensor) -> torch.Tensor:
        assert (images.dtype, images.shape) == (torch.uint8, (2, 3, 24, 40))
        mean = images.float().mean((1, 2, 3))
        return torch.stack([128 - mean, mean - 128], 1)

    facts = SimpleNamespace(data="cells.npz", shape=(3, 24, 40), class_names=["dark", "light"])
    deployed = SimpleNamespace(facts=facts, scores=scores)
    names = [str(tmp_path / f"{name}.png") for name in ("dark", "light")]
    assert [row["label"] for row in predict.predict(deployed, names)] == ["dark", "light"]  # type: ignore[arg-type]
