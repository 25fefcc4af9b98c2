"""Decodes images in parallel and says what is unusual about each."""
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Dict, Optional

import numpy as np
from PIL import Image

from image_files.decode import DataError, ImageInside, decode_image, orientation, read_file
from image_files.duplicates import digest, duplicate_groups, thumbnail

TINY, THIN, HUGE = 32, 10, 50e6  # shorter side in pixels; longer side / shorter side; pixels
_SAME_FORMAT = {'MPO': 'JPEG', 'JPEG2000': 'JPEG 2000', 'DIB': 'BMP'}  # phones write MPO files with the extension .jpg
_CHUNK = 4096  # images whose results wait to be read


@dataclass(frozen=True)
class Inspection:
    """What is known about an image file.

    Attributes:
        path: the file.
        findings: {kind: detail}; 'missing', 'truncated' or 'broken' if it cannot be decoded, and any of 'extension',
            'CMYK', 'palette', '16-bit', 'float', 'tiny', 'thin', 'huge' and 'EXIF'.
        error: why it cannot be decoded, in one line; None if it can.
        digest, thumbnail: see duplicates.py; None if it cannot be decoded.
    """
    path: str
    findings: Dict[str, str] = field(default_factory=dict)
    error: Optional[str] = None
    digest: Optional[bytes] = None
    thumbnail: Optional[np.ndarray] = None


def inspect_image(path):
    """Decodes an image file; returns its `Inspection`."""
    try:
        image = decode_image(path)
    except DataError as error:
        reason = str(error)
        kind = ('missing' if not isinstance(path, ImageInside) and not os.path.exists(path) else
                'truncated' if 'truncated' in reason.lower() or 'end of file' in reason.lower() else 'broken')
        return Inspection(path, {kind: reason, **_file_findings(path)}, reason)
    return Inspection(path, {**_file_findings(path), **_size_findings(*image.size)}, None, digest(image),
                      thumbnail(image))


def inspect_images(paths, workers=None):
    """Yields the `Inspection` of each path in order; threads decode ahead."""
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), _CHUNK):
            yield from pool.map(inspect_image, paths[start:start + _CHUNK])


def groups_of(inspections):
    """Groups of duplicates, see `duplicates.duplicate_groups`, of images that can all be decoded."""
    return duplicate_groups([found.digest for found in inspections],
                            np.stack([found.thumbnail for found in inspections]))


def _file_findings(path):
    """What the header of a file says, if it can be read."""
    found = {}
    try:
        with Image.open(io.BytesIO(read_file(path))) as image:
            mode, name, turned = image.mode, image.format, orientation(image)
    except Exception:  # Pillow raises many types for corrupt files; `inspect_image` reports them
        return found
    expected = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    if expected and _SAME_FORMAT.get(expected, expected) != _SAME_FORMAT.get(name, name):
        found['extension'] = f'is a {name} file'
    if mode == 'CMYK':
        found['CMYK'] = 'is in CMYK'
    elif mode in ('P', 'PA'):
        found['palette'] = 'has a palette'
    elif mode.startswith('I'):
        found['16-bit'] = f'has more than 8 bits per value (mode {mode})'
    elif mode == 'F':
        found['float'] = 'has floating-point values'
    if turned != 1:
        found['EXIF'] = f'is to be turned for display (EXIF orientation {turned}); DATA.EXIF True does so'
    return found


def _size_findings(width, height):
    found, size = {}, f'has {width} x {height} pixels'
    if min(width, height) < TINY:
        found['tiny'] = size
    if max(width, height) > THIN * min(width, height):
        found['thin'] = size
    if width * height > HUGE:
        found['huge'] = size
    return found
