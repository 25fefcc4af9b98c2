"""A pickle interpreter that calls nothing: pickles of tensors and plain values become arrays and containers."""
import math
import pickle  # for the names of its opcodes
import re
import struct

import numpy as np

from errors import CheckpointError
from port_weights.arrays import _TORCH_TYPES, BFLOAT16, _as_array, _is_count, _is_shape, _itemsize

MAX_OPERATIONS = 2_000_000  # of one pickle; the training state of RepLKNet-XL has 300 thousand
MAX_DEPTH = 64              # of nested containers


class Placeholder:
    """Stands for an object that is not data, such as `argparse.Namespace`; holds what the file says of it.

    Attributes: `name` (module and class), `args` of its constructor and `state`, mostly a dict of its attributes.
    """

    def __init__(self, name, args=(), state=None):
        self.name, self.args, self.state = name, args, state

    def __repr__(self):
        return f'Placeholder({self.name})'


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
