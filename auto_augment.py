"""Policies that augment an image with a random choice of simple operations, described by a string.

    rand-m9-mstd0.5-inc1   RandAugment (arXiv 1909.13719); randaug-... is the same
    original-mstd0.5       AutoAugment (arXiv 1805.09501), the paper's policy for ImageNet
    v0-mstd0.5             AutoAugment, the policy of EfficientNet's TPU code
    augmix-m3-w3           AugMix (arXiv 1912.02781)

A string is a name followed by settings in any order, each a key and a number, joined by dashes (defaults in
parentheses):

    rand            m     magnitude (10)
                    n     operations per image (2)
                    p     probability of applying each chosen operation (0.5)
                    mstd  standard deviation of a normal draw around the magnitude (0); above 100 the magnitude is
                          uniform in 0..m
                    mmax  upper bound of the drawn magnitude (10)
                    inc   1: use operations whose effect increases with the magnitude (0)
                    w     0: choose operations with weights, without replacement (uniformly, with replacement)
    original, v0    mstd  as above
    augmix          m     magnitude (3)
                    w     chains (3)
                    d     operations per chain (0: 1 to 3 at random)
                    a     parameter of the Dirichlet and Beta draws (1)

Magnitudes range from 0 to 10. A policy is callable(image, rng: np.random.Generator), RGB image -> RGB image of the same
size. Images are Pillow images, or arrays, uint8 [H, W, 3], to which opencv/operations.py applies the same operations.
"""
import re
from functools import partial
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from errors import UserError
from opencv.operations import operation


class Op(NamedTuple):
    argument: Callable  # (level in 0..1, rng) -> the argument of `apply`
    apply: Callable     # (image, argument, fill, resample) -> image


def _either_sign(value, rng):
    return -value if rng.random() < 0.5 else value


def _affine(image, matrix, fill, resample):
    return image.transform(image.size, Image.AFFINE, matrix, resample, fillcolor=fill)


def _translate_x(image, share, *style):
    return _affine(image, (1, 0, share * image.width, 0, 1, 0), *style)


def _translate_y(image, share, *style):
    return _affine(image, (1, 0, 0, 0, 1, share * image.height), *style)


