"""Decodes image files to RGB."""
import numpy as np
from PIL import Image

from errors import UserError


class DataError(UserError):
    """A list file or an image cannot be used; the message is one line that names the file and the line."""


def decode_image(path):
    """Reads an image file as RGB, see `to_rgb`; EXIF orientation is ignored, as in the official code.

    Raises:
        DataError: the file does not exist or cannot be decoded.
    """
    try:
        with open(path, 'rb') as file:
            return to_rgb(Image.open(file))
    except FileNotFoundError:
        raise DataError(f'{path}: no such image') from None
    except Exception as error:  # Pillow raises many types for corrupt files
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise DataError(f'{path}: cannot read the image: {reason}') from error


def to_rgb(image):
    """Converts a Pillow image of any mode to RGB; alpha is dropped."""
    image.info.pop('transparency', None)  # Pillow would warn that it is lost
    if image.mode.startswith('I'):
        # 16-bit greyscale: Pillow's own conversion would clip at 255
        high_byte = np.asarray(image, dtype=np.int64) >> 8
        image = Image.fromarray(high_byte.clip(0, 255).astype(np.uint8))
    return image.convert('RGB')
