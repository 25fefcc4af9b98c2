"""The depthwise convolution layer and the choice of its implementation."""
import contextlib
import functools
import os
import warnings

import paddle
import paddle.nn.functional as F
from paddle import nn

from large_kernel import autotune, build, cuda, operators
from large_kernel.fft import conv_fft

VARIABLE = 'LARGE_KERNEL_CONV_IMPL'
IMPLEMENTATIONS = ('auto', 'custom', 'fft', 'native')
MAX_KERNEL = 63
FFT_FROM = 7  # smallest kernel for which a traced program uses the FFT, since tracing cannot measure
DTYPES = ('float32', 'float16', 'bfloat16')


def conv_native(x, weight, bias, stride):
    """Paddle's own convolution; same arguments and result as `depthwise_conv2d`."""
    # Always in float32: in half precision Paddle has no such kernel for CPUs, and those for GPUs sum in half precision.
    # Paddle 2.6 refuses the guard while a program is traced, where it has no effect.
    with paddle.amp.auto_cast(enable=False) if paddle.in_dynamic_mode() else contextlib.nullcontext():
        y = F.conv2d(as_float32(x), as_float32(weight), as_float32(bias), stride=stride, padding=weight.shape[-1] // 2,
                     groups=weight.shape[0])
    return as_dtype(y, x.dtype)


def conv_custom(x, weight, bias, stride):
    """The C++ operator, which computes in float32; same arguments and result as `depthwise_conv2d`."""
    dtype = x.dtype
    x, weight, bias = as_float32(x), as_float32(weight), as_float32(bias)
    # While a program is traced it is not known which gradients will be needed.
    traced = not paddle.in_dynamic_mode()
    y = operators.run(x, weight, bias, stride, traced or not x.stop_gradient,
                      traced or not (weight.stop_gradient and (bias is None or bias.stop_gradient)))
    return as_dtype(y, dtype)


_FUNCTIONS = {'custom': conv_custom, 'cuda': cuda.conv_cuda, 'fft': conv_fft, 'native': conv_native}


@functools.lru_cache(maxsize=None)
def dtype_name(dtype):
    return str(dtype).split('.')[-1].lower()


def as_dtype(tensor, dtype):
    own = tensor.dtype
    return tensor if own is dtype or own == dtype else tensor.astype(dtype)  # comparing Paddle's dtypes is slow


def as_float32(tensor):
    """The tensor in float32, which the C++ operators require; None stays None."""
    return None if tensor is None else as_dtype(tensor, paddle.float32)


def is_float(dtype):
    """Whether the implementations support this dtype."""
    return dtype is paddle.float32 or dtype_name(dtype) in DTYPES


def _on_cpu(x):
    if paddle.in_dynamic_mode():
        return x.place.is_cpu_place()
    return paddle.device.get_device() == 'cpu'


def _check(x, weight, bias, stride):
    x_shape, w_shape = x.shape, weight.shape
    problem = None
    if len(x_shape) != 4:
        problem = 'needs an input [N, C, H, W]'
    elif len(w_shape) != 4 or w_shape[1] != 1 or w_shape[2] != w_shape[3]:
        problem = 'needs a weight [C, 1, K, K]'
    elif w_shape[2] % 2 == 0 or not 1 <= w_shape[2] <= MAX_KERNEL:
        problem = f'needs an odd kernel of at most {MAX_KERNEL}'
    elif x_shape[1] != w_shape[0]:
        problem = 'needs as many channels in input and weight'
    elif bias is not None and list(bias.shape) != [w_shape[0]]:
        problem = f'needs a bias [C], not {list(bias.shape)}'
    elif 0 in x_shape:
        problem = 'needs a non-empty input'
    elif stride not in (1, 2):
        problem = f'needs stride 1 or 2, not {stride}'
    elif not is_float(x.dtype):
        problem = f'takes {", ".join(DTYPES)}, not {dtype_name(x.dtype)}'
    if problem:
        raise ValueError(f'depthwise_conv2d {problem}: input {list(x_shape)}, weight {list(w_shape)}')


_warned = False


def runs_custom(x):
    """Whether the C++ operator computes the convolutions of x.

    It does on the CPU with LARGE_KERNEL_CONV_IMPL=custom or `auto`, which warns once if the operator cannot be built.

    Raises:
        RuntimeError: LARGE_KERNEL_CONV_IMPL=custom, but the operator is not available for x.
    """
    global _warned
    name = _implementation()
    if name not in ('auto', 'custom') or not _on_cpu(x):
        return False
    reason = build.reason_unavailable()
    if reason is None:
        return True
    if name == 'custom':
        raise RuntimeError(f'{VARIABLE}=custom: {reason}')
    if not _warned:
        _warned = True
        warnings.warn(f'the C++ operator for depthwise convolutions is not available; using paddle.fft or '
                      f"Paddle's own convolution instead: {reason}", RuntimeWarning, stacklevel=3)
    return False


