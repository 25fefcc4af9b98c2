"""Class activation maps: which parts of an image speak for a class.

The last stage's maps are exact ("Learning Deep Features for Discriminative Localization", arXiv 1512.04150): average
pooling and the head are linear, so the logit of a class is the mean over the positions of the map that the head's
weights make of the normalised features. Those of inner stages are Grad-CAM (arXiv 1610.02391), which needs gradients.
"""
import os

import numpy as np
import paddle
from PIL import Image, ImageDraw, ImageFont

from atomic_file import atomic_file, refuse_taken
from datasets import eval_protocol
from deploy.contact_sheets import LINE, MARGIN, RIGHT, UNKNOWN, WRONG, shortened
from deploy.equivalence import layer_groups
from deploy.layout import is_export
from deploy.predictor import class_scores, load_model
from errors import UserError
from fuse import fuse, pack
from image_files.decode import decode_image
from image_files.fonts import font_for
from large_kernel import operator_in_use
from transforms import eval_geometry, normalize

SIDE = 320  # pixels: the least longer side of an image in the output
OPACITY = 0.55  # of the colours over the image
FIRST_STRIDE = 4  # of the maps of stage 0; it doubles with each stage
# The colours of matplotlib's 'inferno' at equal distances from 0 to 1.
COLOURS = np.array([(0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21),
                    (250, 193, 39), (252, 255, 164)])


def class_maps(model, images, classes):
    """The maps whose means are the logits.

    Args:
        model: a RepLKNet classifier in eval mode, in any form.
        images: tensor [N, 3, H, W].
        classes: numbers of K classes.
    Returns:
        tensor [N, K, h, w], h and w at the stride 32; the mean over h and w is the logit, bias included.
    """
    with paddle.no_grad():
        features = model.norm(model.forward_features(images)[-1])
        chosen = paddle.to_tensor(classes, dtype='int64')
        weight = paddle.index_select(model.head.weight, chosen, axis=1)  # [C, K]
        bias = paddle.index_select(model.head.bias, chosen)
        maps = paddle.matmul(weight, features.flatten(2), transpose_x=True) + bias.reshape([1, -1, 1])
        return maps.reshape([*maps.shape[:2], *features.shape[2:]])


def grad_cam(model, images, classes, stage):
    """The Grad-CAM of a stage: its maps weighted by the mean gradient of the logit, where their sum is positive.

    Args:
        model, images, classes: as for `class_maps`.
        stage: number of the stage, from 0.
    Returns:
        tensor [N, K, h, w].
    """
    with paddle.no_grad():
        groups = list(layer_groups(model).items())
        own = [name for name, _ in groups].index(f'stage {stage}') + 1
        features = images
        for _, group in groups[:own]:
            features = group(features)
    maps = []
    with paddle.enable_grad():
        features = features.detach()
        features.stop_gradient = False
        logits = features
        for _, group in groups[own:]:
            logits = group(logits)
        for number in classes:
            gradient, = paddle.grad(logits[:, number].sum(), features, retain_graph=True)
            weights = gradient.mean([2, 3], keepdim=True)
            maps.append(paddle.nn.functional.relu((weights * features).sum(1)).detach())
    return paddle.stack(maps, axis=1)


def class_overlays(network, config, image, classes, stage=None):
    """The maps of classes over an image.

    Args:
        network: as for `class_maps`.
        config: its settings.
        image: RGB image.
        classes: numbers of K classes.
        stage: number of the stage for Grad-CAM, from 0; None for the exact maps of the last one.
    Returns:
        (the image as it is shown, list of K images like it under a map): cropped as the network sees it with the
        protocol 'crop', whole with 'warp'.
    """
    data, protocol = config.DATA, eval_protocol(config)
    seen = eval_geometry(image, data.IMAGE_SIZE, crop_pct=data.CROP_PCT, protocol=protocol,
                         interpolation=data.INTERPOLATION)
    pixels = paddle.to_tensor(normalize(seen, data.IMAGENET_MEAN, data.IMAGENET_STD)[None])
    maps = (class_maps(network, pixels, classes) if stage is None else
            grad_cam(network, pixels, classes, stage))[0].numpy()
    shown = _resized(image if protocol == 'warp' else seen, max(SIDE, data.IMAGE_SIZE))
    stride = FIRST_STRIDE * 2 ** (len(network.stages) - 1 if stage is None else stage)
    return shown, [overlay(shown, heat, data.IMAGE_SIZE, stride) for heat in maps]


