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
import re
import struct
import zlib
from io import BytesIO

import numpy as np

from errors import UserError
from files import check_digest

MAX_OPERATIONS = 2_000_000  # of one pickle; the training state of RepLKNet-XL has 300 thousand
MAX_DEPTH = 64              # of nested containers
MAX_ENTRIES = 100_000       # of a zip archive: one per tensor
MAX_HEADER = 1 << 23        # bytes, of a safetensors file; RepLKNet's has 200 thousand
BFLOAT16 = 'bfloat16'       # NumPy has no such type: these tensors become float32, which is exact


class CheckpointError(UserError):
    """A file that is no checkpoint, is damaged, or asks for more than data. One line that names the file."""


class Placeholder:
    """Stands for an object that is not data, such as `argparse.Namespace`; holds what the file says of it.

    Attributes: `name` (module and class), `args` of its constructor and `state`, mostly a dict of its attributes.
    """

    def __init__(self, name, args=(), state=None):
        self.name, self.args, self.state = name, args, state

    def __repr__(self):
        return f'Placeholder({self.name})'


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


# ---- file formats

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


# ---- arrays

_SAFETENSORS_TYPES = {'F64': 'f8', 'F32': 'f4', 'F16': 'f2', 'BF16': BFLOAT16, 'I64': 'i8', 'I32': 'i4', 'I16': 'i2',
                      'I8': 'i1', 'U64': 'u8', 'U32': 'u4', 'U16': 'u2', 'U8': 'u1', 'BOOL': '?'}
_TORCH_TYPES = {'torch.DoubleStorage': 'f8', 'torch.FloatStorage': 'f4', 'torch.HalfStorage': 'f2',
                'torch.BFloat16Storage': BFLOAT16, 'torch.LongStorage': 'i8', 'torch.IntStorage': 'i4',
                'torch.ShortStorage': 'i2', 'torch.CharStorage': 'i1', 'torch.ByteStorage': 'u1',
                'torch.BoolStorage': '?'}


class _Budget:
    """Bounds what a file may make the reader allocate.

    Four times the file: its bytes, the arrays over them, and twice as much again for bfloat16.
    """

    def __init__(self, size):
        self.left = 4 * size + (1 << 20)

    def spend(self, nbytes):
        self.left -= nbytes
        if self.left < 0:
            raise CheckpointError('describes more data than the file holds')


def _is_count(value):
    return type(value) is int and 0 <= value < 1 << 62


def _is_shape(value):
    return type(value) is tuple and len(value) <= 32 and all(_is_count(n) for n in value)


def _itemsize(dtype):
    return 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize


def _read_bytes(file, nbytes, budget):
    """Next `nbytes` bytes, which the caller has seen to be there, as a uint8 array."""
    budget.spend(nbytes)
    data = np.empty(nbytes, np.uint8)
    if file.readinto(data) != nbytes:
        raise CheckpointError('truncated')
    return data


def _as_array(data, dtype, order, shape, budget, offset=0, strides=None):
    """Array over the bytes `data`; `offset` and `strides` in elements, None for C order; bounds are checked here."""
    itemsize = _itemsize(dtype)
    count = math.prod(shape)
    if strides is None:
        strides = [math.prod(shape[i + 1:]) for i in range(len(shape))]
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) if count else 0
    if not count:
        offset, strides = 0, [0] * len(shape)
    if count and (last + 1) * itemsize > len(data):
        raise CheckpointError('a tensor is larger than its data: truncated or damaged')
    budget.spend(count * itemsize * (2 if dtype == BFLOAT16 else 1))
    stored = np.dtype('u2' if dtype == BFLOAT16 else dtype).newbyteorder(order)
    array = np.ndarray(shape, stored, data, offset * itemsize, [s * itemsize for s in strides])
    if dtype == BFLOAT16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array if stored.isnative else array.astype(stored.newbyteorder('='))


# ---- the pickle interpreter

class _Global:
    """A function or class that the pickle names; never looked up."""

    def __init__(self, name):
        self.name = name


class _Call:
    """A call that the pickle asks for, not made: `name(*args)`, then the state, items and elements given to it."""

    def __init__(self, name, args):
        self.name, self.args, self.state, self.items, self.elements = name, args, None, {}, []


