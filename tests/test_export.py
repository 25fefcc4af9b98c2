"""Exports: the programs run in other processes and match the original model, or nothing is written."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image
from test_fuse import randomise_norms

import export as exporting
import large_kernel.build
from config import config_text, get_config
from deploy.equivalence import Difference, compare_groups, compare_outputs, layer_groups, multiply_accumulates
from deploy.runtimes import load_onnx_program, load_paddle_program, needs_onednn, program_file
from errors import UserError
from export import CertificateError, export, read_arguments
from fuse import fuse
from port_weights.load import load_weights
from replknet import build_replknet, replknet_31b, replknet_31l, replknet_xl
from run_folder.checkpoint import model_arrays, save_checkpoint

ROOT = Path(__file__).parents[1]
needs_operator = pytest.mark.skipif(large_kernel.build.reason_unavailable() is not None, reason='needs a compiler')


@pytest.fixture(scope='module')
def model(tiny_yaml):
    paddle.seed(0)
    return randomise_norms(build_replknet(get_config(tiny_yaml)))


def save(path, weights, weights_key='model', **more):
    save_checkpoint(path, {'model': weights, **more, 'weights_key': weights_key, 'optimizer': {}, 'epoch': 1, 'step': 1,
                           'best': {}, 'config': ''})


@pytest.fixture(scope='module')
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'tiny.pdparams'
    save(path, model_arrays(model))
    return path


@pytest.fixture
def settings(tiny_yaml, weights):
    return lambda *flags: read_arguments([f'-cfg={tiny_yaml}', f'-pretrained={weights}', '-output=X', *flags])[0]


def images(*shape):
    return np.random.default_rng(5).standard_normal(shape).astype('float32')


PREDICT = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import paddle_env
from deploy.runtimes import load_paddle_program
images, expected = np.load('x.npy'), np.load('y.npy')
np.testing.assert_allclose(load_paddle_program('run/model_native')(images), expected, atol=1e-4)
assert 'large_kernel_' not in open('/proc/self/maps').read()  # the library of the operator
import large_kernel
large_kernel.load_operator()
assert 'large_kernel_' in open('/proc/self/maps').read()
np.testing.assert_allclose(load_paddle_program('run/model')(images), expected, atol=1e-4)
print('same')
"""


