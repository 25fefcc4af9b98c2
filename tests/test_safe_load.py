"""The checkpoint reader: every format, hostile and damaged files, and that no file is read in another way."""
import argparse
import collections
import json
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / 'fuzz'))
import fuzz_checkpoints  # noqa: E402
import hostile  # noqa: E402

from errors import CheckpointError  # noqa: E402
from port_weights.rebuild import Placeholder  # noqa: E402
from port_weights.safe_load import find_weights, read_checkpoint  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def written(tmp_path, data):
    path = tmp_path / 'file'
    path.write_bytes(data)
    return path


# ---- formats

@pytest.mark.parametrize('file, key, count', [
    ('tiny', None, 297), ('tiny_merged', None, 247), ('tiny_xl', 'state_dict', 227), ('tiny_legacy', None, 297),
    ('tiny_fp16', None, 297), ('tiny_training_state', 'model', 297)])
def test_golden_files(golden, file, key, count):
    state, found = find_weights(read_checkpoint(golden / f'{file}.pth'))
    assert found == key and len(state) == count
    assert state['stem.0.conv.weight'].dtype == (np.float16 if 'fp16' in file else np.float32)
    assert state['stem.0.conv.weight'].shape == (8, 3, 3, 3)
    assert state['norm.num_batches_tracked'].shape == () and state['norm.num_batches_tracked'].dtype == np.int64
    assert all(np.isfinite(array).all() for array in state.values())


def test_training_state_holds_the_rest_as_plain_values_and_placeholders(golden):
    state = read_checkpoint(golden / 'tiny_training_state.pth')
    assert isinstance(state['args'], Placeholder) and state['args'].name == 'argparse.Namespace'
    assert state['args'].state['lr'] == 0.004
    assert type(state['epoch']) is int and type(state['optimizer']) is dict
    model, ema = (find_weights(state, key)[0] for key in ('model', 'model_ema'))
    assert list(model) == list(ema) and not same(model['head.weight'], ema['head.weight'])


@pytest.mark.parametrize('file', ['tiny', 'tiny_merged', 'tiny_legacy', 'tiny_fp16', 'tiny_training_state'])
def test_equals_torch_load(golden, file):
    torch = pytest.importorskip('torch', reason='compares with torch.load: needs torch')
    theirs = torch.load(golden / f'{file}.pth', map_location='cpu', weights_only=False)
    ours = read_checkpoint(golden / f'{file}.pth')
    for part in ('model', 'model_ema') if file == 'tiny_training_state' else (None,):
        a, b = (ours, theirs) if part is None else (ours[part], theirs[part])
        assert list(a) == list(b)
        assert all(same(a[name], b[name].numpy()) for name in b)


@pytest.mark.parametrize('legacy', [False, True])
def test_torch_tensors_of_every_kind(tmp_path, legacy):
    torch = pytest.importorskip('torch', reason='writes with torch.save: needs torch')
    base = torch.arange(24.0).reshape(2, 3, 4)
    values = {'plain': base, 'transposed': base.permute(2, 0, 1), 'slice': base[1, 1:, ::2], 'scalar': torch.tensor(2),
              'empty': torch.zeros(0, 3), 'expanded': torch.ones(1).expand(5), 'double': base.double(),
              'int': torch.tensor([1, -2], dtype=torch.int32), 'bool': torch.tensor([True, False]),
              'byte': torch.tensor([255], dtype=torch.uint8), 'last': base.reshape(1, 2, 3, 4).to(
                  memory_format=torch.channels_last), 'parameter': torch.nn.Parameter(base)}
    more = {'bf16': torch.tensor([1.0, -3.140625, 1e30]).bfloat16(), 'size': base.size(), 'dtype': torch.float32,
            'state': torch.nn.BatchNorm2d(2).state_dict(), 'device': torch.device('cpu')}
    torch.save({**values, **more}, tmp_path / 'x', _use_new_zipfile_serialization=not legacy)
    read = read_checkpoint(tmp_path / 'x')
    for name, value in values.items():
        assert same(read[name], value.detach().numpy()), name
    assert read['bf16'].dtype == np.float32 and read['bf16'].tolist() == more['bf16'].float().tolist()
    assert read['size'] == (2, 3, 4) and read['dtype'].name == 'torch.float32'
    assert list(read['state']) == list(more['state'])
    assert read['transposed'].base is not None  # a view of the same data


