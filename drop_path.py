"""Stochastic depth (arXiv 1603.09382)."""
import functools

import paddle
from paddle import nn

from large_kernel import accepts_nchw16c
from large_kernel.conv import as_dtype


@accepts_nchw16c()
class DropPath(nn.Layer):
    """Stochastic depth: drops a residual branch for whole samples while training."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x, mask=None):
        """[N, ...] -> the same shape; kept samples are scaled by 1 / (1 - rate).

        `mask` is the one of `draw_masks`; without it, it is drawn here.
        """
        if not self.drops:
            return x
        if mask is None:
            mask = (paddle.rand([x.shape[0]] + [1] * (x.ndim - 1)) < 1 - self.rate).astype(x.dtype) / (1 - self.rate)
        return x * as_dtype(mask, x.dtype)

    @property
    def drops(self):
        """Whether it drops anything now."""
        return self.training and self.rate > 0


def draw_masks(layers, samples):
    """The masks of DropPath layers for a batch, [samples, 1, 1, 1] each, or None for a layer that drops nothing.

    They take a few operators in all, and are those that the layers would draw one after the other (on a CPU).
    """
    dropping = [layer.rate for layer in layers if layer.drops]
    if not dropping:
        return [None] * len(layers)
    with paddle.amp.auto_cast(enable=False):
        keep, scale = _keep_and_scale(tuple(dropping), paddle.get_device())
        masks = iter(((paddle.rand([len(dropping), samples, 1, 1, 1]) < keep).astype('float32') * scale).unbind())
    return [next(masks) if layer.drops else None for layer in layers]


@functools.lru_cache(maxsize=8)
def _keep_and_scale(rates, _):
    """1 - rate and 1 / (1 - rate), tensors [rates, 1, 1, 1, 1] on the current device."""
    keep = paddle.to_tensor([1 - rate for rate in rates], 'float32')
    scale = paddle.concat([paddle.ones([1]) / (1 - rate) for rate in rates])  # rounded as for a single layer
    return keep.reshape([-1, 1, 1, 1, 1]), scale.reshape([-1, 1, 1, 1, 1])
