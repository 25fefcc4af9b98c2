"""Reads checkpoints of PyTorch, PaddlePaddle and safetensors without executing any code in them.

    checkpoint = read_checkpoint('replknet.pth')            # nested dicts of NumPy arrays and plain values
    state, key = find_weights(checkpoint, key='auto')       # the state dict inside, {name: array}

Both frameworks save pickles, and a pickle is a program that may call any Python function. `restricted_pickle` runs
that program without calling anything, and `rebuild` makes arrays of the few functions that stand for tensors and
containers; any other name is refused. Memory is allocated only after a check that the file holds as many bytes, and
the total is bounded by the size of the file. Checkpoints of this project end with a SHA-256, which is verified.

Needs neither torch nor paddle.
"""
import errno
import json
import math
import os
import pickle  # for the names of its opcodes
import struct
from io import BytesIO

import numpy as np

from atomic_file import check_digest
from errors import CheckpointError, why_unreadable
from port_weights.arrays import BFLOAT16, Budget, as_array, is_shape, itemsize, read_bytes
from port_weights.rebuild import Resolver
from port_weights.restricted_pickle import Unpickler
from port_weights.torch_zip import TorchZip

_USUAL_KEYS = ('model', 'state_dict', 'model_ema')
_OTHER_FILES = {b'<': 'is a web page: the download was refused or needs a confirmation',
                b'version https://git-lfs': 'is a Git LFS pointer: fetch the file itself',
                b'\x1f\x8b': 'is a gzip archive: unpack it first'}
MAX_HEADER = 1 << 23  # bytes, of a safetensors file; RepLKNet's has 200 thousand
_SAFETENSORS_TYPES = {'F64': 'f8', 'F32': 'f4', 'F16': 'f2', 'BF16': BFLOAT16, 'I64': 'i8', 'I32': 'i4', 'I16': 'i2',
                      'I8': 'i1', 'U64': 'u8', 'U32': 'u4', 'U16': 'u2', 'U8': 'u1', 'BOOL': '?'}


def read_checkpoint(path):
    """Reads a checkpoint of torch.save (zip archive, or the format before 1.6), paddle.save or safetensors.

    The content of the file decides which of these it is, not its name.

    Args:
        path: file name.
    Returns:
        what was saved: nested dicts, lists and tuples of NumPy arrays, plain values and `rebuild.Placeholder`s.
        bfloat16 becomes float32, also the uint16 arrays of Paddle files, which Paddle uses for bfloat16. Sets become
        lists. Arrays may be read-only and may share memory.
    Raises:
        CheckpointError: not a checkpoint, damaged, not readable, or it names a function or class that is not known.
        FileNotFoundError: no such file.
    """
    path = os.fspath(path)
    reason = why_unreadable(path)
    if reason == os.strerror(errno.ENOENT):
        raise FileNotFoundError(f'{path}: no such file')
    if reason:
        raise CheckpointError(f'{path}: cannot be read: {reason}')
    if not os.path.isfile(path):
        raise CheckpointError(f'{path}: is a folder or a device, not a checkpoint file')
    with open(path, 'rb') as file:
        try:
            return _read(file, os.fstat(file.fileno()).st_size)
        except CheckpointError as error:
            raise CheckpointError(f'{path}: {error}') from None


def find_weights(checkpoint, key='auto', path='checkpoint'):
    """Finds the state dict in what `read_checkpoint` returned.

    Args:
        checkpoint: a state dict, or a dict that holds one under `key`.
        key: 'model', 'model_ema', 'state_dict' or any other entry. 'auto' takes the entry that 'weights_key' names
            (in checkpoints of this project), else 'model', 'state_dict' or 'model_ema', else the whole dict.
        path: file name, for messages.
    Returns:
        ({name: array}, key of the state dict, or None if it is the whole checkpoint). Values that are not tensors are
        left out, and a prefix 'module.' or '_orig_mod.' that all names share is removed.
    Raises:
        CheckpointError: no such entry, or no tensors in it.
    """
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path}: holds a {type(checkpoint).__name__} instead of a dict of tensors')
    found = _auto_key(checkpoint) if key == 'auto' else key
    if found is not None and not isinstance(checkpoint.get(found), dict):
        holders = [k for k, v in checkpoint.items() if isinstance(v, dict) and isinstance(k, str) and k.isprintable()]
        raise CheckpointError(f"{path}: has no weights under {key!r}; "
                              f"{'it has ' + ', '.join(holders[:8]) if holders else 'it is a plain state dict'}")
    state = checkpoint if found is None else checkpoint[found]
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, np.ndarray)}
    if not tensors:
        if found is not None and any(isinstance(state.get(k), dict) for k in _USUAL_KEYS):
            return find_weights(state, path=path)[0], found
        raise CheckpointError(f'{path}: has no tensors' + ('' if found is None else f' under {found!r}'))
    unprintable = next((name for name in tensors if not name.isprintable()), None)
    if unprintable is not None:
        raise CheckpointError(f'{path}: has a tensor with an unprintable name, {unprintable!a:.60}')
    for prefix in ('module.', '_orig_mod.'):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix):]: tensor for name, tensor in tensors.items()}
    return tensors, found


def _auto_key(checkpoint):
    named = checkpoint.get('weights_key')
    candidates = (named, *_USUAL_KEYS) if isinstance(named, str) else _USUAL_KEYS
    return next((key for key in candidates if isinstance(checkpoint.get(key), dict)), None)


