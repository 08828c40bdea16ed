"""Contrast of ink -> where the digit is: no shade, lines, frames and specks, and one digit only.

Sizes are relative to the picture's or to the digit's. numpy and scipy are imported in functions.
"""

from typing import TYPE_CHECKING, Any

from launch.deploy.paper import MIN_CONTRAST, contrast, edge, rectangularity
from train.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Mask = NDArray[np.bool_]

INK = 0.4  # share of the usual ink from which a pixel is ink
MIN_SLOPE = 8.0  # share of the strongest ink by which the contrast changes at an edge, over the picture's longer side
MAX_GAP = 0.05  # share of the digit's longer side, between parts of one digit; a detached bar of a 5 may be farther
MAX_ASPECT = 2.0  # width by height; MNIST's widest is just below
MAX_PEN = 0.35  # width of strokes as a share of the digit's longer side; MNIST's widest is just below
MAX_CONTACTS = 8  # strokes that reach the picture's border


def boxes_of(labels: "NDArray[np.int32]") -> "NDArray[np.int64]":
    """Return top, left, bottom and right of each labelled shape: [N,4]."""
    import numpy as np
    from scipy import ndimage

    found = [(rows.start, columns.start, rows.stop, columns.stop) for rows, columns in ndimage.find_objects(labels)]
    return np.array(found, np.int64).reshape(-1, 4)


def pen_width(mask: "Mask") -> float:
    """Return the mean width of strokes in pixels."""
    import numpy as np
    from scipy import ndimage

    depth = ndimage.distance_transform_edt(np.pad(mask, 1))
    return max(1.0, 4 * float(depth[depth > 0].mean()) - 2)


def sharp(found: "Floats", peak: float) -> "Mask":
    """Return where ink is, without what has no edge: shade."""
    import numpy as np
    from scipy import ndimage

    mask = found > INK * np.median(found[found > INK * peak]) if peak else found > 0
    labels, num_shapes = ndimage.label(mask, np.ones((3, 3)))
    outlines = labels * (mask & ~ndimage.binary_erosion(mask))
    slopes = ndimage.morphological_gradient(found, 3) / 2
    steep = ndimage.mean(slopes, outlines, np.arange(num_shapes) + 1) > MIN_SLOPE * peak / max(mask.shape)
    return np.append(False, steep | (labels.size == mask.sum()))[labels]


def without_lines(mask: "Mask") -> "Mask":
    """Drop lines from border to border, such as those of ruled paper, and mend the strokes that they cross."""
    import numpy as np
    from scipy import ndimage

    options: Any = {"mode": "constant", "cval": 0}
    for side in (0, 1):
        along, across, short = [1, 1], [1, 1], [1, 1]
        short[side] = mask.shape[side] // 25 + 1
        along[side], across[1 - side] = int(0.9 * mask.shape[side]), mask.shape[1 - side] // 30 + 2
        lines = ndimage.grey_closing(mask.astype(np.uint8), short)
        lines = ndimage.grey_opening(lines, along, **options)
        lines = (lines - ndimage.grey_opening(lines, across, **options)) > 0  # thin ones
        rest = mask & ~lines
        mask = rest | (lines & (ndimage.grey_closing(rest.astype(np.uint8), across, **options) > 0))
    return mask


def pieces(mask: "Mask", is_at_border: bool) -> "Mask":
    """Return the shapes that are neither specks nor around another shape, and at the border only if those are meant."""
    import numpy as np
    from scipy import ndimage

    labels, num_shapes = ndimage.label(mask, np.ones((3, 3)))
    if not num_shapes:
        return mask
    boxes = boxes_of(labels)
    size = (boxes[:, 2:] - boxes[:, :2]).max(1)
    is_inside = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < mask.shape).all(1)
    is_ours: Mask = np.logical_or(is_inside, is_at_border)
    for outer in np.flatnonzero(size > size.max() / 2):  # a frame or a circle
        margin = size[outer] / 20
        is_inner = (boxes[:, :2] > boxes[outer, :2] + margin).all(1) & (boxes[:, 2:] < boxes[outer, 2:] - margin).all(1)
        if (is_inner & (size > 0.3 * size[outer])).any():
            is_ours[outer] = False
    size = size * is_ours
    if size.max() < max(mask.shape) / 25:
        return np.zeros_like(mask)
    gap = ndimage.distance_transform_edt(labels != size.argmax() + 1)
    is_near = ndimage.minimum(gap, labels, np.arange(num_shapes) + 1) < 0.08 * size.max()
    is_ours &= (size > 0.15 * size.max()) | is_near
    return np.append(False, is_ours)[labels]


