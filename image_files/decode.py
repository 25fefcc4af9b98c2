"""Decodes image files to RGB."""
import contextlib
import functools
import io
import logging
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from errors import UserError, one_line

logger = logging.getLogger('replknet')
HEIF = {'.heic', '.heif'}  # formats of phones, which Pillow reads with the package pillow-heif
MAX_PIXELS = 'REPLKNET_MAX_PIXELS'  # environment variable: the largest image that is decoded, in pixels
SIXTEEN_BIT = {'I;16', 'I;16L', 'I;16B', 'I;16N'}
_warned = []  # whether the warning about dark 16-bit images has been given

if os.environ.get(MAX_PIXELS, '').isdigit():
    Image.MAX_IMAGE_PIXELS = int(os.environ[MAX_PIXELS])


class DataError(UserError):
    """A list file or an image cannot be used; the message is one line that names the file and the line."""


class ShardError(DataError):
    """A shard is missing, cut or changed. Unlike an image that cannot be decoded, nothing may replace it."""


class ImageInside(str):
    """The path of an image inside another file, such as a shard; subclasses read it."""

    def read(self):
        """The contents of the image file, bytes.

        Raises:
            ShardError: they cannot be read, or are not those that were written.
        """
        raise NotImplementedError


_UPRIGHT = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
            6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}  # {EXIF orientation: how to turn the image}


def decode_image(path, exif=False):
    """Reads an image file as RGB, see `to_rgb`.

    Raises:
        DataError: the file does not exist or cannot be decoded; ShardError, if it is in a shard that cannot be read.
    """
    with errors_name(path):
        return decode_bytes(read_file(path), exif)


@contextlib.contextmanager
def errors_name(path):
    """Within this block, every error becomes a DataError of one line that names the image file."""
    try:
        yield
    except ShardError:
        raise
    except UnidentifiedImageError:  # whose text is the representation of a file object
        raise DataError(f'{path}: cannot read the image: it is damaged, or of a kind that Pillow cannot read') from None
    except FileNotFoundError:
        raise DataError(f'{path}: no such image') from None
    except Image.DecompressionBombError as error:
        raise DataError(f'{path}: is too large: {error}; if you trust the file, set {MAX_PIXELS} to a larger number of '
                        'pixels') from None
    except Exception as error:  # Pillow raises many types for corrupt files
        raise DataError(f'{path}: cannot read the image: {one_line(error)}') from error


def read_file(path):
    """The bytes of an image file. (From an open file, Pillow asks for as many as a damaged header promises.)

    Raises:
        DataError: the file is empty, or Pillow needs another package for it.
        OSError: the file cannot be read.
    """
    if os.path.splitext(path)[1].lower() in HEIF and not enable_heif():
        raise DataError('needs the package pillow-heif: pip install pillow-heif')
    if isinstance(path, ImageInside):
        data = path.read()
    else:
        with open(path, 'rb') as file:
            data = file.read()
    if not data:
        raise DataError('the file is empty')
    return data


def decode_bytes(data, exif=False):
    """Decodes the bytes of an image file as RGB; use it within `errors_name`.

    JPEG files are decoded by simplejpeg, which is faster, if it is installed and gives the same pixels as Pillow.
    """
    image = Image.open(io.BytesIO(data))
    decode = is_plain_jpeg(image) and simplejpeg_decoder()
    if decode:
        with contextlib.suppress(ValueError):  # a damaged file, for which Pillow decides
            pixels = Image.fromarray(decode(data, 'RGB'))
            if pixels.size == image.size:
                return pixels.transpose(_UPRIGHT[orientation(image)]) if exif and orientation(image) != 1 else pixels
    return to_rgb(image, exif)


def is_plain_jpeg(image):
    """Whether an image that Pillow has opened is a JPEG file in grey or YCbCr, and not one of several images."""
    return image.format == 'JPEG' and image.mode in ('L', 'RGB')


@functools.lru_cache(maxsize=None)
def simplejpeg_decoder():
    """simplejpeg's function decode_jpeg; None if it is not installed, or if it decodes images otherwise than Pillow.

    Both have their own copy of libjpeg-turbo, whose builds may differ.
    """
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (35, 43, 3), dtype=np.uint8))
    for subsampling in range(3):
        file = io.BytesIO()
        noise.save(file, 'JPEG', quality=80, subsampling=subsampling)
        if not np.array_equal(np.asarray(Image.open(file)), decode_jpeg(file.getvalue(), 'RGB')):
            return None
    return decode_jpeg


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
