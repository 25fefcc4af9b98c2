"""A convolution with the norms, activation and residual around it: one operator for inference, else layer by layer."""
import paddle
import paddle.nn.functional as F

from large_kernel import extension
from large_kernel.conv import DTYPES, DepthwiseConv2D, runs_custom

_ACTIVATIONS = {'': lambda x: x, 'relu': F.relu, 'gelu': F.gelu}


@paddle.jit.not_to_static  # traced as it is
def conv_block(x, conv, norm=None, activation='', pre_norm=None, residual=None):
    """activation(norm(conv(pre_norm(x)))) + residual, each part but the convolution optional.

    Where `can_fuse` says so the C++ operator computes it at once, otherwise the layers are called in turn.

    Args:
        x: [N, C, H, W].
        conv: `DepthwiseConv2D` or `nn.Conv2D`.
        norm, pre_norm: batch norms of the result and of the input; `activation`: 'relu', 'gelu' (exact) or ''.
        residual: like the result.

    Returns:
        [N, C_out, H_out, W_out], of x's dtype.
    """
    if can_fuse(x, conv, norm, pre_norm, residual):
        return extension.run_fused(x, conv.weight.astype(x.dtype), conv.bias, residual, _tensors(pre_norm),
                                   _tensors(norm), conv._stride[0], activation, _epsilon(pre_norm), _epsilon(norm))
    x = conv(x if pre_norm is None else pre_norm(x))
    x = _ACTIVATIONS[activation](x if norm is None else norm(x))
    return x if residual is None else residual + x


@paddle.jit.not_to_static
def can_fuse(x, conv, norm=None, pre_norm=None, residual=None):
    """Whether `conv_block` takes the operator.

    It does for a depthwise convolution, or a 1x1 one, which alone may have a norm before it and a residual, where the
    C++ operator serves, norms use their running statistics, nobody asks for gradients and no hook waits for a layer's
    own call.
    """
    pointwise = tuple(conv._kernel_size) == (1, 1) and conv._groups == 1 and tuple(conv._stride) == (1, 1)
    if not pointwise and (not isinstance(conv, DepthwiseConv2D) or pre_norm is not None or residual is not None):
        return False
    norms = [layer for layer in (norm, pre_norm) if layer is not None]
    layers = [conv, *norms]
    if any(layer.training for layer in norms) or any(
            layer._forward_pre_hooks or layer._forward_post_hooks for layer in layers):
        return False
    if paddle.in_dynamic_mode() and paddle.is_grad_enabled():
        tensors = [x, residual, *(p for layer in layers for p in layer.parameters())]
        if any(t is not None and not t.stop_gradient for t in tensors):
            return False
    return str(x.dtype).split('.')[-1].lower() in DTYPES and runs_custom(x)


def _tensors(norm):
    return None if norm is None else [norm.weight, norm.bias, norm._mean, norm._variance]


def _epsilon(norm):
    return 0.0 if norm is None else norm._epsilon
