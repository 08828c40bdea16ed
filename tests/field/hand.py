"""Draw digits as hands do: polylines of all ten classes, turned, slanted and shaken, on sheets with defects."""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]


def arc(x: float, y: float, wide: float, high: float, begin: float, end: float) -> list[Point]:
    """Return points of an ellipse around x, y; 0 degrees is right, 90 is below."""
    angles = np.radians(np.linspace(begin, end, 24))
    return [(x + wide * math.cos(angle), y + high * math.sin(angle)) for angle in angles]


# Strokes of each digit in a box of 1 by 1, y downwards; some in several forms.
DIGITS: dict[int, list[list[list[Point]]]] = {
    0: [[arc(0.5, 0.5, 0.36, 0.5, -90, 275)], [arc(0.5, 0.5, 0.3, 0.5, -60, 305)]],
    1: [[[(0.5, 0), (0.5, 1)]], [[(0.3, 0.25), (0.52, 0), (0.5, 1)]]],
    2: [
        [[*arc(0.5, 0.27, 0.38, 0.27, -170, 20), (0.1, 1), (0.9, 0.98)]],
        [[(0.12, 0.2), *arc(0.48, 0.27, 0.34, 0.26, -140, 40), (0.45, 0.72), (0.08, 0.97), (0.95, 1)]],
    ],
    3: [
        [[*arc(0.45, 0.25, 0.36, 0.25, -150, 80), *arc(0.45, 0.74, 0.42, 0.26, -80, 150)]],
        [[(0.05, 0.1), (0.5, 0), (0.95, 0.2), (0.6, 0.48), (0.95, 0.75), (0.5, 1), (0.05, 0.9)]],
    ],
    4: [
        [[(0.3, 0), (0.08, 0.55), (0.92, 0.55)], [(0.72, 0.1), (0.68, 1)]],
        [[(0.7, 1), (0.7, 0), (0.05, 0.66), (0.95, 0.66)]],
    ],
    5: [
        [[(0.88, 0), (0.25, 0.02), (0.2, 0.42), *arc(0.45, 0.69, 0.4, 0.31, -120, 140)]],
        [[(0.9, 0.03), (0.3, 0.0)], [(0.28, 0.06), (0.2, 0.45), *arc(0.48, 0.7, 0.38, 0.3, -110, 150)]],
    ],
    6: [
        [[(0.75, 0), (0.35, 0.3), *arc(0.5, 0.7, 0.36, 0.3, 180, -190)]],
        [[(0.6, 0.0), (0.3, 0.35), (0.2, 0.7), *arc(0.5, 0.74, 0.3, 0.26, 170, -180)]],
    ],
    7: [
        [[(0.05, 0.02), (0.95, 0), (0.4, 1)]],
        [[(0.05, 0.08), (0.95, 0), (0.6, 0.5), (0.45, 1)], [(0.35, 0.5), (0.85, 0.48)]],
    ],
    8: [
        [arc(0.5, 0.25, 0.3, 0.25, 90, 450), arc(0.5, 0.74, 0.36, 0.26, -90, 270)],
        [[(0.82, 0.12), *arc(0.5, 0.25, 0.3, 0.24, -40, -260), *arc(0.5, 0.74, 0.34, 0.26, -90, 230), (0.82, 0.14)]],
    ],
    9: [
        [[*arc(0.48, 0.3, 0.34, 0.3, 0, -350), (0.8, 0.3), (0.7, 1)]],
        [[*arc(0.45, 0.28, 0.34, 0.28, 20, -340), (0.8, 0.2), (0.78, 0.7), (0.55, 1), (0.2, 0.96)]],
    ],
}


def strokes(digit: int, seed: int) -> list[list[Point]]:
    """Return the strokes of a digit by one hand: in a box of about 0.7 by 1, slanted, turned and shaken."""
    hand = random.Random(100 * seed + digit)
    form = DIGITS[digit][seed % len(DIGITS[digit])]
    slant, turn, wide = hand.uniform(-0.2, 0.2), math.radians(hand.uniform(-8, 8)), hand.uniform(0.6, 0.85)
    moved = []
    for line in form:
        points = []
        for x, y in line:
            x, y = (x - 0.5) * wide - slant * (y - 0.5), y - 0.5
            x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
            points.append((x + hand.uniform(-0.008, 0.008), y + hand.uniform(-0.008, 0.008)))
        moved.append(points)
    return moved


def draw(
    digit: int, seed: int = 0, side: int = 400, pen: int = 24, share: float = 0.6, ink: int = 0, paper: int = 255,
    middle: Point = (0.5, 0.5), wide: int | None = None,
) -> Image.Image:  # fmt: skip
    """Draw a digit on a grey sheet of `side` pixels, `wide` across; its height is a share of the side."""
    sheet = Image.new("L", (wide or side, side), paper)
    pencil = ImageDraw.Draw(sheet)
    for line in strokes(digit, seed):
        points = [(middle[0] * sheet.width + x * share * side, middle[1] * side + y * share * side) for x, y in line]
        pencil.line(points, fill=ink, width=pen, joint="curve")
        if pen > 2:
            for x, y in (points[0], points[-1]):
                pencil.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=ink)
    return sheet
