"""RepLKNet as a backbone of PaddleSeg and PaddleDetection (docs/dense.md).

    python dense.py tools/train.py --config upernet_replknet.yml ...     # runs their script with these backbones

`RepLKNetSeg` and `RepLKNetDet` work without either package.
"""
import runpy
import sys
from collections import namedtuple

import paddle_env  # noqa: F401 - must come before paddle
from errors import UserError
from replknet import VARIANTS, RepLKNet
from zoo import load_pretrained

ShapeSpec = namedtuple('ShapeSpec', 'channels stride')  # the fields of PaddleDetection's ShapeSpec that necks read


class RepLKNetSeg(RepLKNet):
    """Backbone for PaddleSeg: images [N, in_channels, H, W] -> list of feature maps.

    Args:
        variant: name in `replknet.VARIANTS`.
        out_indices: stages, 0 to 3, whose feature maps [N, channels, H / 2^(stage+2), W / 2^(stage+2)] are returned.
        norm_inter_features: apply a batch norm to each returned map, as published dense models with XL do.
        drop_path: highest stochastic-depth rate.
        pretrained: zoo name or file of weights; norms of feature maps are newly initialised.
        in_channels: channels of the images.
        recompute: recompute activations in the backward pass: less memory, more time.
        weights_dir: folder with the files of the zoo.
        variant_args: {argument of `RepLKNet`: value} that replace those of the variant.
    Attributes:
        feat_channels: channels of each returned map.
    Raises:
        UserError: the variant is unknown, or the weights cannot be used.
        FileNotFoundError: the weights do not exist.
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
    """Backbone for PaddleDetection, which passes a dict of inputs; arguments as in `RepLKNetSeg`."""

    @property
    def out_shape(self):
        """List of ShapeSpec with the channels and stride of each feature map, for necks."""
        return [ShapeSpec(channels=channels, stride=4 * 2 ** s)
                for s, channels in zip(self.out_indices, self.feat_channels)]

    def forward(self, inputs):
        """{'image': [N, in_channels, H, W]} -> list of feature maps."""
        return super().forward(inputs['image'])


def register():
    """Registers the backbones with PaddleSeg and PaddleDetection; returns the names of those that are installed."""
    registered = []
    try:
        from paddleseg.cvlibs import manager
        manager.BACKBONES.add_component(RepLKNetSeg)
        registered.append('paddleseg')
    except ImportError:
        pass
    try:
        from ppdet.core.workspace import global_config, serializable
        from ppdet.core.workspace import register as register_module
        if 'RepLKNetDet' not in global_config:  # a second registration would raise
            register_module(serializable(RepLKNetDet))
        registered.append('ppdet')
    except ImportError:
        pass
    return registered


if __name__ == '__main__':
    if len(sys.argv) < 2 or not register():
        sys.exit('usage: python dense.py SCRIPT ARGUMENTS, with PaddleSeg or PaddleDetection installed')
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name='__main__')
