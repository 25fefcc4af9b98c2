"""RepLKNet as a backbone of PaddleSeg and PaddleDetection (docs/dense.md).

    python dense.py tools/train.py --config upernet_replknet.yml ...     # their script, with these backbones known

`RepLKNetSeg` and `RepLKNetDet` need neither package.
"""
import runpy
import sys
from collections import namedtuple

import paddle_env  # noqa: F401 - what Paddle needs before its first product
from errors import UserError
from replknet import VARIANTS, RepLKNet
from zoo import load_pretrained

ShapeSpec = namedtuple('ShapeSpec', 'channels stride')  # what PaddleDetection's necks read of its own


class RepLKNetSeg(RepLKNet):
    """Backbone of PaddleSeg: images [N, in_channels, H, W] to a list of feature maps.

    Args:
        variant: of `replknet.VARIANTS`; `variant_args`: arguments of `RepLKNet` to use in place of the variant's.
        out_indices: stages, 0 to 3, whose maps [N, feat_channels[i], H / 2^(i+2), W / 2^(i+2)] are wanted.
        norm_inter_features: a batch norm on each of these maps; published dense models of XL have it.
        drop_path: highest rate of stochastic depth.
        pretrained: name of the zoo or file of weights; norms on feature maps start afresh.
        weights_dir: where the files of the zoo lie.
        recompute: less memory for more time in training.
    Attributes:
        feat_channels: channels of each map.
    Raises:
        UserError, FileNotFoundError: what was given cannot be used.
    """

    def __init__(self, variant='replknet_31b', out_indices=(0, 1, 2, 3), norm_inter_features=False, drop_path=0.3,
                 pretrained=None, in_channels=3, recompute=False, weights_dir='./weights', variant_args=None):
        if variant not in VARIANTS:
            raise UserError(f'unknown variant {variant!r}: choose from {", ".join(VARIANTS)}')
        sizes = {**VARIANTS[variant], **(variant_args or {})}
        super().__init__(**sizes, drop_path=drop_path, in_channels=in_channels, num_classes=None,
                         out_indices=out_indices, norm_intermediate_features=norm_inter_features, recompute=recompute)
        self.feat_channels = [sizes['channels'][s] for s in self.out_indices]
        if pretrained:
            load_pretrained(self, pretrained, weights_dir)


class RepLKNetDet(RepLKNetSeg):
    """Backbone of PaddleDetection: takes its dict of inputs; arguments as in `RepLKNetSeg`."""

    @property
    def out_shape(self):
        """[ShapeSpec] with channels and stride of each feature map, for necks."""
        return [ShapeSpec(channels=channels, stride=4 * 2 ** s)
                for s, channels in zip(self.out_indices, self.feat_channels)]

    def forward(self, inputs):
        """{'image': [N, in_channels, H, W]} to a list of feature maps."""
        return super().forward(inputs['image'])


def register():
    """Makes the backbones known to PaddleSeg and PaddleDetection; returns the names of those that are installed."""
    known = []
    try:
        from paddleseg.cvlibs import manager
        manager.BACKBONES.add_component(RepLKNetSeg)
        known.append('paddleseg')
    except ImportError:
        pass
    try:
        from ppdet.core.workspace import register as register_module
        from ppdet.core.workspace import serializable
        register_module(serializable(RepLKNetDet))
        known.append('ppdet')
    except ImportError:
        pass
    return known


if __name__ == '__main__':
    if len(sys.argv) < 2 or not register():
        sys.exit('usage: python dense.py SCRIPT ARGUMENTS, where PaddleSeg or PaddleDetection is installed')
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name='__main__')
