"""A pickle interpreter that calls nothing.

A pickle is a program for a stack machine, and some of its opcodes call Python functions. `Unpickler` executes the
opcodes that the frameworks write, except that a call only becomes a `Call` record, which `rebuild.Resolver` turns
into an array or a container if it knows how. Any name outside of its table is refused as soon as it is read.
"""
import pickle  # for the names of its opcodes
from struct import Struct

from errors import CheckpointError
from port_weights.arrays import is_count
from port_weights.rebuild import STORAGE_TYPES, Call, Global, Storage, checked_global, checked_key

MAX_OPERATIONS = 2_000_000  # per pickle; the training state of RepLKNet-XL has 300 thousand
_MARK = object()


class Unpickler:
    """Interprets the opcodes of pickle protocols 2 to 5 that the frameworks write.

    Args:
        file: binary file at the start of a pickle.
        end: position in the file that the pickle must not pass.
    Attributes:
        storages: {key: Storage} that the pickle refers to.
    """

    def __init__(self, file, end):
        self.file, self.end = file, end
        self.stack, self.memo, self.storages = [], {}, {}

    def load(self):
        """Executes one pickle up to its STOP. Returns its value, for a `Resolver`."""
        try:
            return self._run()
        except (IndexError, KeyError, UnicodeDecodeError):
            raise CheckpointError('damaged pickle') from None

    def _run(self):
        if self.take(1) != pickle.PROTO or self.take(1)[0] not in (2, 3, 4, 5):
            raise CheckpointError('is not a pickle of protocol 2 to 5')
        take, handler_of = self.take, _HANDLERS.get
        for _ in range(MAX_OPERATIONS):
            op = take(1)
            handler = handler_of(op)
            if handler is not None:
                handler(self)
            elif op == pickle.STOP:
                if len(self.stack) != 1 or self.stack[0] is _MARK:
                    raise IndexError
                return self.stack[0]
            else:
                raise CheckpointError(f'damaged pickle: opcode {op!r}, which no framework writes')
        raise CheckpointError(f'the pickle has more than {MAX_OPERATIONS} operations')

    def take(self, count):
        """The next `count` bytes of the file."""
        if count > 4096 and count > self.end - self.file.tell():  # before so much memory is allocated
            raise CheckpointError('is truncated')
        data = self.file.read(count)
        if len(data) != count:
            raise CheckpointError('is truncated')
        return data

    def line(self):
        """The next line of the file, without its end."""
        line = self.file.readline(256)
        if not line.endswith(b'\n'):
            raise CheckpointError('damaged pickle: an unterminated name')
        return line[:-1].decode()

    def pop_mark(self):
        """Removes the topmost mark and everything above it from the stack. Returns the list of what was above."""
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not _MARK:  # IndexError when there is none
            at -= 1
        items = stack[at + 1:]
        del stack[at:]
        return items


# ---- handlers of opcodes: functions of an Unpickler, or functions that make one for the format of the operand
# Too few values on the stack are an IndexError, an unknown memo index is a KeyError: `Unpickler.load` catches them.

def _constant(value):
    def push(machine):
        machine.stack.append(value)
    return push


def _operand(fmt):
    """Function that reads the operand of an opcode, a number."""
    unpack, size = Struct(fmt).unpack, Struct(fmt).size

    def read(machine):
        return unpack(machine.take(size))[0]
    return read


def _number(fmt):
    operand = _operand(fmt)

    def push(machine):
        machine.stack.append(operand(machine))
    return push


def _long(machine):
    machine.stack.append(int.from_bytes(machine.take(machine.take(1)[0]), 'little', signed=True))


def _text(fmt):
    length = _operand(fmt)

    def push(machine):
        machine.stack.append(machine.take(length(machine)).decode('utf-8', 'surrogatepass'))
    return push


def _bytes(fmt):
    length = _operand(fmt)

    def push(machine):
        machine.stack.append(machine.take(length(machine)))
    return push


def _put(fmt):
    index = _operand(fmt)

    def put(machine):
        machine.memo[index(machine)] = machine.stack[-1]
    return put


def _memoize(machine):
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(fmt):
    index = _operand(fmt)

    def push(machine):
        machine.stack.append(machine.memo[index(machine)])
    return push


def _frame(machine):
    machine.take(8)


def _pop(machine):
    machine.stack.pop()


def _pop_mark(machine):
    machine.pop_mark()


def _tuple_of(count):
    def replace(machine):
        if len(machine.stack) < count:
            raise IndexError
        machine.stack[-count:] = [tuple(machine.stack[-count:])]
    return replace


def _tuple(machine):
    machine.stack.append(tuple(machine.pop_mark()))


def _empty(container):
    def push(machine):
        machine.stack.append(container())
    return push


