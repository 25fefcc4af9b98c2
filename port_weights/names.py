"""What RepLKNet's tensors are called elsewhere, and which model a set of them belongs to.

This project keeps the names of the earlier Paddle port; the official PyTorch names differ in single words:

    stages.0.blocks.0.large_kernel.lkb_origin.bn.running_mean                official
    stages.0.blocks.0.large_kernel.large_kernel_origin.norm._mean            here

mmpretrain, detectors and segmentors put `backbone.` in front of the official names. Paddle keeps the weights of a
linear layer as [in, out], PyTorch as [out, in].
"""
import re
from dataclasses import dataclass, field
from typing import Dict

import numpy as np

from errors import CheckpointError

_OURS = {'pw1': 'pw_conv_1', 'pw2': 'pw_conv_2', 'lkb_origin': 'large_kernel_origin',
         'small_conv': 'small_kernel_conv', 'lkb_reparam': 'large_kernel_reparam',
         'prelkb_bn': 'pre_large_kernel_bn', 'preffn_bn': 'pre_ffn_bn', 'bn': 'norm',
         'running_mean': '_mean', 'running_var': '_variance'}
_OFFICIAL = {ours: official for official, ours in _OURS.items()}
_COUNTER = 'num_batches_tracked'
# parts of a detector or segmentor other than its backbone
_OTHER_PARTS = ('neck.', 'rpn_head.', 'roi_head.', 'bbox_head.', 'mask_head.', 'decode_head.', 'auxiliary_head.',
                'data_preprocessor.')


@dataclass
class Mapping:
    """Tensors under this project's names.

    Attributes:
        tensors: {name: float32 array in Paddle's layout}.
        sources: {name: what it was called}.
        dropped: {what it was called: why it is left out}.
    """
    tensors: Dict[str, np.ndarray] = field(default_factory=dict)
    sources: Dict[str, str] = field(default_factory=dict)
    dropped: Dict[str, str] = field(default_factory=dict)


def map_names(state, head=None):
    """Renames a state dict of any of the known origins.

    Args:
        state: {name: array} with the names of this project, the official ones, or mmpretrain's.
        head: which head to keep of a file with several; 'none' for no head; None where there is at most one.
    Returns:
        Mapping. Half precision becomes float32; the order of the tensors stays.
    Raises:
        CheckpointError: no names of RepLKNet, of two origins at once, or an ambiguous or unknown head.
    """
    official = any(name.endswith('.running_mean') for name in state)
    if official == any(name.endswith('._mean') for name in state):
        raise CheckpointError('has no batch norms named as in RepLKNet' if not official
                              else 'mixes names of PyTorch and of Paddle')
    mapping = Mapping()
    prefix = 'backbone.' if any(name.startswith('backbone.stem.') for name in state) else ''
    names = {}  # in the file -> without the prefix
    for name in state:
        if name.endswith('.' + _COUNTER):
            mapping.dropped[name] = "Paddle's batch norm keeps no count"
        elif prefix and name.startswith(_OTHER_PARTS):
            mapping.dropped[name] = 'not of the backbone'
        else:
            names[name] = name[len(prefix):] if name.startswith(prefix) else name
    _choose_head(state, names, mapping.dropped, head, official)
    if prefix and 'head.weight' in names.values() and 'norm.weight' not in names.values():
        # mmpretrain calls the norm before the head the last stage's
        last = f'stages.{max(_indices(names.values(), "stages"), default=0)}.norm.'
        names = {name: new[len(last) - len('norm.'):] if new.startswith(last) else new for name, new in names.items()}
    for source, name in names.items():
        if official:
            name = '.'.join(_OURS.get(word, word) for word in name.split('.'))
        if name in mapping.tensors:
            raise CheckpointError(f'{mapping.sources[name]} and {source} are the same tensor {name}')
        array = state[source]
        if array.dtype.kind != 'f':
            raise CheckpointError(f'{source} is of type {array.dtype}, not a floating-point tensor')
        array = array.astype(np.float32, copy=False)
        mapping.tensors[name] = array.T if official and name == 'head.weight' and array.ndim == 2 else array
        mapping.sources[name] = source
    return mapping


def to_paddle_names(state, path='checkpoint'):
    """Tensors of a state dict of any known origin, under this project's names; `path` is for messages."""
    try:
        return map_names(state).tensors
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from None


def official_names(tensors):
    """The inverse of `map_names`: {official name: array in PyTorch's layout} with zero counters for the norms."""
    state = {}
    for name, array in tensors.items():
        words = name.split('.')
        # the final norm and those after stages are called norm in both
        keep = 'norm' if words[0] == 'norm' or re.match(r'stages\.\d+\.norm\.', name) else None
        new = '.'.join(word if word == keep else _OFFICIAL.get(word, word) for word in words)
        state[new] = array.T if name == 'head.weight' else array
        if new.endswith('.running_var'):
            state[new[:-len('running_var')] + _COUNTER] = np.zeros((), np.int64)
    return state


