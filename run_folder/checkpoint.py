"""Checkpoints of a run: atomic writes, safe reads, and the optimizer's state under the names of the model.

A checkpoint is a pickle of a dict with the keys of `SCHEMA`, followed by its SHA-256 (see atomic_file.py).
`paddle.load` can read it too. The best weights are saved in the same format, without the keys that only resuming needs.
Reading never executes code from the file: see port_weights/safe_load.py.
"""
import pickle
import re
from typing import NamedTuple

import paddle

from atomic_file import DigestWriter, atomic_file
from errors import UserError
from port_weights.load import not_finite
from port_weights.safe_load import read_checkpoint

FORMAT = 2


class Entry(NamedTuple):
    """A key of a run checkpoint.

    Attributes:
        type: of the value.
        required: `read_run_checkpoint` refuses files without it. Files that have all of the required keys have the
            others too, except that model_ema and scaler depend on the settings and the device.
        meaning: of the value.
    """
    type: type
    required: bool
    meaning: str


SCHEMA = {
    # written by save_checkpoint
    'format': Entry(int, True, 'version of this schema: FORMAT'),
    # written by RunState.capture
    'model': Entry(dict, True, 'weights and buffers, {structured name: array}: see model_arrays'),
    'model_ema': Entry(dict, False, 'the same of the moving average of the weights, with TRAIN.MODEL_EMA'),
    'optimizer': Entry(dict, True, 'see optimizer_arrays'),
    'scaler': Entry(dict, False, 'state of the loss scaler, in float16 runs on devices that compute in it'),
    'statistics': Entry(dict, False, "{'model', 'model_ema': {buffer: array [processes, ...]}}, the batch norm "
                                     'statistics of each process; {} between epochs, when all have the same'),
    'epoch': Entry(int, True, 'completed epochs, evaluation included'),
    'step': Entry(int, True, 'completed optimizer steps of all epochs'),
    'sums': Entry(dict, False, 'steps and running sums of the current epoch: see training.progress.epoch_sums'),
    'best': Entry(dict, True, "{'model', 'model_ema': metrics of the best evaluation, and its epoch}"),
    'numbered': Entry(dict, False, "{file: {'epoch', 'acc1' (or mAP) in percent or None, 'weights'}} of numbered "
                                   'checkpoints'),
    'config': Entry(str, True, 'settings as YAML: see config.config_text'),
    'data': Entry(dict, False, "{'train', 'val', 'classes': {'digest', 'length'}} of the lists and of classes.txt: see "
                               'image_files.lists.list_identity'),
    'global_batch': Entry(int, False, 'images per optimizer step, of all processes'),
    'processes': Entry(int, False, 'number of processes'),
    'convolutions': Entry(dict, False, 'times of the implementations of the depthwise convolution measured so far: see '
                                       'large_kernel.autotune.choices'),
    # written by RunFolder
    'weights_key': Entry(str, True, "'model' or 'model_ema': the weights to use where one set is needed"),
    'metrics_bytes': Entry(int, False, 'size of metrics.jsonl; a resumed run discards the lines after it'),
}


def save_checkpoint(path, state, keep_old_as=None):
    """Writes `state`, a dict with keys of `SCHEMA`, atomically; see `atomic_file` for `keep_old_as` and errors."""
    with atomic_file(path, keep_old_as) as file:
        writer = DigestWriter(file)
        pickle.dump({'format': FORMAT, **state}, writer, protocol=4)
        writer.end()


def read_run_checkpoint(path):
    """Reads a checkpoint that a run can be resumed from: a dict with the keys of `SCHEMA`.

    Raises:
        CheckpointError: the file is damaged or not a checkpoint.
        UserError: the checkpoint lacks a required key or has another format.
    """
    state = read_checkpoint(path)
    missing = [key for key, entry in SCHEMA.items()
               if entry.required and not (isinstance(state, dict) and key in state)]
    if missing:
        raise UserError(f'{path}: cannot be resumed (it has no {", ".join(missing)}); '
                        'resume from a run folder, or start from weights with -pretrained')
    if state['format'] != FORMAT:
        raise UserError(f'{path}: checkpoint format {state["format"]}; this version reads {FORMAT}; its weights can '
                        'still be loaded with -pretrained')
    return state


