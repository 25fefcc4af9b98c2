"""Arrays over the bytes of a checkpoint file, with every size checked before memory is allocated."""
import math

import numpy as np

from errors import CheckpointError

BFLOAT16 = 'bfloat16'       # NumPy has no such type: these tensors become float32, which is exact
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
