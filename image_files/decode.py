"""Decodes image files to RGB."""
import numpy as np
from PIL import Image

from errors import UserError


class DataError(UserError):
    """A list file or an image cannot be used; the message is one line that names the file and the line."""


_UPRIGHT = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
            6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}  # {EXIF orientation: how to turn the image}


def decode_image(path, exif=False):
    """Reads an image file as RGB, see `to_rgb`.

    Raises:
        DataError: the file does not exist or cannot be decoded.
    """
    try:
        with open(path, 'rb') as file:
            return to_rgb(Image.open(file), exif)
    except FileNotFoundError:
        raise DataError(f'{path}: no such image') from None
    except Exception as error:  # Pillow raises many types for corrupt files
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise DataError(f'{path}: cannot read the image: {reason}') from error


def to_rgb(image, exif=False):
    """Converts a Pillow image of any mode to RGB; alpha is dropped.

    Args:
        exif: whether to turn it as its EXIF orientation says (DATA.EXIF); the official code ignores that.
    """
    if exif and orientation(image) != 1:
        image = image.transpose(_UPRIGHT[orientation(image)])
    image.info.pop('transparency', None)  # Pillow would warn that it is lost
    if image.mode.startswith('I'):
        # 16-bit greyscale: Pillow's own conversion would clip at 255
        high_byte = np.asarray(image, dtype=np.int64) >> 8
        image = Image.fromarray(high_byte.clip(0, 255).astype(np.uint8))
    return image.convert('RGB')


def orientation(image):
    """EXIF orientation of a Pillow image, 1 to 8; 1 (upright) also where there is none, or none that can be read."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata, for which Pillow raises many types, do not spoil the pixels
        return 1
    return value if value in _UPRIGHT else 1