class _Storage:
    """The bytes of one or more torch tensors, kept elsewhere in the file."""

    def __init__(self, dtype, key, count):
        self.dtype, self.key, self.count = dtype, key, count


_MARK = object()
_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
_NUMBERS = {pickle.BININT1: '<B', pickle.BININT2: '<H', pickle.BININT: '<i', pickle.BINFLOAT: '>d'}
_TEXTS = {pickle.SHORT_BINUNICODE: '<B', pickle.BINUNICODE: '<I', pickle.BINUNICODE8: '<Q'}
_BYTES = {pickle.SHORT_BINBYTES: '<B', pickle.BINBYTES: '<I', pickle.BINBYTES8: '<Q', pickle.BYTEARRAY8: '<Q'}
_PUTS = {pickle.BINPUT: '<B', pickle.LONG_BINPUT: '<I'}
_GETS = {pickle.BINGET: '<B', pickle.LONG_BINGET: '<I'}
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}


class _Unpickler:
    """Interprets the opcodes of pickle protocols 2 to 5 that the frameworks write; `storages` are those it named."""

    def __init__(self, file, end):
        self.file, self.end, self.storages = file, end, {}

    def take(self, count):
        if count > 4096 and count > self.end - self.file.tell():
            raise CheckpointError('truncated')
        data = self.file.read(count)
        if len(data) != count:
            raise CheckpointError('truncated')
        return data

    def number(self, fmt):
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def load(self):
        """Runs one pickle, up to its end mark. Returns its value, in which calls are `_Call` records."""
        try:
            return self._run()
        except (IndexError, KeyError, UnicodeDecodeError):
            raise CheckpointError('damaged pickle') from None

    def _run(self):
        stack, memo = [], {}

        def pop_mark():
            at = len(stack) - 1
            while stack[at] is not _MARK:  # IndexError when there is none
                at -= 1
            items = stack[at + 1:]
            del stack[at:]
            return items

        if self.take(1) != pickle.PROTO or self.take(1)[0] not in (2, 3, 4, 5):
            raise CheckpointError('is not a pickle of protocol 2 to 5')
        for _ in range(MAX_OPERATIONS):
            op = self.take(1)
            if op in _CONSTANTS:
                stack.append(_CONSTANTS[op])
            elif op in _NUMBERS:
                stack.append(self.number(_NUMBERS[op]))
            elif op in _TEXTS:
                stack.append(self.take(self.number(_TEXTS[op])).decode('utf-8', 'surrogatepass'))
            elif op in _BYTES:
                stack.append(self.take(self.number(_BYTES[op])))
            elif op in _PUTS:
                memo[self.number(_PUTS[op])] = stack[-1]
            elif op in _GETS:
                stack.append(memo[self.number(_GETS[op])])
            elif op == pickle.MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif op == pickle.MARK:
                stack.append(_MARK)
            elif op in _TUPLES:
                count = _TUPLES[op]
                if len(stack) < count:
                    raise IndexError
                stack[-count:] = [tuple(stack[-count:])]
            elif op == pickle.TUPLE:
                stack.append(tuple(pop_mark()))
            elif op in (pickle.EMPTY_LIST, pickle.EMPTY_SET):
                stack.append([])
            elif op == pickle.FROZENSET:
                stack.append(pop_mark())
            elif op == pickle.EMPTY_DICT:
                stack.append({})
            elif op in (pickle.APPEND, pickle.APPENDS, pickle.ADDITEMS):
                values = [stack.pop()] if op == pickle.APPEND else pop_mark()
                _elements_of(stack[-1]).extend(values)
            elif op in (pickle.SETITEM, pickle.SETITEMS):
                pairs = [stack.pop(-2), stack.pop()] if op == pickle.SETITEM else pop_mark()
                _set_items(stack[-1], pairs)
            elif op == pickle.GLOBAL:
                module, name = self.line(), self.line()
                stack.append(_make_global(module, name))
            elif op == pickle.STACK_GLOBAL:
                name, module = stack.pop(), stack.pop()
                stack.append(_make_global(module, name))
            elif op in (pickle.REDUCE, pickle.NEWOBJ):
                args, function = stack.pop(), stack.pop()
                if type(function) is not _Global or type(args) is not tuple:
                    raise CheckpointError('damaged pickle: calls something that is not a function')
                stack.append(_Call(function.name, args))
            elif op == pickle.BUILD:
                state = stack.pop()
                if type(stack[-1]) is not _Call:
                    raise CheckpointError('damaged pickle: sets the state of a plain value')
                stack[-1].state = state
            elif op == pickle.BINPERSID:
                stack.append(self.storage(stack.pop()))
            elif op == pickle.LONG1:
                stack.append(int.from_bytes(self.take(self.take(1)[0]), 'little', signed=True))
            elif op == pickle.FRAME:
                self.take(8)
            elif op == pickle.POP:
                stack.pop()
            elif op == pickle.POP_MARK:
                pop_mark()
            elif op == pickle.STOP:
                if len(stack) != 1 or stack[0] is _MARK:
                    raise IndexError
                return stack[0]
            else:
                raise CheckpointError(f'damaged pickle: opcode {op!r}, which no framework writes')
        raise CheckpointError(f'the pickle has more than {MAX_OPERATIONS} operations')

    def line(self):
        line = self.file.readline(256)
        if not line.endswith(b'\n'):
            raise CheckpointError('damaged pickle: a name without end')
        return line[:-1].decode()

    def storage(self, pid):
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != 'storage' or type(pid[1]) is not _Global:
            raise CheckpointError('damaged pickle: a reference that is not tensor data')
        dtype, key, count = _TORCH_TYPES.get(pid[1].name), pid[2], pid[4]
        if dtype is None:
            raise CheckpointError(f'tensors of type {pid[1].name} are not supported')
        if type(key) is not str or not _is_count(count) or pid[5:] not in ((), (None,)):
            raise CheckpointError('damaged pickle: a reference that is not tensor data')
        known = self.storages.setdefault(key, _Storage(dtype, key, count))
        if (known.dtype, known.count) != (dtype, count):
            raise CheckpointError(f'damaged pickle: tensor data {key!r} is described in two ways')
        return known


