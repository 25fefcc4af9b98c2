"""A convolution with the norms, activation and residual around it: one operator for inference; in training one for a
norm and its activation; else layer by layer."""
import contextlib

import paddle
import paddle.nn.functional as F
from paddle import nn

from large_kernel import extension
from large_kernel.conv import DepthwiseConv2D, as_dtype, as_float32, is_float, runs_custom
from large_kernel.deferred import BLOCK, Deferred, computed

NORMS = (nn.BatchNorm2D, nn.SyncBatchNorm)
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


@paddle.jit.not_to_static  # traced as it is
def conv_block(x, conv, norm=None, activation='', pre_norm=None, residual=None, to_blocks=False):
    """activation(norm(conv(pre_norm(x)))) + residual, each part but the convolution optional.

    Where `can_fuse` says so the C++ operator computes it at once, otherwise the layers are called in turn, norms as
    `norm_act` does it.

    Args:
        x: [N, C, H, W], or in blocks [N, C / 16, H, W, 16]; a tensor or deferred, see `large_kernel.deferred`.
        conv: `DepthwiseConv2D`, `nn.Conv2D` or `PackedConv2D`.
        norm, pre_norm: batch norms of the result and of the input; `activation`: 'relu', 'gelu' (exact) or ''.
        residual: like the result.
        to_blocks: give the result in blocks whatever x is, where the operator computes it and the channels allow it.

    Returns:
        [N, C_out, H_out, W_out], of x's dtype; in blocks if x is, or see `to_blocks`; deferred if x is, where the
        operator computes it.
    """
    if _around is not None:
        with _around(conv, can_fuse(x, conv, norm, pre_norm, residual)), each_convolution(None):
            return conv_block(x, conv, norm, activation, pre_norm, residual, to_blocks)
    blocked = len(x.shape) == 5
    if can_fuse(x, conv, norm, pre_norm, residual):
        run, dtype = extension.run_fused, x.dtype
        if type(x) is Deferred and x.takes(residual):
            run = Deferred.then
        else:
            x, residual = as_float32(computed(x)), as_float32(computed(residual))
        y = run(x, as_float32(conv.weight), as_float32(conv.bias), residual, _tensors(pre_norm), _tensors(norm),
                conv._kernel_size[0], conv._stride[0], activation, _epsilon(pre_norm), _epsilon(norm),
                blocked or (to_blocks and conv._out_channels % BLOCK == 0), type(conv) is DepthwiseConv2D)
        return as_dtype(y, dtype)
    x = as_planes(x)
    x = conv(x if pre_norm is None else norm_act(x, pre_norm))
    x = _ACTIVATIONS[activation](x) if norm is None else norm_act(x, norm, activation)
    x = x if residual is None else as_planes(residual) + x
    return _as_blocks(x) if blocked else x


def norm_act(x, norm, activation=''):
    """activation(norm(x)) of a batch norm; in training on the CPU by an operator that keeps x alone for the gradients.

    Args:
        x: [N, C, H, W]; `norm`, `activation`: as in `conv_block`.
    """
    if not _trains_fused(x, norm):
        return _ACTIVATIONS[activation](norm(x))
    return extension.run_batch_norm(x, *_tensors(norm), float(norm._momentum), norm._epsilon, activation)


def _trains_fused(x, norm):
    """Whether `norm_act` takes the operator: for an `nn.BatchNorm2D` without hooks, training in float32, not traced."""
    if not (type(norm) is nn.BatchNorm2D and norm.training and not norm._use_global_stats and paddle.in_dynamic_mode()):
        return False
    if norm._forward_pre_hooks or norm._forward_post_hooks or norm._data_format != 'NCHW':
        return False
    values = [x, norm.weight, norm.bias, norm._mean, norm._variance]
    if any(v is None or v.dtype != paddle.float32 for v in values):
        return False
    n, channels, height, width = x.shape
    return channels == norm._num_features and n * height * width > 1 and runs_custom(x)


def as_planes(x):
    """A feature map [N, C, H, W] as it is, or one in blocks [N, C / 16, H, W, 16] in that layout."""
    x = computed(x)
    return x.transpose([0, 1, 4, 2, 3]).flatten(1, 2) if len(x.shape) == 5 else x