def operator_in_use():
    """Whether the C++ operator is used on the current device: it is available and LARGE_KERNEL_CONV_IMPL allows it."""
    return (_implementation() in ('auto', 'custom') and paddle.device.get_device() == 'cpu'
            and build.reason_unavailable() is None)


def _implementation():
    name = os.environ.get(VARIABLE) or 'auto'
    if name not in IMPLEMENTATIONS:
        raise ValueError(f'{VARIABLE}={name}: expected one of {", ".join(IMPLEMENTATIONS)}')
    return name


def select(x, weight, stride):
    """Name of the implementation that will run.

    It is the one named by LARGE_KERNEL_CONV_IMPL, where `custom` is the C++ operator on the CPU, and on GPUs the CUDA
    operator for what it takes, Paddle's own for the rest. With `auto` it is the C++ operator on the CPU, on GPUs the
    CUDA operator for what it takes, and elsewhere the faster of fft and native, measured once for each shape.

    Raises:
        RuntimeError: LARGE_KERNEL_CONV_IMPL=custom, but the operator is not available for x.
    """
    name = _implementation()
    if runs_custom(x):
        return 'custom'
    if name == 'custom' and not (paddle.in_dynamic_mode() and cuda.on_gpu(x)):
        raise RuntimeError(f'{VARIABLE}=custom: the operators run on CPUs, and without tracing on NVIDIA GPUs')
    if name in ('auto', 'custom') and cuda.takes(x, weight, stride, required=name == 'custom'):
        return 'cuda'
    if name != 'auto':
        return 'native' if name == 'custom' else name
    if not paddle.in_dynamic_mode():
        return 'fft' if weight.shape[-1] >= FFT_FROM and -1 not in x.shape[2:] else 'native'
    training = autotune.for_training or paddle.is_grad_enabled() and not (x.stop_gradient and weight.stop_gradient)
    return autotune.choose({'fft': conv_fft, 'native': conv_native}, x, weight, stride, training)


@paddle.jit.not_to_static  # trace the Python code as is: converted to static code, its shapes would become tensors
def depthwise_conv2d(x, weight, bias=None, stride=1):
    """Depthwise convolution with "same" padding (K // 2 zeros on each side).

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16.
        weight: [C, 1, K, K], K odd and at most 63. Weight and bias may have another dtype than x. The CUDA operator
            rounds weights to x's dtype and sums in float32; the others compute in float32.
        bias: [C] or None.
        stride: 1 or 2.

    Returns:
        [N, C, ceil(H / stride), ceil(W / stride)], in x's dtype; with the CUDA operator in mixed precision, in the
        dtype of `paddle.amp.auto_cast`.

    Raises:
        ValueError: a wrong shape, dtype or stride, or an unknown LARGE_KERNEL_CONV_IMPL.
        RuntimeError: LARGE_KERNEL_CONV_IMPL=custom where the operator cannot be built.
    """
    direct = build.direct  # checks everything in C++: cold Python code takes as long as a small layer
    if direct:
        if ((x.stop_gradient and weight.stop_gradient and (bias is None or bias.stop_gradient))
                or not paddle.is_grad_enabled()):
            y = direct.forward(x, weight, bias, stride)
            if y is not None:
                return y
        elif direct.accepts(x, weight, bias, stride):
            return operators.run_with_gradients(x, weight, bias, stride)
    _check(x, weight, bias, stride)
    return _FUNCTIONS[select(x, weight, stride)](x, weight, bias, stride)


def _single(value, name):
    """The value of an int, or of a pair of equal ints, as nn.Conv2D accepts them."""
    values = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(values) != 1 or not isinstance(next(iter(values)), int):
        raise ValueError(f'DepthwiseConv2D needs one int, or two equal ones, as {name}, not {value}')
    return values.pop()


class DepthwiseConv2D(nn.Conv2D):
    """Drop-in for `nn.Conv2D(channels, channels, kernel_size, stride, kernel_size // 2, groups=channels)`.

    Parameters, initialisation and state dict are the same; the forward pass is `depthwise_conv2d`.

    Args:
        channels: input and output channels.
        kernel_size: odd, at most 63.
        stride: 1 or 2.
        weight_attr, bias_attr: as in `nn.Conv2D`; `bias_attr=False` for no bias.

    Raises:
        ValueError: an even or too large kernel, another stride.
    """

    def __init__(self, channels, kernel_size, stride=1, weight_attr=None, bias_attr=None):
        kernel_size, stride = _single(kernel_size, 'kernel_size'), _single(stride, 'stride')
        if kernel_size % 2 == 0 or not 1 <= kernel_size <= MAX_KERNEL:
            raise ValueError(f'DepthwiseConv2D needs an odd kernel_size of at most {MAX_KERNEL}, not {kernel_size}')
        if stride not in (1, 2):
            raise ValueError(f'DepthwiseConv2D needs stride 1 or 2, not {stride}')
        super().__init__(channels, channels, kernel_size, stride, kernel_size // 2, groups=channels,
                         weight_attr=weight_attr, bias_attr=bias_attr)

    def forward(self, x):
        """[N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)]."""
        return depthwise_conv2d(x, self.weight, self.bias, self._stride[0])
