"""Decodes image files to RGB."""
import io
import logging
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from errors import UserError

logger = logging.getLogger('replknet')
HEIF = {'.heic', '.heif'}  # formats of phones, which Pillow reads with the package pillow-heif
MAX_PIXELS = 'REPLKNET_MAX_PIXELS'  # environment variable: the largest image that is decoded, in pixels
SIXTEEN_BIT = {'I;16', 'I;16L', 'I;16B', 'I;16N'}
_warned = []  # whether the warning about dark 16-bit images has been given

if os.environ.get(MAX_PIXELS, '').isdigit():
    Image.MAX_IMAGE_PIXELS = int(os.environ[MAX_PIXELS])


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
        heif = os.path.splitext(path)[1].lower() in HEIF
        if heif and not enable_heif():
            raise DataError('needs the package pillow-heif: pip install pillow-heif')
        with open(path, 'rb') as file:
            data = file.read()  # from an open file, Pillow asks for as many bytes as a damaged header promises
        return to_rgb(Image.open(io.BytesIO(data)), exif)
    except UnidentifiedImageError:
        raise DataError(f'{path}: cannot read the image: ' + (
            'it is damaged, or not of a kind that Pillow can read' if data else 'the file is empty')) from None
    except FileNotFoundError:
        raise DataError(f'{path}: no such image') from None
    except Image.DecompressionBombError as error:
        raise DataError(f'{path}: is too large: {error}; if you trust the file, set {MAX_PIXELS} to a larger number of '
                        'pixels') from None
    except Exception as error:  # Pillow raises many types for corrupt files
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise DataError(f'{path}: cannot read the image: {reason}') from error


def enable_heif():
    """Lets Pillow read HEIC and HEIF files, if the package pillow-heif is installed; returns whether it is."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def to_rgb(image, exif=False):
    """Converts a Pillow image of any mode to RGB, without changing it.

    Alpha is dropped. Of 16-bit greyscale, the high byte is kept. Nothing tells the range of 32-bit integers and of
    floating-point numbers, so these are refused.

    Args:
        exif: whether to turn it as its EXIF orientation says (DATA.EXIF); the official code ignores that.
    Raises:
        DataError: the image has no pixels, or pixels of 32 bits.
    """
    if 0 in image.size:
        raise DataError(f'the image has no pixels, its size is {image.width} x {image.height}')
    if exif and orientation(image) != 1:
        image = image.transpose(_UPRIGHT[orientation(image)])
    if 'transparency' in image.info:
        image = image.copy()
        del image.info['transparency']  # Pillow would warn that it is lost
    # Pillow opens 16-bit PGM files in mode I, and older versions also PNG files
    if image.mode in SIXTEEN_BIT or image.mode == 'I' and image.format in ('PNG', 'PPM'):
        values = np.asarray(image)
        if 255 < values.max() < 4096 and not _warned:
            _warned.append(True)
            logger.warning('%s: its 16-bit pixels of at most %d are nearly black; if the data have 12 bits, multiply '
                           'them by 16 (reported once)', getattr(image, 'filename', '') or 'an image', values.max())
        return Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8)).convert('RGB')
    if image.mode in ('I', 'F'):
        kind = '32-bit integer' if image.mode == 'I' else 'floating-point'
        raise DataError(f'{kind} pixels have no known range; scale them to 0..255 and save them with 8 bits')
    if image.mode in ('La', 'RGBa'):  # Pillow converts premultiplied alpha only to unmultiplied
        image = image.convert({'La': 'LA', 'RGBa': 'RGBA'}[image.mode])
    return image.convert('RGB')


def orientation(image):
    """EXIF orientation of a Pillow image, 1 to 8; 1 (upright) also where there is none, or none that can be read."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata, for which Pillow raises many types, do not spoil the pixels
        return 1
    return value if value in _UPRIGHT else 1
