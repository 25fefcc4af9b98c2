"""Depthwise convolution at the speed of the machine, up to 63x63 kernels, forward and backward.

`DepthwiseConv2D` replaces `nn.Conv2D(channels, channels, K, stride, K // 2, groups=channels)`; who calls it need not
know which implementation runs. `python -m large_kernel` builds the C++ operator ahead and says what will be used.
docs/large_kernel.md describes the implementations.
"""
import paddle_env  # noqa: F401  must stand before paddle
from large_kernel.autotune import describe as describe_choices
from large_kernel.conv import DepthwiseConv2D, depthwise_conv2d, operator_serves
from large_kernel.deferred import computed, defer
from large_kernel.extension import BuildError, load_operator
from large_kernel.fused import as_planes, conv_block, each_convolution, pack_weights
from large_kernel.layout import accepts_nchw16c, map_layout

__all__ = ['BuildError', 'DepthwiseConv2D', 'accepts_nchw16c', 'as_planes', 'computed', 'conv_block', 'defer',
           'depthwise_conv2d', 'describe_choices', 'each_convolution', 'load_operator', 'map_layout', 'operator_serves',
           'pack_weights']
