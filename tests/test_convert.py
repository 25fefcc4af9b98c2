"""Conversion of weights: every origin, every format, and refusals."""
import itertools
import json
import os
import resource
import sys
import time
from pathlib import Path

import forked
import numpy as np
import paddle
import pytest

from atomic_file import atomic_file
from errors import CheckpointError
from port_weights import convert as convert_module
from port_weights.convert import convert, main
from port_weights.names import expected_shapes, infer_architecture, map_names, official_names, variant_name
from port_weights.safe_load import find_weights, read_checkpoint
from port_weights.writers import write_paddle, write_safetensors, write_torch
from replknet import RepLKNet

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ('.safetensors', '.pdparams', '.pth')


def state_of(path, key='auto'):
    return find_weights(read_checkpoint(path), key)[0]


def equal(a, b):
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape
                                    and a[n].tobytes() == b[n].tobytes() for n in a)


def save(path, state, write=write_torch):
    with open(path, 'wb') as file:
        write(file, {name: np.ascontiguousarray(array) for name, array in state.items()})
    return path


def load_model(path, **kwargs):
    tensors = state_of(path)
    model = RepLKNet(**{**infer_architecture(tensors), **kwargs})
    own = model.state_dict()
    assert kwargs or set(own) == set(tensors)
    for name, tensor in own.items():
        tensor.set_value(paddle.to_tensor(np.ascontiguousarray(tensors[name])))
    model.eval()
    return model


@pytest.fixture
def tiny(golden):
    """The official state dict of the tiny model."""
    return state_of(golden / 'tiny.pth')


# ---- the official files

@pytest.mark.parametrize('extension', FORMATS)
@pytest.mark.parametrize('file, key', [
    ('tiny', None), ('tiny_merged', None), ('tiny_xl', None), ('tiny_legacy', None), ('tiny_fp16', None),
    ('tiny_training_state', 'model'), ('tiny_training_state', 'model_ema')])
def test_golden_logits(golden, tmp_path, file, key, extension):
    source, result = golden / f'{file}.pth', tmp_path / f'x{extension}'
    convert(str(source), str(result), key=key or 'auto')
    if extension == '.pth':  # back to this project's names
        convert(str(result), str(tmp_path / 'x.safetensors'))
        result = tmp_path / 'x.safetensors'
    with paddle.no_grad():
        logits = load_model(result)(paddle.to_tensor(np.load(golden / 'input.npy'))).numpy()
    wanted = np.load(golden / 'expected_outputs.npz')[f'{file}_{key}' if key else file]
    assert np.abs(logits - wanted).max() < (2e-3 if file == 'tiny_fp16' else 1e-4)


def test_feature_maps_for_every_subset_of_stages(golden, tmp_path):
    convert(str(golden / 'tiny.pth'), str(tmp_path / 'x.pdparams'))
    wanted = np.load(golden / 'expected_outputs.npz')
    images = paddle.to_tensor(np.load(golden / 'input.npy'))
    for count in range(1, 5):
        for stages in itertools.combinations(range(4), count):
            with paddle.no_grad():
                features = load_model(tmp_path / 'x.pdparams', out_indices=stages, num_classes=None)(images)
            assert len(features) == count
            for stage, feature in zip(stages, features):
                assert np.abs(feature.numpy() - wanted[f'tiny_stage{stage}']).max() < 1e-4


@pytest.mark.parametrize('name, variant', [('31b', 'replknet_31b'), ('31l', 'replknet_31l'), ('xl', 'replknet_xl')])
def test_full_size_names_and_shapes(golden, name, variant):
    shapes = json.loads((golden / f'official_keys_{name}.json').read_text())['tensors']
    state = {key: np.broadcast_to(np.zeros((), np.int64 if 'num_batches' in key else np.float32), shape)
             for key, shape in shapes.items()}
    mapping = map_names(state)
    architecture = infer_architecture(mapping.tensors)
    assert {key: array.shape for key, array in mapping.tensors.items()} == expected_shapes(architecture)
    assert variant_name(architecture) == variant and architecture['num_classes'] == 1000
    assert set(mapping.sources.values()) | set(mapping.dropped) == set(shapes)
    assert all(key.endswith('num_batches_tracked') for key in mapping.dropped)
    assert {key: list(array.shape) for key, array in official_names(mapping.tensors).items()} == shapes


