"""Image transforms as two presets: `eval_transform` and `train_transform`.

Inputs are Pillow images in mode RGB (for the backend 'cv2', files as `ImageSource`), results are float32 arrays
[3, H, W] normalised with `mean` and `std` (of values in 0..1). Every random draw comes from the
`numpy.random.Generator` passed in, so a result depends on the seed only, not on the process that computes it. The
method `levels` of a transform returns the same before normalisation, in a quarter of the memory: see `Levels`.

The evaluation protocols are those of the RepLKNet code (arXiv 2203.06717). The training recipe is timm's, which that
code uses: RandomResizedCrop, flips, RandAugment or another policy of auto_augment.py, or else colour jitter,
normalisation, random erasing (arXiv 1708.04896).
"""
import math
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional, Sequence

import numpy as np
from PIL import Image, ImageEnhance

from auto_augment import build_auto_augment
from opencv import operations
from opencv.package import import_cv2
from opencv.source import ImageSource

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INTERPOLATIONS = {'nearest': Image.NEAREST, 'bilinear': Image.BILINEAR, 'bicubic': Image.BICUBIC,
                  'lanczos': Image.LANCZOS}
EVAL_PROTOCOLS = ('crop', 'warp')
BACKENDS = ('pil', 'cv2')
ERASING_MODES = ('const', 'rand', 'pixel')


class Levels(NamedTuple):
    """A transformed image before it is normalised, and what random erasing puts in its place afterwards.

    Attributes:
        pixels: uint8 [3, H, W], or [views, 3, H, W].
        positions, values: flat indices into `pixels`, int64 [n], each at most once, and normalised values, float32 [n].
    """
    pixels: np.ndarray
    positions: np.ndarray = np.zeros(0, np.int64)
    values: np.ndarray = np.zeros(0, np.float32)

    def normalized(self, mean, std):
        """The image as the transform returns it, float32 of the shape of `pixels`."""
        pixels = normalize_planes(self.pixels, mean, std)
        pixels.reshape(-1)[self.positions] = self.values
        return pixels


