"""The operations of auto_augment.py on RGB arrays, uint8 [H, W, 3].

Each takes the same argument as Pillow's operation and has its definition. Operations that map each value separately
give the same result bit for bit; blends of two images differ by at most one level. Geometric operations use OpenCV's
filters, which blend pixels at the border of the image with the fill colour.
"""
import math

import numpy as np
from PIL import Image

from opencv.package import import_cv2

_TRUNCATE = -0.499  # added before rounding, to truncate as Pillow does
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # ImageFilter.SMOOTH
_VALUES = np.arange(256)


def filter_of(resample):
    """OpenCV's filter for one of Pillow's."""
    cv2 = import_cv2()
    return {Image.NEAREST: cv2.INTER_NEAREST, Image.BILINEAR: cv2.INTER_LINEAR, Image.BICUBIC: cv2.INTER_CUBIC,
            Image.LANCZOS: cv2.INTER_LANCZOS4}[resample]


def resize(image, side, resample):
    """Resizes an image to side x side.

    Unlike Pillow's filters, OpenCV's do not widen with the scale. For much smaller sizes, this therefore takes the mean
    of 2 x 2 pixels at twice the resolution, or of the area. For slightly smaller sizes, the linear filter is closest to
    Pillow's bicubic one.
    """
    cv2 = import_cv2()
    scale = max(image.shape[:2]) / side
    if resample == Image.NEAREST or scale <= 1:
        return cv2.resize(image, (side, side), interpolation=filter_of(resample))
    if 1.35 < scale <= 2.7:
        image = cv2.resize(image, (2 * side, 2 * side), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR if scale <= 1.35 else cv2.INTER_AREA)


def look_up(image, table):
    """Maps each value: table is [256], or [3, 256] with a row for each channel."""
    table = np.asarray(table)
    return import_cv2().LUT(image, table.clip(0, 255).astype(np.uint8).T.reshape(1, 256, -1)
                            if table.ndim == 2 else table.clip(0, 255).astype(np.uint8))


def _grey(image):
    return import_cv2().cvtColor(image, import_cv2().COLOR_RGB2GRAY)


def _histograms(image):
    return [import_cv2().calcHist([image], [channel], None, [256], [0, 256]).ravel() for channel in range(3)]


def _auto_contrast(image, *_):
    tables = []
    for histogram in _histograms(image):
        low, high = np.flatnonzero(histogram)[[0, -1]]
        scale = 255.0 / max(high - low, 1)
        tables.append((_VALUES * scale - low * scale).astype(int) if high > low else _VALUES)
    return look_up(image, tables)


def _equalize(image, *_):
    tables = []
    for histogram in _histograms(image):
        counts = histogram.astype(np.int64)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        tables.append((step // 2 + np.cumsum(counts) - counts) // step if step else _VALUES)
    return look_up(image, tables)


def _posterize(image, bits, *_):
    return image & np.uint8(256 - 2 ** (8 - min(bits, 8)))


def _solarize(image, threshold, *_):
    return look_up(image, np.where(_VALUES < threshold, _VALUES, 255 - _VALUES))


def _solarize_add(image, addend, *_):
    return look_up(image, np.where(_VALUES < 128, _VALUES + addend, _VALUES))


def _blend_with_value(image, value, factor):
    return look_up(image, value + np.float32(factor) * (_VALUES - value).astype(np.float32))


def brightness(image, factor, *_):
    """As ImageEnhance.Brightness: blends with black."""
    return _blend_with_value(image, 0, factor)


def contrast(image, factor, *_):
    """As ImageEnhance.Contrast: blends with the mean of the grey image."""
    return _blend_with_value(image, int(import_cv2().mean(_grey(image))[0] + 0.5), factor)


def color(image, factor, *_):
    """As ImageEnhance.Color: blends with the grey image."""
    cv2 = import_cv2()
    return cv2.addWeighted(image, factor, cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), 1 - factor, _TRUNCATE)


def _sharpness(image, factor, *_):
    cv2 = import_cv2()
    smooth = cv2.filter2D(image, -1, _SMOOTH)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):  # Pillow's filters leave the border as it is
        smooth[edge] = image[edge]
    return cv2.addWeighted(image, factor, smooth, 1 - factor, _TRUNCATE)


def _affine(image, matrix, fill, resample):
    """As Image.transform: `matrix` maps positions in the result to positions in the image, in Pillow's coordinates."""
    cv2 = import_cv2()
    a, b, c, d, e, f = matrix
    # pixel centres are at 0.5 in Pillow and at 0 in OpenCV
    centres = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    return cv2.warpAffine(image, centres, image.shape[1::-1], flags=filter_of(resample) | cv2.WARP_INVERSE_MAP,
                          borderMode=cv2.BORDER_CONSTANT, borderValue=fill)


def _rotate(image, degrees, *style):
    x, y = image.shape[1] / 2, image.shape[0] / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), *style)


def _shear_x(image, shear, *style):
    return _affine(image, (1, shear, 0, 0, 1, 0), *style)


def _shear_y(image, shear, *style):
    return _affine(image, (1, 0, 0, shear, 1, 0), *style)


def _translate_x(image, share, *style):
    return _affine(image, (1, 0, share * image.shape[1], 0, 1, 0), *style)


def _translate_y(image, share, *style):
    return _affine(image, (1, 0, 0, 0, 1, share * image.shape[0]), *style)


_OPERATIONS = {  # keys are beginnings of the names in auto_augment.OPS; a longer one comes first
    'AutoContrast': _auto_contrast, 'Equalize': _equalize, 'Invert': lambda image, *_: 255 - image, 'Rotate': _rotate,
    'Posterize': _posterize, 'SolarizeAdd': _solarize_add, 'Solarize': _solarize, 'Color': color, 'Contrast': contrast,
    'Brightness': brightness, 'Sharpness': _sharpness, 'ShearX': _shear_x, 'ShearY': _shear_y,
    'TranslateX': _translate_x, 'TranslateY': _translate_y,
}


def operation(name):
    """The operation `name` of auto_augment.OPS: callable(image, argument, fill, resample) -> image."""
    return next(apply for prefix, apply in _OPERATIONS.items() if name.startswith(prefix))
