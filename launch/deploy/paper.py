"""A picture of a digit -> how much ink is where: from the sheet of paper in it, in the light of each place.

Transparency, a desk around the sheet, shadows and the colours of pen and paper are gone afterwards. numpy and scipy are
imported in functions.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Floats = NDArray[np.float32]
    Mask = NDArray[np.bool_]

MIN_CONTRAST = 1 / 16  # of the paper's brightness, between ink and paper
MIN_SHEET = 0.05  # share of the picture
MIN_RECTANGULARITY = 0.87  # of a sheet, also in perspective; an ellipse has 0.79


def edge(picture: "NDArray[Any]") -> "NDArray[Any]":
    """Return the pixels of the picture's border: [N]."""
    import numpy as np

    return np.concatenate([picture[0], picture[-1], picture.T[0], picture.T[-1]])


def grey(colour: "Floats") -> "Floats":
    """Project colours [H,W,3] onto the axis along which they differ most: float32 [H,W], 0 to 255."""
    import numpy as np

    points = colour.reshape(-1, 3)
    weights = np.linalg.eigh(np.cov(points.T) + 1e-3)[1][:, -1]  # 1e-3: brightness, if all pixels are alike
    weights /= weights[np.abs(weights).argmax()]
    turned = np.where(weights < 0, 255 - colour, colour)
    return (turned @ np.abs(weights) / np.abs(weights).sum()).astype(np.float32)


def keep(colour: "Floats", inside: "Mask") -> "Floats":
    """Crop to what is inside; continue its colours outside, so that there is neither an edge nor ink."""
    from scipy import ndimage

    rows, columns = ndimage.find_objects(inside.astype(int))[0]
    inside = ndimage.binary_erosion(inside[rows, columns], iterations=2, border_value=1)
    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    return colour[rows, columns][tuple(nearest)]


def opaque(image: "Image") -> "Floats":
    """Return colours [H,W,3] without transparency: of the opaque part, or the shape of its alpha if that is all."""
    import numpy as np
    from scipy import ndimage

    pixels = np.asarray(image, np.float32)
    colour, alpha = pixels[..., :3], pixels[..., 3]
    inside = alpha > alpha.max() / 2
    core = ndimage.binary_erosion(inside, iterations=2, border_value=1)
    if alpha.min() == 255:
        return colour
    if not core.any() or np.ptp(colour[core], axis=0).max() < 255 * MIN_CONTRAST * 3:
        return np.repeat(alpha[..., None], 3, 2)
    return keep(colour, inside)


def rectangularity(mask: "Mask") -> float:
    """Return the area of a filled shape as a share of the smallest rectangle, turned as it may be, around it."""
    import numpy as np

    rows = np.flatnonzero(mask.any(1))
    left, right = mask[rows].argmax(1), mask.shape[1] - mask[rows, ::-1].argmax(1)
    x, y = np.concatenate([left, right, left, right]), np.concatenate([rows, rows, rows + 1, rows + 1])
    angles = np.radians(np.arange(0, 90, 2))[:, None]
    wide, high = (
        np.ptp(x * a + y * b, axis=1) for a, b in ((np.cos(angles), np.sin(angles)), (-np.sin(angles), np.cos(angles)))
    )
    return float(mask.sum() / (wide * high).min())


def sheet(light: "Floats") -> "Mask | None":
    """Return a sheet of paper in the picture: a large rectangle with something on it, away from the border."""
    import numpy as np
    from scipy import ndimage

    low, high = float(light.min()), float(light.max())
    if high - low < 255 * MIN_CONTRAST:
        return None
    for share in (0.5, 0.25, 0.75):
        is_light = light > low + share * (high - low)
        for level in (is_light, ~is_light):
            labels, _ = ndimage.label(level)
            sizes = np.bincount(labels.ravel())
            sizes[0] = 0
            blob = ndimage.binary_fill_holes(labels == sizes.argmax())
            contacts = sum(side.mean() > 0.1 for side in (blob[0], blob[-1], blob.T[0], blob.T[-1]))
            if blob.sum() < MIN_SHEET * blob.size or contacts > 1 or rectangularity(blob) < MIN_RECTANGULARITY:
                continue
            core = ndimage.distance_transform_edt(np.pad(blob, 1))[1:-1, 1:-1] > 0.02 * max(blob.shape)
            if core.any() and np.ptp(light[core]) > 255 * MIN_CONTRAST:
                return blob
    return None


def has_dark_ink(light: "Floats") -> bool:
    """Return whether the ink is darker than the paper. The paper is at the border, or what lies around thin strokes."""
    import numpy as np
    from scipy import ndimage

    low, border, high = np.percentile(edge(light), (25, 50, 75))
    if high - low < 0.1 * np.ptp(light):
        return bool(border - light.min() > light.max() - border)
    for share in (16, 8, 4):  # of the picture's side: wider than the pen, and narrower than what is between its strokes
        window = (max(light.shape) // share,) * 2
        dark, bright = (transform(light, window) for transform in (ndimage.black_tophat, ndimage.white_tophat))
        ratio = float((dark**2).sum() / max((bright**2).sum(), 1))
        if not 0.5 < ratio < 1.3:
            return ratio > 1
    return True


def contrast(light: "Floats", beyond: Any) -> "Floats":
    """Return how much darker each pixel is than the paper around it, as a share of that: 0 paper to 1, or light ink.

    A closing is the paper: it has the light of each place, also of a shadow, and no ink. Beyond the border, the picture
    continues as its "edge", which makes frames wide and so part of the paper, or is "symmetric".
    """
    import numpy as np
    from scipy import ndimage

    height, width = light.shape
    if height >= 2.5 * width and light[:, width // 3 : width - width // 3].max() < 128:
        return (light < 128).astype(np.float32)  # a 1 that is cropped to its ink
    light = light if has_dark_ink(light) else 255 - light
    reach = max(light.shape) // 4
    paper = ndimage.grey_closing(np.pad(light, reach, beyond), 2 * reach)[reach:-reach, reach:-reach]
    found = 1 - light / np.maximum(paper, 1)
    lower, low = np.percentile(found, (10, 25))
    noise = float(low + 6 * (low - lower))  # three deviations of the paper's texture; 0 in a clean image
    return ((found - noise) / max(1 - noise, 1e-3)).clip(0, 1)
