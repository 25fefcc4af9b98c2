"""Hand-made checkpoint files that try to run code, to crash the reader or to exhaust memory or time.

`hostile_files()` returns {name: bytes}; each must be refused with a CheckpointError. Where a pickle runs code, the code
creates a file called MARKER.
"""
import io
import json
import struct
import zipfile

import numpy as np

MARKER = 'pwned-by-a-checkpoint'
_SHELL = f'touch {MARKER}'


def text(value):
    data = value.encode('utf-8', 'surrogatepass')
    return b'X' + struct.pack('<I', len(data)) + data


def integer(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, 'little', signed=True)
    return b'\x8a' + bytes([len(data)]) + data


def call(module, name, *args):
    return f'c{module}\n{name}\n('.encode() + b''.join(args) + b'tR'


def stack_call(module, name, *args):
    return text(module) + text(name) + b'\x93(' + b''.join(args) + b'tR'


def pickled(body):
    """A complete pickle of a dict with `body` under 'w'."""
    return b'\x80\x04}' + text('w') + body + b's.'


def array(shape=(2,), data=b'\0' * 8, dtype=b'', state=None):
    dtype = dtype or call('numpy', 'dtype', text('f4'), b'\x89', b'\x88') + b'(K\x03' + text('<') + b'NNN' \
        + integer(-1) * 2 + b'K\0tb'
    state = state if state is not None else (b'K\x01(' + b''.join(map(integer, shape)) + b't' + dtype + b'\x89C'
                                             + bytes([len(data)]) + data)
    return call('numpy.core.multiarray', '_reconstruct', b'cnumpy\nndarray\n', b'K\0\x85', b'C\x01b') + b'(' + state \
        + b'tb'


def storage(key='0', count=4, kind='FloatStorage', location='cpu'):
    return b'(' + text('storage') + f'ctorch\n{kind}\n'.encode() + text(key) + text(location) + integer(count) + b'tQ'


def tensor(source=None, offset=0, shape=(4,), strides=(1,)):
    return call('torch._utils', '_rebuild_tensor_v2', source or storage(), integer(offset),
                b'(' + b''.join(map(integer, shape)) + b't', b'(' + b''.join(map(integer, strides)) + b't',
                b'\x89', b'N')