@needs_operator
def test_a_run_is_exported_and_its_programs_run_in_a_fresh_process(
        run_script, model, tiny_yaml, list_dataset, tmp_path):
    run = tmp_path / 'a run'
    run.mkdir()
    config = get_config(tiny_yaml, ['DATA.DATA_PATH', str(list_dataset)])
    (run / 'config.yaml').write_text(config_text(config))
    half = {name: array.astype('float16') for name, array in model_arrays(model).items()}  # as with AMP level O2
    save(run / 'best_ema.pdparams', {name: array * 0 for name, array in half.items()}, 'model_ema', model_ema=half)
    done = run_script('export.py', f'--pretrained={run}', '-output=exports/run', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / 'exports' / 'run'
    certificate = json.loads((folder / 'certificate.json').read_text())
    assert [p.name for p in folder.parent.iterdir()] == ['run']
    assert set(certificate['groups']) == set(layer_groups(model)) and len(certificate['groups']) == 1 + 4 + 3 + 1
    assert 'val_list.txt' in certificate['compared_on'] and certificate['form'] == 'fused'
    for name, program in certificate['programs'].items():
        assert program['max_difference'] < 1e-4 and program['top1_agreement'] == 1 and program['latency_ms'] > 0
        assert program['bytes'] == sum((folder / file).stat().st_size for file in program['files'])
        assert f'{name} ' in done.stdout
    assert certificate['after']['parameters'] < certificate['before']['parameters'] == model.num_parameters()
    assert get_config(folder / 'config.yaml').MODEL.NUM_CLASSES == 4
    assert b'fused_conv' in Path(program_file(f'{folder}/model')).read_bytes()
    assert b'fused_conv' not in Path(program_file(f'{folder}/model_native')).read_bytes()

    same = build_replknet(config)
    load_weights(same, half, 'half')
    same.eval()
    np.save(folder.parent / 'x.npy', images(3, 3, 32, 32))
    np.save(folder.parent / 'y.npy', same(paddle.to_tensor(images(3, 3, 32, 32))).numpy())
    result = subprocess.run([sys.executable, '-c', PREDICT, str(ROOT)], cwd=folder.parent, text=True,
                            capture_output=True)
    assert result.stdout.strip().endswith('same'), result.stderr[-2000:]


@needs_operator
@pytest.mark.parametrize(('form', 'dynamic'), [('training', False), ('merged', True), ('fused', True)])
def test_forms_and_sizes(settings, model, tmp_path, form, dynamic):
    certificate = export(settings(), tmp_path / 'out', form=form, dynamic=dynamic)
    assert certificate['image_size'] == ('dynamic' if dynamic else [32, 32])
    x = images(2, 3, 45, 33) if dynamic else images(2, 3, 32, 32)
    expected = model(paddle.to_tensor(x)).numpy()
    for name in ('model', 'model_native'):
        np.testing.assert_allclose(load_paddle_program(str(tmp_path / 'out' / name))(x), expected, atol=1e-4)
        assert needs_onednn(program_file(str(tmp_path / 'out' / name))) == (name == 'model_native')


@needs_operator
@pytest.mark.parametrize('form', ['training', pytest.param('merged', marks=pytest.mark.long), 'fused'])
def test_channel_counts_in_the_nchw16c_layout(tiny_yaml, tmp_path, form):
    widths = ['MODEL.CHANNELS', '[16, 32, 16, 48]']
    model = randomise_norms(build_replknet(get_config(tiny_yaml, widths)))
    save(tmp_path / 'w.pdparams', model_arrays(model))
    flags = [f'-cfg={tiny_yaml}', f'-pretrained={tmp_path}/w.pdparams', '-output=X', '-opts', *widths]
    config = read_arguments(flags)[0]
    export(config, tmp_path / 'out', form=form, dynamic=True)
    program = load_paddle_program(str(tmp_path / 'out' / 'model'))
    for shape in ((2, 3, 45, 33), (1, 3, 64, 96)):
        x = images(*shape)
        np.testing.assert_allclose(program(x), model(paddle.to_tensor(x)).numpy(), atol=1e-4)


@pytest.mark.parametrize(('form', 'dynamic'), [('training', True), ('merged', False), ('fused', True)])
def test_onnx(settings, model, tmp_path, form, dynamic):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    certificate = export(settings(), tmp_path / 'out', form=form, formats=['onnx'], dynamic=dynamic)
    assert list(certificate['programs']) == ['model.onnx']
    path = tmp_path / 'out' / 'model.onnx'
    kinds = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert ('BatchNormalization' in kinds) == (form != 'fused')
    x = images(2, 3, 45, 33) if dynamic else images(2, 3, 32, 32)
    np.testing.assert_allclose(load_onnx_program(path)(x), model(paddle.to_tensor(x)).numpy(), atol=1e-4)


@pytest.mark.parametrize(('module', 'words'), [('onnx', 'pip install onnx'),
                                               ('onnxruntime', 'pip install onnxruntime')])
def test_a_missing_package_is_a_one_line_error_and_nothing_is_written(settings, tmp_path, monkeypatch, module, words):
    if module == 'onnxruntime':
        pytest.importorskip('onnx')
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=words):
        export(settings(), tmp_path / 'out', formats=['onnx'])
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_only_the_native_program_is_written(settings, tmp_path, monkeypatch, capsys):
    def fail():
        raise large_kernel.build.BuildError('no C++ compiler')
    monkeypatch.setattr(exporting, 'load_operator', fail)
    certificate = export(settings(), tmp_path / 'out')
    assert list(certificate['programs']) == ['model_native'] and 'no C++ compiler' in capsys.readouterr().err


def test_the_error_names_the_group_that_differs(settings, tmp_path, monkeypatch):
    def wrong(model, form, final_norm):
        twin = fuse(model)
        bias = twin.transitions[1][0].conv.bias
        bias.set_value(bias + 0.01)
        return twin
    monkeypatch.setattr(exporting, 'in_form', wrong)
    with pytest.raises(CertificateError, match='transition 1 differs from the original by') as caught:
        export(settings(), tmp_path / 'out')
    assert '\n' not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_program_that_differs_is_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, 'load_paddle_program', lambda path, threads: lambda x: np.ones((len(x), 4)))
    with pytest.raises(CertificateError, match='logits of model'):
        export(settings(), tmp_path / 'out')
    assert not list(tmp_path.iterdir())


