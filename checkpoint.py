"""Checkpoints of a run: written atomically, read without executing anything, loaded strictly.

A checkpoint is one file, a pickle of plain values and numpy arrays under structured names, that `paddle.load` reads
as well: `model`, `model_ema`, `optimizer`, `scaler`, `epoch` and `step` (both counted as done), `best`, `config`, and
`weights_key`, which names the entry that stands for the file where one set of weights is wanted.
"""
import pickle
import re

import numpy as np
import paddle

from errors import UserError
from files import atomic_file
from safe_load import read_checkpoint

FORMAT = 1


def save_checkpoint(path, state):
    """Writes `state` so that a crash leaves the old file whole."""
    with atomic_file(path) as file:
        pickle.dump({'format': FORMAT, **state}, file, protocol=4)


def read_run_checkpoint(path):
    """The state that `save_checkpoint` wrote.

    Raises:
        UserError: not a whole checkpoint of a run.
    """
    state = read_checkpoint(path)
    missing = [key for key in ('format', 'model', 'optimizer', 'epoch', 'step', 'best', 'config', 'weights_key')
               if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f'{path}: holds no run to resume (no {", ".join(missing)}); '
                        'resume from last.pdparams of a run folder, or start from weights with -pretrained')
    if state['format'] != FORMAT:
        raise UserError(f'{path}: checkpoint format {state["format"]}; this version reads {FORMAT}')
    return state


def model_arrays(model):
    """Weights and buffers by structured name as numpy arrays; bfloat16, which numpy lacks, as float32."""
    return {name: _as_array(tensor) for name, tensor in model.state_dict().items()}


def load_weights(model, weights, origin, drop_head=False):
    """Copies `weights` into `model`, all or none.

    Args:
        weights: arrays by structured name.
        origin: where they come from, for messages.
        drop_head: leave the head as initialised where its class count differs.
    Returns:
        names that were left out on purpose.
    Raises:
        UserError: a tensor is missing, surplus or of another shape; the text lists them.
    """
    own = model.state_dict()
    dropped = []
    if drop_head:
        dropped = [name for name in ('head.weight', 'head.bias')
                   if name in own and name in weights and tuple(weights[name].shape) != tuple(own[name].shape)]
    missing = [name for name in own if name not in weights]
    surplus = [name for name in weights if name not in own]
    mismatched = [f'{name} {list(weights[name].shape)} for {list(own[name].shape)}' for name in own
                  if name in weights and name not in dropped and tuple(weights[name].shape) != tuple(own[name].shape)]
    problems = [f'{len(names)} {kind}: {", ".join(names[:8])}{", ..." if len(names) > 8 else ""}'
                for kind, names in (('missing', missing), ('surplus', surplus), ('of another shape', mismatched))
                if names]
    if problems:
        raise UserError(f'{origin}: the weights do not fit the model: {"; ".join(problems)}')
    for name, tensor in own.items():
        if name not in dropped:
            tensor.set_value(paddle.to_tensor(np.ascontiguousarray(weights[name])).astype(tensor.dtype))
    return dropped


def optimizer_arrays(optimizer, model):
    """The optimizer's state by the structured names of the model's parameters.

    Paddle's own names (`conv2d_316.w_0_moment1_0`) count every layer the process has built, so they would not fit
    another process.
    """
    structured = {parameter.name: name for name, parameter in model.named_parameters()}
    state = optimizer.state_dict()
    masters = state.pop('master_weights', {})
    accumulators = {}
    for key, tensor in state.items():
        if isinstance(tensor, paddle.Tensor):
            # the longest name that fits: one parameter's name may be the beginning of another's
            name = max((n for n in structured if key.startswith(n + '_')), key=len)
            # under O2 the moments belong to a float32 master copy of the weight
            kind = re.sub(r'^fp32_master_\d+_|_\d+$', '', key[len(name) + 1:])
            accumulators.setdefault(structured[name], {})[kind] = _as_array(tensor)
    return {'name': type(optimizer).__name__, 'accumulators': accumulators,
            'master_weights': {structured[name]: _as_array(tensor) for name, tensor in masters.items()}}


def load_optimizer_arrays(optimizer, model, state, origin):
    """Gives a fresh optimizer the state of `optimizer_arrays`.

    Raises:
        UserError: it is of another model or another kind of optimizer.
    """
    if state['name'] != type(optimizer).__name__:
        raise UserError(f"{origin}: trained with {state['name']}, TRAIN.OPTIMIZER.NAME asks for "
                        f'{type(optimizer).__name__}; to change it start from the weights with -pretrained')
    parameters = dict(model.named_parameters())
    unknown = [name for name in (*state['accumulators'], *state['master_weights']) if name not in parameters]
    if unknown:
        raise UserError(f'{origin}: the optimizer state has parameters that the model has not: '
                        f'{", ".join(unknown[:8])}')
    flat, masters = {}, {}
    for name, parameter in parameters.items():
        owner = parameter.name
        if not parameter.stop_gradient and parameter.dtype in (paddle.float16, paddle.bfloat16):  # O2: see above
            owner += '_fp32_master_0'
            masters[parameter.name] = paddle.to_tensor(state['master_weights'].get(name, parameter.astype('float32')))
            masters[parameter.name].name = owner
        flat.update({f'{owner}_{kind}_0': paddle.to_tensor(array)
                     for kind, array in state['accumulators'].get(name, {}).items()})
    if masters:
        flat['master_weights'] = masters
    optimizer.set_state_dict(flat)


def _as_array(tensor):
    return (tensor.astype('float32') if tensor.dtype == paddle.bfloat16 else tensor).numpy()