def _read(file, size):
    head = file.read(64)
    file.seek(0)
    if head.startswith(b'PK\3\4'):
        return _read_torch_zip(file, size)
    if len(head) > 8 and head[8:9] == b'{' and struct.unpack('<Q', head[:8])[0] <= size - 8:
        return _read_safetensors(file, size)
    if head[:1] == pickle.PROTO:
        return _read_pickle(file, size)
    if not head:
        raise CheckpointError('is empty')
    raise CheckpointError(next((what for start, what in _OTHER_FILES.items() if head.lstrip().startswith(start)),
                               'is not a checkpoint of torch, Paddle or safetensors'))


def _read_safetensors(file, size):
    length, = struct.unpack('<Q', file.read(8))
    if length > MAX_HEADER:
        raise CheckpointError('damaged safetensors header')
    try:
        header = json.loads(file.read(length).decode())
        header.pop('__metadata__', None)
        entries = [(tuple(entry['data_offsets']), name, str(entry['dtype']), tuple(entry['shape']))
                   for name, entry in header.items()]
        entries.sort()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError('damaged safetensors header') from None
    budget = Budget(size)
    tensors = {}
    position = 0  # the format allows neither gaps nor overlaps
    for offsets, name, kind, shape in entries:
        dtype = _SAFETENSORS_TYPES.get(kind)
        if dtype is None:
            raise CheckpointError(f'tensor {name!a:.60} is of type {kind!a:.20}, which is not supported')
        nbytes = math.prod(shape) * itemsize(dtype) if is_shape(shape) else -1  # fits no offsets
        if not is_shape(offsets) or offsets != (position, position + nbytes) or 8 + length + position + nbytes > size:
            raise CheckpointError(f'tensor {name!a:.60} does not fit the file: damaged or truncated')
        tensors[name] = as_array(read_bytes(file, nbytes, budget), dtype, '<', shape, budget)
        position += nbytes
    if 8 + length + position != size:
        raise CheckpointError('has bytes that belong to no tensor: damaged')
    return tensors


def _read_torch_zip(file, size):
    budget = Budget(size)
    archive = TorchZip(file, size, budget)
    roots = [name[:-len('data.pkl')] for name in archive.entries
             if name.endswith('/data.pkl') and name.count('/') == 1]
    if len(roots) != 1:
        raise CheckpointError('is a zip archive, but not one of torch.save')
    root = roots[0]
    if f'{root}constants.pkl' in archive.entries:
        raise CheckpointError('is a TorchScript program; save its state_dict() instead')
    order = archive.read(f'{root}byteorder').tobytes() if f'{root}byteorder' in archive.entries else b'little'
    if order not in (b'little', b'big'):
        raise CheckpointError('unknown byte order')
    program = archive.read(f'{root}data.pkl')
    value = Unpickler(BytesIO(program), len(program)).load()

    def read_storage(key):
        name = f'{root}data/{key}'
        if name not in archive.entries:
            raise CheckpointError(f'tensor data {key!r} is missing: damaged')
        return archive.read(name)

    return Resolver(budget, read_storage, '<' if order == b'little' else '>')(value)


def _read_pickle(file, size):
    size = check_digest(file, size)
    if size is None:
        raise CheckpointError('is damaged: its bytes do not match its SHA-256')
    first = Unpickler(file, size).load()
    if first == 0x1950a86a20f9469cfc6c:  # torch before 1.6 starts with this number
        return _read_torch_legacy(file, size)
    if file.tell() != size:
        raise CheckpointError('has bytes after the end of the pickle: damaged')
    return Resolver(Budget(size), None, '<', paddle=True)(first)


def _read_torch_legacy(file, size):
    """The rest of the file after its magic number: version, machine, the value, keys of the storages, their data."""
    budget = Budget(size)
    resolve = Resolver(budget, None, '<')
    version = Unpickler(file, size).load()
    machine = resolve(Unpickler(file, size).load())
    little_endian = machine.get('little_endian', True) if isinstance(machine, dict) else None
    if version != 1001 or type(little_endian) is not bool:
        raise CheckpointError('is of an unknown version of the torch file format')
    order = '<' if little_endian else '>'
    unpickler = Unpickler(file, size)
    value, storages = unpickler.load(), unpickler.storages
    keys = resolve(Unpickler(file, size).load())
    offsets = _legacy_offsets(file, size, keys if isinstance(keys, list) else [], storages, order)

    def read_storage(key):
        if key not in offsets:
            raise CheckpointError(f'tensor data {key!r} is missing: truncated or damaged')
        file.seek(offsets[key])
        return read_bytes(file, storages[key].nbytes, budget)

    return Resolver(budget, read_storage, order)(value)


def _legacy_offsets(file, size, keys, storages, order):
    """{key of a storage: position of its bytes}; each storage is preceded by its number of elements."""
    offsets = {}
    position = file.tell()
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or key in offsets:
            raise CheckpointError('damaged list of tensor data')
        file.seek(position)
        count = file.read(8)
        position += 8
        if len(count) < 8 or struct.unpack(f'{order}q', count)[0] != storage.count or storage.nbytes > size - position:
            raise CheckpointError('tensor data is cut short: truncated or damaged')
        offsets[key] = position
        position += storage.nbytes
    return offsets
