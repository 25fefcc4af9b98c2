"""The names of RepLKNet's tensors here and elsewhere, and the architecture that a state dict belongs to.

This project keeps the names of the earlier Paddle port. The official PyTorch names differ in a few words:

    stages.0.blocks.0.large_kernel.lkb_origin.bn.running_mean                official
    stages.0.blocks.0.large_kernel.large_kernel_origin.norm._mean            here

mmpretrain, detectors and segmentors put `backbone.` before the official names. The weight of a linear layer is
[in, out] in Paddle, [out, in] in PyTorch.
"""
import re
from dataclasses import dataclass, field
from typing import Dict

import numpy as np

from errors import CheckpointError

# words of the official names: those of this project
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
        sources: {name: name in the source}.
        dropped: {name in the source: reason}.
    """
    tensors: Dict[str, np.ndarray] = field(default_factory=dict)
    sources: Dict[str, str] = field(default_factory=dict)
    dropped: Dict[str, str] = field(default_factory=dict)


def map_names(state, head=None):
    """Renames a state dict of any of the known origins.

    Args:
        state: {name: array} with the names of this project, the official ones, or mmpretrain's.
        head: the head to keep if there are several; 'none' keeps no head; None expects one at most.
    Returns:
        Mapping. Half precision becomes float32; the order of the tensors does not change.
    Raises:
        CheckpointError: no names of RepLKNet, names of two origins, or an ambiguous or unknown head.
    """
    official = any(name.endswith('.running_mean') for name in state)
    if official == any(name.endswith('._mean') for name in state):
        raise CheckpointError('has no batch norms named as in RepLKNet' if not official
                              else 'mixes names of PyTorch and of Paddle')
    mapping = Mapping()
    prefix = 'backbone.' if any(name.startswith('backbone.stem.') for name in state) else ''
    names = _without_prefix(state, prefix, mapping.dropped)
    _choose_head(state, names, mapping.dropped, head, official)
    if prefix:
        names = _rename_final_norm(names)
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


def _without_prefix(state, prefix, dropped):
    """{name in the source: name without `prefix`} of RepLKNet's tensors; the others are added to `dropped`."""
    names = {}
    for name in state:
        if name.endswith('.' + _COUNTER):
            dropped[name] = "Paddle's batch norm keeps no count"
        elif prefix and name.startswith(_OTHER_PARTS):
            dropped[name] = 'not of the backbone'
        else:
            names[name] = name[len(prefix):] if name.startswith(prefix) else name
    return names


def _choose_head(state, names, dropped, head, official):
    """Renames the chosen head of `names` (in place) to head.weight and head.bias; moves the others to `dropped`."""
    heads = {}  # its name: {name in the source: head.weight or head.bias}
    for source, name in names.items():
        match = re.fullmatch(r'head\.(?:(.+)\.)?(weight|bias)', name)
        if match:
            heads.setdefault(match.group(1) or 'head', {})[source] = f'head.{match.group(2)}'
    if head is None and len(heads) > 1:
        raise CheckpointError('has several heads; choose one with convert.py -head=NAME: ' + ', '.join(
            name + _class_count(state, sources, official) for name, sources in heads.items()) + ' or none')
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


def _class_count(state, sources, official):
    """' (N classes)', or '' if the head has no weight that says how many."""
    shapes = [state[s].shape for s, name in sources.items() if name == 'head.weight' and state[s].ndim == 2]
    return f' ({shapes[0][0 if official else 1]} classes)' if shapes else ''


def _rename_final_norm(names):
    """Renames the norm before the head to `norm.`; mmpretrain calls it the norm of the last stage."""
    if 'head.weight' not in names.values() or 'norm.weight' in names.values():
        return names
    last = f'stages.{max(_indices(names.values(), "stages"), default=0)}.norm.'
    return {source: name[len(last) - len('norm.'):] if name.startswith(last) else name
            for source, name in names.items()}


def to_paddle_names(state, path='checkpoint'):
    """The tensors of a state dict of any known origin under this project's names; `path` is for messages."""
    try:
        return map_names(state).tensors
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from None


