"""Mixed precision of training on the CPU: 1x1 convolutions multiply in bfloat16 and sum in float32.

They are most of the time of a training step. Weights, feature maps, gradients, norms and all else stay in float32, so
losses need no scaling.
"""
import contextlib

import paddle
from paddle import nn

from large_kernel import operators
from large_kernel.conv import runs_custom
from large_kernel.packed import is_same

_active = False


@contextlib.contextmanager
def bf16_products(enable=True):
    """While active, `conv_block` computes 1x1 convolutions and their gradients with products in bfloat16.

    Where the C++ operator is not in use, they are computed in float32.
    """
    global _active
    before, _active = _active, enable
    try:
        yield
    finally:
        _active = before


def is_active():
    """Whether `bf16_products` is active; recomputation restores it."""
    return _active


def convolve(conv, x):
    """`conv(x)` of a convolution layer, with products in bfloat16 where `bf16_products` asks for it."""
    if not (_active and type(conv) is nn.Conv2D and conv._kernel_size[0] == conv._stride[0] == 1 and conv.bias is None
            and is_same(conv) and paddle.in_dynamic_mode() and not conv._forward_pre_hooks
            and not conv._forward_post_hooks):
        return conv(x)
    weight = conv.weight
    if (x.dtype != paddle.float32 or weight.dtype != paddle.float32 or len(x.shape) != 4 or 0 in x.shape
            or x.shape[1] != weight.shape[1] or not runs_custom(x)):
        return conv(x)
    return operators.run_pointwise_bf16(x, weight)