@pytest.mark.parametrize('extension', FORMATS)
def test_round_trip_is_identical(golden, tmp_path, tiny, extension):
    convert(str(golden / 'tiny.pth'), str(tmp_path / f'a{extension}'))
    convert(str(tmp_path / f'a{extension}'), str(tmp_path / 'b.pth'))
    back = state_of(tmp_path / 'b.pth')
    assert list(back) == list(state_of(golden / 'tiny.pth'))
    assert equal({n: a for n, a in back.items() if 'num_batches' not in n},
                 {n: a for n, a in tiny.items() if 'num_batches' not in n})


@pytest.mark.parametrize('extension', FORMATS)
def test_the_bytes_depend_on_the_tensors_only(golden, tmp_path, extension):
    convert(str(golden / 'tiny.pth'), str(tmp_path / f'a{extension}'))
    save(tmp_path / 'other.safetensors', state_of(golden / 'tiny.pth'), write_safetensors)
    time.sleep(0.01)
    convert(str(tmp_path / 'other.safetensors'), str(tmp_path / f'b{extension}'))
    assert (tmp_path / f'a{extension}').read_bytes() == (tmp_path / f'b{extension}').read_bytes()


# ---- other origins

def test_parallel_training_prefix(tmp_path, tiny, golden):
    save(tmp_path / 'a.pth', {f'module.{name}': array for name, array in tiny.items()})
    convert(str(tmp_path / 'a.pth'), str(tmp_path / 'a.pdparams'))
    convert(str(golden / 'tiny.pth'), str(tmp_path / 'b.pdparams'))
    assert (tmp_path / 'a.pdparams').read_bytes() == (tmp_path / 'b.pdparams').read_bytes()


def mmpretrain(tiny):
    names = {name: f'backbone.{name}' for name in tiny}
    names.update({name: f'backbone.stages.3.{name}' for name in tiny if name.startswith('norm.')})
    names.update({name: name.replace('head.', 'head.fc.') for name in tiny if name.startswith('head.')})
    return {new: tiny[name] for name, new in names.items()}


def test_mmpretrain(tmp_path, tiny, golden):
    save(tmp_path / 'a.pth', mmpretrain(tiny))
    convert(str(tmp_path / 'a.pth'), str(tmp_path / 'a.safetensors'))
    convert(str(golden / 'tiny.pth'), str(tmp_path / 'b.safetensors'))
    assert equal(state_of(tmp_path / 'a.safetensors'), state_of(tmp_path / 'b.safetensors'))


@pytest.mark.parametrize('norms', [(), (0, 1, 2, 3), (1, 3)])
def test_backbones_of_detectors(tmp_path, tiny, norms):
    channels = (8, 16, 24, 32)
    state = {f'backbone.{n}': a for n, a in tiny.items() if not n.startswith(('norm', 'head'))}
    for stage in norms:
        for part in ('weight', 'bias', 'running_mean', 'running_var'):
            state[f'backbone.stages.{stage}.norm.{part}'] = np.full(channels[stage], stage + 1, 'f4')
    state['neck.fpn.weight'] = state['roi_head.bbox_head.fc.weight'] = np.zeros(3, 'f4')
    save(tmp_path / 'a.pth', state)
    report = convert(str(tmp_path / 'a.pth'), str(tmp_path / 'a.pdparams'), verify=True)
    assert report.architecture['num_classes'] is None
    assert report.architecture.get('out_indices', []) == list(norms)
    assert {n for n, reason in report.dropped.items() if 'backbone' in reason} == {
        'neck.fpn.weight', 'roi_head.bbox_head.fc.weight'}
    convert(str(tmp_path / 'a.pdparams'), str(tmp_path / 'b.pth'))
    assert {n[9:] for n in state if n.startswith('backbone.') and 'num_batches' not in n} == {
        n for n in state_of(tmp_path / 'b.pth') if 'num_batches' not in n}


