"""The effective receptive field (ERF): how much each pixel of the input contributes to the centre of a feature map.

The map of an image is relu(d y / d input), summed over the colours, where y is the sum over the channels of the relu of
the feature map's central position. Maps are averaged over images. This is the definition of the paper (arXiv
2203.06717, section 5) and of its code.

    field = receptive_field(layer, images)          # any Paddle layer that returns a feature map
    ratios = area_ratios(log_scaled(field))         # of the log-scaled map, as published
    ratios = area_ratios(field)                     # of the map itself
"""
import contextlib
from typing import NamedTuple, Tuple

import numpy as np
import paddle
from paddle import nn

from errors import UserError
from replknet import ReparamLargeKernelConv

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)  # shares of the map's sum, as in the paper


class Area(NamedTuple):
    """The smallest centred square that holds more than a share of a map's sum.

    Attributes:
        side: in pixels, odd; the larger side of the map if no odd square inside it is large enough.
        ratio: its area divided by that of the map.

    Both are NaN for a map whose sum is 0.
    """
    side: float
    ratio: float


class FieldSum(NamedTuple):
    """A sum of maps; `add` returns a new one, so that an interruption never leaves one half changed.

    Attributes:
        total: float64 [H, W], or 0 without images.
        done: number of images, those left out included.
        left_out: for each image that was left out, the reason.
    """
    total: np.ndarray = np.zeros([])
    done: int = 0
    left_out: Tuple[str, ...] = ()

    def add(self, field, name='image'):
        """The sum with the map of one more image; the image is left out if its map is not finite."""
        if not np.isfinite(field).all():
            return self.leave_out(f'{name}: its gradients are not finite')
        return FieldSum(self.total + field, self.done + 1, self.left_out)

    def leave_out(self, reason):
        return FieldSum(self.total, self.done + 1, (*self.left_out, reason))

    def mean(self):
        """The mean map, float32 [H, W].

        Raises:
            UserError: no image has a map.
        """
        if self.done == len(self.left_out):
            raise UserError('no image has a map' + (f'; the first one: {self.left_out[0]}' if self.left_out else ''))
        return (self.total / (self.done - len(self.left_out))).astype(np.float32)


def receptive_field(layers, images):
    """The effective receptive field of any layer, over images. Batch norms use their running statistics.

    Args:
        layers: a Paddle layer or another function of tensors, [1, 3, H, W] -> feature map [1, C, h, w]; or a list of
            them to apply in turn, see `contributions`.
        images: iterable of normalised images, float32 arrays [3, H, W] of one size.
    Returns:
        float32 array [H, W], the mean over the images whose gradients are finite.
    Raises:
        ValueError: the result is not a feature map, or does not depend on the image.
        UserError: no image has a finite map.
    """
    layers, total = layers if isinstance(layers, (list, tuple)) else [layers], FieldSum()
    for image in images:
        total = total.add(contributions(layers, image))
    return total.mean()


def contributions(layers, image):
    """The map of one image.

    Only the maps between the layers are kept; each layer is recomputed for its gradient. Gradients of
    parameters are not computed.

    Args:
        layers: list of layers or functions to apply in turn.
        image: float32 array [3, H, W].
    Returns:
        float64 array [H, W]; NaN where intermediate values are not finite.
    Raises:
        ValueError: see `receptive_field`.
    """
    *earlier, last = layers
    x, inputs = paddle.to_tensor(np.asarray(image)[None], dtype='float32'), []
    with _for_input_gradients(layers):
        with paddle.no_grad():
            for layer in earlier:
                inputs.append(x)
                x = layer(x)
        with paddle.enable_grad():
            gradient = _gradient(last, x)
            for layer in reversed(earlier):
                gradient = _gradient(layer, inputs.pop(), gradient)
    return np.maximum(gradient[0].numpy(), 0).sum(0, dtype=np.float64)  # np.maximum keeps NaN