def _elements_of(target):
    if type(target) is list:
        return target
    if type(target) is _Call:
        return target.elements
    raise CheckpointError('damaged pickle: appends to something that is not a list')


def _set_items(target, pairs):
    items = target if type(target) is dict else target.items if type(target) is _Call else None
    if items is None or len(pairs) % 2:
        raise CheckpointError('damaged pickle: sets items of something that is not a dict')
    for key, value in zip(pairs[::2], pairs[1::2]):
        items[_checked_key(key)] = value


def _checked_key(key):
    # hashing nested tuples can take forever or overflow the stack, and large integers can be made to collide
    if type(key) in (str, bytes, bool, type(None)) or type(key) is int and key.bit_length() <= 60:
        return key
    raise CheckpointError(f'a dict has a key of type {type(key).__name__}')


def _make_global(module, name):
    if type(module) is not str or type(name) is not str:
        raise CheckpointError('damaged pickle: a global without a name')
    full = f"{_RENAMED_MODULES.get(module, module)}.{name}"
    if full not in _FUNCTIONS and full not in _INERT and full not in _TORCH_TYPES:
        shown = f'{module}.{name}'[:100]
        raise CheckpointError(f"refused: the file names {shown if shown.isprintable() else ascii(shown)}, "
                              'which is neither a tensor nor a plain value')
    return _Global(full)


# ---- from records to values

