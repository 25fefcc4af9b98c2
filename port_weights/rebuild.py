"""What a pickle may refer to, and how the records of `restricted_pickle.Unpickler` become arrays and containers."""
import math
import re

import numpy as np

from errors import CheckpointError
from port_weights.arrays import BFLOAT16, as_array, is_count, is_shape, itemsize

MAX_DEPTH = 64  # of nested containers
STORAGE_TYPES = {'torch.DoubleStorage': 'f8', 'torch.FloatStorage': 'f4', 'torch.HalfStorage': 'f2',
                 'torch.BFloat16Storage': BFLOAT16, 'torch.LongStorage': 'i8', 'torch.IntStorage': 'i4',
                 'torch.ShortStorage': 'i2', 'torch.CharStorage': 'i1', 'torch.ByteStorage': 'u1',
                 'torch.BoolStorage': '?'}
_UNFINISHED = object()


# ---- records

class Placeholder:
    """Stands for an object that is not data, such as an `argparse.Namespace`.

    Attributes:
        name: module and class.
        args: arguments of its constructor.
        state: usually a dict of its attributes.
    """

    def __init__(self, name, args=(), state=None):
        self.name, self.args, self.state = name, args, state

    def __repr__(self):
        return f'Placeholder({self.name})'


class Global:
    """A function or class that the pickle names; it is never looked up."""

    def __init__(self, name):
        self.name = name


class Call:
    """A call that the pickle asks for, `name(*args)`, and what it then does to the result; nothing is called."""

    def __init__(self, name, args):
        self.name, self.args, self.state, self.items, self.elements = name, args, None, {}, []


class Storage:
    """The data of one or more torch tensors, which is elsewhere in the file under `key`; `count` elements."""

    def __init__(self, dtype, key, count):
        self.dtype, self.key, self.count = dtype, key, count
        self.nbytes = count * itemsize(dtype)


def checked_global(module, name):
    """Global for a name that is known; CheckpointError for any other."""
    if type(module) is not str or type(name) is not str:
        raise CheckpointError('damaged pickle: a global without a name')
    full = f'{_RENAMED_MODULES.get(module, module)}.{name}'
    if full not in _FUNCTIONS and full not in _INERT and full not in STORAGE_TYPES:
        shown = f'{module}.{name}'[:100]
        raise CheckpointError(f"refused: the file names {shown if shown.isprintable() else ascii(shown)}, "
                              'which is neither a tensor nor a plain value')
    return Global(full)


def checked_key(key):
    """`key`, unless it is of a type that is not safe as a key of a dict."""
    # hashing nested tuples can take forever or overflow the stack, and large integers can be made to collide
    if type(key) in (str, bytes, bool, type(None)) or type(key) is int and key.bit_length() <= 60:
        return key
    raise CheckpointError(f'a dict has a key of type {type(key).__name__}')


# ---- what they become