def _frozenset(machine):
    machine.stack.append(machine.pop_mark())


def _append(machine):
    value = machine.stack.pop()
    _elements_of(machine.stack[-1]).append(value)


def _appends(machine):
    values = machine.pop_mark()
    _elements_of(machine.stack[-1]).extend(values)


def _elements_of(target):
    if type(target) is list:
        return target
    if type(target) is Call:
        return target.elements
    raise CheckpointError('damaged pickle: appends to something that is not a list')


def _setitem(machine):
    value, key = machine.stack.pop(), machine.stack.pop()
    _set_items(machine.stack[-1], [key, value])


def _setitems(machine):
    pairs = machine.pop_mark()
    _set_items(machine.stack[-1], pairs)


def _set_items(target, pairs):
    items = target if type(target) is dict else target.items if type(target) is Call else None
    if items is None or len(pairs) % 2:
        raise CheckpointError('damaged pickle: sets items of something that is not a dict')
    for key, value in zip(pairs[::2], pairs[1::2]):
        items[checked_key(key)] = value


def _global(machine):
    module, name = machine.line(), machine.line()
    machine.stack.append(checked_global(module, name))


def _stack_global(machine):
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(checked_global(module, name))


def _call(machine):
    args, function = machine.stack.pop(), machine.stack.pop()
    if type(function) is not Global or type(args) is not tuple:
        raise CheckpointError('damaged pickle: calls something that is not a function')
    machine.stack.append(Call(function.name, args))


def _build(machine):
    state = machine.stack.pop()
    if type(machine.stack[-1]) is not Call:
        raise CheckpointError('damaged pickle: sets the state of a plain value')
    machine.stack[-1].state = state


def _persistent_id(machine):
    pid = machine.stack.pop()
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != 'storage' or type(pid[1]) is not Global:
        raise CheckpointError('damaged pickle: a reference that is not tensor data')
    dtype, key, count = STORAGE_TYPES.get(pid[1].name), pid[2], pid[4]
    if dtype is None:
        raise CheckpointError(f'tensors of type {pid[1].name} are not supported')
    if type(key) is not str or not is_count(count) or pid[5:] not in ((), (None,)):
        raise CheckpointError('damaged pickle: a reference that is not tensor data')
    storage = machine.storages.setdefault(key, Storage(dtype, key, count))
    if (storage.dtype, storage.count) != (dtype, count):
        raise CheckpointError(f'damaged pickle: tensor data {key!r} is described in two ways')
    machine.stack.append(storage)


_HANDLERS = {
    # constants, numbers, texts, bytes
    pickle.NONE: _constant(None), pickle.NEWTRUE: _constant(True), pickle.NEWFALSE: _constant(False),
    pickle.BININT1: _number('<B'), pickle.BININT2: _number('<H'), pickle.BININT: _number('<i'),
    pickle.BINFLOAT: _number('>d'), pickle.LONG1: _long,
    pickle.SHORT_BINUNICODE: _text('<B'), pickle.BINUNICODE: _text('<I'), pickle.BINUNICODE8: _text('<Q'),
    pickle.SHORT_BINBYTES: _bytes('<B'), pickle.BINBYTES: _bytes('<I'), pickle.BINBYTES8: _bytes('<Q'),
    pickle.BYTEARRAY8: _bytes('<Q'),
    # memo, stack, frames
    pickle.BINPUT: _put('<B'), pickle.LONG_BINPUT: _put('<I'), pickle.MEMOIZE: _memoize,
    pickle.BINGET: _get('<B'), pickle.LONG_BINGET: _get('<I'),
    pickle.MARK: _constant(_MARK), pickle.POP: _pop, pickle.POP_MARK: _pop_mark, pickle.FRAME: _frame,
    # tuples, lists (for sets too), dicts
    pickle.EMPTY_TUPLE: _constant(()), pickle.TUPLE1: _tuple_of(1), pickle.TUPLE2: _tuple_of(2),
    pickle.TUPLE3: _tuple_of(3), pickle.TUPLE: _tuple,
    pickle.EMPTY_LIST: _empty(list), pickle.EMPTY_SET: _empty(list), pickle.FROZENSET: _frozenset,
    pickle.APPEND: _append, pickle.APPENDS: _appends, pickle.ADDITEMS: _appends,
    pickle.EMPTY_DICT: _empty(dict), pickle.SETITEM: _setitem, pickle.SETITEMS: _setitems,
    # functions, classes and calls, which are only recorded; tensor data
    pickle.GLOBAL: _global, pickle.STACK_GLOBAL: _stack_global, pickle.REDUCE: _call, pickle.NEWOBJ: _call,
    pickle.BUILD: _build, pickle.BINPERSID: _persistent_id,
}