class _Resolver:
    """Turns the value of `_Unpickler.load` into plain containers, arrays and placeholders.

    Args:
        budget: `_Budget` of the file.
        read_storage: function from a storage's key to its bytes as a uint8 array; None where a file has none.
        order: byte order of the storages, '<' or '>'.
        paddle: undo what paddle.save does to tensors.
    """

    def __init__(self, budget, read_storage, order, paddle=False):
        self.budget, self.read_storage, self.order, self.paddle = budget, read_storage, order, paddle
        self.done, self.depth, self.data = {}, 0, {}

    def __call__(self, value):
        if type(value) in (str, bytes, int, float, bool, type(None), np.ndarray):
            return value
        # values are shared, in a hostile file so often that visiting each occurrence would never end
        if id(value) in self.done:
            _, result = self.done[id(value)]
            if result is _MARK:
                raise CheckpointError('damaged pickle: a container holds itself')
            return result
        if self.depth > MAX_DEPTH:
            raise CheckpointError(f'containers are nested more than {MAX_DEPTH} deep')
        self.done[id(value)] = value, _MARK  # holding the value keeps its id from being used again
        self.depth += 1
        result = self._resolve(value)
        self.depth -= 1
        self.done[id(value)] = value, result
        return result

    def _resolve(self, value):
        if type(value) is dict:
            return self.mapping(value)
        if type(value) is list:
            return [self(v) for v in value]
        if type(value) is tuple:
            result = tuple(self(v) for v in value)
            # how Paddle stores a tensor inside of nested containers
            named = self.paddle and len(result) == 2 and type(result[0]) is str and type(result[1]) is np.ndarray
            return result[1] if named else result
        if type(value) is _Call:
            try:
                return _FUNCTIONS.get(value.name, _Resolver.make_placeholder)(self, value, *value.args)
            except TypeError:
                raise CheckpointError(f'damaged pickle: {value.name} with arguments it does not take') from None
        if type(value) is _Global:
            return Placeholder(value.name)
        raise CheckpointError('damaged pickle: tensor data outside of a tensor')

    def mapping(self, items):
        result = {key: self(value) for key, value in items.items()}
        if self.paddle and 'UnpackBigParamInfor@@' in result:
            self.join_slices(result)
        return result

    def join_slices(self, state):
        """Protocols 2 and 3 of paddle.save cut parameters of a gigabyte and more into slices."""
        try:
            for name, info in state.pop('UnpackBigParamInfor@@').items():
                slices = [state.pop(part) for part in info['slices']]
                self.budget.spend(sum(s.nbytes for s in slices))
                state[name] = np.concatenate(slices).reshape(info['OriginShape'])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise CheckpointError('a parameter saved in slices is damaged') from None

    def make_placeholder(self, call, *args):
        return Placeholder(call.name, self(args), self(call.state))

    def make_dict(self, call, *args):
        items = {}
        for source in args:
            if source is None or type(source) is _Global:  # the factory of a defaultdict
                continue
            source = self(source)
            for pair in source.items() if type(source) is dict else source:
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise CheckpointError('damaged pickle: a dict of something else than pairs')
                items[_checked_key(pair[0])] = pair[1]
        items.update(self.mapping(call.items))
        return items

    def make_list(self, call, values=(), *_):
        values = self(values)
        if type(values) not in (list, tuple):
            raise TypeError
        return [*values, *(self(v) for v in call.elements)]

    def make_tuple(self, call, values=()):
        values = self(values)
        if type(values) not in (list, tuple, np.ndarray):
            raise TypeError
        return values if type(values) is np.ndarray else tuple(values)  # Paddle makes a tuple of a tensor

    def make_bytes(self, call, text='', encoding='latin1'):
        if type(text) is not str or encoding != 'latin1':
            raise TypeError
        self.budget.spend(len(text))
        try:
            return text.encode('latin1')
        except UnicodeEncodeError:
            raise CheckpointError('damaged pickle: bytes that are not latin1') from None

    def make_dtype(self, call, name, *_):
        state = self(call.state)
        if type(name) is not str or not re.fullmatch(r'[<>|=]?(b1|\?|[iu][1248]|f[248])', name):
            raise CheckpointError(f'arrays of type {name!r:.40} are not supported')
        order = state[1] if type(state) is tuple and len(state) > 1 else '='
        if type(order) is not str or order not in ('<', '>', '|', '='):
            raise CheckpointError('damaged pickle: unknown byte order')
        dtype = np.dtype(name)
        return dtype if order in '|=' else dtype.newbyteorder(order)

    def make_array(self, call, *_):
        state = call.state
        if type(state) is not tuple or len(state) != 5:
            raise TypeError
        _, shape, dtype, fortran, data = (self(v) for v in state)
        return self.dense(data, dtype, shape, fortran is True)

    def make_array_of_buffer(self, call, data, dtype, shape, order):
        return self.dense(self(data), self(dtype), self(shape), order == 'F')

    def make_scalar(self, call, dtype, data):
        return self.dense(self(data), self(dtype), (), False)[()]

    def dense(self, data, dtype, shape, fortran):
        if type(data) is not bytes or not isinstance(dtype, np.dtype) or not _is_shape(shape) \
                or len(data) != math.prod(shape) * dtype.itemsize:
            raise CheckpointError('an array is larger or smaller than its data: truncated or damaged')
        kind = dtype.str[1:]
        if self.paddle and kind == 'u2':
            kind = BFLOAT16
        order = dtype.str[0].replace('|', '<')
        if fortran:
            return _as_array(data, kind, order, shape[::-1], self.budget).T
        return _as_array(data, kind, order, shape, self.budget)

    def make_tensor(self, call, storage, offset, shape, strides, *_):
        if type(storage) is not _Storage or not _is_count(offset) or not _is_shape(shape) or not _is_shape(strides) \
                or len(shape) != len(strides):
            raise CheckpointError('damaged pickle: a tensor without its data, shape or strides')
        if storage.key not in self.data:
            self.data[storage.key] = self.read_storage(storage.key)
        data = self.data[storage.key]
        if len(data) < storage.count * _itemsize(storage.dtype):
            raise CheckpointError(f'tensor data {storage.key!r} is cut short: truncated or damaged')
        return _as_array(data, storage.dtype, self.order, shape, self.budget, offset, strides)

    def make_parameter(self, call, data, *_):
        return self(data)

    def make_attribute(self, call, owner, name):
        """mmengine saves references to methods of its meters; of other things none may be asked for."""
        if type(owner) is not _Global or owner.name not in _INERT or type(name) is not str:
            raise CheckpointError('refused: the file asks for an attribute of an object')
        return Placeholder(f'{owner.name}.{name}')


