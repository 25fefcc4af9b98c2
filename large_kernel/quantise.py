"""int8 for 1x1 convolutions: rounding weights and activations to 8 bits after training.

    quantised = quantise(fused, batches)      # {name of a convolution: Quantised}
    pack_weights(fused, 'bf16', quantised)

Weights have one scale per output channel, symmetric around 0. Activations have one scale and one zero point per
convolution. Their range is that of the calibration images, cut where the mean squared error of rounding is smallest: a
few activations are far larger than all others, and steps wide enough for them would be too coarse for the rest.
"""
import contextlib
from typing import NamedTuple

import numpy as np
import paddle

from large_kernel.conv_norm_act import as_planes, each_convolution
from large_kernel.packed import PackedConv2D

_BINS = 2048
_CUTS = np.linspace(0.3, 1, 36)  # of the range, tried for the smallest error


class Quantised(NamedTuple):
    """A 1x1 convolution in int8: y = out_scale * (weight @ q) + bias, q = round(in_scale * x + in_shift) from 0 to 255.

    Attributes:
        weight: int8 [out_channels, in_channels].
        in_scale, in_shift: float32 [in_channels].
        out_scale, bias: float32 [out_channels].
    """
    weight: np.ndarray
    in_scale: np.ndarray
    in_shift: np.ndarray
    out_scale: np.ndarray
    bias: np.ndarray


class Histogram:
    """Counts of the values of any number of arrays, from their smallest to their largest.

    Attributes:
        low, high: the smallest and the largest value so far.
    """

    def __init__(self):
        self.low, self.high, self._counts = 0.0, 0.0, np.zeros(_BINS, np.int64)

    def add(self, values):
        low, high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        if (low, high) != (self.low, self.high):
            self._counts, _ = np.histogram(self._centres(), _BINS, (low, high), weights=self._counts)
            self.low, self.high = low, high
        self._counts = self._counts + np.histogram(values, _BINS, (low, high))[0]

    def _centres(self):
        return self.low + (np.arange(_BINS) + 0.5) * (self.high - self.low) / _BINS

    def best_range(self):
        """(low, high), which include 0, such that the mean squared error of rounding to 256 steps is smallest."""
        centres = self._centres()

        def error(limits):
            step = (limits[1] - limits[0]) / 255 or 1.0
            rounded = np.round((np.clip(centres, *limits) - limits[0]) / step) * step + limits[0]
            return float((self._counts * (rounded - centres) ** 2).sum())

        # one side after the other, as most maps are one-sided
        high = min(_CUTS, key=lambda cut: error((self.low, cut * self.high))) * self.high
        return min(((cut * self.low, high) for cut in _CUTS), key=error)


def ranges(model, batches, names):
    """Ranges of the inputs of convolutions in a model in eval mode.

    Args:
        model: a fused model on the CPU that calls its convolutions through `conv_block`.
        batches: arrays of images, float32 [N, 3, H, W].
        names: {convolution: name}.
    Returns:
        {name: (low, high)}
    """
    found = {name: Histogram() for name in names.values()}

    def hook(conv, inputs):
        found[names[conv]].add(as_planes(inputs[0]).astype('float32').numpy())

    hooks = [conv.register_forward_pre_hook(hook) for conv in names]
    try:
        with paddle.no_grad(), each_convolution(lambda conv, fused: contextlib.nullcontext()):
            for images in batches:
                model(paddle.to_tensor(images))
    finally:
        for handle in hooks:
            handle.remove()
    return {name: histogram.best_range() for name, histogram in found.items()}


def quantisable(model):
    """{convolution: name} of the 1x1 convolutions that int8 can compute, in the order of the model."""
    return {conv: name for name, conv in model.named_sublayers()
            if PackedConv2D.can_pack(conv) and conv._kernel_size[0] == conv._stride[0] == 1}


def quantise_convolution(conv, limits):
    """The int8 form of a 1x1 convolution.

    Args:
        conv: `nn.Conv2D` with or without a bias.
        limits: (low, high) of its input.
    Returns:
        Quantised
    """
    weight = conv.weight.astype('float32').numpy().astype(np.float64).reshape(conv._out_channels, -1)
    bias = np.zeros(len(weight)) if conv.bias is None else conv.bias.astype('float32').numpy().astype(np.float64)
    low, high = limits
    step = (high - low) / 255 or 1.0
    zero = round(-low / step)  # the integer that stands for 0, so that padding and ReLU's zeros are exact
    scales = np.abs(weight).max(axis=1) / 127
    scales[scales == 0] = 1.0
    integers = np.clip(np.round(weight / scales[:, None]), -127, 127)
    out_scale = (scales * step).astype(np.float32)
    channels = weight.shape[1]
    return Quantised(integers.astype(np.int8), np.full(channels, 1 / step, np.float32),
                     np.full(channels, zero, np.float32), out_scale,
                     (bias - out_scale.astype(np.float64) * zero * integers.sum(axis=1)).astype(np.float32))


def quantise(model, batches):
    """Every 1x1 convolution of a fused model in int8; the model is not changed.

    Args:
        model, batches: as in `ranges`.
    Returns:
        {name: Quantised}
    """
    names = quantisable(model)
    limits = ranges(model, batches, names)
    return {name: quantise_convolution(conv, limits[name]) for conv, name in names.items()}
