"""`launch predict` reads a digit from a photo or a drawing as a person would, or refuses it in one line."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MNIST_ROOT, ROOT
from hand import draw
from numpy.typing import NDArray
from photos import PENS, REFUSED, WAYS, cropped
from PIL import Image

from launch.deploy import formats, image, predict
from launch.folder import decode
from train.config import DataConfig
from train.errors import UserError
from train.storage import data

SHAPE = (1, 28, 28)


def stored(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def seen(picture: Image.Image) -> np.ndarray:
    return image.read(stored(picture), "photo", "mnist", SHAPE)[0]


def answers(model: formats.Deployed, contents: list[bytes]) -> list[tuple[int | None, float]]:
    """Return label and probability of each image, None and 0 of a refused one."""
    found: list[tuple[int | None, float]] = [(None, 0.0)] * len(contents)
    for at, content in enumerate(contents):
        try:
            pixels = image.read(content, "photo", "mnist", SHAPE)
        except UserError:
            continue
        shares = model.scores(torch.from_numpy(pixels)[None]).softmax(1)[0]
        found[at] = (int(shares.argmax()), float(shares.max()))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> formats.Deployed:
    """Train configs/mnist.yaml."""
    if not MNIST_ROOT:
        pytest.skip("MNIST_ROOT is not set: the original MNIST files are needed")
    folder = tmp_path_factory.mktemp("runs")
    command = ["-m", "launch", "run", "--", "--config", "configs/mnist.yaml", "--run.name", "mnist", "--run.dir"]
    env = os.environ | {"MNIST_ROOT": MNIST_ROOT}
    done = subprocess.run([sys.executable, *command, str(folder)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return formats.load(folder / "mnist", None)


@pytest.fixture(scope="module")
def plain() -> NDArray[np.int64]:
    """Return what the model sees of each digit on plain paper: [10,28,28]."""
    return np.stack([seen(draw(digit, 0, 300, 12)).astype(int) for digit in range(10)])


@pytest.mark.parametrize("way", PENS)
def test_any_pen_is_as_strong_and_wide_as_that_of_mnist(way: str) -> None:
    pixels = seen(PENS[way](3, 0))
    assert pixels.max() >= 250
    assert 60 <= (pixels > 127).sum() <= 200  # 99 % of MNIST's digits


@pytest.mark.sample(20)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_around_a_digit_does_not_reach_the_model(way: str, plain: NDArray[np.int64]) -> None:
    """Of the digits on plain paper, the same one is the nearest."""
    digit = (7 * list(WAYS).index(way) + 2) % 10
    pixels = seen(WAYS[way](digit, 0)).astype(int)
    shifted = [np.roll(pixels, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    distances = np.min([np.abs(moved - plain).mean((1, 2)) for moved in shifted], 0)
    assert distances.argmin() == digit, distances.round()
    assert pixels.max() >= 250


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_one_digit_is_refused_in_one_line(case: str) -> None:
    picture, words = REFUSED[case]
    with pytest.raises(UserError, match=words) as error:
        seen(picture)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("pen", [4, 24, 40])
def test_a_one_without_paper_is_a_one(pen: int) -> None:
    bar = seen(Image.new("L", (pen, 130)))
    assert (bar > 127).any(1).sum() == 20
    assert 2 <= (bar > 127).any(0).sum() <= 7
    assert np.abs(bar.astype(int) - seen(cropped(draw(1, 0, 400, 24), 3))).mean() < 30


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (2, 3), (5000, 2), (3, 300)])
def test_an_image_of_any_shape_is_read_or_refused(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4)).astype(np.uint8)
    for low in (0, 255):  # transparent pixels or none
        picture = Image.fromarray(np.concatenate([pixels[..., :3], pixels[..., 3:] | np.uint8(low)], 2))
        with contextlib.suppress(UserError):
            assert seen(picture).shape == SHAPE[1:]


def test_a_large_photo_is_reduced_while_it_is_decoded() -> None:
    sheet = draw(3, 0, 1000, 20).resize((9248, 6944))  # 64 megapixels
    content = stored(sheet, "JPEG", quality=30)
    assert decode(content, "photo", 1024).size == (2312, 1736)
    assert decode(stored(draw(3, 0, 2000, 20), "JPEG"), "photo").size == (2000, 2000)
    assert image.read(content, "photo", "mnist", SHAPE).max() >= 250


def test_empty_first_frames_of_an_animation_are_skipped() -> None:
    frames = [draw(3, 0, 200, 12)] * 2
    content = stored(Image.new("L", (200, 200), 255), save_all=True, append_images=frames)
    assert np.array_equal(image.read(content, "photo", "mnist", SHAPE)[0], seen(frames[0]))


def test_a_refused_image_costs_one_line_and_no_other_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 2, 3))[:, None] * torch.tensor([0.0, 0.0, 0.0])

    facts = SimpleNamespace(data="mnist", shape=SHAPE, class_names=["a", "b", "c"])
    monkeypatch.setattr(formats, "load", lambda *_: SimpleNamespace(facts=facts, scores=scores))
    monkeypatch.chdir(tmp_path)
    for name in ("one.png", "two.png"):
        draw(3).save(name)
    Path("bad.png").write_text("no image")
    names = ["one.png", "bad.png", "two.png", "absent.png"]
    assert predict.main(["model", *names]) == 2
    printed = capsys.readouterr()
    assert [line.split(":")[0] for line in printed.out.splitlines()] == ["one.png", "two.png"]
    lines = printed.err.splitlines()
    assert [line.split()[0] for line in lines] == ["warning:", "error:", "warning:", "error:"]
    assert "no class has 50 %" in lines[0]
    rows = predict.predict(formats.load(Path("model"), None), names)
    assert [row["image"] for row in rows] == names
    assert ["error" in row for row in rows] == [False, True, False, True]
    assert set(rows[1]) == {"image", "error"}


@pytest.mark.slow
@pytest.mark.mnist
@pytest.mark.xdist_group("photos")  # one training serves them all
def test_photos_are_read_as_a_person_would(model: formats.Deployed) -> None:
    ways = PENS | WAYS
    cases = [(way, (at + step) % 10, step % 3) for at, way in enumerate(ways) for step in (0, 3, 5, 8)]
    pictures = [ways[way](digit, hand) for way, digit, hand in cases]
    contents = [
        stored(picture, "JPEG", quality=85) if digit % 2 and picture.mode in ("L", "RGB") else stored(picture)
        for picture, (_, digit, _) in zip(pictures, cases, strict=True)
    ]
    found = answers(model, contents)
    wrong = [(case, answer) for case, answer in zip(cases, found, strict=True) if answer[0] != case[1]]
    assert len(wrong) <= 0.05 * len(cases), wrong
    assert sum(label is not None and share > 0.5 for _, (label, share) in wrong) <= 0.01 * len(cases), wrong


@pytest.mark.slow
@pytest.mark.mnist
@pytest.mark.xdist_group("photos")  # one training serves them all
@pytest.mark.parametrize("factor", [1, 4, 10])
def test_enlarged_digits_of_mnist_are_read_as_they_are(factor: int, model: formats.Deployed, mnist_root: Path) -> None:
    tensors = data.prepare(DataConfig(root=str(mnist_root)))[0].tensors
    images, labels = tensors["test_images"][:500], tensors["test_labels"][:500].tolist()
    contents = []
    for digit in images.numpy():
        side = 28 * factor
        sheet = Image.new("L", (2 * side, 2 * side))
        sheet.paste(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC), (side // 3, side // 2))
        contents.append(stored(Image.fromarray(255 - np.asarray(sheet))))
    found = answers(model, contents)
    assert sum(label is None for label, _ in found) <= 2
    assert sum(label == expected for (label, _), expected in zip(found, labels, strict=True)) >= 493