def _gradient(layer, x, gradient=None):
    """The gradient of x: from that of `layer(x)`, or if it is None from the centre of `layer(x)`."""
    x = x.detach()
    x.stop_gradient = False
    y = layer(x)
    if gradient is None:
        gradient = _gradient_of_centre(y)
    found, = paddle.grad(y, x, gradient, allow_unused=True)
    if found is None:
        raise ValueError('the feature map does not depend on the image: the layer detaches it, or computes without '
                         'gradients')
    return found


def _gradient_of_centre(y):
    """The gradient of the sum over the channels of the relu of the central position, in the shape of y."""
    if not isinstance(y, paddle.Tensor) or len(y.shape) != 4:
        found = f'tensor of shape {list(y.shape)}' if isinstance(y, paddle.Tensor) else type(y).__name__
        raise ValueError(f'the layer returns a {found}, not a feature map [N, C, H, W]: wrap it in a function that '
                         'returns one')
    if y.stop_gradient:
        raise ValueError('the feature map does not depend on the image: the layer detaches it, or computes without '
                         'gradients')
    height, width = y.shape[2:]
    values = y.detach()[:, :, height // 2, width // 2].astype('float32').numpy()
    seed = np.zeros(y.shape, np.float32)
    seed[:, :, height // 2, width // 2] = np.where(np.isfinite(values), values > 0, np.nan)
    return paddle.to_tensor(seed).astype(y.dtype)


@contextlib.contextmanager
def _for_input_gradients(layers):
    """Puts layers into eval mode and excludes their parameters from gradients; afterwards they are as before."""
    modes, wanted = [], []
    for layer in layers:
        if isinstance(layer, nn.Layer):
            modes += [(part, part.training) for part in layer.sublayers(include_self=True)]
            wanted += [parameter for parameter in layer.parameters() if not parameter.stop_gradient]
    for part, _ in modes:
        part.training = False
    for parameter in wanted:
        parameter.stop_gradient = True
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter in wanted:
            parameter.stop_gradient = False


def stage_layers(model, stage):
    """The layers of a RepLKNet up to the feature map of a stage, for `receptive_field`.

    Args:
        model: `replknet.RepLKNet`, in any form.
        stage: number of the stage, from 0.
    Returns:
        list of layers; the map is taken before the final norm and before the norms of returned feature maps.
    """
    layers = [nn.Sequential(*model.stem)]
    for index in range(stage + 1):
        layers += model.stages[index].blocks
        if index < stage:
            layers.append(nn.Sequential(*model.transitions[index]))
    return layers


def drop_small_kernels(model):
    """Removes the branches with small kernels, batch norms included, from a RepLKNet, in place.

    Raises:
        UserError: the branches are merged into the large kernels already, or there are none.
    """
    for layer in model.sublayers():
        if isinstance(layer, ReparamLargeKernelConv):
            if layer.merged:
                raise UserError('the small kernels are merged into the large ones and cannot be removed; use weights '
                                'in the training form')
            if layer.small_kernel_conv is None:
                raise UserError('the model has no small kernels')
            layer.small_kernel_conv = None


def log_scaled(field):
    """log10(field + 1), divided by its largest value: the map that the paper draws and measures.

    It is not invariant to the scale of the gradients: see docs/erf.md.
    """
    scaled = np.log10(np.asarray(field, np.float64) + 1)
    return scaled / (scaled.max() or 1)


def area_ratios(field, thresholds=THRESHOLDS):
    """The areas of the smallest centred squares of odd side that hold more than a share of a map's sum.

    Args:
        field: non-negative array [H, W]; the centre is the pixel [H // 2, W // 2].
        thresholds: the shares.
    Returns:
        {threshold: `Area`}.
    """
    field = np.asarray(field, np.float64)
    height, width = field.shape
    distance = np.maximum(abs(np.arange(height) - height // 2)[:, None], abs(np.arange(width) - width // 2))
    sums = np.bincount(distance.ravel(), field.ravel()).cumsum()
    if not sums[-1] > 0:
        return dict.fromkeys(thresholds, Area(np.nan, np.nan))
    areas = {}
    for threshold in thresholds:
        side = 2 * int(np.argmax(sums > threshold * sums[-1])) + 1
        areas[threshold] = Area(min(side, max(height, width)), min(side, height) * min(side, width) / field.size)
    return areas
