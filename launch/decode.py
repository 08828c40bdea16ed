"""PNG and JPEG files -> pictures, the same way for `launch data --from` and for `launch predict`.

Only PNG and JPEG are decoded, within a limit of pixels that is checked before any is. A picture is upright (EXIF), has
8 bits per channel, and lies on white where it is transparent. numpy and Pillow are imported in functions.
"""

import io
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES, MAX_PIXELS = 100_000_000, 50_000_000


def read_bytes(name: str) -> bytes:
    """Return the content of an image file, or of standard input for `-`. Raises UserError, naming it."""
    try:
        if name != "-" and not Path(name).is_file():  # a pipe would block
            raise UserError(f"{name} is not a file. Expected a PNG or JPEG image.")
        with sys.stdin.buffer if name == "-" else open(name, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{name} has more than {MAX_BYTES:,} bytes. Make it smaller.")
    return content


def decode(content: bytes, name: str) -> "Image":
    """Decode PNG or JPEG into RGBA, upright. Raises UserError, naming the image."""
    import numpy as np
    from PIL import Image, ImageOps

    if not content:
        raise UserError(f"{name} is empty. Expected a PNG or JPEG image.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but readable files
            image: Any = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bit; convert() would cut off at 255
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("RGBA")
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is neither PNG nor JPEG. Convert it to one of them.") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} has too many pixels. Expected at most {MAX_PIXELS:,}: make it smaller.") from None
    except Exception as error:  # what Pillow raises for a damaged file has no common class
        raise UserError(f"{name} is damaged: {one_line(error, 100)}.") from None


def picture(content: bytes, name: str, size: tuple[int, int] | None) -> "Image":
    """Decode PNG or JPEG into RGB, on white, resized to (height, width) if that is given. Raises UserError."""
    from PIL import Image

    found = decode(content, name)
    found = Image.alpha_composite(Image.new("RGBA", found.size, "white"), found).convert("RGB")
    return resize(found, size) if size else found


def resize(image: "Image", size: tuple[int, int]) -> "Image":
    """Resize a whole image to (height, width), antialiased. Its aspect ratio changes if `size` has another one."""
    from PIL import Image

    return image.resize(size[::-1], Image.Resampling.BILINEAR)
