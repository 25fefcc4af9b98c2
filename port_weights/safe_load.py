"""Reads checkpoints of PyTorch, PaddlePaddle and safetensors without running anything that stands in them.

    checkpoint = read_checkpoint('replknet.pth')            # nested dicts of NumPy arrays and plain values
    state, key = find_weights(checkpoint, key='auto')       # the state dict inside, {name: array}

Both frameworks save pickles, and a pickle is a program that may call any Python function. Here the program is run by
a small interpreter that calls nothing: a call becomes a `_Call` record, and the records of the few functions that
rebuild tensors and containers are then turned into arrays. Any other global is refused, by name. Nothing is allocated
before the file is seen to hold as many bytes, and the total is bounded by the size of the file.

A checkpoint of this project ends with a digest (`files.DigestWriter`), which is compared.

Needs neither torch nor paddle.
"""
import json
import math
import os
import pickle  # for the names of its opcodes
import struct
import zlib
from io import BytesIO

import numpy as np

from atomic_file import check_digest
from errors import CheckpointError
from port_weights.arrays import (
    _SAFETENSORS_TYPES,
    _as_array,
    _Budget,
    _is_shape,
    _itemsize,
    _read_bytes,
)
from port_weights.restricted_pickle import _Resolver, _Unpickler

MAX_ENTRIES = 100_000       # of a zip archive: one per tensor
MAX_HEADER = 1 << 23        # bytes, of a safetensors file; RepLKNet's has 200 thousand


def read_checkpoint(path):
    """Reads a checkpoint file, told by its content: torch (zip and pre-1.6), paddle.save, safetensors.

    Args:
        path: file name.
    Returns:
        what was saved: nested dicts, lists and tuples of NumPy arrays, plain values and `Placeholder`s. bfloat16
        becomes float32, sets become lists, and uint16 arrays of Paddle files are bfloat16, as Paddle has it. Arrays
        may be read-only and may share memory.
    Raises:
        CheckpointError: not a checkpoint, damaged, or with a global outside the known ones.
        FileNotFoundError: no such file.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f'{path}: no such file')
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
        key: 'model', 'model_ema', 'state_dict' or any other entry; 'auto' takes the entry that 'weights_key' names
            (this project's own checkpoints have it), else 'model', 'state_dict', 'model_ema', else the whole.
        path: file name, for messages.
    Returns:
        ({name: array}, the key, or None when the whole is the state dict). What is no tensor is left out, and so is
        a 'module.' in front of all names.
    Raises:
        CheckpointError: no such entry, or no tensors in it.
    """
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path}: holds a {type(checkpoint).__name__} instead of a dict of tensors')
    found = None if key == 'auto' else key
    if key == 'auto':
        named = checkpoint.get('weights_key')
        candidates = ([named] if isinstance(named, str) else []) + ['model', 'state_dict', 'model_ema']
        found = next((c for c in candidates if isinstance(checkpoint.get(c), dict)), None)
    elif not isinstance(checkpoint.get(key), dict):
        holders = [k for k, v in checkpoint.items() if isinstance(v, dict) and isinstance(k, str) and k.isprintable()]
        raise CheckpointError(f"{path}: has no weights under {key!r}; "
                              f"{'it has ' + ', '.join(holders[:8]) if holders else 'it is a plain state dict'}")
    state = checkpoint if found is None else checkpoint[found]
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, np.ndarray)}
    if not tensors:
        if found is not None and any(isinstance(state.get(k), dict) for k in ('model', 'state_dict', 'model_ema')):
            return find_weights(state, path=path)[0], found
        raise CheckpointError(f'{path}: no tensors' + ('' if found is None else f' under {found!r}'))
    strange = [name for name in tensors if not name.isprintable()]
    if strange:
        raise CheckpointError(f'{path}: a tensor is called {strange[0]!a:.60}')
    for prefix in ('module.', '_orig_mod.'):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix):]: tensor for name, tensor in tensors.items()}
    return tensors, found


