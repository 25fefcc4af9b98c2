"""Mixed precision of training on the CPU: 1x1 convolutions multiply in bfloat16 and sum in float32.

They are most of the time of a training step. Weights, feature maps, gradients, norms and all else stay in float32, so
losses need no scaling.
"""
import contextlib

import paddle

from large_kernel.conv import runs_custom

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


def takes_bf16_products(x, weight, stride):
    """Whether products in bfloat16 are asked for and the operator computes them: of a 1x1 convolution in float32.

    Args:
        x: [N, C, H, W] in dygraph; `weight`: [C_out, C, K, K] of a dense convolution with "same" padding.
    """
    if not _active or weight.shape[2] != 1 or stride != 1:
        return False
    shape = x.shape
    return (x.dtype == paddle.float32 and weight.dtype == paddle.float32 and len(shape) == 4 and 0 not in shape
            and shape[1] == weight.shape[1] and runs_custom(x))
