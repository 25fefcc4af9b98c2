"""Folds the batch norms of a RepLKNet into its convolutions: the same eval-mode function, without a batch norm.

    fused = fuse(model)        # a new model, float32; `model` is not changed
    logits = fused(images)

A norm after a convolution is folded into its weight and bias. Of a norm before a 1x1 convolution, the scale multiplies
the weight's input channels, and the shift times the weight is added to the bias. The final norm is folded into the
head, since average pooling is linear. (A norm before a padded convolution could not be folded: its padding is zero, not
the shift.)
"""
import copy

import paddle
from paddle import nn

from errors import UserError
from large_kernel import DepthwiseConv2D, PackedConv2D, pack_weights
from replknet import ConvBN, ConvFFN, RepLKBlock, as_float64, batch_norm_affine


def fuse(model, final_norm=False):
    """Returns a model in eval mode with the batch norms folded; it computes what `model` computes in eval mode.

    Folding is done in float64 and rounded to float32 once. The remaining parameters keep their names. The norm of an
    intermediate feature map cannot be folded, because the next stage takes the map without it: it becomes a 1x1
    depthwise convolution.

    Args:
        model: a RepLKNet, merged or not, with weights of any precision and BatchNorm2D or SyncBatchNorm layers.
        final_norm: keep the final norm, so that `pool` returns the same features as that of `model`.
    Returns:
        RepLKNet, merged, float32.
    Raises:
        ValueError: the model was packed, which must come after folding.
    """
    if any(isinstance(layer, PackedConv2D) for layer in model.sublayers()):
        raise ValueError('fuse comes before pack: this model is packed already')
    fused = copy.deepcopy(model)
    fused.eval()
    fused.to(dtype='float32')
    fused.structural_reparam()
    for block in fused.sublayers():
        if isinstance(block, RepLKBlock):
            _fold(block.pw_conv_1, before=block.pre_large_kernel_bn)
            block.pre_large_kernel_bn = None
        elif isinstance(block, ConvFFN):
            _fold(block.pw_conv_1, before=block.pre_ffn_bn)
            block.pre_ffn_bn = None
    for conv_bn in fused.sublayers():
        if isinstance(conv_bn, ConvBN) and conv_bn.norm is not None:
            _fold(conv_bn)
    for stage in fused.stages:
        if hasattr(stage, 'norm'):
            stage.norm = _affine_conv(*batch_norm_affine(stage.norm))
    if fused.num_classes is not None and not final_norm:
        scale, shift = batch_norm_affine(fused.norm)
        weight = as_float64(fused.head.weight)  # [in, out]
        _set(fused.head, weight * scale[:, None], as_float64(fused.head.bias) + shift @ weight)
        fused.norm = nn.Identity()
    return fused


def pack(model, precision='fp32', quantised=None):
    """Packs the weights of a RepLKNet in eval mode for the C++ operator on the CPU, in place.

    Arguments and result as in `large_kernel.pack_weights`: with precision 'fp32' the outputs stay the same.

    Raises:
        UserError: a precision other than 'fp32', and the model is neither merged nor fused.
    """
    if precision != 'fp32' and not is_merged(model):
        raise UserError(f'-precision={precision}: needs a merged or fused model, since branches are added in float32')
    return pack_weights(model, precision, quantised)


def is_merged(model):
    """Whether the small kernels of a RepLKNet are merged into the large ones."""
    return any(getattr(layer, 'merged', False) for layer in model.sublayers())


class WithFeatures(nn.Layer):
    """Images [N, 3, H, W] -> [N, num_classes + C]: a classifier's logits, and the pooled features its head takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        features = self.model.pool(self.model.forward_features(images)[-1])
        return paddle.concat([self.model.head(features), features], axis=1)


def in_form(model, form, final_norm=False):
    """Returns a RepLKNet in eval mode in a form: 'fused', 'merged' or 'training' (the model itself).

    Raises:
        UserError: the model is merged already, and `form` is 'training'.
    """
    if form == 'fused':
        return fuse(model, final_norm)
    if form == 'merged':
        merged = copy.deepcopy(model)
        merged.structural_reparam()
        return merged
    if is_merged(model):
        raise UserError('-form=training: the weights are merged already; use merged or fused')
    return model


def _fold(conv_bn, before=None):
    """Folds the norm after a convolution, and `before`, the norm before a 1x1 one, into its weight and bias."""
    weight = as_float64(conv_bn.conv.weight)
    scale, bias = batch_norm_affine(conv_bn.norm)
    weight = weight * scale[:, None, None, None]
    if before is not None:
        scale, shift = batch_norm_affine(before)
        bias = bias + weight[:, :, 0, 0] @ shift
        weight = weight * scale[:, None, None]
    conv_bn.conv.bias = conv_bn.conv.create_parameter([len(bias)], is_bias=True)
    _set(conv_bn.conv, weight, bias)
    conv_bn.norm = None


def _affine_conv(scale, shift):
    """The 1x1 depthwise convolution that computes scale * x + shift."""
    conv = DepthwiseConv2D(len(scale), 1)
    _set(conv, scale[:, None, None, None], shift)
    return conv


def _set(layer, weight, bias):
    layer.weight.set_value(paddle.to_tensor(weight, dtype='float32'))
    layer.bias.set_value(paddle.to_tensor(bias, dtype='float32'))