def _read(file, size):
    head = file.read(64)
    file.seek(0)
    if head.startswith(b'PK\3\4'):
        return _read_torch_zip(file, size)
    if len(head) > 8 and head[8:9] == b'{' and struct.unpack('<Q', head[:8])[0] <= size - 8:
        return _read_safetensors(file, size)
    if head[:1] == pickle.PROTO:
        return _read_pickle(file, size)
    for start, what in ((b'', 'is empty'), (b'<', 'is a web page: the download was refused or needs a confirmation'),
                        (b'version https://git-lfs', 'is a Git LFS pointer: fetch the file itself'),
                        (b'\x1f\x8b', 'is a gzip archive: unpack it first')):
        if (head == start) if not start else head.lstrip().startswith(start):
            raise CheckpointError(what)
    raise CheckpointError('is not a checkpoint of torch, Paddle or safetensors')


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
    budget = _Budget(size)
    tensors = {}
    position = 0  # the format allows neither gaps nor overlaps
    for offsets, name, kind, shape in entries:
        dtype = _SAFETENSORS_TYPES.get(kind)
        if dtype is None:
            raise CheckpointError(f'tensor {name!a:.60} is of type {kind!a:.20}, which is not supported')
        nbytes = math.prod(shape) * _itemsize(dtype) if _is_shape(shape) else -1  # fits no offsets
        if not _is_shape(offsets) or offsets != (position, position + nbytes) or 8 + length + position + nbytes > size:
            raise CheckpointError(f'tensor {name!a:.60} does not fit the file: damaged or truncated')
        tensors[name] = _as_array(_read_bytes(file, nbytes, budget), dtype, '<', shape, budget)
        position += nbytes
    if 8 + length + position != size:
        raise CheckpointError('has bytes that belong to no tensor: damaged')
    return tensors


def _read_torch_zip(file, size):
    entries = _zip_directory(file, size)
    roots = [name[:-len('data.pkl')] for name in entries if name.endswith('/data.pkl') and name.count('/') == 1]
    if len(roots) != 1:
        raise CheckpointError('is a zip archive, but not one of torch.save')
    root = roots[0]
    if f'{root}constants.pkl' in entries:
        raise CheckpointError('is a TorchScript program; save its state_dict() instead')
    budget = _Budget(size)

    def read(name):
        return _read_zip_entry(file, size, name, entries[name], budget)

    order = read(f'{root}byteorder').tobytes() if f'{root}byteorder' in entries else b'little'
    if order not in (b'little', b'big'):
        raise CheckpointError('unknown byte order')
    data = read(f'{root}data.pkl')
    unpickler = _Unpickler(BytesIO(data), len(data))
    value = unpickler.load()

    def read_storage(key):
        name = f'{root}data/{key}'
        if name not in entries:
            raise CheckpointError(f'tensor data {key!r} is missing: damaged')
        return read(name)

    return _Resolver(budget, read_storage, '<' if order == b'little' else '>')(value)


def _read_pickle(file, size):
    size = check_digest(file, size)
    if size is None:
        raise CheckpointError('is damaged: its bytes do not match its SHA-256')
    first = _Unpickler(file, size).load()
    if first == 0x1950a86a20f9469cfc6c:  # torch before 1.6 starts with this number
        return _read_torch_legacy(file, size)
    if file.tell() != size:
        raise CheckpointError('has bytes after the end of the pickle: damaged')
    return _Resolver(_Budget(size), None, '<', paddle=True)(first)


def _read_torch_legacy(file, size):
    budget = _Budget(size)
    resolve = _Resolver(budget, None, '<')
    version = _Unpickler(file, size).load()
    info = resolve(_Unpickler(file, size).load())
    if version != 1001 or not isinstance(info, dict):
        raise CheckpointError('is of an unknown version of the torch file format')
    unpickler = _Unpickler(file, size)
    value = unpickler.load()
    keys = resolve(_Unpickler(file, size).load())
    order = '<' if info.get('little_endian', True) else '>'
    offsets = {}
    position = file.tell()
    for key in keys if isinstance(keys, list) else ():
        storage = unpickler.storages.get(key) if isinstance(key, str) else None
        if storage is None or key in offsets:
            raise CheckpointError('damaged list of tensor data')
        file.seek(position)
        count = file.read(8)
        nbytes = storage.count * _itemsize(storage.dtype)
        position += 8
        if len(count) < 8 or struct.unpack(f'{order}q', count)[0] != storage.count or nbytes > size - position:
            raise CheckpointError('tensor data is cut short: truncated or damaged')
        offsets[key] = position
        position += nbytes

    def read_storage(key):
        if key not in offsets:
            raise CheckpointError(f'tensor data {key!r} is missing: truncated or damaged')
        file.seek(offsets[key])
        storage = unpickler.storages[key]
        return _read_bytes(file, storage.count * _itemsize(storage.dtype), budget)

    return _Resolver(budget, read_storage, order)(value)


