"""The fused twin of a RepLKNet: the same eval-mode function without a batch norm.

    fused = fuse(model)        # a new model, float32; `model` stays as it is
    logits = fused(images)

A norm after a convolution goes into its weight and bias; one before a 1x1 convolution scales the weight's input
channels and its shift, carried through the weight, joins the bias; the final one goes into the head, as average pooling
is linear. (A norm before a padded convolution could not be folded: padding is zero, not the shift.)
"""
import copy

import paddle
from paddle import nn

from errors import UserError
from large_kernel import DepthwiseConv2D, pack_weights
from large_kernel.conv_norm_act import PackedConv2D
from replknet import ConvBN, ConvFFN, RepLKBlock, as_float64, batch_norm_affine


def fuse(model, final_norm=False):
    """A model in eval mode that computes what `model` computes in eval mode, its batch norms folded.

    Folds in float64 and rounds to float32 once. The names of the parameters stay; the norms are gone. The norm
    of an intermediate feature map cannot be folded, because the next stage takes the map without it: it becomes
    a 1x1 depthwise convolution.

    Args:
        model: a RepLKNet, merged or not, with weights of any precision and BatchNorm2D or SyncBatchNorm layers.
        final_norm: keep the final norm, so that `pool` gives the features that the model's own does.
    Returns:
        RepLKNet, merged, float32.
    Raises:
        ValueError: the model went through `pack`, which comes last.
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


def pack(model):
    """Prepares a RepLKNet in eval mode, of any form, for inference with the C++ operator on the CPU; in place.

    The weights of dense convolutions are packed, see `large_kernel.pack_weights`; the model computes what it did.

    Returns:
        The model.
    """
    return pack_weights(model)


def is_merged(model):
    """Whether the small kernels of a RepLKNet are merged into its large ones."""
    return any(getattr(layer, 'merged', False) for layer in model.sublayers())


class WithFeatures(nn.Layer):
    """A classifier as images [N, 3, H, W] -> [N, num_classes + C]: logits, and the features that the head takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        features = self.model.pool(self.model.forward_features(images)[-1])
        return paddle.concat([self.model.head(features), features], axis=1)


def in_form(model, form, final_norm=False):
    """A RepLKNet in eval mode in the form 'fused', 'merged' or 'training': the model itself for the last.

    Raises:
        UserError: the training form of merged weights, which cannot be had.
    """
    if form == 'fused':
        return fuse(model, final_norm)
    if form == 'merged':
        twin = copy.deepcopy(model)
        twin.structural_reparam()
        return twin
    if is_merged(model):
        raise UserError('-form=training: the weights are merged already; take merged or fused')
    return model


def _fold(conv_bn, before=None):
    """Folds the norm behind a convolution, and the one before it if it is a 1x1, into its weight and bias."""
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
    conv = DepthwiseConv2D(len(scale), 1)
    _set(conv, scale[:, None, None, None], shift)
    return conv


def _set(layer, weight, bias):
    layer.weight.set_value(paddle.to_tensor(weight, dtype='float32'))
    layer.bias.set_value(paddle.to_tensor(bias, dtype='float32'))
