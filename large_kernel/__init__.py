"""Fast depthwise convolution with kernels up to 63x63, forward and backward.

`DepthwiseConv2D` replaces `nn.Conv2D(channels, channels, K, stride, K // 2, groups=channels)` and chooses the
implementation by itself. `python -m large_kernel` builds the C++ operator in advance and prints which implementation
will be used. docs/large_kernel.md describes the implementations.
"""
import paddle_env  # noqa: F401 - sets the environment, so before paddle
from large_kernel.autotune import describe as describe_choices
from large_kernel.build import BuildError, load_operator
from large_kernel.conv import DepthwiseConv2D, depthwise_conv2d, operator_in_use
from large_kernel.conv_norm_act import as_planes, conv_block, each_convolution
from large_kernel.layout import accepts_nchw16c, map_layout
from large_kernel.packed import PackedConv2D, fastest_precision, pack_weights
from large_kernel.products import bf16_products
from large_kernel.sequence import computed, defer

__all__ = ['BuildError', 'DepthwiseConv2D', 'PackedConv2D', 'accepts_nchw16c', 'as_planes', 'bf16_products', 'computed',
           'conv_block', 'defer', 'depthwise_conv2d', 'describe_choices', 'each_convolution', 'fastest_precision',
           'load_operator', 'map_layout', 'operator_in_use', 'pack_weights']