def infer_architecture(tensors):
    """Arguments of `replknet.RepLKNet` that fit the shapes of a state dict with this project's names.

    Raises:
        CheckpointError: a tensor that the shapes are read from is missing.
    """
    def shape(name, dimensions=4):
        if name not in tensors or tensors[name].ndim != dimensions or 0 in tensors[name].shape:
            raise CheckpointError(f'no usable tensor {name}: every RepLKNet has one')
        return tensors[name].shape

    stages = _indices(tensors, 'stages')
    merged = any('.large_kernel_reparam.' in name for name in tensors)
    branch = 'large_kernel_reparam' if merged else 'large_kernel_origin.conv'
    widths = [[shape(f'stages.{stage}.blocks.{block}.pw_conv_1.conv.weight') for stage in range(len(stages))]
              for block in (0, 1)]  # of a RepLKBlock and of a ConvFFN
    architecture = {
        'large_kernel_sizes': [shape(f'stages.{stage}.blocks.0.large_kernel.{branch}.weight')[-1]
                               for stage in range(len(stages))],
        'layers': [(len(_indices(tensors, f'stages.{stage}.blocks')) + 1) // 2 for stage in range(len(stages))],
        'channels': [channels for _, channels, _, _ in widths[0]],
        'dw_ratio': _ratio(widths[0]), 'ffn_ratio': _ratio(widths[1]),
        'in_channels': shape('stem.0.conv.weight')[1], 'merged': merged}
    small = 'stages.0.blocks.0.large_kernel.small_kernel_conv.conv.weight'
    architecture['small_kernel'] = shape(small)[-1] if small in tensors else 0
    architecture['num_classes'] = shape('head.weight', 2)[1] if 'head.weight' in tensors else None
    normed = sorted(stage for stage in stages if f'stages.{stage}.norm.weight' in tensors)
    if normed:
        architecture.update(out_indices=normed, norm_intermediate_features=True)
    return architecture


def _ratio(shapes):
    """The ratio r for which int(r * inputs) is the outputs of all 1x1 convolutions, if there is one."""
    ratio = max((outputs / inputs for outputs, inputs, _, _ in shapes), default=0.0)
    while any(int(inputs * ratio) < outputs for outputs, inputs, _, _ in shapes):
        ratio = float(np.nextafter(ratio, np.inf))  # the quotient was rounded down
    return ratio


def variant_name(architecture):
    """Name of the published variant, such as 'replknet_31b', or None for another width, depth or kernel list."""
    from replknet import VARIANTS
    for name, variant in VARIANTS.items():
        wanted = {'small_kernel': 5, 'dw_ratio': 1.0, 'ffn_ratio': 4.0, **variant}
        if architecture['merged']:  # where the small kernel can no longer be told
            del wanted['small_kernel']
        if all(architecture[key] == value for key, value in wanted.items()):
            return name
    return None


def expected_shapes(architecture):
    """{name: shape} of the model's tensors, without their memory.

    Raises:
        CheckpointError: sizes that no model can have.
    """
    import paddle

    from replknet import RepLKNet
    try:
        with paddle.LazyGuard():
            model = RepLKNet(**architecture)
    except ValueError as error:
        raise CheckpointError(f'no RepLKNet has these shapes: {error}') from None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _choose_head(state, names, dropped, head, official):
    """Renames the chosen head of `names` (in place) to head.weight and head.bias; moves the others to `dropped`."""
    heads = {}
    for source, name in names.items():
        match = re.fullmatch(r'head\.(?:(.+)\.)?(weight|bias)', name)
        if match:
            heads.setdefault(match.group(1) or 'head', {})[source] = f'head.{match.group(2)}'
    if head is None and len(heads) > 1:
        def classes(sources):
            shapes = [state[s].shape for s, name in sources.items() if name == 'head.weight' and state[s].ndim == 2]
            return f' ({shapes[0][0 if official else 1]} classes)' if shapes else ''
        raise CheckpointError('has several heads: choose with convert.py -head one of ' + ', '.join(
            f'{name}{classes(sources)}' for name, sources in heads.items()) + ' or none')
    if head not in (None, 'none', *heads):
        raise CheckpointError(f"has no head {head!r}; it has {', '.join(heads) or 'none'}")
    chosen = next(iter(heads), None) if head is None else head
    for name, sources in heads.items():
        if name == chosen:
            names.update(sources)
        else:
            for source in sources:
                dropped[source] = 'head not chosen'
                del names[source]
    if head == 'none':
        for source in [s for s, name in names.items() if name.startswith('norm.')]:
            dropped[source] = 'no final norm without a head'
            del names[source]


def _indices(names, group):
    """The numbers that follow `group.` in the names."""
    pattern = re.compile(re.escape(group) + r'\.(\d{1,4})\.')
    return {int(match.group(1)) for match in map(pattern.match, names) if match}