def several_heads(tiny):
    state = {n: a for n, a in tiny.items() if not n.startswith('head')}
    for name, classes in (('cls_22k', 13), ('cls_other', 5)):
        state[f'head.{name}.weight'] = np.full((classes, 32), classes, 'f4')
        state[f'head.{name}.bias'] = np.full(classes, classes, 'f4')
    return state


@pytest.mark.parametrize('head, classes', [('cls_22k', 13), ('cls_other', 5), ('none', None)])
def test_several_heads(tmp_path, tiny, head, classes):
    save(tmp_path / 'a.pth', several_heads(tiny))
    report = convert(str(tmp_path / 'a.pth'), str(tmp_path / 'a.safetensors'), head=head, verify=True)
    assert report.architecture['num_classes'] == classes
    state = state_of(tmp_path / 'a.safetensors')
    assert ('norm.weight' in state) == ('head.weight' in state) == (classes is not None)
    if classes:
        assert state['head.weight'].shape == (32, classes) and (state['head.weight'] == classes).all()
    assert len(report.mapped) + len(report.dropped) == len(several_heads(tiny))


@pytest.mark.parametrize('head, message', [
    (None, r'several heads; choose one with convert.py -head=NAME: cls_22k \(13 classes\), cls_other \(5 .* or none'),
    ('cls_1k', "no head 'cls_1k'; it has cls_22k, cls_other")])
def test_head_that_is_not_chosen(tmp_path, tiny, head, message):
    save(tmp_path / 'a.pth', several_heads(tiny))
    with pytest.raises(CheckpointError, match=message):
        convert(str(tmp_path / 'a.pth'), str(tmp_path / 'a.safetensors'), head=head)


def test_file_of_paddle_save(tmp_path):
    """As the earlier port and this project write them: Paddle's names, alone or next to other entries."""
    model = RepLKNet([7, 5], [1, 2], [8, 12], small_kernel=3, dw_ratio=1.5, ffn_ratio=2, num_classes=12)
    paddle.save(model.state_dict(), str(tmp_path / 'a.pdparams'))
    paddle.save({'model': model.state_dict(), 'epoch': 3}, str(tmp_path / 'b.pdparams'))
    for name in 'ab':
        report = convert(str(tmp_path / f'{name}.pdparams'), str(tmp_path / f'{name}.safetensors'), verify=True)
        assert report.variant is None and report.architecture == {
            'large_kernel_sizes': [7, 5], 'layers': [1, 2], 'channels': [8, 12], 'small_kernel': 3, 'dw_ratio': 1.5,
            'ffn_ratio': 2.0, 'num_classes': 12, 'in_channels': 3, 'merged': False}
        assert equal(state_of(tmp_path / f'{name}.safetensors'), {n: t.numpy() for n, t in model.state_dict().items()})


def test_a_square_head_is_transposed_once(tmp_path):
    model = RepLKNet([5], [1], [6], num_classes=6)
    paddle.save(model.state_dict(), str(tmp_path / 'a.pdparams'))
    convert(str(tmp_path / 'a.pdparams'), str(tmp_path / 'a.pth'))
    weight = model.head.weight.numpy()
    assert (state_of(tmp_path / 'a.pth')['head.weight'] == weight.T).all() and not (weight == weight.T).all()