def _zip_directory(file, size):
    """{name: (offset of the local header, bytes, crc)} of an archive of uncompressed entries without a comment."""
    def fields(fmt, offset, signature):
        if not 0 <= offset <= size - struct.calcsize(fmt):
            raise CheckpointError('damaged or truncated zip archive')
        file.seek(offset)
        values = struct.unpack(fmt, file.read(struct.calcsize(fmt)))
        if values[0] != signature:
            raise CheckpointError('damaged or truncated zip archive')
        return values

    *_, count, length, start, _ = fields('<4s4H2LH', size - 22, b'PK\5\6')
    if count == 0xffff or 0xffffffff in (length, start):
        _, _, offset, _ = fields('<4sLQL', size - 42, b'PK\6\7')
        *_, count, length, start = fields('<4sQ2H2L4Q', offset, b'PK\6\6')
    if start + length > size or count * 46 > length or count > MAX_ENTRIES:
        raise CheckpointError('damaged zip directory')
    file.seek(start)
    directory = BytesIO(file.read(length))
    entries = {}
    for _ in range(count):
        head = directory.read(46)
        if len(head) < 46 or head[:4] != b'PK\1\2':
            raise CheckpointError('damaged zip directory')
        (flags, method, _, _, crc, packed, nbytes, name_length, extra_length, comment_length, _, _, _,
         offset) = struct.unpack('<4H3L5H2L', head[8:])
        try:
            name = directory.read(name_length).decode()
        except UnicodeDecodeError:
            raise CheckpointError('damaged zip directory') from None
        extra = directory.read(extra_length)
        directory.seek(comment_length, os.SEEK_CUR)
        if 0xffffffff in (packed, nbytes, offset):
            packed, nbytes, offset = _zip64_sizes(extra, nbytes, packed, offset)
        if method != 0 or packed != nbytes or flags & 1:
            raise CheckpointError(f'zip entry {name!r} is compressed or encrypted; torch.save writes neither')
        if name in entries:
            raise CheckpointError(f'zip entry {name!r} occurs twice')
        entries[name] = offset, nbytes, crc
    return entries


def _zip64_sizes(extra, nbytes, packed, offset):
    while len(extra) >= 4:
        kind, length = struct.unpack('<2H', extra[:4])
        if kind == 1:
            values = list(struct.unpack(f'<{length // 8}Q', extra[4:4 + length // 8 * 8].ljust(length // 8 * 8, b'\0')))
            try:
                nbytes, packed, offset = (values.pop(0) if v == 0xffffffff else v for v in (nbytes, packed, offset))
            except IndexError:
                break
            return packed, nbytes, offset
        extra = extra[4 + length:]
    raise CheckpointError('damaged zip directory')


def _read_zip_entry(file, size, name, entry, budget):
    offset, nbytes, crc = entry
    file.seek(offset)
    head = file.read(30)
    if len(head) < 30 or head[:4] != b'PK\3\4':
        raise CheckpointError(f'zip entry {name!r} is damaged')
    offset += 30 + sum(struct.unpack('<2H', head[26:]))
    if offset + nbytes > size:
        raise CheckpointError(f'zip entry {name!r} is cut short: truncated or damaged')
    file.seek(offset)
    data = _read_bytes(file, nbytes, budget)
    if zlib.crc32(data) != crc:
        raise CheckpointError(f'zip entry {name!r} is damaged: its checksum differs')
    return data
