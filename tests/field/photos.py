"""What happens to a digit before it is a photo: desks, frames, shadows, ruled paper, transparency, scissors."""

from collections.abc import Callable

import numpy as np
from hand import draw
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

Way = Callable[[int, int], Image.Image]  # digit, hand


def grey(pixels: NDArray) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def shaded(sheet: Image.Image, share: NDArray) -> Image.Image:
    return grey(np.asarray(sheet, np.float32) * share)


def noisy(sheet: Image.Image, deviation: float) -> Image.Image:
    pixels = np.asarray(sheet, np.float32)
    return grey(pixels + np.random.default_rng(0).normal(0, deviation, pixels.shape))


def ramp(side: int, end: float) -> NDArray:
    return np.linspace(1, end, side)[None]


def vignette(side: int, depth: float = 0.6) -> NDArray:
    along = np.linspace(-1, 1, side) ** 2
    return 1 - depth * np.add.outer(along, along) / 2


def lamp(side: int) -> NDArray:
    along = np.linspace(-1, 1, side)
    return 0.35 + 0.65 * np.exp(-2 * np.add.outer((along + 0.2) ** 2, (along - 0.3) ** 2))


def cut(side: int, at: int, share: float = 0.55) -> NDArray:
    return np.where(np.arange(side) > at, share, 1)[None]


def slanting(side: int) -> NDArray:
    return np.where(np.add.outer(np.arange(side), np.arange(side)) > 0.9 * side, 0.55, 1)


def framed(sheet: Image.Image, width: int, colour: int, inset: int = 0) -> Image.Image:
    box = (inset, inset, sheet.width - 1 - inset, sheet.height - 1 - inset)
    ImageDraw.Draw(sheet).rectangle(box, outline=colour, width=width)
    return sheet


