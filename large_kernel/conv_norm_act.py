"""A convolution with the norms, activation and residual around it.

In inference one fused operator computes all of it; in training a second operator fuses each batch norm with its
activation. Where neither operator applies, the layers run one by one.
"""
import contextlib

import paddle
import paddle.nn.functional as F
from paddle import nn

from large_kernel import build, operators
from large_kernel.conv import DepthwiseConv2D, as_dtype, as_float32, depthwise_conv2d, dtype_name, is_float, runs_custom
from large_kernel.packed import PackedConv2D, is_same
from large_kernel.products import takes_bf16_products
from large_kernel.sequence import BLOCK, Deferred, computed

NORMS = (nn.BatchNorm2D, nn.SyncBatchNorm)
CONVOLUTIONS = (nn.Conv2D, DepthwiseConv2D, PackedConv2D)  # exact types: a subclass may compute something else
_ACTIVATIONS = {'': lambda x: x, 'relu': F.relu, 'gelu': F.gelu}


_around = None  # the function given to `each_convolution` while it is active


@contextlib.contextmanager
def each_convolution(around):
    """While active, models compute their convolutions one at a time, each inside `around(conv, fused)`.

    Args:
        around: function of a convolution layer, and whether the C++ operator computes it with what belongs to it, that
            returns a context manager.
    """
    global _around
    previous, _around = _around, around
    try:
        yield
    finally:
        _around = previous


def is_watched():
    """Whether `each_convolution` is active."""
    return _around is not None


@paddle.jit.not_to_static  # trace the Python code as is
def conv_block(x, conv, norm=None, activation='', pre_norm=None, residual=None, to_blocks=False):
    """activation(norm(conv(pre_norm(x)))) + residual, each part but the convolution optional.

    The C++ operator computes it in one call where `can_fuse` holds; otherwise the layers are called in turn, norms
    through `norm_act`.

    Args:
        x: [N, C, H, W], or NCHW16c [N, C / 16, H, W, 16]; a tensor or a deferred map, see `large_kernel.sequence`.
        conv: `DepthwiseConv2D`, `nn.Conv2D` or `PackedConv2D`.
        norm, pre_norm: batch norms of the result and of the input; `activation`: 'relu', 'gelu' (exact) or ''.
        residual: same shape as the result.
        to_blocks: return NCHW16c even if x is NCHW, provided the operator runs and C_out is a multiple of 16.

    Returns:
        [N, C_out, H_out, W_out] in x's dtype; NCHW16c if x is, or see `to_blocks`; deferred if x is deferred and the
        operator runs. In NCHW16c, results are in bfloat16 from the first convolution with weights in bfloat16 on.
    """
    if _around is not None:
        with _around(conv, can_fuse(x, conv, norm, pre_norm, residual)), each_convolution(None):
            return conv_block(x, conv, norm, activation, pre_norm, residual, to_blocks)
    blocked = len(x.shape) == 5
    if (norm is None or not norm.training) and can_fuse(x, conv, norm, pre_norm, residual):
        run, dtype = operators.run_fused, x.dtype
        if type(x) is Deferred and x.takes(residual):
            run = Deferred.then
        else:
            x, residual = _operand(x), _operand(residual)
        packed = type(conv) is PackedConv2D
        y = run(x, conv.packed_weight() if packed else as_float32(conv.weight), as_float32(conv.bias), residual,
                *(packed and conv.quantisation or (_tensors(pre_norm), _tensors(norm))),
                [conv._kernel_size[0], conv._stride[0], activation, _epsilon(pre_norm), _epsilon(norm),
                 blocked or (to_blocks and conv._out_channels % BLOCK == 0), type(conv) is DepthwiseConv2D])
        return y if type(y) is Deferred or _is_half(y) else as_dtype(y, dtype)
    x = computed(x)
    # Paddle's batch norm takes no bfloat16 on the CPU
    dtype, wide = x.dtype, paddle.float32 if blocked and _is_half(x) else None
    x = as_planes(x, wide)
    x = _convolve(x if pre_norm is None else norm_act(x, pre_norm), conv)
    x = _ACTIVATIONS[activation](x) if norm is None else norm_act(x, norm, activation)
    x = x if residual is None else as_planes(residual, wide) + x
    return _as_blocks(x if wide is None else as_dtype(x, dtype)) if blocked else x


def _convolve(x, conv):
    """conv(x); the operator at once where `conv` is a plain layer, since the call of a layer takes three times longer.
    """
    if not paddle.in_dynamic_mode() or conv._forward_pre_hooks or conv._forward_post_hooks:
        return conv(x)
    own = conv._parameters  # attribute access on a Layer is slow, and a network's forward pass has hundreds
    if type(conv) is DepthwiseConv2D:
        return depthwise_conv2d(x, own['weight'], own.get('bias'), conv._stride[0])
    if type(conv) is nn.Conv2D and own.get('bias') is None and is_same(conv):
        if takes_bf16_products(x, own['weight'], conv._stride[0]):
            return operators.run_pointwise_bf16(x, own['weight'])
        return operators.run_dense(x, own['weight'], conv._stride, conv._updated_padding)
    return conv(x)