_RENAMED_MODULES = {'__builtin__': 'builtins', 'pathlib._local': 'pathlib',
                    'numpy._core.multiarray': 'numpy.core.multiarray',
                    'numpy._core.numeric': 'numpy.core.numeric'}
_FUNCTIONS = {
    'builtins.dict': _Resolver.make_dict, 'collections.OrderedDict': _Resolver.make_dict,
    'collections.Counter': _Resolver.make_dict, 'collections.defaultdict': _Resolver.make_dict,
    'builtins.list': _Resolver.make_list, 'builtins.set': _Resolver.make_list,
    'builtins.frozenset': _Resolver.make_list, 'collections.deque': _Resolver.make_list,
    'builtins.tuple': _Resolver.make_tuple, 'torch.Size': _Resolver.make_tuple,
    '_codecs.encode': _Resolver.make_bytes, 'builtins.bytes': _Resolver.make_bytes,  # protocol 2 has no bytes
    'numpy.dtype': _Resolver.make_dtype, 'numpy.core.multiarray._reconstruct': _Resolver.make_array,
    'numpy.core.numeric._frombuffer': _Resolver.make_array_of_buffer,
    'numpy.core.multiarray.scalar': _Resolver.make_scalar,
    'torch._utils._rebuild_tensor': _Resolver.make_tensor, 'torch._utils._rebuild_tensor_v2': _Resolver.make_tensor,
    'torch._utils._rebuild_parameter': _Resolver.make_parameter,
    'builtins.getattr': _Resolver.make_attribute,
}
_INERT = {  # become placeholders
    'argparse.Namespace', 'types.SimpleNamespace', 'pathlib.PosixPath', 'pathlib.WindowsPath',
    'pathlib.PurePosixPath', 'pathlib.PureWindowsPath', 'yacs.config.CfgNode', 'fvcore.common.config.CfgNode',
    'addict.addict.Dict', 'mmcv.utils.config.ConfigDict', 'mmengine.config.config.ConfigDict',
    'mmengine.logging.history_buffer.HistoryBuffer', 'numpy.ndarray', 'torch.device', 'torch.float64',
    'torch.float32', 'torch.float16', 'torch.bfloat16', 'torch.int64', 'torch.int32', 'torch.uint8', 'torch.bool',
    'builtins.int', 'builtins.float', 'builtins.bool', 'builtins.str',
}