def eval_transform(image_size, *, crop_pct=0.875, protocol='crop', interpolation='bicubic',
                   mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """The deterministic transform for evaluation and prediction.

    Args:
        image_size: int, side of the result in pixels.
        crop_pct: float in (0, 1]; with 'crop', the shorter side is resized to int(image_size / crop_pct).
        protocol: 'crop' (resize the shorter side, centre crop) or 'warp' (resize the whole image to a square, the
            protocol of the published checkpoints at 384).
        interpolation: 'nearest', 'bilinear', 'bicubic' or 'lanczos', antialiased.
        mean, std: three floats each.

    Returns:
        callable(image) -> float32 array [3, image_size, image_size].

    Raises:
        ValueError: an argument is out of range.
    """
    _check_common(image_size, interpolation, mean, std)
    if protocol not in EVAL_PROTOCOLS:
        raise ValueError(f'unknown evaluation protocol {protocol!r}: use one of {", ".join(EVAL_PROTOCOLS)}')
    if not 0 < crop_pct <= 1:
        raise ValueError(f'crop_pct must be in (0, 1], got {crop_pct}')
    return _EvalTransform(image_size, crop_pct, protocol, interpolation, mean, std)


@dataclass(frozen=True)
class _EvalTransform:
    """The result of `eval_transform`, which describes the attributes."""
    image_size: int
    crop_pct: float
    protocol: str
    interpolation: str
    mean: Sequence[float]
    std: Sequence[float]

    def levels(self, image):
        """The image as `Levels`."""
        return Levels(_planes(eval_geometry(image, self.image_size, crop_pct=self.crop_pct, protocol=self.protocol,
                                            interpolation=self.interpolation)))

    def __call__(self, image):
        return self.levels(image).normalized(self.mean, self.std)


def eval_geometry(image, image_size, *, crop_pct=0.875, protocol='crop', interpolation='bicubic'):
    """The part of `eval_transform` before normalisation: RGB image of any size -> square RGB image."""
    resample = INTERPOLATIONS[interpolation]
    if protocol == 'warp':
        return _resize_to_square(image, image_size, resample)
    shorter = int(image_size / crop_pct)
    width, height = image.size
    if width <= height:
        resized = shorter, int(shorter * height / width)
    else:
        resized = int(shorter * width / height), shorter
    if _out_of_proportion(resized, image, image_size):
        return _resize_centre(image, resized, image_size, resample)
    return _exact_centre(image, resized, image_size, resample)


def _exact_centre(image, resized, side, resample):
    """The centre, side x side, of `image.resize(resized)`, bit for bit, with less work.

    Pillow resizes the rows first, then the columns, and rounds in between (of tall images, the columns first). Here
    rows and columns that do not reach the centre are left out, except where leaving them out would change the weights
    of the others by rounding.
    """
    if image.height > 1.75 * image.width:
        return _centre_crop(image.resize(resized, resample), side, side)
    left, top = (round((length - side) / 2) for length in resized)
    across = _exact_span(image.width, resized[0], left, side)
    down = _exact_span(image.height, resized[1], top, side)
    columns, scale = side if across else resized[0], image.height / resized[1]
    # Pillow itself leaves out rows, with a box. It must not resize the columns first; and of small images, copying the
    # rows is faster than resizing columns that are not visible.
    if down and (across or scale > 2) and image.height - side <= 2 * (image.width - columns):
        across = across or (0, image.width)
        rows = image.resize((columns, side), resample, (across[0], down[0], across[1], down[1]))
        return rows if columns == side else rows.crop((left, 0, left + side, side))
    margin = 4 * max(1, scale)  # more than the widest filter reaches, lanczos with 3
    first = max(0, math.floor(top * scale - margin))
    last = min(image.height, math.ceil((top + side) * scale + margin))
    rows = image.crop((0, first, image.width, last))
    if across:
        rows = rows.resize((side, rows.height), resample, (across[0], 0, across[1], rows.height))
    else:
        rows = rows.resize((resized[0], rows.height), resample).crop((left, 0, left + side, rows.height))
    if down:
        return rows.resize((side, side), resample, (0, down[0] - first, side, down[1] - first))
    visible = Image.new(image.mode, (side, image.height))
    visible.paste(rows, (0, first))
    return visible.resize((side, resized[1]), resample).crop((0, top, side, top + side))


def _exact_span(length, resized, offset, side):
    """(start, stop), in pixels of the image, of a part of a resized axis; None where rounding would change its weights.

    Pillow takes them in single precision: the scale must have few binary digits, as that of all resizing to 256 pixels.
    """
    scale = length / resized
    if length >= 1 << 15 or not (scale * 256).is_integer():
        return None
    return offset * scale, (offset + side) * scale


def _out_of_proportion(intermediate, image, side):
    """Whether an intermediate image (width, height) is far larger than both an image and a result of side x side.

    True only above 16 million pixels, 64 MB, so only for thin images; others are computed as in the official code.
    """
    return math.prod(intermediate) > 4 * max(image.width * image.height, side * side, 1 << 22)


def _resize_centre(image, resized, side, resample):
    """The centre, side x side, of an image resized to `resized`, without computing the rest.

    Differs from the crop of the resized image by rounding, at most two levels of 255.
    """
    first, last, corner = [], [], []
    for length, target in zip(image.size, resized):
        offset, scale = round((target - side) / 2), length / target
        start, stop = offset * scale, (offset + side) * scale
        margin = 4 * max(1, scale)  # more than the widest filter reaches, lanczos with 3
        first.append(max(0, math.floor(start - margin)))
        last.append(min(length, math.ceil(stop + margin)))
        corner.append((start - first[-1], stop - first[-1]))  # small numbers: Pillow takes the box in single precision
    box = (corner[0][0], corner[1][0], corner[0][1], corner[1][1])
    return image.crop((*first, *last)).resize((side, side), resample, box)


def _resize_to_square(image, side, resample):
    # Pillow resizes the rows first, to side x height pixels; its weights take 32 bytes per pixel of the longer side
    if _out_of_proportion((side, max(image.width, image.height)), image, side):
        tall = image.height > image.width
        image = image.resize((image.width, side) if tall else (side, image.height), resample, reducing_gap=3)
    return image.resize((side, side), resample)


def _centre_crop(image, width, height):
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def normalize(image, mean, std):
    """RGB image -> float32 array [3, H, W], (value / 255 - mean) / std."""
    return normalize_planes(_planes(image), mean, std)


def _planes(image):
    """RGB image or array [H, W, 3] -> uint8 array [3, H, W]."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def normalize_planes(planes, mean, std, out=None):
    """Array [..., 3, H, W] of values in 0..255 -> float32, (value / 255 - mean) / std; `out`: where to write it."""
    pixels = np.empty(planes.shape, np.float32) if out is None else out
    np.copyto(pixels, planes)
    pixels /= 255
    pixels -= np.asarray(mean, np.float32).reshape(3, 1, 1)
    pixels /= np.asarray(std, np.float32).reshape(3, 1, 1)
    return pixels


def train_transform(image_size, *, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5, vflip=0.0, color_jitter=0.4,
                    auto_augment='rand-m9-mstd0.5-inc1', interpolation='bicubic', re_prob=0.25, re_mode='pixel',
                    re_count=1, views=1, mean=IMAGENET_MEAN, std=IMAGENET_STD, backend='pil'):
    """The random transform for training.

    Args:
        image_size: int, side of the result in pixels.
        scale, ratio: (low, high) of RandomResizedCrop: share of the image's area, and width / height.
        hflip, vflip: probability of a horizontal and of a vertical flip.
        color_jitter: strength of brightness, contrast and saturation jitter; used only without `auto_augment`.
        auto_augment: policy such as 'rand-m9-mstd0.5-inc1', see auto_augment.py; '' for none.
        interpolation: filter of the crop and of the policy's geometric operations.
        re_prob, re_mode, re_count: probability, mode and count of `random_erasing`.
        views: above 1, the result is this many views of the same crop, the first one only cropped and flipped (AugMix,
            arXiv 1912.02781).
        mean, std: three floats each; the policy fills uncovered pixels with the mean.
        backend: 'pil', or 'cv2' for the same random draws and operations with OpenCV, which is faster.

    Returns:
        callable(image, rng: np.random.Generator) -> float32 array [3, image_size, image_size], or with several views
        [views, 3, image_size, image_size].

    Raises:
        ValueError: an argument is out of range.
        UserError: `auto_augment` is malformed, or OpenCV is not installed.
    """
    _check_common(image_size, interpolation, mean, std)
    _check_range('scale', scale, 0, 1)
    _check_range('ratio', ratio, 0, math.inf)
    for name, value in (('hflip', hflip), ('vflip', vflip), ('re_prob', re_prob)):
        if not 0 <= value <= 1:
            raise ValueError(f'{name} is a probability, got {value}')
    if color_jitter < 0:
        raise ValueError(f'color_jitter must not be negative, got {color_jitter}')
    if re_mode not in ERASING_MODES:
        raise ValueError(f'unknown random erasing mode {re_mode!r}: use one of {", ".join(ERASING_MODES)}')
    if re_count < 1:
        raise ValueError(f're_count must be at least 1, got {re_count}')
    if views < 1:
        raise ValueError(f'views must be at least 1, got {views}')
    if backend not in BACKENDS:
        raise ValueError(f'unknown backend {backend!r}: use one of {", ".join(BACKENDS)}')
    if backend == 'cv2':
        import_cv2()
    fill = tuple(min(255, round(255 * m)) for m in mean)
    augment = None
    if auto_augment:
        augment = build_auto_augment(auto_augment, fill=fill, resample=INTERPOLATIONS[interpolation])
    kind = _TrainTransform if backend == 'pil' else _OpenCVTransform
    return kind(image_size=image_size, scale=scale, ratio=ratio, hflip=hflip, vflip=vflip,
                color_jitter=color_jitter, augment=augment, interpolation=interpolation, re_prob=re_prob,
                re_mode=re_mode, re_count=re_count, views=views, mean=mean, std=std)


@dataclass(frozen=True)
class _TrainTransform:
    """The result of `train_transform`, which describes the attributes; `augment` is the policy, or None."""
    image_size: int
    scale: Sequence[float]
    ratio: Sequence[float]
    hflip: float
    vflip: float
    color_jitter: float
    augment: Optional[Callable]
    interpolation: str
    re_prob: float
    re_mode: str
    re_count: int
    views: int
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image, rng):
        return self.levels(image, rng).normalized(self.mean, self.std)

    def levels(self, image, rng):
        """The image as `Levels`."""
        image = self._cropped(image, draw_crop(image.width, image.height, rng, scale=self.scale, ratio=self.ratio))
        if rng.random() < self.hflip:
            image = self._flipped(image, Image.FLIP_LEFT_RIGHT)
        if rng.random() < self.vflip:
            image = self._flipped(image, Image.FLIP_TOP_BOTTOM)
        if self.views == 1:
            return self._augmented(image, rng)
        clean = _planes(image)
        views = [Levels(clean)] + [self._augmented(image, rng) for _ in range(self.views - 1)]
        return Levels(np.stack([view.pixels for view in views]),
                      np.concatenate([view.positions + index * clean.size for index, view in enumerate(views)]),
                      np.concatenate([view.values for view in views]))

    def _augmented(self, image, rng):
        if self.augment is not None:
            image = self.augment(image, rng)
        elif self.color_jitter:
            image = jitter_color(image, rng, self.color_jitter)
        pixels = _planes(image)
        if not rng.random() < self.re_prob:
            return Levels(pixels)
        values = np.full(pixels.shape, np.nan, np.float32)
        random_erasing(values, rng, mode=self.re_mode, count=self.re_count)
        positions = np.flatnonzero(~np.isnan(values))
        return Levels(pixels, positions, values.reshape(-1)[positions])

    def _cropped(self, image, box):
        left, top, width, height = box
        image = image.crop((left, top, left + width, top + height))
        return _resize_to_square(image, self.image_size, INTERPOLATIONS[self.interpolation])

    def _flipped(self, image, direction):
        return image.transpose(direction)


class _OpenCVTransform(_TrainTransform):
    """The same with OpenCV: callable(ImageSource, rng). The image is an array, uint8 [H, W, 3]."""

    open = ImageSource  # instead of decode_image

    def _cropped(self, image, box):
        return operations.resize(image.crop(box, self.image_size), self.image_size, INTERPOLATIONS[self.interpolation])

    def _flipped(self, image, direction):
        return import_cv2().flip(image, int(direction == Image.FLIP_LEFT_RIGHT))


def random_resized_crop(image, image_size, rng, *, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation='bicubic'):
    """Crops a random box, see `draw_crop`, and resizes it to a square."""
    left, top, width, height = draw_crop(image.width, image.height, rng, scale=scale, ratio=ratio)
    image = image.crop((left, top, left + width, top + height))
    return _resize_to_square(image, image_size, INTERPOLATIONS[interpolation])


def draw_crop(image_width, image_height, rng, *, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random box (left, top, width, height) within an image.

    It has a share in `scale` of the image's area and width / height in `ratio` (log-uniform). After ten boxes that do
    not fit, the largest centred box within `ratio` is used, as in torchvision.
    """
    for _ in range(10):
        area = image_width * image_height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            left = int(rng.integers(image_width - width + 1))
            return left, int(rng.integers(image_height - height + 1)), width, height
    width = min(image_width, max(1, round(image_height * ratio[1])))
    height = min(image_height, max(1, round(image_width / ratio[0])))
    return round((image_width - width) / 2), round((image_height - height) / 2), width, height


def jitter_color(image, rng, strength):
    """Brightness, contrast and saturation in random order, each by a factor in [max(0, 1 - strength), 1 + strength]."""
    array = not isinstance(image, Image.Image)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for index in rng.permutation(len(enhancers)):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        image = (operations.operation(enhancers[index].__name__)(image, factor) if array else
                 enhancers[index](image).enhance(factor))
    return image


def random_erasing(pixels, rng, *, mode='pixel', count=1, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3)):
    """Overwrites `count` random boxes of the normalised array [3, H, W], in place.

    Args:
        mode: 'const' (zeros, the mean), 'rand' (one normal draw per channel) or 'pixel' (one draw per value).
        area: (low, high) of all boxes' share of the image; each box gets 1 / `count` of it.
        aspect: (low, high) of height / width, log-uniform.
    """
    channels, height, width = pixels.shape
    for _ in range(count):
        for _ in range(10):
            target = height * width * rng.uniform(*area) / count
            box_aspect = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
            h, w = round(math.sqrt(target * box_aspect)), round(math.sqrt(target / box_aspect))
            if h < height and w < width:
                top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                shape = {'const': None, 'rand': (channels, 1, 1), 'pixel': (channels, h, w)}[mode]
                value = 0.0 if shape is None else rng.standard_normal(shape, dtype=np.float32)
                pixels[:, top:top + h, left:left + w] = value
                break


def _check_common(image_size, interpolation, mean, std):
    if not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f'image_size must be a whole number of pixels above 0, got {image_size!r}')
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f'unknown interpolation {interpolation!r}: use one of {", ".join(INTERPOLATIONS)}')
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f'mean and std must be three numbers each, std above 0, got {mean} and {std}')


def _check_range(name, pair, low, high):
    if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
        raise ValueError(f'{name} must be (low, high) with {low} < low <= high <= {high}, got {pair}')
