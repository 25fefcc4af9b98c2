"""Decodes an image file of which only a crop is needed."""
import contextlib
import io

import numpy as np
from PIL import Image

from image_files.decode import (
    decode_bytes,
    errors_name,
    is_plain_jpeg,
    orientation,
    read_file,
    simplejpeg_decoder,
    to_rgb,
)


class ImageSource:
    """An image file, decoded at the size that a crop of it needs.

    Args:
        path: the file.
        exif: whether to rotate it according to its EXIF orientation.

    Attributes:
        width, height: size of the whole image.

    Raises:
        DataError: the file does not exist or cannot be decoded.
    """

    def __init__(self, path, exif=False):
        self._path, self._pixels = path, None
        with errors_name(path):
            self._data = read_file(path)
            self._image = Image.open(io.BytesIO(self._data))
            if is_plain_jpeg(self._image) and not (exif and orientation(self._image) != 1):
                self.width, self.height = self._image.size
            else:
                self._pixels = np.asarray(decode_bytes(self._data, exif))
                self.height, self.width, _ = self._pixels.shape

    def crop(self, box, side):
        """The pixels of a box (left, top, width, height), uint8 [h, w, 3].

        A JPEG file is decoded at 1/2, 1/4 or 1/8 of its size where that leaves the crop at least `side` pixels wide
        and high.

        Raises:
            DataError: the file cannot be decoded.
        """
        left, top, width, height = box
        if self._pixels is None:
            factor = max((factor for factor in (2, 4, 8) if min(width, height) >= factor * side), default=1)
            with errors_name(self._path):
                self._pixels = self._decoded(factor)
        across, down = self._pixels.shape[1] / self.width, self._pixels.shape[0] / self.height
        return self._pixels[round(top * down):max(round((top + height) * down), round(top * down) + 1),
                            round(left * across):max(round((left + width) * across), round(left * across) + 1)]

    def _decoded(self, factor):
        decode = simplejpeg_decoder()
        width, height = -(-self.width // factor), -(-self.height // factor)
        if decode:
            with contextlib.suppress(ValueError):  # a damaged file, which is left to Pillow
                pixels = decode(self._data, 'RGB', min_height=height, min_width=width, min_factor=factor)
                if pixels.shape == (height, width, 3):
                    return pixels
        self._image.draft(None, (self.width // factor, self.height // factor))
        return np.asarray(to_rgb(self._image))