def _as_blocks(x):
    n, channels, height, width = x.shape
    return x.reshape([n, channels // BLOCK, BLOCK, height, width]).transpose([0, 1, 3, 4, 2])


@paddle.jit.not_to_static
def can_fuse(x, conv, norm=None, pre_norm=None, residual=None):
    """Whether `conv_block` takes the operator.

    It does for a depthwise convolution and a dense one with "same" padding, where the C++ operator serves, norms use
    their running statistics, nobody asks for gradients and no hook waits for a layer's own call. A residual must be
    that of a dense convolution, a norm before it that of a 1x1.
    """
    kind, shape = type(conv), x.shape
    if kind not in CONVOLUTIONS or 0 in shape or shape[1] * (BLOCK if len(shape) == 5 else 1) not in (
            conv._in_channels, -1, -BLOCK):
        return False
    if kind is DepthwiseConv2D:
        if residual is not None or pre_norm is not None:
            return False
    elif not (kind is PackedConv2D or _is_same(conv)):
        return False
    elif pre_norm is not None and (conv._kernel_size[0] > 1 or conv._stride[0] > 1):
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
    return type(x) is Deferred or is_float(x.dtype) and runs_custom(x)  # a sequence began with that question


def _is_same(conv):
    """Whether an `nn.Conv2D` is dense, of odd K, stride 1 or 2, padded with zeros to "same" size."""
    kernel, stride = conv._kernel_size[0], conv._stride[0]
    return (conv._groups == 1 and kernel % 2 == 1 and stride in (1, 2) and conv._padding_mode == 'zeros'
            and conv._data_format == 'NCHW'
            and [*conv._kernel_size, *conv._updated_padding, *conv._stride, *conv._dilation]
            == [kernel, kernel, kernel // 2, kernel // 2, stride, stride, 1, 1])


class PackedConv2D(nn.Layer):
    """A dense convolution for inference whose weight is kept in the layout that the C++ operator computes with.

    Packed in every call, as those of `nn.Conv2D` are, weights cost some percent of a network's time.

    Args:
        conv: `nn.Conv2D` for which `can_pack` holds.

    Attributes:
        weight: float32 [out_channels / 16, in_channels * K * K, 16]; `bias`: as in `conv`.
    """

    def __init__(self, conv):
        super().__init__()
        self._kernel_size, self._stride, self._groups = conv._kernel_size, conv._stride, conv._groups
        self._in_channels, self._out_channels, self.bias = conv._in_channels, conv._out_channels, conv.bias
        weight = conv.weight.astype('float32').reshape([conv.weight.shape[0] // BLOCK, BLOCK, -1]).transpose([0, 2, 1])
        self.weight = self.create_parameter(weight.shape, dtype='float32',
                                            default_initializer=nn.initializer.Assign(weight))
        self.weight.stop_gradient = True
        self.eval()

    @staticmethod
    def can_pack(conv):
        """Whether a layer is a dense convolution of odd K, "same" padding, stride 1 or 2, 16 n channels and no hook."""
        if not isinstance(conv, nn.Conv2D) or conv._forward_pre_hooks or conv._forward_post_hooks:
            return False
        return _is_same(conv) and conv._out_channels % BLOCK == 0

    def forward(self, x):
        """[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        x, kernel = as_planes(x), self._kernel_size[0]
        weight = self.weight.transpose([0, 2, 1]).reshape([-1, self._in_channels, kernel, kernel]).astype(x.dtype)
        return F.conv2d(x, weight, None if self.bias is None else self.bias.astype(x.dtype), self._stride, kernel // 2)


def pack_weights(model):
    """Packs the weights of the dense convolutions of a model in eval mode, in place, for inference on the CPU.

    The function it computes stays; the shapes in its state dict do not. Where somebody asks for gradients, or the C++
    operator does not serve, weights are unpacked in every call: not for training.

    Returns:
        The model.
    """
    for layer in model.sublayers(include_self=True):
        for name, conv in layer._sub_layers.items():
            if PackedConv2D.can_pack(conv):
                layer._sub_layers[name] = PackedConv2D(conv)
    return model


# Of these very types: a subclass may compute something else.
CONVOLUTIONS = (nn.Conv2D, DepthwiseConv2D, PackedConv2D)


def _tensors(norm):
    if norm is None:
        return None
    if paddle.in_dynamic_mode():
        own = norm._parameters  # a Layer's attributes are slow, and there are hundreds of these in a call of a network
        tensors = own['weight'], own['bias'], own['_mean'], own['_variance']
    else:
        tensors = norm.weight, norm.bias, norm._mean, norm._variance
    return [as_float32(tensor) for tensor in tensors]


def _epsilon(norm):
    return 0.0 if norm is None else norm._epsilon