def on_desk(
    sheet: Image.Image, colour: int | tuple, side: int, angle: float = 0, at: tuple[int, int] | None = None
) -> Image.Image:
    turned = sheet.convert("RGBA").rotate(angle, Image.Resampling.BICUBIC, expand=True)
    desk = Image.new("RGB", (side, side), colour if isinstance(colour, tuple) else (colour,) * 3)
    desk.paste(turned, at or ((side - turned.width) // 2, (side - turned.height) // 2), turned)
    return desk


def ruled(sheet: Image.Image, step: int, width: int, colour: tuple, *, is_squared: bool = False) -> Image.Image:
    lines = Image.new("RGB", sheet.size, "white")
    pen = ImageDraw.Draw(lines)
    for at in range(step // 2, max(sheet.size), step):
        pen.line((0, at, sheet.width, at), fill=colour, width=width)
        if is_squared:
            pen.line((at, 0, at, sheet.height), fill=colour, width=width)
    return grey(np.minimum(np.asarray(sheet.convert("RGB")), np.asarray(lines)))


def crossed(sheet: Image.Image, step: int, width: int) -> Image.Image:
    for at in range(step, sheet.height, step):
        ImageDraw.Draw(sheet).line((0, at, sheet.width, at), fill=255, width=width)
    return sheet


def cropped(sheet: Image.Image, margin: int = 0) -> Image.Image:
    left, top, right, bottom = sheet.point(lambda value: 255 * (value < 200)).getbbox()
    return sheet.crop((left - margin, top - margin, right + margin, bottom + margin))


def on_glass(sheet: Image.Image, pen: int) -> Image.Image:
    glass = Image.new("RGBA", sheet.size, (pen, pen, pen, 0))
    glass.putalpha(ImageOps.invert(sheet))
    return glass


def in_margin(sheet: Image.Image, colour: tuple, margin: int = 30) -> Image.Image:
    window = Image.new("RGBA", (sheet.width + 2 * margin, sheet.height + 2 * margin), colour)
    window.paste(sheet.convert("RGBA"), (margin, margin))
    return window


def spotted(sheet: Image.Image, radius: float, *spots: tuple[int, int]) -> Image.Image:
    pen = ImageDraw.Draw(sheet)
    for x, y in spots:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)
    return sheet


def dark_corner(sheet: Image.Image) -> Image.Image:
    ImageDraw.Draw(sheet).polygon([(0, 0), (130, 0), (0, 110)], fill=30)
    return sheet


def circled(sheet: Image.Image) -> Image.Image:
    ImageDraw.Draw(sheet).ellipse((40, 40, 360, 360), outline=0, width=6)
    return sheet


def in_16_bits(sheet: Image.Image, shift: int) -> Image.Image:
    return Image.fromarray(np.asarray(sheet).astype(np.uint16) << shift)


def side_by_side(digits: tuple[int, int], hand: int, pen: int, wide: int = 260) -> Image.Image:
    both = Image.new("L", (2 * wide, 400), 255)
    for at, digit in enumerate(digits):
        both.paste(draw(digit, hand, 400, pen, wide=wide), (at * wide, 0))
    return both


BLUE, CLEAR = (150, 180, 230), (0, 0, 0, 0)
PENS: dict[str, Way] = {
    f"pen {pen} of {side}": lambda digit, hand, pen=pen, side=side: draw(digit, hand, side, pen, 0.7)  # type: ignore[misc]
    for pen, side in [(1, 28), (2, 28), (3, 64), (1, 200), (1, 1000), (40, 300), (24, 400), (10, 4000), (40, 4000)]
}
WAYS: dict[str, Way] = {
    "small on a large sheet": lambda d, hand: draw(d, hand, 2000, 8, 0.08, middle=(0.3, 0.6)),
    "light on dark": lambda d, hand: draw(d, hand, ink=240, paper=20, pen=10),
    "black frame": lambda d, hand: framed(draw(d, hand), 3, 0),
    "grey frame of a pixel": lambda d, hand: framed(draw(d, hand), 1, 200),
    "thick frame": lambda d, hand: framed(draw(d, hand, pen=8), 15, 30),
    "inner frame": lambda d, hand: framed(draw(d, hand, pen=8), 4, 0, 20),
    "pencil, black frame": lambda d, hand: framed(draw(d, hand, pen=5, ink=150, paper=220), 3, 0),
    "pencil, thin inner frame": lambda d, hand: framed(draw(d, hand, 400, 5, 0.5, 150, 220), 2, 0, 30),
    "dark desk": lambda d, hand: on_desk(draw(d, hand, 500, 30, ink=20, paper=235), 60, 800),
    "pencil, dark desk": lambda d, hand: noisy(on_desk(draw(d, hand, 500, 8, ink=150, paper=225), 60, 800), 6),
    "turned on a dark desk": lambda d, hand: on_desk(draw(d, hand, 500, 12, ink=20, paper=235), 60, 900, 13),
    "light desk": lambda d, hand: on_desk(draw(d, hand, 500, 12, ink=20, paper=200), 245, 800),
    "pencil, light desk": lambda d, hand: on_desk(draw(d, hand, 500, 8, ink=130, paper=200), 245, 800, 5),
    "wooden desk": lambda d, hand: noisy(on_desk(draw(d, hand, 500, 10, ink=40), (120, 80, 40), 900, 9), 6),
    "desk on two sides": lambda d, hand: on_desk(draw(d, hand, 500, 12, ink=20, paper=235), 60, 600, at=(100, -20)),
    "desk on one side": lambda d, hand: on_desk(draw(d, hand, 500, 12, ink=20, paper=235), 60, 500, at=(60, 0)),
    "dark card on a light desk": lambda d, hand: on_desk(draw(d, hand, 500, 12, ink=240, paper=40), 230, 800),
    "dark corner": lambda d, hand: dark_corner(draw(d, hand, 400, 10, 0.5)),
    "hard shadow": lambda d, hand: shaded(draw(d, hand, 600, 30, ink=30, paper=200), cut(600, 330)),
    "pencil, hard shadow": lambda d, hand: noisy(shaded(draw(d, hand, 600, 8, ink=130, paper=210), cut(600, 280)), 3),
    "slanting shadow": lambda d, hand: shaded(draw(d, hand, 600, 14, ink=30, paper=210), slanting(600)),
    "gradient": lambda d, hand: shaded(draw(d, hand, 600, 30, ink=30, paper=200), ramp(600, 0.45)),
    "pencil, steep gradient": lambda d, hand: noisy(shaded(draw(d, hand, 600, 8, 0.6, 120, 220), ramp(600, 0.35)), 3),
    "vignette": lambda d, hand: shaded(draw(d, hand, 600, 12, ink=30, paper=200), vignette(600)),
    "pencil, vignette": lambda d, hand: noisy(shaded(draw(d, hand, 600, 6, 0.6, 120, 200), vignette(600)), 5),
    "under a lamp": lambda d, hand: shaded(draw(d, hand, 600, 10, ink=60, paper=230), lamp(600)),
    "clear margin": lambda d, hand: in_margin(draw(d, hand, 200, 14), CLEAR),
    "clear white margin": lambda d, hand: in_margin(draw(d, hand, 200, 14), (255, 255, 255, 0)),
    "dark card, clear red margin": lambda d, hand: in_margin(draw(d, hand, 200, 6, ink=230, paper=30), (255, 0, 0, 0)),
    "black on glass": lambda d, hand: on_glass(draw(d, hand, 200, 5), 0),
    "white on glass": lambda d, hand: on_glass(draw(d, hand, 200, 5), 255),
    "specks": lambda d, hand: spotted(draw(d, hand), 1, (3, 3), (200, 390)),
    "pencil, black specks": lambda d, hand: spotted(draw(d, hand, 400, 6, 0.6, 150, 220), 3, (33, 33), (350, 100)),
    "ruled": lambda d, hand: ruled(draw(d, hand), 40, 2, BLUE),
    "ruled in dark blue": lambda d, hand: ruled(draw(d, hand, 800, 6, ink=40), 60, 3, (90, 110, 200)),
    "pencil, ruled": lambda d, hand: ruled(draw(d, hand, 800, 9, ink=130), 60, 3, BLUE),
    "pencil, squared": lambda d, hand: ruled(draw(d, hand, 800, 9, ink=100), 50, 2, BLUE, is_squared=True),
    "cut by white lines": lambda d, hand: crossed(draw(d, hand), 40, 3),
    "on a line": lambda d, hand: ruled(draw(d, hand, 400, 10), 720, 4, (0, 0, 0)),
    "tight crop": lambda d, hand: cropped(draw(d, hand)),
    "tight crop, thin pen": lambda d, hand: cropped(draw(d, hand, 400, 4)),
    "tight crop, light on dark": lambda d, hand: ImageOps.invert(cropped(draw(d, hand), 1)),
    "at the lower border": lambda d, hand: draw(d, hand, 400, 16, 0.7, middle=(0.5, 0.66)),
    "noisy pencil": lambda d, hand: noisy(draw(d, hand, 800, 14, ink=150, paper=215), 10),
    "very noisy pencil": lambda d, hand: noisy(draw(d, hand, 800, 8, ink=150, paper=215), 15),
    "8 of 16 bits": lambda d, hand: in_16_bits(draw(d, hand), 0),
    "12 of 16 bits": lambda d, hand: in_16_bits(draw(d, hand, ink=20, paper=220), 4),
    "pencil on a desk in a gradient": lambda d, hand: noisy(
        shaded(on_desk(draw(d, hand, 500, 7, 0.6, 110, 230), 70, 900, 6).convert("L"), ramp(900, 0.5)), 4
    ),
    "ruled and framed": lambda d, hand: framed(ruled(draw(d, hand, 800, 10, ink=30), 60, 2, BLUE), 4, 0),
    "thin, framed, in a gradient": lambda d, hand: shaded(
        framed(draw(d, hand, 600, 4, 0.6, 30, 220), 3, 0), ramp(600, 0.5)
    ),
    "frame in a clear margin": lambda d, hand: in_margin(framed(draw(d, hand, 300, 6), 4, 0), CLEAR),
    "ruled on a desk": lambda d, hand: on_desk(ruled(draw(d, hand, 500, 7, ink=30), 40, 2, BLUE), 60, 900, 4),
    "circled": lambda d, hand: circled(draw(d, hand, 400, 8, 0.45)),
}
EMPTY = Image.new("L", (400, 400), 220)
REFUSED: dict[str, tuple[Image.Image, str]] = {
    "37": (side_by_side((3, 7), 1, 24), "several separate shapes"),
    "33, thin": (side_by_side((3, 3), 0, 4), "several separate shapes"),
    "11": (side_by_side((1, 1), 0, 20, 130), "several separate shapes"),
    "one above another": (side_by_side((3, 8), 0, 14, 400).rotate(90, expand=True), "several separate shapes"),
    "empty ruled paper": (ruled(EMPTY, 40, 2, BLUE), "several separate shapes"),
    "minus": (Image.new("L", (100, 20)), "blank"),
    "empty gradient": (shaded(EMPTY, ramp(400, 0.4)), "blank"),
    "empty vignette": (noisy(shaded(EMPTY, vignette(400)), 2), "blank"),
    "empty and noisy": (noisy(EMPTY, 3), "blank"),
    "empty frame": (framed(EMPTY.copy(), 5, 0), "blank"),
    "empty box": (framed(EMPTY.copy(), 3, 0, 40), "like no digit's"),
    "empty sheet on a desk": (on_desk(Image.new("L", (400, 500), 230), 60, 800, 10), "like no digit's"),
    "empty card": (in_margin(Image.new("L", (200, 200), 255), CLEAR), "like no digit's"),
    "noise": (grey(np.random.default_rng(0).integers(0, 255, (300, 300))), "blank"),
}
