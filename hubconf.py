"""Entry points for `paddle.hub`; `paddle.hub.help(FOLDER, 'replknet_31b', source='local')` shows their arguments.

    model = paddle.hub.load(FOLDER, 'replknet_31b', source='local', pretrained=True)
    backbone = paddle.hub.load(FOLDER, 'replknet_31l', source='local', num_classes=None, out_indices=(0, 1, 2, 3))
"""
import os as _os

import paddle_env  # noqa: F401 - must come before paddle
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
            raise ValueError(f'{name} has no published weights; give a file with pretrained=')
        model = _RepLKNet(**{**_VARIANTS[name], **arguments})
        if pretrained:
            _load_pretrained(model, published[0] if pretrained is True else pretrained, weights_dir)
        return model

    entry.__name__ = name
    entry.__doc__ = f"""{name}, a classifier, or with out_indices a backbone.

    Args:
        pretrained: a file of weights, a zoo name (for this model: {', '.join(published) or 'none'}), or True for
            the first of these names.
        weights_dir: folder with the files of the zoo.
        arguments: arguments of `RepLKNet`: num_classes (None for no head), out_indices, norm_intermediate_features,
            drop_path, in_channels, recompute, merged. A head whose number of classes differs from that of the weights
            is newly initialised.
    Returns:
        paddle.nn.Layer: [N, 3, H, W] -> [N, num_classes], or the list of feature maps selected by out_indices.
    Raises:
        ValueError: the weights cannot be used, or an argument is out of range.
        FileNotFoundError: the weights do not exist.
    """
    return entry


globals().update({_name: _entry(_name) for _name in _VARIANTS})