def test_big_endian_archive(tmp_path):
    data = hostile.in_archive(hostile.tensor(), entries=[('byteorder', b'big'),
                                                         ('data/0', np.arange(4, dtype='>f4').tobytes())])
    assert read_checkpoint(written(tmp_path, data))['w'].tolist() == [0, 1, 2, 3]


def test_archive_with_64_bit_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, 'ZIP64_LIMIT', 3)
    monkeypatch.setattr(zipfile, 'ZIP_FILECOUNT_LIMIT', 1)
    data = hostile.in_archive(hostile.tensor(), entries=[('data/0', np.arange(4, dtype='<f4').tobytes())])
    assert b'PK\6\6' in data and data.count(b'\xff\xff\xff\xff') > 4
    assert read_checkpoint(written(tmp_path, data))['w'].tolist() == [0, 1, 2, 3]


def test_damaged_weights_are_noticed(tmp_path, golden):
    data = bytearray((golden / 'tiny.pth').read_bytes())
    data[len(data) // 2] ^= 1
    with pytest.raises(CheckpointError, match='checksum'):
        read_checkpoint(written(tmp_path, bytes(data)))


class _Tensor:
    """Is pickled as paddle.save pickles a tensor in a nested container."""

    def __init__(self, name, array):
        self.name, self.array = name, array

    def __reduce__(self):
        return tuple, ((self.name, self.array),)


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('numpy_name', [b'numpy.core', b'numpy._core'])
def test_pickles_of_arrays(tmp_path, protocol, numpy_name):
    state = {'a': np.arange(6, dtype='f4').reshape(2, 3), 'f': np.arange(6.0).reshape(2, 3).T, 'i': np.array(7),
             'big': np.arange(3, dtype='>i4'), 'bool': np.array([True]), 'none': np.zeros((0, 2), 'f2')}
    nested = {'model': {name: _Tensor(f'p_{name}', array) for name, array in state.items()},
              'scalar': np.float64(2.5), 'list': [1, 'x', (2, None), b'y'], 'args': argparse.Namespace(lr=1),
              'bf16': np.array([0x3f80, 0xc049], 'u2'), 'order': collections.OrderedDict(a=1),
              'default': collections.defaultdict(list, a=[1]), 'set': {3}, 'path': Path('x')}
    data = pickle.dumps(nested, protocol)
    other = b'numpy._core' if np.__version__[0] >= '2' else b'numpy.core'
    if other != numpy_name and protocol < 4:  # where names are not preceded by their length
        data = data.replace(other, numpy_name)
    read = read_checkpoint(written(tmp_path, data))
    for name, array in state.items():
        assert read['model'][name].tolist() == array.tolist() and read['model'][name].shape == array.shape
        assert read['model'][name].dtype == array.dtype.newbyteorder('=')
    assert read['scalar'] == 2.5 and read['list'] == [1, 'x', (2, None), b'y'] and read['args'].state == {'lr': 1}
    assert read['bf16'].tolist() == [1.0, -3.140625]
    assert read['order'] == {'a': 1} and read['default'] == {'a': [1]} and read['set'] == [3]


@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_files_of_paddle_save(tmp_path, protocol):
    paddle = pytest.importorskip('paddle')
    layer = paddle.nn.Sequential(paddle.nn.Conv2D(1, 2, 3), paddle.nn.BatchNorm2D(2), paddle.nn.Linear(3, 2))
    optimizer = paddle.optimizer.AdamW(parameters=layer.parameters(),
                                       learning_rate=paddle.optimizer.lr.CosineAnnealingDecay(0.1, 10))
    layer[0](paddle.ones([1, 1, 4, 4])).sum().backward()
    optimizer.step()
    half = paddle.to_tensor([1.0, -3.140625]).astype('bfloat16')
    paddle.save(layer.state_dict(), str(tmp_path / 'state'), protocol=protocol)
    paddle.save({'model': layer.state_dict(), 'optimizer': optimizer.state_dict(), 'half': half, 'epoch': 3},
                str(tmp_path / 'nested'), protocol=protocol)
    state, key = find_weights(read_checkpoint(tmp_path / 'state'))
    nested = read_checkpoint(tmp_path / 'nested')
    inner, inner_key = find_weights(nested)
    assert key is None and inner_key == 'model'
    for name, tensor in layer.state_dict().items():
        assert same(state[name], tensor.numpy()) and same(inner[name], tensor.numpy())
    assert nested['half'].tolist() == [1.0, -3.140625] and nested['epoch'] == 3
    moments = {name for name in nested['optimizer'] if 'moment1' in name}
    assert moments and nested['optimizer']['LR_Scheduler']['last_lr'] == 0.1


def test_parameters_that_paddle_cut_into_slices(tmp_path):
    state = {'w@@.0': np.arange(4, dtype='f4'), 'w@@.1': np.arange(4, 6, dtype='f4'), 'b': np.zeros(1, 'f4'),
             'UnpackBigParamInfor@@': {'w': {'OriginShape': (2, 3), 'slices': ['w@@.0', 'w@@.1']}}}
    read = read_checkpoint(written(tmp_path, pickle.dumps(state, 2)))
    assert list(read) == ['b', 'w'] and read['w'].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_safetensors(tmp_path):
    save_file = pytest.importorskip('safetensors.numpy').save_file
    state = {'a': np.arange(6, dtype='f4').reshape(2, 3), 'h': np.ones(3, 'f2'), 'i': np.array(5),
             'e': np.zeros((0, 2)), 'b': np.array([True, False])}
    save_file(state, tmp_path / 'x', metadata={'format': 'np'})
    read = read_checkpoint(tmp_path / 'x')
    assert set(read) == set(state) and all(same(read[name], state[name]) for name in state)


def test_bfloat16_in_safetensors_is_exact(tmp_path):
    values = np.array([1.0, -3.140625, 1e-40, np.inf, 2.0 ** 127], 'f4')
    upper = (values.view('u4') >> 16).astype('<u2')
    data = hostile.safetensors({'w': {'dtype': 'BF16', 'shape': [5], 'data_offsets': [0, 10]}}, upper.tobytes())
    read = read_checkpoint(written(tmp_path, data))['w']
    assert read.dtype == np.float32 and (read.view('u4') == upper.astype('u4') << 16).all()


# ---- which weights

W = {'w': np.zeros(1)}
V = {'w': np.ones(1)}


@pytest.mark.parametrize('checkpoint, key, found, value', [
    (W, 'auto', None, 0), ({'model': W, 'model_ema': V}, 'auto', 'model', 0),
    ({'model': W, 'model_ema': V}, 'model_ema', 'model_ema', 1),
    ({'state_dict': V, 'meta': {}}, 'auto', 'state_dict', 1), ({'state_dict': V, 'model': W}, 'auto', 'model', 0),
    ({'model_ema': V}, 'auto', 'model_ema', 1), ({'ema': V, 'model': W}, 'ema', 'ema', 1),
    ({'model': W, 'model_ema': V, 'weights_key': 'model_ema'}, 'auto', 'model_ema', 1),
    ({'model': W, 'weights_key': 'model_ema'}, 'auto', 'model', 0),
    ({'model': {'module.w': V['w']}}, 'auto', 'model', 1), ({'model': {'state_dict': V}}, 'auto', 'model', 1),
    ({**W, 'StructuredToParameterName@@': {'w': 'x'}, 'epoch': 3}, 'auto', None, 0)])
def test_find_weights(checkpoint, key, found, value):
    state, where = find_weights(checkpoint, key)
    assert where == found and list(state) == ['w'] and state['w'] == value


@pytest.mark.parametrize('checkpoint, key, message', [
    ([1], 'auto', 'x.pth: holds a list'), ({'epoch': 1}, 'auto', 'x.pth: has no tensors'),
    ({'model': {}}, 'auto', "no tensors under 'model'"), ({'model': W}, 'model_ema', "'model_ema'; it has model"),
    (W, 'model', 'plain state dict'), ({'a\nb': W['w']}, 'auto', 'unprintable name')])
def test_find_weights_says_what_is_wrong(checkpoint, key, message):
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        find_weights(checkpoint, key, path='x.pth')
    assert '\n' not in str(error.value)


# ---- files that are not checkpoints

@pytest.mark.parametrize('data, message', [
    (b'', 'is empty'), (b'<!DOCTYPE html><html>', 'web page'), (b'\n<html>', 'web page'), (b'\x1f\x8b\x08', 'gzip'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'LFS'), (b'just text', 'not a checkpoint'),
    (b'PK\3\4', 'zip'), (b'\x80', 'truncated'), (b'\0' * 100, 'not a checkpoint')])
def test_other_files_are_named(tmp_path, data, message):
    path = written(tmp_path, data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f'{path}: ') and '\n' not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file'):
        read_checkpoint(tmp_path / 'nothing')
    with pytest.raises(CheckpointError, match='folder'):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize('file', ['tiny.pth', 'tiny_legacy.pth', 'paddle', 'safetensors'])
def test_every_truncation_is_noticed(tmp_path, golden, file):
    forms = fuzz_checkpoints.corpus()
    data = (golden / file).read_bytes() if file.endswith('.pth') else forms[f'written {file}']
    ends = [*range(1, 200), *np.linspace(200, len(data) - 1, 200).astype(int)]
    for end in ends:
        if end < len(data):
            with pytest.raises(CheckpointError):
                read_checkpoint(written(tmp_path, data[:end]))


def test_needs_no_framework(golden):
    program = ('import sys; from port_weights.safe_load import read_checkpoint; '
               'read_checkpoint(sys.argv[1]); '
               'sys.exit(bool({"torch", "paddle", "safetensors"} & set(sys.modules)))')
    assert subprocess.run([sys.executable, '-c', program, str(golden / 'tiny.pth')], cwd=ROOT).returncode == 0


# ---- attacks

def test_hostile_files_are_refused():
    files = hostile.hostile_files()
    counts, failures = fuzz_checkpoints.fuzz(len(files), hostile=True)
    assert failures == []
    assert sum(counts.values()) == len(files) > 100
    assert [form for form, outcome in counts if outcome != 'refused'] == []


def test_refusal_names_the_global(tmp_path):
    with pytest.raises(CheckpointError, match=r'file: refused: the file names os\.system'):
        read_checkpoint(written(tmp_path, hostile.hostile_files()['os.system']))


@pytest.mark.parametrize('name', hostile.harmless_files())
def test_strange_but_harmless_files_are_read(tmp_path, name):
    assert 'w' in read_checkpoint(written(tmp_path, hostile.harmless_files()[name]))


def test_the_hostile_pickles_are_real(tmp_path):
    """Plain unpickling runs the code in these files."""
    for name in ('os.system', 'os.system as STACK_GLOBAL', 'builtins.eval'):
        path = written(tmp_path, hostile.hostile_files()[name])
        subprocess.run([sys.executable, '-c', f'import pickle; pickle.load(open({str(path)!r}, "rb"))'], cwd=tmp_path,
                       check=True)
        (tmp_path / hostile.MARKER).unlink()


def test_mutants():
    counts, failures = fuzz_checkpoints.fuzz(800)
    assert failures == []
    assert sum(counts.values()) == 800
    # the test would show little if the first check caught all damage
    assert sum(number for (_, outcome), number in counts.items() if outcome == 'read') > 80


@pytest.mark.long
def test_many_mutants():
    counts, failures = fuzz_checkpoints.fuzz(12000, seed=1)
    assert failures == [] and sum(counts.values()) == 12000


def test_no_other_loader():
    """Files of users are read by safe_load only, which unpickles nothing."""
    pattern = re.compile(r'\b(c?[pP]ickle|dill|joblib|paddle|torch|marshal|shelve)\.(load|loads|open|Unpickler)\('
                         r'|allow_pickle\s*=\s*True|from pickle import|import cPickle')
    found = [f'{path.relative_to(ROOT)}:{number}' for path in ROOT.rglob('*.py')
             if 'tests' not in path.relative_to(ROOT).parts and not any(p.startswith('.') for p in path.parts)
             for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1)
             if pattern.search(line)]
    assert found == []


def test_header_of_safetensors_is_bounded(tmp_path):
    header = json.dumps({'a' * (9 << 20): {}}).encode()
    with pytest.raises(CheckpointError, match='header'):
        read_checkpoint(written(tmp_path, struct.pack('<Q', len(header)) + header))
