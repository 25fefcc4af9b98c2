"""Arrays over the bytes of a checkpoint file; every size is checked before memory is allocated."""
import math

import numpy as np

from errors import CheckpointError

BFLOAT16 = 'bfloat16'  # NumPy has no such type: these tensors become float32, which is exact


class Budget:
    """Limits the memory that reading a file may allocate.

    The limit is four times the size of the file: its bytes, the arrays over them, and twice as much again for
    bfloat16.
    """

    def __init__(self, size):
        self.left = 4 * size + (1 << 20)

    def spend(self, nbytes):
        """Raises CheckpointError when the limit is exceeded."""
        self.left -= nbytes
        if self.left < 0:
            raise CheckpointError('describes more data than the file holds')


def is_count(value):
    """Whether `value` can be a size, an offset or a stride."""
    return type(value) is int and 0 <= value < 1 << 62


def is_shape(value):
    """Whether `value` can be a shape or strides."""
    return type(value) is tuple and len(value) <= 32 and all(is_count(n) for n in value)


def itemsize(dtype):
    """Bytes per element as stored; `dtype` is BFLOAT16 or anything that `numpy.dtype` takes."""
    return 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize


def read_bytes(file, nbytes, budget):
    """The next `nbytes` bytes as a uint8 array. The caller has checked that the file holds them."""
    budget.spend(nbytes)
    data = np.empty(nbytes, np.uint8)
    if file.readinto(data) != nbytes:
        raise CheckpointError('is truncated')
    return data


def as_array(data, dtype, order, shape, budget, offset=0, strides=None):
    """Array over the buffer `data`, after a check that all its elements are inside.

    Args:
        data: bytes or uint8 array.
        dtype: NumPy type without a byte order, such as 'f4', or BFLOAT16.
        order: byte order of the data, '<' or '>'.
        shape: sizes of the array.
        budget: `Budget` that the array is charged to.
        offset, strides: position of the first element and steps, in elements; strides None: C order.
    Returns:
        array in the byte order of this machine; a view of `data` where possible.
    Raises:
        CheckpointError: an element is outside of the data, or the budget is exceeded.
    """
    size = itemsize(dtype)
    count = math.prod(shape)
    if strides is None:
        strides = [math.prod(shape[i + 1:]) for i in range(len(shape))]
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) if count else 0
    if not count:
        offset, strides = 0, [0] * len(shape)
    if count and (last + 1) * size > len(data):
        raise CheckpointError('a tensor is larger than its data: truncated or damaged')
    budget.spend(count * size * (2 if dtype == BFLOAT16 else 1))
    stored = np.dtype('u2' if dtype == BFLOAT16 else dtype).newbyteorder(order)
    array = np.ndarray(shape, stored, data, offset * size, [step * size for step in strides])
    if dtype == BFLOAT16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array if stored.isnative else array.astype(stored.newbyteorder('='))
