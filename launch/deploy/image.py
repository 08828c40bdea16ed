"""Image files -> images uint8 [C,H,W] as the training images were.

For a model of digits and the like, light ink on black is cropped, scaled and centred: the border's median colour is the
paper, and ink is what differs from it, whichever of the two is darker. For any other model, the whole picture is
resized, as `launch data --from` does it. numpy and Pillow are imported in functions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch.folder import decode, picture
from train.config import INK_NAMES
from train.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

SIDE = 28
WORK_SIDE = 1024  # pixels; larger images are averaged down to it first
MIN_CONTRAST = 16.0  # of 255, between ink and paper
IN_BOX = 0.2  # share of the strongest ink from which a pixel is in the digit's box; the paper's texture is below it
# Longer side of the ink's box in pixels. MNIST's "fit in a 20x20 pixel box", and "the center of mass" is in the middle
# (LeCun, Cortes and Burges, The MNIST database of handwritten digits). The other data sets fill their frame.
MNIST_BOX = 20


def ink(image: "Image", name: str) -> "NDArray[np.float32]":
    """Return how much ink is where, float32 [H,W], 0 paper to 255 ink. Raises UserError for an image without any."""
    import numpy as np

    pixels: NDArray[Any] = np.asarray(image.reduce(-(-max(image.size) // WORK_SIDE)), np.float32)
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
        raise UserError(f"{name} is blank. Expected ink that differs from the border and does not cover it.")
    return (((found - noise) / (peak - noise)).clip(0, 1) * 255).astype(np.float32)


def fit(found: "NDArray[np.float32]", data_name: str) -> "NDArray[np.uint8]":
    """Crop ink to its box, scale the longer side and centre it: uint8 [28,28] as in the data set of that name."""
    import numpy as np
    from PIL import Image

    box = Image.fromarray(found).crop(Image.fromarray(found > IN_BOX * 255).getbbox())
    scale = (MNIST_BOX if data_name == "mnist" else SIDE) / max(box.size)
    width, height = (max(1, round(length * scale)) for length in box.size)
    small = np.asarray(box.resize((width, height), Image.Resampling.BOX))
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    if data_name == "mnist":
        middles = [float(np.average(np.arange(len(sums)), weights=sums)) for sums in (small.sum(1), small.sum(0))]
        top, left = (round(SIDE / 2 - middle) for middle in middles)
        top, left = min(max(top, 0), SIDE - height), min(max(left, 0), SIDE - width)
    framed = np.zeros((SIDE, SIDE), np.uint8)
    framed[top : top + height, left : left + width] = small.round().clip(0, 255)
    return framed


def read(content: bytes, name: str, data_name: str, shape: Sequence[int]) -> "NDArray[np.uint8]":
    """Turn an image file into uint8 [C,H,W] of that shape, like the images of a data set. Raises UserError."""
    import numpy as np

    if data_name in INK_NAMES:
        return fit(ink(decode(content, name), name), data_name)[None]
    channels, height, width = shape
    found = picture(content, name, (height, width)).convert("L" if channels == 1 else "RGB")
    return np.asarray(found).reshape(height, width, channels).transpose(2, 0, 1)