class Resolver:
    """Turns the value of `Unpickler.load` into plain containers, arrays and placeholders.

    Args:
        budget: `arrays.Budget` of the file.
        read_storage: function from the key of a storage to its bytes as a uint8 array; None if the file has none.
        order: byte order of the storages, '<' or '>'.
        paddle: undo what paddle.save does to tensors.
    Raises:
        CheckpointError: when called, with a value that is damaged, nested too deeply, or larger than the budget.
    """

    def __init__(self, budget, read_storage, order, paddle=False):
        self.budget, self.read_storage, self.order, self.paddle = budget, read_storage, order, paddle
        self.done = {}  # id of a value: (the value, its result); _UNFINISHED while it is being resolved
        self.data = {}  # key of a storage: its bytes
        self.depth = 0

    def __call__(self, value):
        if type(value) in (str, bytes, int, float, bool, type(None), np.ndarray):
            return value
        # a hostile file can share values so often that visiting every occurrence would never end
        if id(value) in self.done:
            _, result = self.done[id(value)]
            if result is _UNFINISHED:
                raise CheckpointError('damaged pickle: a container holds itself')
            return result
        if self.depth > MAX_DEPTH:
            raise CheckpointError(f'containers are nested more than {MAX_DEPTH} deep')
        self.done[id(value)] = value, _UNFINISHED  # a reference to the value, so that its id is not reused
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
            # paddle.save turns a tensor in a nested container into (name, array)
            named = self.paddle and len(result) == 2 and type(result[0]) is str and type(result[1]) is np.ndarray
            return result[1] if named else result
        if type(value) is Call:
            try:
                return _FUNCTIONS.get(value.name, Resolver.make_placeholder)(self, value, *value.args)
            except TypeError:
                raise CheckpointError(f'damaged pickle: {value.name} with arguments it does not take') from None
        if type(value) is Global:
            return Placeholder(value.name)
        raise CheckpointError('damaged pickle: tensor data outside of a tensor')

    def mapping(self, items):
        result = {key: self(value) for key, value in items.items()}
        if self.paddle and 'UnpackBigParamInfor@@' in result:
            self.join_slices(result)
        return result

    def join_slices(self, state):
        """Joins the slices into which paddle.save, with protocols 2 and 3, cuts parameters of a gigabyte and more."""
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
            if source is None or type(source) is Global:  # the default factory of a defaultdict
                continue
            source = self(source)
            for pair in source.items() if type(source) is dict else source:
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise CheckpointError('damaged pickle: a dict made of something other than pairs')
                items[checked_key(pair[0])] = pair[1]
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
        return values if type(values) is np.ndarray else tuple(values)  # paddle.save writes a tensor as tuple(array)

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
        if type(data) is not bytes or not isinstance(dtype, np.dtype) or not is_shape(shape) \
                or len(data) != math.prod(shape) * dtype.itemsize:
            raise CheckpointError('an array is larger or smaller than its data: truncated or damaged')
        kind = dtype.str[1:]
        if self.paddle and kind == 'u2':
            kind = BFLOAT16
        order = dtype.str[0].replace('|', '<')
        if fortran:
            return as_array(data, kind, order, shape[::-1], self.budget).T
        return as_array(data, kind, order, shape, self.budget)

    def make_tensor(self, call, storage, offset, shape, strides, *_):
        if type(storage) is not Storage or not is_count(offset) or not is_shape(shape) or not is_shape(strides) \
                or len(shape) != len(strides):
            raise CheckpointError('damaged pickle: a tensor without its data, shape or strides')
        if storage.key not in self.data:
            self.data[storage.key] = self.read_storage(storage.key)
        data = self.data[storage.key]
        if len(data) < storage.nbytes:
            raise CheckpointError(f'tensor data {storage.key!r} is cut short: truncated or damaged')
        return as_array(data, storage.dtype, self.order, shape, self.budget, offset, strides)

    def make_parameter(self, call, data, *_):
        return self(data)

    def make_attribute(self, call, owner, name):
        """A reference to a method of an inert class, such as mmengine saves for its meters; nothing else is allowed."""
        if type(owner) is not Global or owner.name not in _INERT or type(name) is not str:
            raise CheckpointError('refused: the file asks for an attribute of an object')
        return Placeholder(f'{owner.name}.{name}')


_RENAMED_MODULES = {'__builtin__': 'builtins', 'pathlib._local': 'pathlib',
                    'numpy._core.multiarray': 'numpy.core.multiarray',
                    'numpy._core.numeric': 'numpy.core.numeric'}
_FUNCTIONS = {
    'builtins.dict': Resolver.make_dict, 'collections.OrderedDict': Resolver.make_dict,
    'collections.Counter': Resolver.make_dict, 'collections.defaultdict': Resolver.make_dict,
    'builtins.list': Resolver.make_list, 'builtins.set': Resolver.make_list,
    'builtins.frozenset': Resolver.make_list, 'collections.deque': Resolver.make_list,
    'builtins.tuple': Resolver.make_tuple, 'torch.Size': Resolver.make_tuple,
    '_codecs.encode': Resolver.make_bytes, 'builtins.bytes': Resolver.make_bytes,  # protocol 2 has no bytes
    'numpy.dtype': Resolver.make_dtype, 'numpy.core.multiarray._reconstruct': Resolver.make_array,
    'numpy.core.numeric._frombuffer': Resolver.make_array_of_buffer,
    'numpy.core.multiarray.scalar': Resolver.make_scalar,
    'torch._utils._rebuild_tensor': Resolver.make_tensor, 'torch._utils._rebuild_tensor_v2': Resolver.make_tensor,
    'torch._utils._rebuild_parameter': Resolver.make_parameter,
    'builtins.getattr': Resolver.make_attribute,
}
_INERT = {  # become placeholders
    'argparse.Namespace', 'types.SimpleNamespace', 'pathlib.PosixPath', 'pathlib.WindowsPath',
    'pathlib.PurePosixPath', 'pathlib.PureWindowsPath', 'yacs.config.CfgNode', 'fvcore.common.config.CfgNode',
    'addict.addict.Dict', 'mmcv.utils.config.ConfigDict', 'mmengine.config.config.ConfigDict',
    'mmengine.logging.history_buffer.HistoryBuffer', 'numpy.ndarray', 'torch.device', 'torch.float64',
    'torch.float32', 'torch.float16', 'torch.bfloat16', 'torch.int64', 'torch.int32', 'torch.uint8', 'torch.bool',
    'builtins.int', 'builtins.float', 'builtins.bool', 'builtins.str',
}