def _solarize_add(image, addend, *_):
    table = [min(255, value + addend) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def _enhancement(enhancer):
    def apply(image, factor, *_):
        return enhancer(image).enhance(factor)
    return apply


def _no_argument(level, rng):
    return None


def _factor(level, rng):
    return 0.1 + 1.8 * level


def _factor_increasing(level, rng):
    return max(0.1, 1 + _either_sign(0.9 * level, rng))


def _posterize(image, bits, *_):
    # ImageOps.posterize refuses 0 bits, which the highest magnitude needs
    mask = 256 - 2 ** (8 - min(bits, 8))
    return image.point([value & mask for value in range(256)] * 3)


def _solarize(image, threshold, *_):
    return ImageOps.solarize(image, threshold)


# Arguments as in timm, from arXiv 1805.09501 and 1909.13719; the level is magnitude / 10.
OPS = {
    'AutoContrast': Op(_no_argument, lambda image, *_: ImageOps.autocontrast(image)),
    'Equalize': Op(_no_argument, lambda image, *_: ImageOps.equalize(image)),
    'Invert': Op(_no_argument, lambda image, *_: ImageOps.invert(image)),
    'Rotate': Op(lambda level, rng: _either_sign(30 * level, rng),
                 lambda image, degrees, fill, resample: image.rotate(degrees, resample, fillcolor=fill)),
    'Posterize': Op(lambda level, rng: int(4 * level), _posterize),
    'PosterizeIncreasing': Op(lambda level, rng: max(0, 4 - int(4 * level)), _posterize),
    'PosterizeOriginal': Op(lambda level, rng: 4 + int(4 * level), _posterize),
    'Solarize': Op(lambda level, rng: int(256 * level), _solarize),
    'SolarizeIncreasing': Op(lambda level, rng: 256 - int(256 * level), _solarize),
    'SolarizeAdd': Op(lambda level, rng: int(110 * level), _solarize_add),
    'Color': Op(_factor, _enhancement(ImageEnhance.Color)),
    'ColorIncreasing': Op(_factor_increasing, _enhancement(ImageEnhance.Color)),
    'Contrast': Op(_factor, _enhancement(ImageEnhance.Contrast)),
    'ContrastIncreasing': Op(_factor_increasing, _enhancement(ImageEnhance.Contrast)),
    'Brightness': Op(_factor, _enhancement(ImageEnhance.Brightness)),
    'BrightnessIncreasing': Op(_factor_increasing, _enhancement(ImageEnhance.Brightness)),
    'Sharpness': Op(_factor, _enhancement(ImageEnhance.Sharpness)),
    'SharpnessIncreasing': Op(_factor_increasing, _enhancement(ImageEnhance.Sharpness)),
    'ShearX': Op(lambda level, rng: _either_sign(0.3 * level, rng),
                 lambda image, shear, *style: _affine(image, (1, shear, 0, 0, 1, 0), *style)),
    'ShearY': Op(lambda level, rng: _either_sign(0.3 * level, rng),
                 lambda image, shear, *style: _affine(image, (1, 0, 0, shear, 1, 0), *style)),
    'TranslateXRel': Op(lambda level, rng: _either_sign(0.45 * level, rng), _translate_x),
    'TranslateYRel': Op(lambda level, rng: _either_sign(0.45 * level, rng), _translate_y),
    'TranslateXThird': Op(lambda level, rng: _either_sign(level / 3, rng), _translate_x),
    'TranslateYThird': Op(lambda level, rng: _either_sign(level / 3, rng), _translate_y),
}


def _apply(name, image, magnitude, rng, fill, resample):
    op = OPS[name]
    apply = op.apply if isinstance(image, Image.Image) else operation(name)
    return apply(image, op.argument(magnitude / 10, rng), fill, resample)


def _draw_magnitude(magnitude, noise, highest, rng):
    if noise > 100:
        magnitude = rng.uniform(0, magnitude)
    elif noise > 0:
        magnitude = rng.normal(magnitude, noise)
    return min(max(magnitude, 0.0), highest)


# The operations of RandAugment, with the probabilities of weight set 0 ('w0').
_RAND_AUGMENT_WEIGHTS = {
    'AutoContrast': 0.025, 'Equalize': 0.005, 'Invert': 0.0, 'Rotate': 0.3, 'Posterize': 0.0, 'Solarize': 0.005,
    'SolarizeAdd': 0.005, 'Color': 0.025, 'Contrast': 0.005, 'Brightness': 0.005, 'Sharpness': 0.025, 'ShearX': 0.2,
    'ShearY': 0.2, 'TranslateXRel': 0.1, 'TranslateYRel': 0.1,
}


class RandAugment:
    """RandAugment: a few out of 15 operations, all with the same magnitude.

    Args:
        magnitude, noise, max_magnitude: m, mstd and mmax of the string.
        count, prob: n and p.
        increasing: inc, 0 or 1.
        weights: 0 for w0, None for a uniform choice.
        fill: (r, g, b) of pixels uncovered by a geometric operation.
        resample: Pillow filter for geometric operations.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, *, magnitude=10, noise=0, max_magnitude=10, count=2, prob=0.5, increasing=0, weights=None, fill,
                 resample):
        drawable = sum(weight > 0 for weight in _RAND_AUGMENT_WEIGHTS.values())
        if count < 1 or count % 1:
            raise ValueError('n must be a whole number above 0')
        if increasing not in (0, 1):
            raise ValueError('inc must be 0 or 1')
        if prob > 1:
            raise ValueError('p must be at most 1')
        if weights not in (None, 0):
            raise ValueError('w must be 0')
        if weights is not None and count > drawable:
            raise ValueError(f'n must be at most {drawable} with w0')
        self.magnitude, self.noise, self.max_magnitude = magnitude, noise, max_magnitude
        self.count, self.prob, self.fill, self.resample = count, prob, fill, resample
        self.names = [f'{name}Increasing' if increasing and f'{name}Increasing' in OPS else name
                      for name in _RAND_AUGMENT_WEIGHTS]
        self.weights = None
        if weights is not None:
            self.weights = np.array(list(_RAND_AUGMENT_WEIGHTS.values()))
            self.weights /= self.weights.sum()

    def __call__(self, image, rng):
        chosen = rng.choice(len(self.names), self.count, replace=self.weights is None, p=self.weights)
        for index in chosen:
            if rng.random() < self.prob:
                magnitude = _draw_magnitude(self.magnitude, self.noise, self.max_magnitude, rng)
                image = _apply(self.names[index], image, magnitude, rng, self.fill, self.resample)
        return image


# Sub-policies of (operation, probability, magnitude).
ORIGINAL_POLICY = (
    (('PosterizeOriginal', 0.4, 8), ('Rotate', 0.6, 9)), (('Solarize', 0.6, 5), ('AutoContrast', 0.6, 5)),
    (('Equalize', 0.8, 8), ('Equalize', 0.6, 3)), (('PosterizeOriginal', 0.6, 7), ('PosterizeOriginal', 0.6, 6)),
    (('Equalize', 0.4, 7), ('Solarize', 0.2, 4)), (('Equalize', 0.4, 4), ('Rotate', 0.8, 8)),
    (('Solarize', 0.6, 3), ('Equalize', 0.6, 7)), (('PosterizeOriginal', 0.8, 5), ('Equalize', 1.0, 2)),
    (('Rotate', 0.2, 3), ('Solarize', 0.6, 8)), (('Equalize', 0.6, 8), ('PosterizeOriginal', 0.4, 6)),
    (('Rotate', 0.8, 8), ('Color', 0.4, 0)), (('Rotate', 0.4, 9), ('Equalize', 0.6, 2)),
    (('Equalize', 0.0, 7), ('Equalize', 0.8, 8)), (('Invert', 0.6, 4), ('Equalize', 1.0, 8)),
    (('Color', 0.6, 4), ('Contrast', 1.0, 8)), (('Rotate', 0.8, 8), ('Color', 1.0, 2)),
    (('Color', 0.8, 8), ('Solarize', 0.8, 7)), (('Sharpness', 0.4, 7), ('Invert', 0.6, 8)),
    (('ShearX', 0.6, 5), ('Equalize', 1.0, 9)), (('Color', 0.4, 0), ('Equalize', 0.6, 3)),
    (('Equalize', 0.4, 7), ('Solarize', 0.2, 4)), (('Solarize', 0.6, 5), ('AutoContrast', 0.6, 5)),
    (('Invert', 0.6, 4), ('Equalize', 1.0, 8)), (('Color', 0.6, 4), ('Contrast', 1.0, 8)),
    (('Equalize', 0.8, 8), ('Equalize', 0.6, 3)),
)
V0_POLICY = (
    (('Equalize', 0.8, 1), ('ShearY', 0.8, 4)), (('Color', 0.4, 9), ('Equalize', 0.6, 3)),
    (('Color', 0.4, 1), ('Rotate', 0.6, 8)), (('Solarize', 0.8, 3), ('Equalize', 0.4, 7)),
    (('Solarize', 0.4, 2), ('Solarize', 0.6, 2)), (('Color', 0.2, 0), ('Equalize', 0.8, 8)),
    (('Equalize', 0.4, 8), ('SolarizeAdd', 0.8, 3)), (('ShearX', 0.2, 9), ('Rotate', 0.6, 8)),
    (('Color', 0.6, 1), ('Equalize', 1.0, 2)), (('Invert', 0.4, 9), ('Rotate', 0.6, 0)),
    (('Equalize', 1.0, 9), ('ShearY', 0.6, 3)), (('Color', 0.4, 7), ('Equalize', 0.6, 0)),
    (('Posterize', 0.4, 6), ('AutoContrast', 0.4, 7)), (('Solarize', 0.6, 8), ('Color', 0.6, 9)),
    (('Solarize', 0.2, 4), ('Rotate', 0.8, 9)), (('Rotate', 1.0, 7), ('TranslateYRel', 0.8, 9)),
    (('ShearX', 0.0, 0), ('Solarize', 0.8, 4)), (('ShearY', 0.8, 0), ('Color', 0.6, 4)),
    (('Color', 1.0, 0), ('Rotate', 0.6, 2)), (('Equalize', 0.8, 4), ('Equalize', 0.0, 8)),
    (('Equalize', 1.0, 4), ('AutoContrast', 0.6, 2)), (('ShearY', 0.4, 7), ('SolarizeAdd', 0.6, 7)),
    (('Posterize', 0.8, 2), ('Solarize', 0.6, 10)), (('Solarize', 0.6, 8), ('Equalize', 0.6, 1)),
    (('Color', 0.8, 6), ('Rotate', 0.4, 5)),
)


class AutoAugment:
    """AutoAugment: a random sub-policy, whose operations have their own probability and magnitude, in order.

    Args:
        policy: sub-policies of (name in OPS, probability, magnitude).
        noise: mstd of the string.
        fill, resample: see `RandAugment`.
    """

    def __init__(self, policy, *, noise=0, fill, resample):
        self.policy, self.noise, self.fill, self.resample = policy, noise, fill, resample

    def __call__(self, image, rng):
        for name, prob, magnitude in self.policy[rng.integers(len(self.policy))]:
            if rng.random() < prob:
                magnitude = _draw_magnitude(magnitude, self.noise, 10, rng)
                image = _apply(name, image, magnitude, rng, self.fill, self.resample)
        return image


class AugMix:
    """AugMix: the image, mixed with a mixture of several chains of operations applied to it.

    Args:
        magnitude: m of the string; each operation draws its magnitude uniformly from 0.1 to m.
        width, depth, alpha: w, d and a.
        fill, resample: see `RandAugment`.

    Raises:
        ValueError: an argument is out of range.
    """

    # as published: without operations that resemble the corruptions of ImageNet-C
    names = ('AutoContrast', 'Equalize', 'PosterizeIncreasing', 'Rotate', 'SolarizeIncreasing', 'ShearX', 'ShearY',
             'TranslateXThird', 'TranslateYThird')

    def __init__(self, *, magnitude=3, width=3, depth=0, alpha=1, fill, resample):
        if not 0.1 <= magnitude <= 10:
            raise ValueError('m must be from 0.1 to 10')
        if width < 1 or width % 1:
            raise ValueError('w must be a whole number above 0')
        if depth % 1:
            raise ValueError('d must be a whole number')
        if alpha == 0:
            raise ValueError('a must be above 0')
        self.magnitude, self.width, self.depth, self.alpha = magnitude, width, depth, alpha
        self.fill, self.resample = fill, resample

    def __call__(self, image, rng):
        weights = rng.dirichlet([self.alpha] * self.width)
        share = rng.beta(self.alpha, self.alpha)
        mixed = (1 - share) * np.asarray(image, np.float32)
        for weight in weights:
            augmented = image
            for index in rng.integers(len(self.names), size=self.depth or rng.integers(1, 4)):
                magnitude = rng.uniform(0.1, self.magnitude)
                augmented = _apply(self.names[index], augmented, magnitude, rng, self.fill, self.resample)
            mixed += share * weight * np.asarray(augmented, np.float32)
        mixed = np.rint(mixed).clip(0, 255).astype(np.uint8)
        return Image.fromarray(mixed) if isinstance(image, Image.Image) else mixed


_RAND_SETTINGS = {'m': 'magnitude', 'n': 'count', 'p': 'prob', 'mstd': 'noise', 'mmax': 'max_magnitude',
                  'inc': 'increasing', 'w': 'weights'}
_KINDS = {  # name: (function that builds the policy, {key in the string: argument})
    'rand': (RandAugment, _RAND_SETTINGS),
    'randaug': (RandAugment, _RAND_SETTINGS),
    'original': (partial(AutoAugment, ORIGINAL_POLICY), {'mstd': 'noise'}),
    'v0': (partial(AutoAugment, V0_POLICY), {'mstd': 'noise'}),
    'augmix': (AugMix, {'m': 'magnitude', 'w': 'width', 'd': 'depth', 'a': 'alpha'}),
}


def build_auto_augment(spec, *, fill=(128, 128, 128), resample=Image.BICUBIC):
    """The policy described by a string such as 'rand-m9-mstd0.5-inc1', see the top of this file.

    Args:
        spec: the string.
        fill: (r, g, b) of pixels uncovered by a geometric operation.
        resample: Pillow filter for geometric operations.

    Raises:
        UserError: the string is malformed.
    """
    name, *parts = spec.split('-')
    if name not in _KINDS:
        raise UserError(f'auto augment string {spec!r}: must start with one of {", ".join(_KINDS)}, '
                        "as in rand-m9-mstd0.5-inc1; '' means none")
    build, arguments = _KINDS[name]
    settings = {}
    for part in parts:
        match = re.fullmatch(r'([a-z]+)(\d+(\.\d*)?)', part)
        if not match or match[1] not in arguments:
            raise UserError(f'auto augment string {spec!r}: {part!r} is not a setting; use a number after one of '
                            f'{", ".join(arguments)}')
        settings[arguments[match[1]]] = float(match[2]) if match[3] else int(match[2])
    try:
        return build(fill=fill, resample=resample, **settings)
    except ValueError as error:
        raise UserError(f'auto augment string {spec!r}: {error}') from None