def model_arrays(model):
    """Weights and buffers as {structured name: numpy array}; bfloat16, which NumPy lacks, becomes float32."""
    return {name: _as_array(tensor) for name, tensor in model.state_dict().items()}


def optimizer_arrays(optimizer, model, masters=None, flat=()):
    """The optimizer's state under the structured names of the model's parameters.

    Paddle's own names, such as `conv2d_316.w_0_moment1_0`, contain a count of all layers built in the process, so they
    differ from process to process.

    Args:
        masters: {structured name: float32 parameter} that the optimizer updates in place of the model's parameters of
            these names (AMP level O2).
        flat: the `training.flat.FlatParameters` that it updates as a whole.
    Returns:
        dict: name (class of the optimizer), accumulators {parameter: {kind: array}}, and master_weights
        {parameter: float32 array}.
    """
    masters = masters or {}
    structured = {masters.get(name, parameter).name: name for name, parameter in model.named_parameters()}
    accumulators, entries = {}, optimizer.state_dict()
    for group in flat:
        entries = group.unpacked(entries)
    for key, tensor in entries.items():
        if isinstance(tensor, paddle.Tensor):
            # the longest match, because one parameter's name may be a prefix of another's
            name = max((n for n in structured if key.startswith(n + '_')), key=len)
            kind = re.sub(r'_\d+$', '', key[len(name) + 1:])
            accumulators.setdefault(structured[name], {})[kind] = _as_array(tensor)
    return {'name': type(optimizer).__name__, 'accumulators': accumulators,
            'master_weights': {name: _as_array(tensor) for name, tensor in masters.items()}}


def load_optimizer_arrays(optimizer, model, state, origin, masters=None, flat=()):
    """Loads the result of `optimizer_arrays` into a new optimizer.

    Args:
        state: result of `optimizer_arrays`.
        origin: where it comes from, for messages.
        masters, flat: as for `optimizer_arrays`.
    Raises:
        UserError: it belongs to another model or another kind of optimizer, or is not finite.
    """
    if state['name'] != type(optimizer).__name__:
        raise UserError(f"{origin}: trained with {state['name']}, but TRAIN.OPTIMIZER.NAME selects "
                        f'{type(optimizer).__name__}; to change it, start from the weights with -pretrained')
    parameters, masters = dict(model.named_parameters()), masters or {}
    unknown = [name for name in (*state['accumulators'], *state['master_weights']) if name not in parameters]
    if unknown:
        raise UserError(f'{origin}: the optimizer state has parameters that the model does not have: '
                        f'{", ".join(unknown[:8])}')
    broken = not_finite({**{f'{name} ({kind})': array for name, kinds in state['accumulators'].items()
                            for kind, array in kinds.items()},
                         **{f'{name} (master weight)': array for name, array in state['master_weights'].items()}})
    if broken:
        raise UserError(f'{origin}: the optimizer state is not finite (NaN or infinity): {broken}; use an earlier '
                        'checkpoint')
    for name in state['master_weights'].keys() & masters.keys():
        masters[name].set_value(paddle.to_tensor(state['master_weights'][name]))
    entries = {masters.get(name, parameter).name: {
        f'{kind}_0': paddle.to_tensor(array) for kind, array in state['accumulators'].get(name, {}).items()}
        for name, parameter in parameters.items()}
    for group in flat:
        entries = group.packed(entries)
    optimizer.set_state_dict({f'{name}_{kind}': tensor for name, kinds in entries.items()
                              for kind, tensor in kinds.items()})


def _as_array(tensor):
    return (tensor.astype('float32') if tensor.dtype == paddle.bfloat16 else tensor).numpy()
