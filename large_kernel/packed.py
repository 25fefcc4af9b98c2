"""Weights of dense convolutions for inference, in the layout and the precision in which the C++ operator reads them."""
import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from large_kernel import build
from large_kernel.conv import as_dtype, as_float32
from large_kernel.sequence import BLOCK

PER_WORD = {'fp32': 1, 'bf16': 2, 'int8': 4}  # numbers in 32 bits; kPerWord in csrc/gemm_product.h
_DTYPES = {'fp32': paddle.float32, 'bf16': paddle.bfloat16}
_ROW = 16  # words: kWords in csrc/gemm_product.h


def is_same(conv):
    """Whether an `nn.Conv2D` is dense, with an odd kernel, stride 1 or 2 and "same" zero padding."""
    kernel, stride = conv._kernel_size[0], conv._stride[0]
    return (conv._groups == 1 and kernel % 2 == 1 and stride in (1, 2) and conv._padding_mode == 'zeros'
            and conv._data_format == 'NCHW'
            and [*conv._kernel_size, *conv._updated_padding, *conv._stride, *conv._dilation]
            == [kernel, kernel, kernel // 2, kernel // 2, stride, stride, 1, 1])


class PackedConv2D(nn.Layer):
    """A dense convolution for inference whose weight is stored in the C++ operator's packed layout.

    The weights of an `nn.Conv2D` are packed in every call, which costs a few percent of a network's time.

    Args:
        conv: `nn.Conv2D` for which `can_pack` holds.
        precision: 'fp32', or 'bf16': weight and input are rounded to bfloat16, their products summed in float32; in
            NCHW16c the result is rounded to bfloat16, too.
        quantised: for a 1x1 convolution at stride 1, a `large_kernel.quantise.Quantised` instead: int8.

    Attributes:
        weight: [out_channels / 16, rows, 16] in float32, bfloat16 or int8; `rows` is in_channels * K * K, filled up
            with zeros for the latter two. `bias`: float32 [out_channels] or None.
        quantisation: for int8 [[scale, shift] of the input, [scale] of the sums], each float32 [channels]; else None.
    """

    def __init__(self, conv, precision='fp32', quantised=None):
        super().__init__()
        self._kernel_size, self._stride, self._groups = conv._kernel_size, conv._stride, conv._groups
        self._in_channels, self._out_channels, self.bias = conv._in_channels, conv._out_channels, conv.bias
        self.precision = 'int8' if quantised else precision
        self._has_quantisation = quantised is not None
        if quantised:
            weight = quantised.weight
            for name in ('in_scale', 'in_shift', 'out_scale'):
                self.register_buffer(name, paddle.to_tensor(getattr(quantised, name), dtype='float32'))
            self.bias = self.create_parameter([self._out_channels], is_bias=True)
            self.bias.set_value(quantised.bias)
            self.bias.stop_gradient = True
        else:
            weight = conv.weight.astype('float32').numpy().reshape(self._out_channels, -1)
            weight = bfloat16_bits(weight) if precision == 'bf16' else weight
        self.register_buffer('weight', paddle.to_tensor(_packed(weight, PER_WORD[self.precision])))
        self.eval()

    @staticmethod
    def can_pack(conv):
        """Whether `conv` can be packed: `is_same`, output channels in multiples of 16, and no hooks."""
        if not isinstance(conv, nn.Conv2D) or conv._forward_pre_hooks or conv._forward_post_hooks:
            return False
        return is_same(conv) and conv._out_channels % BLOCK == 0

    def packed_weight(self):
        """The weight in the dtype of the precision, whatever dtype the layer was cast to."""
        weight = self._buffers['weight']
        return weight if self.precision == 'int8' else as_dtype(weight, _DTYPES[self.precision])

    @property
    def quantisation(self):
        if not self._has_quantisation:
            return None
        own = self._buffers
        return [as_float32(own['in_scale']), as_float32(own['in_shift'])], [as_float32(own['out_scale'])]

    def forward(self, x):
        """[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)], without the C++ operator."""
        kernel, dtype = self._kernel_size[0], x.dtype
        x, weight, bias = as_float32(x), self._unpacked(), as_float32(self.bias)
        if self.precision == 'bf16':
            x = x.astype('bfloat16').astype('float32')
        elif self.precision == 'int8':
            scale, shift = (v.reshape([1, -1, 1, 1]) for v in (self.in_scale, self.in_shift))
            x = (x * scale + shift).round().clip(0, 255)
            weight = weight * self.out_scale.reshape([-1, 1, 1, 1])
        return F.conv2d(x, weight, bias, self._stride, kernel // 2).astype(dtype)

    def _unpacked(self):
        """The weight in float32, [out_channels, in_channels, K, K]; for int8 the integers."""
        kernel, per_word = self._kernel_size[0], PER_WORD[self.precision]
        blocks = self._out_channels // BLOCK
        words = as_float32(self.weight).reshape([blocks, -1, BLOCK, per_word]).transpose([0, 2, 1, 3])
        rows = words.reshape([self._out_channels, -1])[:, :self._in_channels * kernel ** 2]
        return rows.reshape([self._out_channels, self._in_channels, kernel, kernel])


def bfloat16_bits(values):
    """The bits of float32 values rounded to bfloat16 (to the nearest, ties to even), uint16; Paddle's form of bfloat16.

    Raises:
        ValueError: a value is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError('a weight is not finite')
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _packed(rows, per_word):
    """A weight [out_channels, terms] as [out_channels / 16, terms, 16], with words of `per_word` consecutive terms."""
    out_channels, terms = rows.shape
    multiple = _ROW * per_word if per_word > 1 else 1
    rows = np.pad(rows, [(0, 0), (0, -terms % multiple)])
    words = rows.reshape(out_channels // BLOCK, BLOCK, -1, per_word).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(words).reshape(out_channels // BLOCK, -1, BLOCK)


def pack_weights(model, precision='fp32', quantised=None):
    """Packs the weights of the dense convolutions of a model in eval mode, in place, for inference on the CPU.

    The model computes the same function, with 'bf16' and int8 up to rounding, but the shapes in its state dict change.
    Where gradients are needed or the C++ operator is not in use, the weights are unpacked in every call, so this is
    not for training.

    Args:
        precision: 'fp32' or 'bf16', see `PackedConv2D`.
        quantised: {name of a convolution: `Quantised`} of those to compute in int8, see `large_kernel.quantise`.
    Returns:
        The model.
    """
    for prefix, layer in list(model.named_sublayers(include_self=True)):
        for name, conv in layer._sub_layers.items():
            if PackedConv2D.can_pack(conv):
                path = f'{prefix}.{name}' if prefix else name
                layer._sub_layers[name] = PackedConv2D(conv, precision, (quantised or {}).get(path))
    return model


def fastest_precision():
    """'bf16' where the operator multiplies bfloat16 with the processor's own instructions, else 'fp32'.

    See `build.instructions`.
    """
    return 'bf16' if build.instructions('bf16') else 'fp32'
