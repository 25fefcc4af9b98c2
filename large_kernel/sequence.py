"""Deferred feature maps: a sequence of fused convolutions runs as one call of the operator.

A convolution streams megabytes of weights through the caches and evicts the interpreter's code and data, so that each
operator call spends 0.06 ms in Python alone, a twentieth of a network's time for one image. In a sequence, Python
first describes all convolutions, and the operator then computes them in one go. In programs, sequences save the time
between two operators.
"""
import paddle

from large_kernel import operators
from large_kernel.conv import runs_custom

BLOCK = 16  # channels per block in packed weights and NCHW16c feature maps; kChannelBlock in csrc
_BIAS, _IN_NORM, _OUT_NORM, _BLOCKED, _DEPTHWISE, _INT8 = 1, 2, 4, 8, 16, 32  # enum Part in operator.cc


class Deferred:
    """A feature map that is not computed yet: `conv_block` accepts and returns it, `computed` computes it.

    Attributes:
        shape, dtype, stop_gradient: as a tensor's.
    """

    __slots__ = ('_sequence', '_index', 'shape')
    stop_gradient = True

    def __init__(self, sequence, index, shape):
        self._sequence, self._index, self.shape = sequence, index, shape

    @property
    def dtype(self):
        return self._sequence.x.dtype

    def takes(self, residual):
        """Whether `then` can append a convolution with this residual to the sequence."""
        return self._index == len(self._sequence.kernels) and (
            residual is None or type(residual) is Deferred and residual._sequence is self._sequence)

    def then(self, weight, bias, residual, in_norm, out_norm, attributes):
        """Appends a convolution of this map and returns its result; arguments as in `operators.run_fused`."""
        kernel, stride, activation, in_epsilon, out_epsilon, blocked, depthwise = attributes
        sequence = self._sequence
        sequence.parameters.append(weight)
        parts = _BLOCKED * blocked + _DEPTHWISE * depthwise + _INT8 * (weight.dtype == paddle.int8)
        if bias is not None:
            sequence.parameters.append(bias)
            parts += _BIAS
        if in_norm is not None:
            sequence.parameters += in_norm
            parts += _IN_NORM
        if out_norm is not None:
            sequence.parameters += out_norm
            parts += _OUT_NORM
        sequence.ends.append(len(sequence.parameters))
        sequence.kernels.append(kernel)
        sequence.strides.append(stride)
        sequence.parts.append(parts)
        sequence.residuals.append(-1 if residual is None else residual._index)
        sequence.activations.append(activation)
        sequence.epsilons += (in_epsilon, out_epsilon)

        batch, _, *sides = self.shape[:4]
        sides = [-1 if side < 0 else (side - 1) // stride + 1 for side in sides]  # -1: unknown in a program
        shape = weight.shape
        channels = shape[0] * (1 if len(shape) == 4 else BLOCK)
        shape = [batch, channels // BLOCK, *sides, BLOCK] if blocked else [batch, channels, *sides]
        return Deferred(sequence, self._index + 1, shape)


class _Sequence:
    """The first feature map of a sequence, and the arguments of the operator `fused_convs` for each convolution."""

    def __init__(self, x):
        self.x = x
        self.parameters, self.ends = [], []
        self.kernels, self.strides, self.parts, self.residuals, self.activations, self.epsilons = [], [], [], [], [], []

    def value(self, count):
        """The feature map after the first `count` convolutions."""
        if not count:
            return self.x
        return operators.run_fused_sequence(
            self.x, self.parameters[:self.ends[count - 1]], self.kernels[:count], self.strides[:count],
            self.parts[:count], self.residuals[:count], self.activations[:count], self.epsilons[:2 * count])


@paddle.jit.not_to_static  # trace the Python code as is
def defer(x):
    """Starts a sequence at x where the C++ operator can run one; else returns x itself.

    x must be float32, or bfloat16 in NCHW16c.

    For inference only, and for layers that pass their feature maps to `conv_block` and nothing else.
    """
    can_defer = x.dtype == paddle.float32 or (len(x.shape) == 5 and x.dtype == paddle.bfloat16)
    return Deferred(_Sequence(x), 0, x.shape) if can_defer and runs_custom(x) else x


@paddle.jit.not_to_static
def computed(x):
    """The tensor of a feature map, deferred or not."""
    return x._sequence.value(x._index) if type(x) is Deferred else x