def archive(program, entries=(('data/0', b'\0' * 16),), compression=zipfile.ZIP_STORED, program_name='data.pkl'):
    """A zip archive as torch.save writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', compression) as file:
        for name, data in ((program_name, program), *entries, ('version', b'3\n')):
            file.writestr(zipfile.ZipInfo(f'archive/{name}'), data, compression)
    return buffer.getvalue()


def in_archive(body, **kwargs):
    return archive(b'\x80\x02}' + text('w') + body + b's.', **kwargs)


def safetensors(header, data=b''):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(header)) + header + data


def _legacy(body, keys=(), data=b''):
    magic = 0x1950a86a20f9469cfc6c.to_bytes(10, 'little')
    return (b'\x80\x02\x8a\x0a' + magic + b'.' + b'\x80\x02M\xe9\x03.' + b'\x80\x02}' + text('little_endian')
            + b'\x88s.' + b'\x80\x02}' + text('w') + body + b's.' + b'\x80\x02](' + b''.join(map(text, keys)) + b'e.'
            + data)


def _laughs():
    """A pair that holds the same pair twice, and so on for 60 levels: 2 ** 60 leaves."""
    body = text('ha') + b'\x94'
    for level in range(60):
        body += b'0h' + bytes([level]) + b'h' + bytes([level]) + b'\x86\x94'
    return body


def _overlapping_archive():
    """An archive with 200 entries that share the same megabyte."""
    parts = b''.join(text(str(i)) + tensor(storage(str(i), 1 << 18), shape=(1 << 18,)) for i in range(200))
    program = b'\x80\x02}(' + parts + b'u.'
    out, directory = b'', b''
    body = b'\0' * (1 << 20)
    crc = zipfile.crc32(body)
    first = None
    for name, data in (('archive/data.pkl', program), ('archive/data/0', body)):
        first = len(out)
        out += struct.pack('<4s5H3L2H', b'PK\3\4', 20, 0, 0, 0, 0, zipfile.crc32(data), len(data), len(data),
                           len(name), 0) + name.encode() + data
        if name.endswith('pkl'):
            directory += struct.pack('<4s6H3L5H2L', b'PK\1\2', 20, 20, 0, 0, 0, 0, zipfile.crc32(data), len(data),
                                     len(data), len(name), 0, 0, 0, 0, 0, 0) + name.encode()
    for i in range(200):
        name = f'archive/data/{i}'
        directory += struct.pack('<4s6H3L5H2L', b'PK\1\2', 20, 20, 0, 0, 0, 0, crc, len(body), len(body), len(name),
                                 0, 0, 0, 0, 0, first) + name.encode()
    return out + directory + struct.pack('<4s4H2LH', b'PK\5\6', 0, 0, 201, 201, len(directory), len(out), 0)


def _far_entry():
    """An archive whose only entry has an offset that no file position can be."""
    name = b'archive/data.pkl'
    directory = struct.pack('<4s6H3L5H2L', b'PK\1\2', 45, 45, 0, 0, 0, 0, 0, 0, 0, len(name), 12, 0, 0, 0, 0,
                            0xffffffff) + name + struct.pack('<2HQ', 1, 8, (1 << 64) - 1)
    return b'PK\3\4' + directory + struct.pack('<4s4H2LH', b'PK\5\6', 0, 0, 1, 1, len(directory), 4, 0)


def _twice():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as file:
        file.writestr(zipfile.ZipInfo('archive/data.pkl'), b'\x80\x02}.')
        file.fp.seek(file.start_dir)
        file.NameToInfo.clear()
        file.writestr(zipfile.ZipInfo('archive/data.pkl'), b'\x80\x02}.')
    return buffer.getvalue()


_F4 = np.arange(4, dtype='<f4').tobytes()
_ENTRY = {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]}
_NAMESPACE = b'cargparse\nNamespace\n'


def _code():
    """Pickles that run code."""
    return {
        'os.system': pickled(call('os', 'system', text(_SHELL))),
        'posix.system': pickled(call('posix', 'system', text(_SHELL))),
        'os.system in an archive': in_archive(call('os', 'system', text(_SHELL))),
        'os.system in a legacy file': _legacy(call('os', 'system', text(_SHELL))),
        'os.system as STACK_GLOBAL': pickled(stack_call('os', 'system', text(_SHELL))),
        'subprocess': pickled(call('subprocess', 'Popen', b'](' + text('touch') + text(MARKER) + b'e')),
        'builtins.eval': pickled(call('builtins', 'eval', text(f"open('{MARKER}', 'w')"))),
        'builtins.exec, Python 2 name': pickled(call('__builtin__', 'exec', text(f"open('{MARKER}', 'w')"))),
        'DenseTensor, which Paddle saves as eval': pickled(call('builtins', 'eval', text('data'), b'}')),
        'runpy': pickled(call('runpy', 'run_path', text(MARKER))),
        'numpy function': pickled(call('numpy', 'save', text(MARKER), b'K\x01')),
        'torch.load in the file': pickled(call('torch.storage', '_load_from_bytes', b'C\x02\x80\x02')),
        'getattr of a refused object': pickled(call('builtins', 'getattr', b'cos\nsystem\n', text('__call__'))),
        'getattr of a function': pickled(call('builtins', 'getattr', b'ccollections\nOrderedDict\n', text('update'))),
        'call of a getattr': pickled(b'(' + call('builtins', 'getattr', _NAMESPACE, text('__init__')) + b')R' + b't'),
        'getattr of an instance': pickled(call('builtins', 'getattr', _NAMESPACE + b')\x81', text('__dict__'))),
        'dotted name': pickled(stack_call('builtins', 'dict.__class__.__subclasses__')),
        'dotted name of a placeholder': pickled(stack_call('argparse', 'Namespace.__init__.__globals__')),
        'full-width letters': pickled(stack_call('\uff4fs', 'system', text(_SHELL))),
        'name of two lines': pickled(stack_call('os\n\x1b[2J', 'system', text(_SHELL))),
        'name with a null': pickled(stack_call('os\0', 'system', text(_SHELL))),
        'name with a lone surrogate': pickled(stack_call('os\udc80', 'system', text(_SHELL))),
        'name that is no text': pickled(b'K\x01K\x02\x93)R'),
        'copyreg': pickled(call('copyreg', '_reconstructor', _NAMESPACE, b'cbuiltins\nobject\n', b'N')),
        'add_extension': pickled(call('copyreg', 'add_extension', text('os'), text('system'), b'K\x01')),
        'extension registry': pickled(b'\x82\x01)R'),
        'INST': b'(S\'' + _SHELL.encode() + b'\'\nios\nsystem\n.',
        'INST in protocol 2': pickled(b'(' + text(_SHELL) + b'ios\nsystem\n'),
        'OBJ': pickled(b'(cos\nsystem\n' + text(_SHELL) + b'o'),
        'NEWOBJ_EX': pickled(_NAMESPACE + b')}\x92'),
        'callable that is a value': pickled(text('os.system') + b')R'),
    }


def _arrays():
    """Impossible arrays of NumPy."""
    return {
        'array of objects': pickled(array(state=b'K\x01K\x01\x85' + call('numpy', 'dtype', text('O8'), b'\x89\x88')
                                          + b'\x89](NNe')),
        'array of void': pickled(array(dtype=call('numpy', 'dtype', text('V1000000000'), b'\x89\x88'))),
        'huge array': pickled(array(shape=(1 << 40, 1 << 20))),
        'array of a negative shape': pickled(array(shape=(-2,))),
        'array of a shape that overflows': pickled(array(shape=(1 << 62, 4))),
        'array of a thousand dimensions': pickled(array(shape=(1,) * 1000)),
        'array that is too short': pickled(array(shape=(3,))),
        'array without state': pickled(array()[:-1] + b'0'),
        'array with a state of another kind': pickled(array(state=b'N')),
        'dtype with metadata': pickled(array(dtype=call('numpy', 'dtype', text('f4')) + b'(K\x04NN}K\x01K\x01K\0'
                                             b'tb')),
        'byte order that is an array': pickled(call('numpy', 'dtype', text('f4')) + b'(K\x03' + array() + b'tb'),
        'scalar that is too short': pickled(call('numpy.core.multiarray', 'scalar',
                                                 call('numpy', 'dtype', text('f8')), b'C\x01a')),
        'buffer of a huge shape': pickled(call('numpy.core.numeric', '_frombuffer', b'C\x01a', call(
            'numpy', 'dtype', text('f8')), b'(' + integer(1 << 50) + b't', text('C'))),
    }


def _tensors():
    """Impossible tensors of torch, and storages outside of the file."""
    return {
        'tensor beyond its storage': in_archive(tensor(shape=(5,))),
        'tensor at an offset beyond its storage': in_archive(tensor(offset=1)),
        'offset that overflows': in_archive(tensor(offset=(1 << 62) - 1)),
        'negative offset': in_archive(tensor(offset=-4)),
        'negative stride': in_archive(tensor(offset=3, strides=(-1,))),
        'stride that overflows': in_archive(tensor(shape=(2, 2), strides=((1 << 62) - 1, (1 << 62) - 1))),
        'expanded to a petabyte': in_archive(tensor(shape=(1 << 48,), strides=(0,))),
        'shape and strides of unequal length': in_archive(tensor(shape=(2, 2), strides=(1,))),
        'storage that is too short': in_archive(tensor(storage(count=8))),
        'storage of a negative size': in_archive(tensor(storage(count=-4))),
        'storage of two types': in_archive(b'(' + tensor() + tensor(storage(kind='DoubleStorage', count=2)) + b't'),
        'storage that is a path': in_archive(tensor(storage('../../../../etc/passwd'))),
        'storage of an absolute path': in_archive(tensor(storage('/etc/passwd'))),
        'storage without a class': in_archive(b'(' + text('storage') + b'cargparse\nNamespace\n' + text('0')
                                              + text('cpu') + b'K\x04tQ'),
        'persistent id that is text': in_archive(text('file:///etc/passwd') + b'Q'),
        'storage as a value': in_archive(storage()),
        'tensor of text': in_archive(tensor(text('0'))),
        'quantized tensor': in_archive(call('torch._utils', '_rebuild_qtensor')),
        'legacy storage that is missing': _legacy(tensor(storage('1'))),
        'legacy storage cut short': _legacy(tensor(), ['0'], struct.pack('<q', 4) + _F4[:-1]),
        'legacy storage of another size': _legacy(tensor(), ['0'], struct.pack('<q', 1 << 60) + _F4),
        'legacy key that nobody named': _legacy(b'N', ['0']),
        'legacy byte order that is an array': _legacy(b'N').replace(text('little_endian') + b'\x88',
                                                                    text('little_endian') + array()),
        'legacy keys twice': _legacy(tensor(), ['0', '0'], (struct.pack('<q', 4) + _F4) * 2),
    }


def _structures():
    """Containers that are too deep, hold themselves or have dangerous keys, and invalid programs."""
    return {
        'deep tuples': pickled(b')' + b'\x85' * 100_000),
        'deep lists': pickled(b']' * 100_000 + b'a' * 99_999),
        'deep dicts': pickled((b'}' + text('a')) * 100_000 + b'N' + b's' * 100_000),
        'deep tuple as a key': b'\x80\x04})' + b'\x85' * 100_000 + b'Ns.',
        'shared tuples as a key': b'\x80\x04}' + _laughs() + b'Ns.',
        'list that holds itself': pickled(b']\x94h\0a'),
        'dict that holds itself': b'\x80\x04}\x94' + text('w') + b'h\0s.',
        'placeholder that holds itself': pickled(_NAMESPACE + b')\x81\x94h\0b'),
        'integer keys that collide': pickled(b'}(' + b''.join(
            integer(k * ((1 << 61) - 1)) + b'N' for k in range(50_000)) + b'u'),
        'float as a key': pickled(b'}G' + b'\0' * 8 + b'Ns'),
        'array as a key': pickled(b'}' + array() + b'Ns'),
        'odd number of items': pickled(b'}(' + text('a') + b'u'),
        'items of a list': pickled(b'](' + text('a') + b'Nu'),
        'elements of a dict': pickled(b'}Na'),
        'state of a list': pickled(b']}b'),
        'state of a dict': pickled(b'}}b'),
        'OrderedDict of no pairs': pickled(call('collections', 'OrderedDict', b'](K\x01K\x02e')),
        'OrderedDict of a number': pickled(call('collections', 'OrderedDict', b'K\x01')),
        'tuple of a number': pickled(call('builtins', 'tuple', b'K\x05')),
        'two million dicts': pickled(b'(' + b'}' * 2_100_000 + b't'),
        'no mark': pickled(b't'),
        'empty stack': b'\x80\x040.',
        'two values at the end': b'\x80\x04NN.',
        'end without a value': b'\x80\x04.',
        'no end': b'\x80\x04}',
        'memo that was never set': pickled(b'h\x05'),
        'protocol 255': b'\x80\xff}.',
        'bytes behind the pickle': pickled(b'N') + b'\0',
    }


def _sizes():
    """Lengths beyond the file, and values that grow when they are rebuilt."""
    return {
        'text of 4 EB': pickled(b'\x8d' + struct.pack('<Q', 1 << 62)),
        'text of 4 GB': pickled(b'X' + b'\xff' * 4),
        'bytes of 16 EB': pickled(b'\x8e' + b'\xff' * 8),
        'bytearray of 4 EB': pickled(b'\x96' + struct.pack('<Q', 1 << 62)),
        'integer of 2 GB': pickled(b'\x8b' + struct.pack('<i', (1 << 31) - 1)),
        'out-of-band buffer': pickled(b'\x97'),
        'text encoded a thousand times': pickled(
            b'(' + text('a' * 100_000) + b'\x94' + text('latin1') + b'\x941('
            + b'c_codecs\nencode\nh\0h\1\x86R' * 1000 + b't'),
        'text encoded otherwise': pickled(call('_codecs', 'encode', text('a'), text('utf-32'))),
        'text that is not UTF-8': pickled(b'X\x02\0\0\0\xff\xfe'),
        'name of a megabyte': pickled(b'c' + b'a' * (1 << 20) + b'\n\nN'),
        'slices that are missing': b'\x80\x04}' + text('UnpackBigParamInfor@@') + b'}' + text('w') + b'}' + text(
            'slices') + b']' + text('x') + b'asss.',
        'slices that are text': b'\x80\x04}' + text('UnpackBigParamInfor@@') + b'K\x01s.',
    }


def _containers():
    """Zip archives and safetensors files."""
    return {
        'deflated archive': in_archive(tensor(storage(count=1 << 24), shape=(1 << 24,)),
                                       entries=[('data/0', b'\0' * (1 << 26))], compression=zipfile.ZIP_DEFLATED),
        'overlapping entries': _overlapping_archive(),
        'entry twice': _twice(),
        'entry at an offset of 16 EB': _far_entry(),
        'archive without a pickle': archive(b'', program_name='other'),
        'TorchScript': in_archive(b'N', entries=[('constants.pkl', b'')]),
        'unknown byte order': in_archive(b'N', entries=[('byteorder', b'middle')]),
        'directory of 4 billion entries': b'PK\3\4' + struct.pack(
            '<4sQ2H2L4Q', b'PK\6\6', 44, 45, 45, 0, 0, 1 << 32, 1 << 32, 0, 0) + struct.pack(
            '<4sLQL', b'PK\6\7', 0, 4, 1) + struct.pack('<4s4H2LH', b'PK\5\6', 0, 0, 65535, 65535, 0xffffffff,
                                                        0xffffffff, 0),
        'safetensors header of 16 EB': b'\xff' * 8 + b'{}',
        'safetensors header beyond the file': struct.pack('<Q', 100) + b'{}',
        'safetensors of deep JSON': safetensors(b'{"a":' + b'[' * 100_000 + b']' * 100_000 + b'}'),
        'safetensors that is no dict of tensors': safetensors({'a': 5}),
        'safetensors without offsets': safetensors({'a': {'dtype': 'F32', 'shape': [4]}}, _F4),
        'safetensors of a negative offset': safetensors({'a': dict(_ENTRY, data_offsets=[-16, 0])}, _F4),
        'safetensors of one offset': safetensors({'a': dict(_ENTRY, data_offsets=[0])}, _F4),
        'safetensors of mixed offsets': safetensors({'a': _ENTRY, 'b': dict(_ENTRY, data_offsets=['0', None])}, _F4),
        'safetensors of fractional offsets': safetensors({'a': dict(_ENTRY, data_offsets=[0.0, 16.0])}, _F4),
        'safetensors in UTF-16': safetensors(json.dumps({'a': _ENTRY}).encode('utf-16-le'), _F4),
        'safetensors of overlapping tensors': safetensors({'a': _ENTRY, 'b': _ENTRY}, _F4),
        'safetensors with a gap': safetensors({'a': dict(_ENTRY, data_offsets=[4, 20])}, _F4 + b'1234'),
        'safetensors with bytes behind': safetensors({'a': _ENTRY}, _F4 + b'1234'),
        'safetensors of a shape that overflows': safetensors({'a': dict(_ENTRY, shape=[1 << 40, 1 << 40])}, _F4),
        'safetensors of a shape that is text': safetensors({'a': dict(_ENTRY, shape='4')}, _F4),
        'safetensors of an unknown type': safetensors({'a': dict(_ENTRY, dtype='F8_E4M3')}, _F4),
        'safetensors cut short': safetensors({'a': _ENTRY}, _F4[:-1]),
        'safetensors of a huge number': safetensors(b'{"a":' + b'9' * 100_000 + b'}'),
    }


def hostile_files():
    """{name: bytes} of all files that must be refused."""
    return {**_code(), **_arrays(), **_tensors(), **_structures(), **_sizes(), **_containers()}


def harmless_files():
    """{name: bytes} of files that look hostile but hold only data; these are read."""
    return {
        'shared tuples': pickled(_laughs()),
        'namespace': pickled(b'cargparse\nNamespace\n)\x81}' + text('lr') + b'K\x01sb'),
        'method of a meter': pickled(call('builtins', 'getattr', b'cmmengine.logging.history_buffer\nHistoryBuffer\n',
                                          text('mean'))),
        'highest memo index': pickled(b'Nr\xff\xff\xff\xff'),
        'archive with names outside': in_archive(tensor(), entries=[('data/0', b'\0' * 16),
                                                                     ('../../../tmp/evil', b'x')]),
    }
