"""Entries for `paddle.hub`; `paddle.hub.help(FOLDER, 'replknet_31b', source='local')` tells their arguments.

    model = paddle.hub.load(FOLDER, 'replknet_31b', source='local', pretrained=True)
    backbone = paddle.hub.load(FOLDER, 'replknet_31l', source='local', num_classes=None, out_indices=(0, 1, 2, 3))
"""
import os as _os

import paddle_env  # noqa: F401 - what Paddle needs before its first product
from replknet import VARIANTS as _VARIANTS
from replknet import RepLKNet as _RepLKNet
from zoo import ZOO as _ZOO
from zoo import load_pretrained as _load_pretrained

dependencies = ['paddle', 'numpy', 'PIL']

_WEIGHTS = _os.path.join(_os.path.dirname(_os.path.abspath(__file__)), 'weights')


def _entry(name):
    published = [checkpoint.name for checkpoint in _ZOO.values() if checkpoint.variant == name]

    def entry(pretrained=False, weights_dir=_WEIGHTS, **arguments):
        if pretrained is True and not published:
            raise ValueError(f'{name} has no published weights; name a file with pretrained=')
        model = _RepLKNet(**{**_VARIANTS[name], **arguments})
        if pretrained:
            _load_pretrained(model, published[0] if pretrained is True else pretrained, weights_dir)
        return model

    entry.__name__ = name
    entry.__doc__ = f"""{name}, a classifier or with out_indices a backbone.

    Args:
        pretrained: a file of weights, a name of the zoo (here: {', '.join(published) or 'none'}), or True for the
            first of these.
        weights_dir: where the files of the zoo lie.
        arguments: of `RepLKNet`: num_classes (None for no head), out_indices, norm_intermediate_features, drop_path,
            in_channels, recompute, merged. A head of another class count than the weights' starts afresh.
    Returns:
        paddle.nn.Layer: [N, 3, H, W] -> [N, num_classes], or the list of feature maps that out_indices chooses.
    Raises:
        ValueError, FileNotFoundError: the text says what cannot be used.
    """
    return entry


globals().update({_name: _entry(_name) for _name in _VARIANTS})
