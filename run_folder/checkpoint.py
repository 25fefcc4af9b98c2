"""Checkpoints of a run: written atomically, read without executing anything, loaded strictly.

A checkpoint is one file, a pickle of plain values and numpy arrays under structured names, that `paddle.load` reads
as well, followed by a SHA-256 that `safe_load.read_checkpoint` compares. `run.RunState` says what is in it;
`weights_key` names the entry that stands for the file where one set of weights is wanted.
"""
import pickle
import re

import paddle

from atomic_file import DigestWriter, atomic_file
from errors import UserError
from port_weights.safe_load import read_checkpoint

FORMAT = 2


def save_checkpoint(path, state, keep_old_as=None):
    """Writes `state` so that a crash leaves the old file whole; see `files.atomic_file`."""
    with atomic_file(path, keep_old_as) as file:
        writer = DigestWriter(file)
        pickle.dump({'format': FORMAT, **state}, writer, protocol=4)
        writer.end()


def read_run_checkpoint(path):
    """The state of a run that `save_checkpoint` wrote.

    Raises:
        CheckpointError: the file is damaged.
        UserError: it is not a checkpoint of a run.
    """
    state = read_checkpoint(path)
    missing = [key for key in ('format', 'model', 'optimizer', 'epoch', 'step', 'best', 'config', 'weights_key')
               if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f'{path}: holds no run to resume (no {", ".join(missing)}); '
                        'resume from a run folder, or start from weights with -pretrained')
    if state['format'] != FORMAT:
        raise UserError(f'{path}: checkpoint format {state["format"]}; this version reads {FORMAT}; its weights can be '
                        'taken with -pretrained')
    return state


def model_arrays(model):
    """Weights and buffers by structured name as numpy arrays; bfloat16, which numpy lacks, as float32."""
    return {name: _as_array(tensor) for name, tensor in model.state_dict().items()}


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