@pytest.mark.parametrize('form', ['f2', 'f8', 'bf16'])
def test_other_precisions_become_float32(tmp_path, tiny, form):
    values = {n: a for n, a in tiny.items() if 'num_batches' not in n}
    if form == 'bf16':  # a Paddle file: uint16
        values = {n: (np.ascontiguousarray(a).view('u4') >> 16).astype('u2')
                  for n, a in map_names(values).tensors.items()}
        wanted = {n: (a.astype('u4') << 16).view('f4') for n, a in values.items()}
        save(tmp_path / 'a', values, write_paddle)
    else:
        values = {n: a.astype(form) for n, a in values.items()}
        wanted = map_names({n: a.astype('f4') for n, a in values.items()}).tensors
        save(tmp_path / 'a', values, write_paddle)
    convert(str(tmp_path / 'a'), str(tmp_path / 'b.safetensors'))
    assert equal(state_of(tmp_path / 'b.safetensors'), wanted)


@pytest.mark.parametrize('merged', [False, True])
def test_expected_shapes_are_those_of_the_model(merged):
    arguments = {'large_kernel_sizes': [9, 7, 5], 'layers': [1, 2, 1], 'channels': [4, 6, 10], 'small_kernel': 3,
                 'dw_ratio': 1.5, 'ffn_ratio': 3, 'num_classes': 3, 'merged': merged}
    model = RepLKNet(**arguments)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert expected_shapes(arguments) == shapes
    inferred = infer_architecture({name: tensor.numpy() for name, tensor in model.state_dict().items()})
    assert inferred == {**arguments, 'in_channels': 3, 'small_kernel': 0 if merged else 3}


@pytest.mark.parametrize('dw_ratio, ffn_ratio, channels', [
    (0.29, 4, [100, 7]), (1.3, 0.7, [7, 30]), (7 / 3, 3.3, [3, 9])])
def test_ratios_that_round(dw_ratio, ffn_ratio, channels):
    model = {'large_kernel_sizes': [5, 3], 'layers': [1, 1], 'channels': channels, 'small_kernel': 0,
             'dw_ratio': dw_ratio, 'ffn_ratio': ffn_ratio, 'num_classes': None}
    shapes = expected_shapes(model)
    inferred = infer_architecture({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()})
    assert expected_shapes(inferred) == shapes


# ---- files read by other libraries

def test_paddle_load_reads_pdparams(golden, tmp_path):
    convert(str(golden / 'tiny.pth'), str(tmp_path / 'x.pdparams'))
    theirs = paddle.load(str(tmp_path / 'x.pdparams'))
    assert equal({n: t.numpy() for n, t in theirs.items()}, state_of(tmp_path / 'x.pdparams'))
    model = RepLKNet(**infer_architecture(state_of(tmp_path / 'x.pdparams')))
    assert model.set_state_dict(theirs) == ([], [])


@pytest.mark.parametrize('names', ['paddle', 'official'])
def test_safetensors_reads_safetensors(golden, tmp_path, names):
    load_file = pytest.importorskip('safetensors.numpy').load_file
    convert(str(golden / 'tiny.pth'), str(tmp_path / 'x.safetensors'), names=names)
    theirs = load_file(tmp_path / 'x.safetensors')
    assert equal(theirs, state_of(tmp_path / 'x.safetensors'))
    assert ('norm.running_mean' in theirs) == (names == 'official')


@pytest.mark.parametrize('mmap', [False, True])
def test_torch_reads_pth(golden, tmp_path, mmap):
    torch = pytest.importorskip('torch', reason='loads the written .pth: needs torch')
    convert(str(golden / 'tiny_training_state.pth'), str(tmp_path / 'x.pth'), key='model_ema')
    theirs = torch.load(str(tmp_path / 'x.pth'), weights_only=True, mmap=mmap)
    original = torch.load(golden / 'tiny_training_state.pth', weights_only=False)['model_ema']
    assert list(theirs) == list(original)
    for name, tensor in original.items():
        assert theirs[name].dtype == tensor.dtype and theirs[name].is_contiguous()
        assert 'num_batches' in name or torch.equal(theirs[name], tensor), name


# ---- the command line

