"""`launch predict` sees digits on any paper and in any size as the training images were, and refuses the rest."""

import contextlib
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from launch.__main__ import main
from launch.deploy import formats, image
from train.config import DataConfig
from train.errors import UserError
from train.storage import data

NUM_EXAMPLES = 60
SHAPE = (1, 28, 28)
WRONG, OTHER = (
    0.07,
    0.05,
)  # largest shares of wrong labels, and of labels other than without the detour by a file; plus one


@pytest.fixture(scope="module")
def model(digits_run: Path) -> formats.Deployed:
    return formats.load(digits_run, None)


@pytest.fixture(scope="module")
def digits() -> tuple[NDArray[np.uint8], torch.Tensor]:
    """Return handwritten digits that the model has not seen: images [N,28,28], light on black, and labels."""
    tensors = data.prepare(DataConfig(name="digits"))[0].tensors
    return tensors["test_images"][:NUM_EXAMPLES].numpy(), tensors["test_labels"][:NUM_EXAMPLES].long()


def drawn(
    digit: NDArray[np.uint8], *, factor: int = 4, paper: Any = 255, pen: Any = 0, noise: float = 0, seed: int = 0
) -> Image.Image:
    """Draw an upscaled digit off the middle of a larger sheet of paper; RGB."""
    generator = np.random.default_rng([seed, int(digit.sum())])
    side = 28 * factor
    ink = np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    sheet = np.zeros((side + 16 * factor, side + 9 * factor, 1), np.float32)
    top, left = generator.integers(1, 15 * factor), generator.integers(1, 8 * factor)
    sheet[top : top + side, left : left + side] = ink
    colours = np.broadcast_to(np.float32(paper), 3), np.broadcast_to(np.float32(pen), 3)
    pixels = colours[0] * (1 - sheet) + colours[1] * sheet
    pixels = pixels + (generator.normal(0, noise, pixels.shape) if noise else 0)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def glass(digit: NDArray[np.uint8], pen: int) -> Image.Image:
    """Draw a digit on a transparent sheet: all colour is the pen's, and the shape is in the alpha channel."""
    alpha = drawn(digit, paper=0, pen=255).convert("L")
    found = Image.new("RGBA", alpha.size, (pen, pen, pen, 0))
    found.putalpha(alpha)
    return found


def deep(digit: NDArray[np.uint8]) -> Image.Image:
    """Draw a digit in 16 bit grey, dark on light."""
    return Image.fromarray(np.asarray(drawn(digit).convert("L")).astype(np.uint16) * 257)


def turned(digit: NDArray[np.uint8]) -> bytes:
    """Return the file of a phone held sideways: rotated pixels, and EXIF with the rotation."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    return saved(drawn(digit).transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=90)


WAYS: dict[str, Callable[[NDArray[np.uint8]], bytes]] = {
    "as it is": lambda digit: saved(Image.fromarray(digit)),
    "as it is, inverted, JPEG": lambda digit: saved(Image.fromarray(255 - digit), "JPEG"),
    "dark on light": lambda digit: saved(drawn(digit)),
    "light on dark": lambda digit: saved(drawn(digit, paper=0, pen=255)),
    "grey on grey": lambda digit: saved(drawn(digit, paper=90, pen=140).convert("L")),
    "blue on yellow, JPEG": lambda digit: saved(
        drawn(digit, paper=(240, 230, 140), pen=(20, 30, 140)), "JPEG", quality=60
    ),
    "red on equally bright green": lambda digit: saved(drawn(digit, paper=(60, 160, 60), pen=(200, 90, 60))),
    "noisy paper, JPEG": lambda digit: saved(drawn(digit, paper=200, pen=40, noise=8), "JPEG", quality=50),
    "small JPEG": lambda digit: saved(drawn(digit, factor=2), "JPEG", quality=75),
    "large": lambda digit: saved(drawn(digit, factor=30), "JPEG", quality=75),
    "palette": lambda digit: saved(drawn(digit, paper=(240, 230, 140), pen=(20, 30, 140)).quantize(64)),
    "one bit": lambda digit: saved(drawn(digit).convert("1", dither=Image.Dither.NONE)),
    "16 bit": lambda digit: saved(deep(digit)),
    "CMYK": lambda digit: saved(drawn(digit).convert("CMYK"), "JPEG"),
    "black on glass": lambda digit: saved(glass(digit, 0)),
    "white on glass": lambda digit: saved(glass(digit, 255)),
    "grey and alpha": lambda digit: saved(glass(digit, 0).convert("LA")),
    "turned by EXIF": turned,
}


@pytest.mark.parametrize("way", WAYS)
def test_digits_are_recognized_on_any_paper(way: str, model: formats.Deployed, digits: tuple) -> None:
    images, labels = digits
    some = 10 if way == "large" else NUM_EXAMPLES
    seen = np.stack([image.read(WAYS[way](digit), way, "digits", SHAPE) for digit in images[:some]])
    assert (seen.dtype, seen.shape) == (np.uint8, (some, *SHAPE))
    predictions = model.scores(torch.from_numpy(seen)).argmax(1)
    direct = model.scores(torch.from_numpy(images[:some])[:, None]).argmax(1)
    assert (predictions != direct).sum() <= 1 + OTHER * some
    assert (predictions != labels[:some]).sum() <= 1 + WRONG * some


@pytest.mark.parametrize("way", ["dark on light", "light on dark", "16 bit", "black on glass", "white on glass"])
def test_the_way_that_a_digit_is_stored_changes_no_more_than_round_off(way: str, digits: tuple) -> None:
    for digit in digits[0][:20]:
        seen, expected = (
            image.read(WAYS[name](digit), name, "digits", SHAPE).astype(int) for name in (way, "dark on light")
        )
        assert np.abs(seen - expected).max() <= 4


TURNS = {
    3: "ROTATE_180",
    6: "ROTATE_90",
    8: "ROTATE_270",
    2: "FLIP_LEFT_RIGHT",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    7: "TRANSVERSE",
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_undone(orientation: int, digits: tuple) -> None:
    picture = drawn(digits[0][0])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = saved(picture.transpose(Image.Transpose[TURNS[orientation]]), exif=exif)
    assert np.array_equal(image.read(stored, "x", "digits", SHAPE), image.read(saved(picture), "x", "digits", SHAPE))


@pytest.mark.mnist
def test_mnist_images_come_out_as_they_went_in(mnist_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preprocessing is MNIST's own. An image cropped to its faintest pixel returns to its place, bit for bit."""
    images = data.prepare(DataConfig(root=str(mnist_root)))[0].tensors["test_images"][:2000].numpy()
    monkeypatch.setattr(image, "IN_BOX", 0.0)
    assert [
        at for at, digit in enumerate(images) if not np.array_equal(image.fit(digit.astype(np.float32), "mnist"), digit)
    ] == []


