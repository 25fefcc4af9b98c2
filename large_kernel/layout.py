"""Which layout a model's inner feature maps have: NCHW, or for inference NCHW16c and computed in sequences.

NCHW16c is [N, C / 16, H, W, 16]: the layout in which the C++ operator reads and writes maps fastest. A model may use it
where all layers that see the maps can handle it, which their classes declare with `accepts_nchw16c`.
"""
from typing import NamedTuple

import paddle
from paddle import nn

from large_kernel.conv_norm_act import CONVOLUTIONS, NORMS, is_watched
from large_kernel.sequence import BLOCK, defer

_ACCEPTING = {nn.LayerList: None}  # {class: `may_defer`}; of these very types, as a subclass may compute something else


def accepts_nchw16c(may_defer=None):
    """Class decorator: `forward` accepts maps in NCHW and in NCHW16c.

    It may pass them to `conv_block` and to other such layers, and combine them elementwise.

    Args:
        may_defer: function of a layer, whether its `forward` does not combine maps, so that they may be deferred (see
            `large_kernel.sequence`); None where this is always so.
    """
    def declare(layer_class):
        _ACCEPTING[layer_class] = may_defer
        return layer_class
    return declare


class MapLayout(NamedTuple):
    """Attributes: `nchw16c`, whether inner maps may be in that layout; `deferred`, whether they may be deferred."""
    nchw16c: bool
    deferred: bool

    def begin(self, x):
        """The map that a sequence of layers starts with, deferred or as it is."""
        return defer(x) if self.deferred else x


@paddle.jit.not_to_static
def map_layout(model, layers):
    """The layout for a call of `model`, whose inner maps are seen by `layers` and all layers inside them.

    NCHW in training, where gradients are recorded, and where a layer has a hook, is of another class than the declared
    ones or has a width that is not a multiple of 16.

    Returns:
        MapLayout
    """
    if model.training or (paddle.in_dynamic_mode() and paddle.is_grad_enabled()):
        return MapLayout(False, False)
    layers, deferred = list(layers), not is_watched()
    while layers:
        layer = layers.pop()
        if type(layer) not in _ACCEPTING or layer._forward_pre_hooks or layer._forward_post_hooks:
            return MapLayout(False, False)
        may_defer = _ACCEPTING[type(layer)]
        deferred = deferred and (may_defer is None or may_defer(layer))
        for inner in layer._sub_layers.values():
            if type(inner) in CONVOLUTIONS:
                if inner._out_channels % BLOCK or inner._forward_pre_hooks or inner._forward_post_hooks:
                    return MapLayout(False, False)
            elif inner is not None and type(inner) not in NORMS:  # `conv_block` takes care of the hooks of norms
                layers.append(inner)
    return MapLayout(True, deferred)