def find_inside(light: "Floats") -> "tuple[Floats, Mask] | None":
    """Return contrast and shapes that do not touch the border, below what is darker: frame, desk or specks."""
    from scipy import ndimage

    found = contrast(light, "edge")
    rest, peak = found.copy(), float(found.max())
    for _ in range(5):
        if rest.max() < max(MIN_CONTRAST, 0.15 * peak):
            break
        mask = (rest > 0) & sharp(found, rest.max())
        if (shapes := pieces(without_lines(mask), is_at_border=False)).any():
            return found, shapes
        dark = rest > INK * rest.max()
        boxes = boxes_of(ndimage.label(dark)[0])
        reach = min(max(light.shape) // 15, (boxes[:, 2:] - boxes[:, :2]).max() // 2 + 1)
        rest[ndimage.binary_dilation(dark, iterations=reach, mask=rest > 0.1 * rest.max())] = 0
    return None


def find_at_border(light: "Floats") -> "tuple[Floats, Mask] | None":
    """Return contrast and shapes of a picture that is cropped to its ink; None for an empty frame."""
    found = contrast(light, "symmetric")
    mask = pieces(sharp(found, float(found.max())), is_at_border=True)
    sides = (mask[0], mask[-1], mask.T[0], mask.T[-1])
    is_frame = mask.mean() < 0.5 and min(side.mean() for side in sides) > 0.9
    return None if found.max() < MIN_CONTRAST or is_frame or not mask.any() else (found, mask)


def check(mask: "Mask", name: str) -> None:
    """Raise UserError for what is not one digit."""
    import numpy as np
    from scipy import ndimage

    height, width = np.ptp(np.nonzero(mask), axis=1) + 1
    size = max(height, width)
    labels, num_shapes = ndimage.label(ndimage.distance_transform_edt(~mask) <= MAX_GAP / 2 * size)
    labels *= mask
    tops, lefts, bottoms, rights = boxes_of(labels).T
    heights, widths = bottoms - tops, rights - lefts
    main = np.bincount(labels.ravel())[1:].argmax()
    gap = ndimage.distance_transform_edt(labels != main + 1)
    gaps = ndimage.minimum(gap, labels, np.arange(num_shapes) + 1) / size
    is_beside = np.minimum(rights, rights[main]) - np.maximum(lefts, lefts[main]) < 0.2 * widths
    is_apart = (heights > 0.5 * heights[main]) & (gaps > np.where(is_beside, MAX_GAP, 0.12))
    is_apart |= (heights > np.maximum(0.3 * height, widths)) & (gaps > MAX_GAP)  # one above another
    is_apart |= (heights > 0.2 * height) & (gaps > 0.25)
    if is_apart.any():
        raise UserError(f"{name} has several separate shapes. Expected one digit: crop the picture to it.")
    num_contacts = np.count_nonzero(np.diff(edge(mask).astype(int)) > 0)
    is_blot = pen_width(mask) > MAX_PEN * size and height < 2.5 * width
    is_box = width > 0.75 * height and rectangularity(ndimage.binary_fill_holes(mask)) > 0.97
    if is_blot or is_box or width > MAX_ASPECT * height or num_contacts > MAX_CONTACTS:
        raise UserError(f"{name} has a shape like no digit's, {width} x {height}. Expected one digit, upright.")
