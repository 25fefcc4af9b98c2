"""Writes state dicts as safetensors, as pickles for `paddle.load` and as zip files for `torch.load`.

All three formats are written by hand: neither torch nor safetensors is needed, the bytes depend only on the tensors,
and the weights are not copied.
"""
import json
import struct
import zipfile

import numpy as np

_SAFETENSORS_TYPES = {'float32': 'F32', 'int64': 'I64'}
_TORCH_TYPES = {'float32': 'FloatStorage', 'int64': 'LongStorage'}


def write_safetensors(file, state):
    """Writes `state` {name: float32 or int64 array} to a binary file; format: huggingface.co/docs/safetensors."""
    header, position = {'__metadata__': {'format': 'np'}}, 0
    for name, array in state.items():
        header[name] = {'dtype': _SAFETENSORS_TYPES[array.dtype.name], 'shape': list(array.shape),
                        'data_offsets': [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # aligns the data
    file.write(struct.pack('<Q', len(text)) + text)
    for array in state.values():
        file.write(_bytes(array))


def write_paddle(file, state):
    """Writes `state` {name: array} to a binary file as a pickled dict of NumPy arrays, as paddle.save does.

    The pickle refers to NumPy's functions by their names in NumPy 1, which NumPy 2 knows too.
    """
    file.write(b'\x80\x04}(')  # protocol 4, dict, mark
    for name, array in state.items():
        data = _bytes(array)
        file.write(_text(name) + b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n' + _tuple([_integer(0)])
                   + b'C\x01b\x87R(' + _integer(1) + _tuple(map(_integer, array.shape))
                   + b'cnumpy\ndtype\n' + _text(array.dtype.str[1:]) + b'\x89\x88\x87R(' + _integer(3) + _text('<')
                   + b'NNN' + _integer(-1) + _integer(-1) + _integer(0) + b'tb'
                   + b'\x89\x8e' + struct.pack('<Q', data.nbytes))
        file.write(data)
        file.write(b'tb')
    file.write(b'u.')


def write_torch(file, state):
    """Writes `state` {name: float32 or int64 array} to a binary file in the zip format of torch 1.6 and later."""
    program = b'\x80\x02ccollections\nOrderedDict\n)R('
    for index, (name, array) in enumerate(state.items()):
        strides = [int(np.prod(array.shape[i + 1:], dtype=np.int64)) for i in range(array.ndim)]
        program += (_text(name) + b'ctorch._utils\n_rebuild_tensor_v2\n('
                    + _tuple([_text('storage'), f'ctorch\n{_TORCH_TYPES[array.dtype.name]}\n'.encode(),
                              _text(str(index)), _text('cpu'), _integer(array.size)]) + b'Q'
                    + _integer(0) + _tuple(map(_integer, array.shape)) + _tuple(map(_integer, strides))
                    + b'\x89ccollections\nOrderedDict\n)RtR')
    entries = [('data.pkl', program + b'u.'), ('byteorder', b'little'),
               *((f'data/{index}', array) for index, array in enumerate(state.values())), ('version', b'3\n')]
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:
        for name, data in entries:
            info = zipfile.ZipInfo(f'archive/{name}')  # dated 1980, so that equal weights give equal bytes
            # torch may map the file into memory: pad the header's extra field to align the data, as torch.save does
            padding = -(file.tell() + 30 + len(info.filename) + 4) % 64
            info.extra = struct.pack('<2H', 0x4246, padding) + b'Z' * padding
            archive.writestr(info, data if isinstance(data, bytes) else _bytes(data))


def _bytes(array):
    little = array.astype(array.dtype.newbyteorder('<'), copy=False)
    return memoryview(np.ascontiguousarray(little).reshape(-1).view(np.uint8))


# opcodes of pickle protocols 2 and 4

def _text(value):
    data = value.encode()
    return b'X' + struct.pack('<I', len(data)) + data


def _integer(value):
    return b'J' + struct.pack('<i', value) if -1 <= value < 1 << 31 else b'\x8a\x08' + struct.pack('<q', value)


def _tuple(items):
    return b'(' + b''.join(items) + b't'