class ActivationMaps:
    """Writes a PNG file for each image: the image, with the map of the predicted class and of another label over it.

    The image is shown as the network sees it, cropped with the protocol 'crop' and whole with 'warp'. Each map has its
    own scale, from its least to its greatest value.

    Args:
        folder: a folder that is empty or does not exist.
        model, cfg: as for `Predictor`; not an export.
        stage: number of the stage, from 0; None for the exact maps of the last one.
    Raises:
        UserError, FileNotFoundError: an argument cannot be used.
    """

    def __init__(self, folder, model, cfg=None, stage=None):
        if is_export(model):
            raise UserError(f'-cam={folder}: {model} is an exported program, which does not give its feature maps; '
                            'name its weights instead')
        refuse_taken(folder, 'cam')
        network, self._config = load_model(model, cfg)
        stages = len(network.stages)
        if stage is not None and not 0 <= stage < stages:
            raise UserError(f'-cam_stage={stage}: the model has the stages 0 to {stages - 1}')
        self._stage = stage
        network = fuse(network)
        self._network = pack(network) if operator_in_use() and stage is None else network
        self._folder, self._taken, self._font = folder, set(), None
        os.makedirs(folder, exist_ok=True)

    def add(self, prediction, label=None, names=()):
        """Writes the maps of an image; nothing, if it could not be read.

        Args:
            prediction: a `Prediction`, of the path of an image.
            label: number of its class, or None; a tuple for a model with several labels per image.
            names: names of all classes.
        """
        if prediction.error:
            return
        if self._font is None:
            self._font = font_for(names) or ImageFont.load_default()
        guess, data = int(np.argmax(prediction.logits)), self._config.DATA
        labels = label if isinstance(label, tuple) else (label,)
        others = [other for other in labels if other not in (None, guess)]
        classes = [guess, *others[:1]]
        image = decode_image(prediction.picture, data.EXIF)
        shown, overlays = class_overlays(self._network, self._config, image, classes, self._stage)
        frame = UNKNOWN if label is None else RIGHT if guess in labels else WRONG
        scores = class_scores(prediction.logits, data.MULTI_LABEL)
        panels = [(shown, os.path.basename(prediction.picture), UNKNOWN)]
        for number, image, colour in zip(classes, overlays, (frame, UNKNOWN)):
            title = f'{"predicted" if number == guess else "label"}: {names[number]}, {scores[number]:.1%}'
            panels.append((image, title, colour))
        with atomic_file(os.path.join(self._folder, self._free_name(prediction.picture))) as file:
            self._side_by_side(panels).save(file, format='PNG')

    def _free_name(self, path):
        """A name after that of the image; images of the same name in several folders are numbered."""
        stem = os.path.splitext(os.path.basename(path))[0]
        name, number = stem, 1
        while name in self._taken:
            number += 1
            name = f'{stem}_{number}'
        self._taken.add(name)
        return f'{name}.png'

    def _side_by_side(self, panels):
        width, height = panels[0][0].size
        sheet = Image.new('RGB', (len(panels) * (width + MARGIN) + MARGIN, height + 2 * MARGIN + LINE), 'white')
        draw = ImageDraw.Draw(sheet)
        for index, (image, text, colour) in enumerate(panels):
            left = MARGIN + index * (width + MARGIN)
            sheet.paste(image, (left, MARGIN))
            draw.text((left, MARGIN + height + 4), shortened(text, self._font, width),
                      fill='black' if colour == UNKNOWN else colour, font=self._font)
        return sheet


def _resized(image, side):
    """The image with `side` pixels in its longer side, and at least one in the other."""
    scale = side / max(image.size)
    return image.resize([max(1, round(scale * length)) for length in image.size], Image.BICUBIC)


def overlay(image, heat, size, stride):
    """An image with the colours of a map over it.

    Args:
        image: RGB image of what the network sees, in any resolution.
        heat: map [h, w].
        size: height and width of the network's input, in pixels.
        stride: pixels of the input between two positions of the map.
    Returns:
        RGB image of the same size.
    """
    heat = at_pixels(at_pixels(heat, image.height, size, stride).T, image.width, size, stride).T
    span = heat.max() - heat.min()
    heat = (heat - heat.min()) / (span if span > 0 else 1)
    position = heat * (len(COLOURS) - 1)
    below = np.minimum(position.astype(int), len(COLOURS) - 2)
    share = (position - below)[..., None]
    colours = COLOURS[below] * (1 - share) + COLOURS[below + 1] * share
    mixed = (1 - OPACITY) * np.asarray(image) + OPACITY * colours
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def at_pixels(values, count, size, stride):
    """Interpolates [n, ...], n positions along an axis of the input, at `count` pixels that cover the axis.

    Position k of a map is centred on pixel k * stride of the input, not in the middle of `stride` pixels: a 3x3
    convolution of stride 2 and padding 1 centres its output k on its input 2k. Pixels beyond the last position take its
    value.
    """
    pixels = (np.arange(count) + 0.5) * size / count - 0.5
    position = np.clip(pixels / stride, 0, len(values) - 1)
    below = np.minimum(position.astype(int), max(0, len(values) - 2))
    above = np.minimum(below + 1, len(values) - 1)
    share = (position - below).reshape([-1] + [1] * (values.ndim - 1))
    return values[below] * (1 - share) + values[above] * share