def official_names(tensors):
    """The inverse of `map_names`: {official name: array in PyTorch's layout}, with zeros as counters of the norms."""
    state = {}
    for name, array in tensors.items():
        words = name.split('.')
        # the final norm and the norms after stages have the same name in both
        keep = 'norm' if words[0] == 'norm' or re.match(r'stages\.\d+\.norm\.', name) else None
        new = '.'.join(word if word == keep else _OFFICIAL.get(word, word) for word in words)
        state[new] = array.T if name == 'head.weight' else array
        if new.endswith('.running_var'):
            state[new[:-len('running_var')] + _COUNTER] = np.zeros((), np.int64)
    return state


def infer_architecture(tensors):
    """Finds the arguments of `replknet.RepLKNet` that give the shapes of a state dict.

    Args:
        tensors: {name: array} with this project's names.
    Returns:
        dict of arguments.
    Raises:
        CheckpointError: a tensor is missing from whose shape an argument follows.
    """
    def shape(name, dimensions=4):
        if name not in tensors or tensors[name].ndim != dimensions or 0 in tensors[name].shape:
            raise CheckpointError(f'has no usable tensor {name}, which every RepLKNet has')
        return tensors[name].shape

    present = _indices(tensors, 'stages')
    stages = [f'stages.{stage}' for stage in range(len(present))]
    merged = any('.large_kernel_reparam.' in name for name in tensors)
    large = 'large_kernel_reparam' if merged else 'large_kernel_origin.conv'
    small = 'stages.0.blocks.0.large_kernel.small_kernel_conv.conv.weight'
    # block 0 of a stage is a RepLKBlock, block 1 a ConvFFN
    dw_convs, ffn_convs = ([shape(f'{stage}.blocks.{block}.pw_conv_1.conv.weight') for stage in stages]
                           for block in (0, 1))
    architecture = {
        'large_kernel_sizes': [shape(f'{stage}.blocks.0.large_kernel.{large}.weight')[-1] for stage in stages],
        'layers': [(len(_indices(tensors, f'{stage}.blocks')) + 1) // 2 for stage in stages],
        'channels': [inputs for _, inputs, _, _ in dw_convs],
        'dw_ratio': _ratio(dw_convs), 'ffn_ratio': _ratio(ffn_convs),
        'in_channels': shape('stem.0.conv.weight')[1], 'merged': merged,
        'small_kernel': shape(small)[-1] if small in tensors else 0,
        'num_classes': shape('head.weight', 2)[1] if 'head.weight' in tensors else None}
    normed = sorted(stage for stage in present if f'stages.{stage}.norm.weight' in tensors)
    if normed:
        architecture.update(out_indices=normed, norm_intermediate_features=True)
    return architecture


def _ratio(shapes):
    """The ratio r with int(r * inputs) == outputs in all 1x1 convolutions [outputs, inputs, 1, 1], if there is one."""
    ratio = max((outputs / inputs for outputs, inputs, _, _ in shapes), default=0.0)
    while any(int(inputs * ratio) < outputs for outputs, inputs, _, _ in shapes):
        ratio = float(np.nextafter(ratio, np.inf))  # the quotient was rounded down
    return ratio


def variant_name(architecture):
    """Name of the published variant, such as 'replknet_31b', or None if width, depth or kernel sizes differ."""
    from replknet import VARIANTS
    for name, variant in VARIANTS.items():
        wanted = {'small_kernel': 5, 'dw_ratio': 1.0, 'ffn_ratio': 4.0, **variant}
        if architecture['merged']:  # the size of the small kernel is lost
            del wanted['small_kernel']
        if all(architecture[key] == value for key, value in wanted.items()):
            return name
    return None


def expected_shapes(architecture):
    """{name: shape} of the tensors of `RepLKNet(**architecture)`, without allocating them.

    Raises:
        CheckpointError: no model has these sizes.
    """
    import paddle

    from replknet import RepLKNet
    try:
        with paddle.LazyGuard():
            model = RepLKNet(**architecture)
    except ValueError as error:
        raise CheckpointError(f'no RepLKNet has these shapes: {error}') from None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _indices(names, group):
    """The set of numbers that follow `group.` in the names."""
    pattern = re.compile(re.escape(group) + r'\.(\d{1,4})\.')
    return {int(match.group(1)) for match in map(pattern.match, names) if match}
