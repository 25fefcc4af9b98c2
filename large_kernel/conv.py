"""The depthwise convolution layer and the choice of its implementation."""
import os

import paddle.nn.functional as F
from paddle import nn

from large_kernel.fft import conv_fft

IMPLEMENTATIONS = ('auto', 'custom', 'fft', 'native')


def conv_native(x, weight, bias, stride):
    """Paddle's own convolution; same arguments and result as `depthwise_conv2d`."""
    return F.conv2d(x, weight.astype(x.dtype), None if bias is None else bias.astype(x.dtype),
                    stride=stride, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def depthwise_conv2d(x, weight, bias=None, stride=1):
    """Depthwise convolution with "same" padding (K // 2 zeros on each side).

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16.
        weight: [C, 1, K, K], K odd.
        bias: [C] or None.
        stride: 1 or 2.

    Returns:
        [N, C, ceil(H / stride), ceil(W / stride)], of x's dtype.
    """
    name = os.environ.get('LARGE_KERNEL_CONV_IMPL', 'auto')
    if name == 'native' or -1 in x.shape[2:]:
        return conv_native(x, weight, bias, stride)
    return conv_fft(x, weight, bias, stride)


class DepthwiseConv2D(nn.Conv2D):
    """Drop-in for `nn.Conv2D(channels, channels, kernel_size, stride, kernel_size // 2, groups=channels)`.

    Args:
        channels: input and output channels.
        kernel_size: odd, from 1 to 63.
        stride: 1 or 2.
        weight_attr, bias_attr: as in `nn.Conv2D`; `bias_attr=False` for no bias.
    """

    def __init__(self, channels, kernel_size, stride=1, weight_attr=None, bias_attr=None):
        super().__init__(channels, channels, kernel_size, stride, kernel_size // 2, groups=channels,
                         weight_attr=weight_attr, bias_attr=bias_attr)

    def forward(self, x):
        """[N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)]."""
        return depthwise_conv2d(x, self.weight, self.bias, self._stride[0])