def test_weights_that_are_nan_are_refused(settings, model, tmp_path):
    arrays = model_arrays(model)
    arrays['stages.2.blocks.1.pw_conv_1.conv.weight'] = arrays['stages.2.blocks.1.pw_conv_1.conv.weight'] * np.nan
    save(tmp_path / 'nan.pdparams', arrays)
    with pytest.raises(UserError, match='nan.pdparams.*: contains values that are not finite'):
        export(settings(f'-pretrained={tmp_path}/nan.pdparams'), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_over_the_tolerance_the_status_is_1_and_nothing_is_written(run_script, tiny_yaml, weights, tmp_path):
    done = run_script('export.py', f'-cfg={tiny_yaml}', f'-pretrained={weights}', '-output=out', '-tolerance=1e-12',
                      cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith('nothing is exported: ')
    assert 'Traceback' not in done.stderr and not list(tmp_path.iterdir())


def test_only_an_export_is_replaced_and_only_with_overwrite(settings, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'precious.txt').write_text('mine')
    with pytest.raises(UserError, match='exists'):
        export(settings(), out)
    with pytest.raises(UserError, match='replaces exports only'):
        export(settings(), out, overwrite=True)
    assert (out / 'precious.txt').read_text() == 'mine'
    (out / 'certificate.json').write_text('{}')
    export(settings(), out, overwrite=True)
    assert not (out / 'precious.txt').exists() and json.loads((out / 'certificate.json').read_text())['groups']
    assert os.listdir(tmp_path) == ['out']
    before = (out / 'certificate.json').read_text()
    with pytest.raises(CertificateError):
        export(settings(), out, tolerance=1e-12, overwrite=True)
    assert (out / 'certificate.json').read_text() == before and os.listdir(tmp_path) == ['out']


@pytest.mark.parametrize(('flags', 'words'), [
    (['-form=folded'], "invalid choice: 'folded'"), (['-format=onxx'], "'onxx': choose from paddle, onnx"),
    (['-image_size=32', '-dynamic'], 'not allowed with argument'), ([], '-output')])
def test_wrong_flags_are_one_line_errors(capsys, tiny_yaml, flags, words):
    with pytest.raises(SystemExit) as caught:
        read_arguments([f'-cfg={tiny_yaml}', '-pretrained=W', *flags, *(['-output=X'] if flags else [])])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and error.count('\n') == 1


def test_missing_settings_and_weights_are_errors(tiny_yaml, tmp_path):
    (tmp_path / 'alone.pdparams').touch()
    with pytest.raises(UserError, match='-cfg is missing'):
        read_arguments(['-output=X', f'-pretrained={tmp_path}/alone.pdparams'])
    with pytest.raises(FileNotFoundError, match='W.pdparams: no such file or folder'):
        read_arguments(['-output=X', '-pretrained=W.pdparams'])
    with pytest.raises(UserError, match='-pretrained is missing'):
        read_arguments([f'-cfg={tiny_yaml}', '-output=X'])
    with pytest.raises(UserError, match='no checkpoint'):
        read_arguments([f'-cfg={tiny_yaml}', '-output=X', f'-pretrained={tmp_path}'])
    config, arguments = read_arguments([f'-cfg={tiny_yaml}', '-output=X', f'-pretrained={tmp_path}/W.pdparams'])
    with pytest.raises(FileNotFoundError, match='W.pdparams: neither a file nor a name'):
        export(config, tmp_path / 'out')
    config, _ = read_arguments(['-pretrained=replknet_31b_1k_384', '-output=X'])
    assert config.DATA.IMAGE_SIZE == 384 and config.MODEL.NAME == 'replknet_31b'


def test_merged_weights_have_no_training_form(settings, tmp_path):
    merged = build_replknet(settings(), merged=True)
    save(tmp_path / 'merged.pdparams', model_arrays(randomise_norms(merged)))
    config = settings(f'-pretrained={tmp_path}/merged.pdparams')
    with pytest.raises(UserError, match='merged already'):
        export(config, tmp_path / 'out', form='training')
    export(config, tmp_path / 'out')


def test_images_from_a_folder(settings, tmp_path):
    folder = tmp_path / 'images'
    with pytest.raises(FileNotFoundError, match='no such folder'):
        export(settings(), tmp_path / 'out', pictures=folder)
    folder.mkdir()
    with pytest.raises(UserError, match='no images in this folder'):
        export(settings(), tmp_path / 'out', pictures=folder)
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(folder / 'grey.png')
    assert '1 images (' in export(settings(), tmp_path / 'out', pictures=folder)['compared_on']
    (folder / 'a.png').write_text('text')
    with pytest.raises(UserError, match='a.png: cannot read the image'):
        export(settings(), tmp_path / 'other', pictures=folder)


@pytest.mark.parametrize(('build', 'size', 'gmacs'), [(replknet_31b, 224, 15.354), (replknet_31b, 384, 45.119),
                                                      (replknet_31l, 384, 95.989), (replknet_xl, 320, 128.730)])
def test_multiply_accumulates_match_the_published_figures(build, size, gmacs):
    with paddle.LazyGuard():
        model = build(merged=True)
    assert multiply_accumulates(model, size, size) / 1e9 == pytest.approx(gmacs, abs=1e-3)


def test_difference_over_several_batches():
    difference = Difference()
    difference.add(np.array([1.0, -8.0]), np.array([1.5, -8.0]))
    difference.add(np.array([2.0]), np.array([0.0]))
    assert (difference.largest, difference.mean, difference.scale) == (2, 2.5 / 3, 8)
    difference.add(np.array([np.nan]), np.array([0.0]))
    assert np.isnan(difference.largest)


def test_top1_agreement_and_equal_groups(model):
    logits = [np.eye(4)[[0, 1, 2]], np.eye(4)[[3]]]
    found = iter([np.eye(4)[[0, 1, 3]], np.eye(4)[[3]]])
    difference, _, agreement = compare_outputs(logits, lambda images: next(found), [None, None], 4)
    assert difference.largest == 1 and agreement == 0.75
    found = iter([np.eye(4)[[0, 1, 3]], np.eye(4)[[3]]])
    difference, features, agreement = compare_outputs(logits, lambda images: next(found), [None, None], 2)
    assert difference.largest == 0 and features.largest == 1 and agreement == 1
    groups = compare_groups(model, model, [images(1, 3, 40, 33)])
    assert all(d.largest == 0 and d.scale > 0 for d in groups.values())
