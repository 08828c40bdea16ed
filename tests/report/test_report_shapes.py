"""A page shows images of any shape, any number of classes, and networks without convolutions."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from pages import DATA, Page, make_rows, make_run, make_samples, make_summary

from launch.report import main
from train.rundir import Evaluation

pytest.importorskip("matplotlib")


def page(tmp_path: Path, run: Path) -> Page:
    assert main([str(run), "--output", str(tmp_path / "page.html")]) == 0
    return Page((tmp_path / "page.html").read_text())


def test_many_classes_are_listed_by_what_goes_wrong_most_and_colours_are_not_inverted(tmp_path: Path) -> None:
    names = [f"kind {number}" for number in range(60)]
    facts = {"name": "cells.npz", "shape": [3, 24, 40], "class_names": names}
    counts = [[30 if label == guess else 0 for guess in range(60)] for label in range(60)]
    counts[7][50], counts[7][7] = 20, 10
    evaluation = Evaluation(0.98, 0.02, 1780, "p" * 64, counts)
    summary = make_summary(results={"raw": evaluation}, data=DATA | facts, num_examples=1800)
    run = make_run(tmp_path / "many", make_rows(data=DATA | facts), summary)
    make_samples(run / "samples.safetensors", 5, (3, 24, 40))
    found = page(tmp_path, run)
    assert "kind 7 kind 50 20" in found.text
    assert "the least accurate of 60" in found.text
    assert "kind 7 33.3% 20 wrong" in found.text
    assert found.count("table", **{"class": "matrix tall"}) == 0
    assert (found.count("div", **{"class": "images"}), found.count("div", **{"class": "images ink"})) == (1, 0)
    from matplotlib.image import imread

    uri, *_ = (attributes["src"] for tag, attributes in found.tags if tag == "img")
    pixels = imread(io.BytesIO(base64.b64decode(str(uri).partition(",")[2])), format="png")
    expected = np.arange(3 * 24 * 40).astype(np.uint8).reshape(3, 24, 40).transpose(1, 2, 0)
    assert np.array_equal((pixels[..., :3] * 255).round(), expected)


def test_a_network_without_convolutions_has_a_page_without_filters(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mlp", make_rows(), make_summary(), mistakes=3)
    tensors = safetensors.numpy.load_file(run / "samples.safetensors")
    del tensors["filters"]
    safetensors.numpy.save_file(tensors, run / "samples.safetensors")
    found = page(tmp_path, run)
    assert "filters" not in found.text
    assert found.count("div", **{"class": "images ink"}) == 1
