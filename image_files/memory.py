"""Pictures that a caller passes: paths, Pillow images and arrays. Nothing of the caller's is changed."""
import io
import os

import numpy as np
from PIL import Image

from image_files.decode import decode_image, to_rgb

ACCEPTED = 'a picture is a path (str or os.PathLike), a Pillow image, or an RGB array, uint8 [H, W, 3]'


def listed(pictures):
    """The pictures to iterate over: a single one becomes a list of one.

    Raises:
        TypeError: neither a picture nor a sequence; the text says what is accepted.
    """
    if isinstance(pictures, (str, os.PathLike, Image.Image)):
        return [pictures]
    if isinstance(pictures, np.ndarray) and pictures.dtype.kind not in 'OU':  # an array of paths is a sequence
        if pictures.ndim != 4:
            check_type(pictures)
            return [pictures]
    elif isinstance(pictures, (bytes, bytearray, io.IOBase)) or hasattr(pictures, 'numpy') or not hasattr(
            pictures, '__iter__'):
        check_type(pictures)
    return pictures


def check_type(picture):
    """Raises TypeError, with a text that says what is accepted, unless `picture` is a picture."""
    if isinstance(picture, (str, os.PathLike, Image.Image)):
        return
    found, hint = type(picture).__name__, ''
    if isinstance(picture, np.ndarray):
        if picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
            return
        found = f'{picture.dtype} array {list(picture.shape)}'
        if picture.dtype.kind == 'f':
            hint = '; scale its values to 0..255 and convert it with .round().astype(np.uint8)'
        elif picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[0] == 3:
            hint = '; use array.transpose(1, 2, 0)'
        elif picture.dtype == np.uint8:
            hint = '; PIL.Image.fromarray(array) takes grey and RGBA arrays'
    elif isinstance(picture, (bytes, bytearray)):
        hint = '; os.fsdecode(b) gives a path, PIL.Image.open(io.BytesIO(b)) the image of an encoded file'
    elif isinstance(picture, io.IOBase):
        hint = '; use PIL.Image.open(file)'
    elif hasattr(picture, 'numpy'):
        hint = '; use tensor.numpy(), with RGB values 0..255 as uint8 [H, W, 3]'
    raise TypeError(f'{ACCEPTED}; this is: {found}{hint}')


def snapshot(picture):
    """A copy of a Pillow image or an array as it is now, to be decoded later by any thread; a path as it is.

    A Pillow image that is not loaded yet remains so: its file is copied and decoded from the copy.
    """
    if isinstance(picture, np.ndarray):
        return picture.copy()
    if not isinstance(picture, Image.Image):
        return picture
    copy = _unloaded_copy(picture) or picture.copy()
    copy.format, copy.filename = picture.format, getattr(picture, 'filename', '')  # `to_rgb` and messages need them
    return copy


def _unloaded_copy(image):
    """A copy of an image that still waits to be read from its file; None if that is not the case."""
    file = getattr(image, 'fp', None)
    if file is None or (_has_pixels(image) and not image.tile):
        return None
    try:
        position = file.tell()
        file.seek(0)
        try:
            copy = Image.open(io.BytesIO(file.read()))
        finally:
            file.seek(position)
        if image.tell():
            copy.seek(image.tell())
        return copy if (copy.mode, copy.size) == (image.mode, image.size) else None
    except Exception:  # not a whole file; Pillow may still be able to load the image
        return None


def _has_pixels(image):
    try:
        return image.im is not None
    except (AssertionError, AttributeError):  # Pillow 11 and later, before they are loaded
        return False


def described(picture):
    """A picture in words, for messages: its path, if it has one."""
    if isinstance(picture, np.ndarray):
        return f'array {list(picture.shape)}'
    if isinstance(picture, Image.Image):
        return getattr(picture, 'filename', '') or f'Pillow image of mode {picture.mode}, {picture.size}'
    return str(picture)


def read_picture(picture, exif=False):
    """Decodes a picture to an RGB image; `exif` turns it as its EXIF orientation says.

    Raises:
        DataError: a path that cannot be read.
        Exception: another picture that cannot be read; Pillow raises many types.
    """
    if isinstance(picture, (str, os.PathLike)):
        return decode_image(picture, exif)
    if 0 in (picture.shape if isinstance(picture, np.ndarray) else picture.size):
        raise ValueError('it has no pixels')
    return to_rgb(Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture, exif)
