"""Image files -> images uint8 [C,H,W] as the training images were.

For a model of digits and the like, light ink on black is cropped, scaled and centred: the border's median colour is the
paper, and ink is what differs from it, whichever of the two is darker. For any other model, the whole picture is
resized, as `launch data --from` does it. numpy and Pillow are imported in functions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch.decode import decode, picture
from train.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

SIDE = 28
WORK_SIDE = 1024  # pixels; larger images are averaged down to it first
MIN_CONTRAST = 16.0  # of 255, between ink and paper
IN_BOX = 0.2  # share of the strongest ink from which a pixel is in the digit's box; the paper's texture is below it
# Longer side of the digit's box in pixels, and what is put into the middle. MNIST: "size normalized to fit in a 20x20
# pixel box while preserving their aspect ratio ... centered in a 28x28 image by computing the center of mass" (LeCun,
# Cortes and Burges, The MNIST database of handwritten digits). The digits of scikit-learn fill their 8 rows: measured,
# all 1,797 of them. Fashion-MNIST: "resizing the longest edge of the image to 28" (Xiao, Rasul and Vollgraf, 2017), and
# kmnist fills its frame.
FULL_FRAME = (28, "box")
FRAMES = {"mnist": (20, "mass"), **dict.fromkeys(("fashion_mnist", "kmnist", "digits"), FULL_FRAME)}


def ink(image: "Image", name: str) -> "NDArray[np.float32]":
    """Return how much ink is where, float32 [H,W], 0 paper to 255 ink. Raises UserError for an image without any."""
    import numpy as np

    factor = -(-max(image.size) // WORK_SIDE)
    pixels: NDArray[Any] = np.asarray(image.reduce(factor), np.float32)
    colour, alpha = pixels[..., :3], pixels[..., 3:] / 255
    if alpha.min() < 1:  # composite a transparent image onto a contrasting background
        brightness = (colour * alpha).sum() / max(float(3 * alpha.sum()), 1.0)
        colour = colour * alpha + (255 if brightness < 128 else 0) * (1 - alpha)
    border = np.concatenate([colour[0], colour[-1], colour[:, 0], colour[:, -1]])
    paper = np.median(border, axis=0)
    noise = 3 * float(np.median(np.abs(border - paper).max(-1)))  # texture of the paper, JPEG; 0 in a clean image
    found = np.abs(colour - paper).max(-1)
    peak = float(found.max())
    if peak < noise + MIN_CONTRAST:
        expected = "Expected ink that does not cover the border"
        raise UserError(f"{name} is blank: nothing in it differs from its border. {expected}.")
    return (((found - noise) / (peak - noise)).clip(0, 1) * 255).astype(np.float32)


def fit(found: "NDArray[np.float32]", data_name: str) -> "NDArray[np.uint8]":
    """Crop ink to its box, scale the longer side and centre it: uint8 [28,28] as in the data set of that name."""
    import numpy as np
    from PIL import Image

    side, middle = FRAMES[data_name]
    mask = found > IN_BOX * 255
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = side / max(box.shape)
    height, width = (max(1, round(length * scale)) for length in box.shape)
    small = np.asarray(Image.fromarray(box).resize((width, height), Image.Resampling.BOX))
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    if middle == "mass":
        mass = small.sum()
        top = round(SIDE / 2 - float((small.sum(1) * np.arange(height)).sum() / mass))
        left = round(SIDE / 2 - float((small.sum(0) * np.arange(width)).sum() / mass))
        top, left = min(max(top, 0), SIDE - height), min(max(left, 0), SIDE - width)
    framed = np.zeros((SIDE, SIDE), np.uint8)
    framed[top : top + height, left : left + width] = small.round().clip(0, 255)
    return framed


def read(content: bytes, name: str, data_name: str, shape: Sequence[int]) -> "NDArray[np.uint8]":
    """Turn the bytes of an image file into an image uint8 of shape (C, H, W), like those of a data set.

    Raises UserError, naming the image.
    """
    import numpy as np

    if data_name in FRAMES:
        return fit(ink(decode(content, name), name), data_name)[None]
    channels, height, width = shape
    found = picture(content, name, (height, width)).convert("L" if channels == 1 else "RGB")
    return np.asarray(found).reshape(height, width, channels).transpose(2, 0, 1)