def norm_act(x, norm, activation=''):
    """activation(norm(x)) of a batch norm; in training on the CPU, an operator that saves only x for the backward pass.

    Args:
        x: [N, C, H, W]; `norm`, `activation`: as in `conv_block`.
    """
    if not _trains_plainly(norm):
        return _ACTIVATIONS[activation](norm(x))
    own = norm._parameters
    weight, bias, mean, variance = own.get('weight'), own.get('bias'), own['_mean'], own['_variance']
    if _trains_fused(x, weight, bias, mean, variance):
        return operators.run_batch_norm(x, weight, bias, mean, variance, float(norm._momentum), norm._epsilon,
                                        activation)
    return _ACTIVATIONS[activation](F.batch_norm(x, mean, variance, weight, bias, True, norm._momentum, norm._epsilon,
                                                 norm._data_format, norm._use_global_stats))


def _trains_plainly(norm):
    """Whether a call of this layer would do no more than `F.batch_norm` with statistics of the batch, in dygraph."""
    return (type(norm) is nn.BatchNorm2D and norm.training and not norm._use_global_stats and paddle.in_dynamic_mode()
            and norm._data_format == 'NCHW' and not norm._forward_pre_hooks and not norm._forward_post_hooks)


def _trains_fused(x, *tensors):
    """Whether `norm_act` uses the operator: in float32, with weight, bias and statistics `tensors`."""
    direct = build.direct  # checks everything in C++
    if direct:
        return direct.accepts_norm(x, *tensors)
    if any(tensor is None or as_dtype(tensor, paddle.float32) is not tensor for tensor in (x, *tensors)):
        return False
    n, channels, height, width = x.shape
    return tensors[0].shape[0] == channels and n * height * width > 1 and runs_custom(x)


def as_planes(x, dtype=None):
    """A feature map in NCHW: [N, C, H, W] is returned unchanged, NCHW16c [N, C / 16, H, W, 16] is converted.

    Args:
        dtype: of the result where x is NCHW16c; None for that of x.
    """
    x = computed(x)
    if len(x.shape) < 5:
        return x
    return (x if dtype is None else as_dtype(x, dtype)).transpose([0, 1, 4, 2, 3]).flatten(1, 2)


def _is_half(x):
    """Whether a map is in bfloat16 and NCHW16c, which the operator takes as it is."""
    return len(x.shape) == 5 and dtype_name(x.dtype) == 'bfloat16'


def _operand(x):
    """A map, deferred or not, or None, in the form that the operator takes."""
    x = computed(x)
    return x if x is None or _is_half(x) else as_float32(x)


def _as_blocks(x):
    n, channels, height, width = x.shape
    return x.reshape([n, channels // BLOCK, BLOCK, height, width]).transpose([0, 1, 3, 4, 2])


@paddle.jit.not_to_static
def can_fuse(x, conv, norm=None, pre_norm=None, residual=None):
    """Whether `conv_block` uses the fused operator.

    The convolution must be depthwise, or dense with "same" padding; the C++ operator must be in use for x; norms must
    use their running statistics; no gradient may be needed and no layer may have hooks. Residuals are fused into dense
    convolutions only, norms of the input into 1x1 convolutions only.
    """
    kind, shape = type(conv), x.shape
    if kind not in CONVOLUTIONS or 0 in shape or shape[1] * (BLOCK if len(shape) == 5 else 1) not in (
            conv._in_channels, -1, -BLOCK):
        return False
    if kind is DepthwiseConv2D:
        if residual is not None or pre_norm is not None:
            return False
    elif not (kind is PackedConv2D or is_same(conv)):
        return False
    elif pre_norm is not None and (conv._kernel_size[0] > 1 or conv._stride[0] > 1):
        return False
    if kind is PackedConv2D and conv.quantisation and not (norm is pre_norm is None):
        return False
    layers = [conv]
    for layer in (norm, pre_norm):
        if layer is not None:
            if type(layer) not in NORMS or layer.training or layer._use_global_stats is False:
                return False
            if layer._parameters.get('weight') is None or layer._parameters.get('bias') is None:
                return False
            layers.append(layer)
    for layer in layers:
        if layer._forward_pre_hooks or layer._forward_post_hooks:
            return False
    if paddle.in_dynamic_mode() and paddle.is_grad_enabled():
        tensors = [x, residual, *(p for layer in layers for p in layer.parameters())]
        if any(t is not None and not t.stop_gradient for t in tensors):
            return False
    return type(x) is Deferred or is_float(x.dtype) and runs_custom(x)  # for a sequence, `defer` has checked that


def _tensors(norm):
    if norm is None:
        return None
    if paddle.in_dynamic_mode():
        own = norm._parameters  # attribute access on a Layer is slow, and a network's forward pass has hundreds
        tensors = own['weight'], own['bias'], own['_mean'], own['_variance']
    else:
        tensors = norm.weight, norm.bias, norm._mean, norm._variance
    return [as_float32(tensor) for tensor in tensors]


def _epsilon(norm):
    return 0.0 if norm is None else norm._epsilon