def run(*arguments, cwd=ROOT):
    result = forked.run([sys.executable, str(ROOT / 'port_weights' / 'convert.py'), *map(str, arguments)], cwd=cwd)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize('dashes', ['-', '--'])
def test_command(golden, tmp_path, dashes):
    status, out, err = run(golden / 'tiny_training_state.pth', 'x', f'{dashes}key=model_ema', f'{dashes}reference',
                           golden / 'expected_outputs.npz', f'{dashes}report=report.txt', cwd=tmp_path)
    assert status == 0, err
    assert 'logits agree' in out and '10 classes' in out and 'model_ema' in out
    assert sorted(os.listdir(tmp_path)) == ['report.txt', 'x.safetensors']
    listed = (tmp_path / 'report.txt').read_text()
    source = state_of(golden / 'tiny_training_state.pth', 'model_ema')
    assert all(sum(f' {name} ' in line.replace(':', ' ') + ' ' for line in listed.splitlines()
                   if line.startswith(('mapped', 'dropped'))) >= 1 for name in source)
    assert sum(line.startswith(('mapped', 'dropped')) for line in listed.splitlines()) == len(source)


def damaged(tiny, kind):
    state = dict(tiny)
    if kind == 'missing':
        del state['stages.2.blocks.3.pw1.conv.weight']
    elif kind == 'surplus':
        state['stages.2.blocks.1.extra.weight'] = np.zeros(3, 'f4')
    elif kind == 'shape':
        state['transitions.0.1.conv.weight'] = np.zeros((16, 1, 5, 5), 'f4')
    elif kind == 'stage':
        state = {n: a for n, a in state.items() if not n.startswith('stages.1.')}
    elif kind == 'others':
        state = {'conv1.weight': np.zeros((1, 1), 'f4'), 'bn.running_mean': np.zeros(1, 'f4')}
    elif kind == 'integers':
        state['head.bias'] = state['head.bias'].astype('i8')
    elif kind == 'mixed':
        state['stem.0.norm._mean'] = state['stem.0.bn.running_mean']
    return state


@pytest.mark.parametrize('kind, message', [
    ('missing', '1 missing: stages.2.blocks.3.pw_conv_1.conv.weight; nothing was written'),
    ('surplus', '1 surplus: stages.2.blocks.1.extra.weight; nothing was written'),
    ('shape', '1 of the wrong shape: transitions.0.1.conv.weight [16, 1, 5, 5], not [16, 1, 3, 3]; '
              'nothing was written'),
    ('stage', 'no usable tensor'), ('others', 'no usable tensor stem.0.conv.weight'), ('integers', 'int64'),
    ('mixed', 'mixes names')])