@pytest.mark.parametrize(
    ("shape", "side"), [((40, 10), (20, 5)), ((10, 40), (5, 20)), ((400, 400), (20, 20)), ((1, 300), (1, 20))]
)
def test_mnist_frame_keeps_proportions_and_centres_the_mass(shape: tuple, side: tuple) -> None:
    sheet = np.zeros((500, 600), np.float32)
    sheet[30 : 30 + shape[0], 50 : 50 + shape[1]] = 255
    found = image.fit(sheet, "mnist")
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    assert (len(rows), len(columns)) == side
    assert found.max() == 255
    for at, sums in enumerate((found.sum(1), found.sum(0))):
        assert abs((sums * np.arange(28)).sum() / sums.sum() - 14) <= 0.5, at


def test_other_data_sets_fill_the_frame() -> None:
    sheet = np.zeros((50, 60), np.float32)
    sheet[10:30, 5:15] = 255
    found = image.fit(sheet, "fashion_mnist")
    assert found[:, 7:21].min() == 255
    assert found.sum() == 255 * 28 * 14


# Files that are no images: content, and what the one line must contain


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, content: bytes, depth: int = 8, colour: int = 0, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", content) + chunk(b"IEND", b"")


SHEET = drawn(np.pad(np.full((12, 6), 255, np.uint8), ((8, 8), (11, 11))))
GOOD_PNG, GOOD_JPEG = saved(SHEET), saved(SHEET, "JPEG")
BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "neither PNG nor JPEG"),
    "one byte": (b"\0", "neither PNG nor JPEG"),
    "text": (b"<html>404 Not Found</html>", "neither PNG nor JPEG"),
    "zeros": (bytes(4096), "neither PNG nor JPEG"),
    "GIF": (saved(SHEET, "GIF"), "neither PNG nor JPEG"),
    "BMP": (saved(SHEET, "BMP"), "neither PNG nor JPEG"),
    "TIFF": (saved(SHEET, "TIFF"), "neither PNG nor JPEG"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nquit\n", "neither PNG nor JPEG"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "neither PNG nor JPEG"),
    "PNG magic only": (GOOD_PNG[:8], ""),
    "PNG header only": (GOOD_PNG[:33], ""),
    "half a PNG": (GOOD_PNG[: len(GOOD_PNG) // 2], "cannot be decoded"),
    "PNG with a wrong sum": (GOOD_PNG[:29] + bytes([GOOD_PNG[29] ^ 1]) + GOOD_PNG[30:], ""),
    "PNG with a damaged stream": (png(28, 28, b"no zlib here"), "cannot be decoded"),
    "PNG with too few rows": (png(28, 28, zlib.compress(bytes(29 * 3))), ""),
    "PNG of no width": (png(0, 28, zlib.compress(bytes(28))), ""),
    "PNG of impossible depth": (png(28, 28, zlib.compress(bytes(29 * 28)), depth=3), ""),
    "PNG bomb by its header": (
        png(60000, 60000, zlib.compress(bytes(1000))),
        "exceeds limit of 178956970 pixels",
    ),
    "PNG with a text bomb": (
        png(28, 28, zlib.compress(bytes(29 * 28)), extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))),
        "cannot be decoded",
    ),
    "half a JPEG": (GOOD_JPEG[: len(GOOD_JPEG) // 2], "cannot be decoded"),
    "JPEG magic only": (GOOD_JPEG[:3], ""),
    "JPEG header only": (GOOD_JPEG[:150], ""),
    "JPEG behind text": (b"x" + GOOD_JPEG, "neither PNG nor JPEG"),
    "white": (saved(Image.new("RGB", (50, 50), "white")), "is blank"),
    "black": (saved(Image.new("L", (50, 50))), "is blank"),
    "one pixel": (saved(Image.new("L", (1, 1))), "is blank"),
    "transparent": (saved(Image.new("RGBA", (50, 50), (0, 0, 0, 0))), "is blank"),
    "hardly any contrast": (saved(drawn(np.asarray(Image.new("L", (28, 28))), paper=100, pen=105)), "is blank"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_what_is_no_image_is_refused_in_one_line(case: str) -> None:
    content, words = BAD_IMAGES[case]
    with pytest.raises(UserError) as error:
        image.read(content, "scan.png", "mnist", SHAPE)
    assert str(error.value).startswith("scan.png ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=100).map(lambda tail: GOOD_PNG[:60] + tail), st.data()))
@settings(deadline=None, max_examples=150)
def test_any_bytes_are_an_image_or_refused(content: Any) -> None:
    if not isinstance(content, bytes):  # one byte of a good file is another
        good = content.draw(st.sampled_from([GOOD_PNG, GOOD_JPEG]))
        at = content.draw(st.integers(0, len(good) - 1))
        content = good[:at] + bytes([content.draw(st.integers(0, 255))]) + good[at + 1 :]
    with contextlib.suppress(UserError):
        assert image.read(content, "x", "mnist", SHAPE).shape == SHAPE


@pytest.fixture
def folder(tmp_path: Path, digits: tuple) -> Path:
    """Make a folder with three good images and files that are no images."""
    for at, digit in enumerate(digits[0][:3]):
        (tmp_path / f"{at}.png").write_bytes(saved(drawn(digit)))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    return tmp_path


REFUSALS: dict[str, tuple[list[str], str]] = {
    "missing": (["0.png", "absent.png"], "absent.png is not a file"),
    "directory": (["."], ". is not a file"),
    "pipe": (["pipe.png"], "pipe.png is not a file"),
    "loop of links": (["loop.png"], "loop.png is not a file"),
    "text": (["0.png", "text.png", "1.png"], "text.png is neither PNG nor JPEG"),
    "empty": (["empty.png", "0.png"], "empty.png is neither PNG nor JPEG"),
    "two bad ones": (["text.png", "empty.png"], "text.png is neither"),
    "long name": (["x" * 5000], "File name too long"),
    "none": ([], "IMAGE"),
    "option": (["0.png", "--jsn"], "Did you mean --json?"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_predict_refuses_each_bad_image_in_one_line_and_answers_the_others(
    case: str, folder: Path, digits_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    names, words = REFUSALS[case]
    assert main(["predict", str(digits_run), *names]) == 2
    printed = capsys.readouterr()
    is_usage = case in ("none", "option")
    good = [] if is_usage else [name for name in names if name in ("0.png", "1.png", "2.png")]
    assert [line.split(":")[0] for line in printed.out.splitlines()] == good
    lines = printed.err.splitlines()
    assert len(lines) == (1 if is_usage else len(names) - len(good))
    assert all(line.startswith("error: ") for line in lines)
    assert words in printed.err


@pytest.mark.parametrize(
    ("name", "words"),
    [("absent", "is no model"), ("absent.onnx", "is no model"), ("0.png", "is no model"), (".", "has no checkpoint")],
)
def test_predict_refuses_what_is_no_model(
    name: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(folder / name), str(folder / "0.png")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert words in error


def test_predict_prints_a_line_per_image_in_order(
    folder: Path, digits_run: Path, model: Any, digits: tuple, capsys: Any
) -> None:
    names = [str(folder / f"{at}.png") for at in (2, 0, 1)]
    assert main(["predict", str(digits_run), *names]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"{folder / f'{at}.png'}: {digits[1][at]}" for at in (2, 0, 1)]
    shares = [float(word.split()[1].rstrip("%")) for word in lines[0].split("(")[1].rstrip(")").split(", ")]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 10


def test_predict_reads_standard_input_and_writes_json(
    folder: Path, digits_run: Path, digits: tuple, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((folder / "1.png").read_bytes())))
    assert main(["predict", str(digits_run), "-", str(folder / "0.png"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["image"], row["label"]) for row in rows] == [
        ("-", str(int(digits[1][1]))),
        (str(folder / "0.png"), str(int(digits[1][0]))),
    ]
    for row in rows:
        assert list(row["probabilities"]) == list("0123456789")
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["probability"] == max(row["probabilities"].values()) == row["probabilities"][row["label"]]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"nothing")))
    assert main(["predict", str(digits_run), "-"]) == 2
    assert "standard input is neither PNG nor JPEG" in capsys.readouterr().err
