"""Image files -> images uint8 [C,H,W] as the training images were.

For a model of MNIST, a digit is searched for as a person would: on the sheet of paper in the picture, in its own light,
without frame, ruled lines and specks. It is drawn with a pen like MNIST's, cropped, scaled and centred. For the other
data sets of light ink on black, ink is what differs from the border. For any other model, the whole picture is resized,
as `launch data --from` does it. numpy, scipy and Pillow are imported in functions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.deploy.paper import MIN_CONTRAST, edge, grey, keep, opaque, sheet
from launch.deploy.shapes import check, find_at_border, find_inside, pen_width
from launch.folder import decode, picture
from train.config import INK_NAMES
from train.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Floats = NDArray[np.float32]
    Mask = NDArray[np.bool_]

SIDE = 28
WORK_SIDES = (256, 1024)  # pixels; smaller images are enlarged, larger ones averaged down
IN_BOX = 0.2  # share of the strongest ink from which a pixel is in the digit's box; the paper's texture is below it
# Longer side of the ink's box in pixels. MNIST's "fit in a 20x20 pixel box", and "the center of mass" is in the middle
# (LeCun, Cortes and Burges, The MNIST database of handwritten digits). The other data sets fill their frame.
MNIST_BOX = 20
# Width of the pen as a share of the box's longer side. 95 % of MNIST's digits are above the first; the second is usual.
THIN_PEN, USUAL_PEN = 0.09, 0.125


def find_strokes(colour: "Floats") -> "tuple[Floats, Mask] | None":
    """Return the contrast of a picture [H,W,3] and where in it the digit is; None if there is no ink."""
    from scipy import ndimage

    light = ndimage.gaussian_filter(grey(colour), max(colour.shape) / 700)
    inner = sheet(light)
    if inner is not None and (strokes := find_strokes(keep(colour, inner))):
        return strokes
    return find_inside(light) or find_at_border(light)


def as_drawn_by_usual_pen(found: "Floats", mask: "Mask") -> "Floats":
    """Return strokes at full strength, float32 [H,W], 0 to 255; thin ones are drawn again with a wider pen."""
    import numpy as np
    from scipy import ndimage

    width, size = pen_width(mask), max(np.ptp(np.nonzero(mask), axis=1)) + 1
    if width < THIN_PEN * size:
        radius = (USUAL_PEN * size - width) / (1 - USUAL_PEN) / 2
        return 255 * (ndimage.distance_transform_edt(~np.pad(mask, int(radius) + 2)) <= radius).astype(np.float32)
    strength = (found / np.percentile(found[mask], 75)).clip(0, 1)
    return (strength * 255 * (ndimage.distance_transform_edt(~mask) <= width / 2)).astype(np.float32)


def plain_ink(colour: "Floats") -> "Floats | None":
    """Return what differs from the border, float32 [H,W], 0 to 255: garments, and what has several or soft shapes."""
    import numpy as np

    light = grey(colour)
    paper = np.median(edge(light))
    noise = 3 * float(np.median(np.abs(edge(light) - paper)))  # texture of the paper, JPEG; 0 in a clean image
    found = (np.abs(light - paper) - noise).clip(0)
    return found / found.max() * 255 if found.max() > 255 * MIN_CONTRAST else None


def ink(image: "Image", name: str, data_name: str) -> "Floats":
    """Return how much ink is where, float32 [H,W], 0 paper to 255 ink. Raises UserError for an image without any."""
    from PIL import Image

    least, most = WORK_SIDES
    image = image.reduce(-(-max(image.size) // most))
    if (factor := least // max(image.size)) > 1:
        image = image.resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC)
    colour = opaque(image)
    if data_name != "mnist":
        found = plain_ink(colour)
    elif strokes := find_strokes(colour):
        check(strokes[1], name)
        found = as_drawn_by_usual_pen(*strokes)
    else:
        found = None
    if found is None:
        raise UserError(f"{name} is blank. Expected ink that differs from the border and does not cover it.")
    return found


def fit(found: "Floats", data_name: str) -> "NDArray[np.uint8]":
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
        return fit(ink(decode(content, name, WORK_SIDES[1]), name, data_name), data_name)[None]
    channels, height, width = shape
    found = picture(content, name, (height, width)).convert("L" if channels == 1 else "RGB")
    return np.asarray(found).reshape(height, width, channels).transpose(2, 0, 1)