def test_damaged_state_dicts(tmp_path, tiny, capsys, kind, message):
    save(tmp_path / 'a.pth', damaged(tiny, kind))
    (tmp_path / 'b.pdparams').write_bytes(b'as it was')
    assert main([str(tmp_path / 'a.pth'), str(tmp_path / 'b.pdparams')]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count('\n') == 1 and captured.out == ''
    assert f"{tmp_path / 'a.pth'}: " in captured.err
    assert sorted(os.listdir(tmp_path)) == ['a.pth', 'b.pdparams']
    assert (tmp_path / 'b.pdparams').read_bytes() == b'as it was'


@pytest.mark.parametrize('arguments, message', [
    (['tiny.pth', 'x.onnx'], 'x.onnx: unknown extension; use .safetensors, .pdparams, .pth'),
    (['tiny.pth', 'tiny.pth'], 'is the source itself'),
    (['tiny.pth', 'no/folder/x.pth'], 'no/folder: no such folder'),
    (['nothing.pth', 'x.pth'], 'nothing.pth: no such file'),
    (['tiny.pth', 'x.pdparams', '-names=official'], '.pdparams is written with paddle names only'),
    (['tiny.pth', 'x.pth', '-names=paddle'], '.pth is written with official names only'),
    (['tiny.pth', 'x.pth', '-model=replknet_31b'], 'is of a custom size, not replknet_31b'),
    (['tiny.pth', 'x.pth', '-model=resnet'], 'not resnet'),
    (['tiny.pth', 'x.pth', '-key=model_ema'], "has no weights under 'model_ema'; it is a plain state dict"),
    (['tiny_xl.pth', 'x.pth', '-key=model'], 'it has state_dict'),
    (['tiny.pth', 'x.pth', '-head=cls_22k'], "no head 'cls_22k'; it has head"),
    (['tiny.pth', 'x.pth', '-reference=nothing.npz'], 'nothing.npz: no such file'),
    (['tiny.pth', 'x.pth', '-reference=tiny.pth'], 'input.npy: no such file'),
    (['tiny.pth', 'x.pth', '-reference=text.npz'], 'text.npz: is not an .npz file of logits'),
    (['tiny.pth', 'x.pth', '-reference=wrong.npz'], 'logits differ from wrong.npz by'),
    (['tiny.pth', 'x.pth', '-reference=other.npz'], "neither 'logits' nor 'tiny'"),
    (['tiny.pth', 'x.pth', '-reference=shape.npz'], 'its logits have shape [2, 9], those of the model [2, 10]'),
    (['nan.pth', 'x.pth', '-verify'], 'nan.pth: contains values that are not finite')])
def test_mistakes_are_one_line(golden, tmp_path, tiny, monkeypatch, capsys, arguments, message):
    for name in ('tiny.pth', 'tiny_xl.pth'):
        (tmp_path / name).write_bytes((golden / name).read_bytes())
    images = np.load(golden / 'input.npy')
    np.savez(tmp_path / 'wrong.npz', logits=np.zeros((2, 10), 'f4'), input=images)
    np.savez(tmp_path / 'other.npz', x=np.zeros((2, 10), 'f4'), input=images)
    np.savez(tmp_path / 'shape.npz', tiny=np.zeros((2, 9), 'f4'), input=images)
    save(tmp_path / 'nan.pth', {**tiny, 'norm.bias': np.full(32, np.nan, 'f4')})
    (tmp_path / 'text.npz').write_text('text')
    before = sorted(os.listdir(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize('arguments', [[], ['a'], ['a', 'b', '-nonsense'], ['a', 'b', '-names=x']])
def test_wrong_flags(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and capsys.readouterr().err.count('\n') == 1


def test_a_damaged_copy_is_noticed(golden, tmp_path, monkeypatch):
    """Verification reads the file that was written."""
    def careless(file, state):
        write_safetensors(file, {**state, 'head.bias': state['head.bias'] + 1})

    monkeypatch.setitem(convert_module._WRITERS, '.safetensors', careless)
    with pytest.raises(CheckpointError, match='differ from the source'):
        convert(str(golden / 'tiny.pth'), str(tmp_path / 'x.safetensors'), verify=True)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    (tmp_path / 'x').write_bytes(b'old')
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / 'x') as file:
        file.write(b'half')
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ['x'] and (tmp_path / 'x').read_bytes() == b'old'


@pytest.mark.long
def test_full_size_takes_seconds_and_little_memory(golden, tmp_path):
    """RepLKNet-31B with random weights: under 10 s, peak memory under 3 times the file."""
    shapes = json.loads((golden / 'official_keys_31b.json').read_text())['tensors']
    rng = np.random.default_rng(0)
    save(tmp_path / 'a.pth', {name: np.zeros((), 'i8') if 'num_batches' in name else
                              rng.random(shape, np.float32) for name, shape in shapes.items()})
    size = (tmp_path / 'a.pth').stat().st_size
    for extension in FORMATS:
        start = time.time()
        status, out, err = run(tmp_path / 'a.pth', tmp_path / f'b{extension}', '-model=replknet_31b')
        assert status == 0, err
        assert time.time() - start < 10
    # ru_maxrss: of the largest child so far, in KiB
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 3 * size
