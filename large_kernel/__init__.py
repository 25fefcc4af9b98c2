"""Depthwise convolution at the speed of the machine, up to 63x63 kernels, forward and backward.

`DepthwiseConv2D` replaces `nn.Conv2D(channels, channels, K, stride, K // 2, groups=channels)`; who calls it need not
know which implementation runs. docs/large_kernel.md describes them.
"""
from large_kernel.conv import DepthwiseConv2D, depthwise_conv2d

__all__ = ['DepthwiseConv2D', 'depthwise_conv2d']
