"""Inference in bfloat16 and int8: what is exported, what is refused, and what the certificate says."""
import copy
import importlib.util
import json
import sys

import numpy as np
import paddle
import pytest
from PIL import Image
from test_fuse import randomise_norms

import benchmark
import deploy.rounding
import export as exporting
from config import config_text, get_config
from datasets import get_dataset
from deploy import predictor as predicting
from deploy.comparison_images import comparison_images
from deploy.equivalence import dygraph_program
from deploy.onnx_int8 import write_onnx_int8
from deploy.rounding import Rounding, choose_int8_layers, decisions, rounding_cost, rounding_table
from deploy.runtimes import load_paddle_program
from errors import UserError
from export import CertificateError, export, read_arguments
from fuse import fuse, in_form, pack
from large_kernel import PackedConv2D, build, fastest_precision
from predict import Predictor
from replknet import build_replknet
from run_folder.checkpoint import model_arrays, save_checkpoint

pytestmark = pytest.mark.skipif(build.reason_unavailable() is not None, reason='needs the C++ operator')
OPTS = ['MODEL.CHANNELS', '[16, 32, 16, 48]', 'MODEL.LAYERS', '[1, 1, 1, 1]']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A data folder of 24 images in 4 classes, which are colours."""
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(3)
    for index in range(24):
        colour = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]][index % 4]
        pixels = rng.integers(0, 256, (40, 40, 3)) * 0.4 + np.array(colour) * 0.6
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{index}.png')
    (folder / 'val_list.txt').write_text(''.join(f'{index}.png {index % 4}\n' for index in range(24)))
    return folder


def trained(config, spoil=lambda model: None):
    """A model that knows the colours: its head is fitted by least squares.

    Args:
        spoil: changes the model before that.
    """
    paddle.seed(0)
    model = randomise_norms(build_replknet(config))
    model.eval()
    spoil(model)
    dataset = get_dataset(config, 'val')
    with paddle.no_grad():
        features = model.pool(model.forward_features(paddle.to_tensor(
            np.stack([dataset[index][0] for index in range(24)])))[-1]).numpy()
    wanted = 8 * np.eye(4)[dataset.labels]
    centred = features - features.mean(0)
    weight = np.linalg.solve(centred.T @ centred + 0.01 * np.trace(centred.T @ centred) * np.eye(48) / 48,
                             centred.T @ wanted)
    model.head.weight.set_value(weight.astype('float32'))
    model.head.bias.set_value((wanted.mean(0) - features.mean(0) @ weight).astype('float32'))
    return model


@pytest.fixture(scope='module')
def run(tmp_path_factory, tiny_yaml, data):
    """A run folder."""
    folder, config = tmp_path_factory.mktemp('run'), get_config(tiny_yaml, ['DATA.DATA_PATH', str(data), *OPTS])
    (folder / 'config.yaml').write_text(config_text(config))
    save(folder, trained(config))
    return folder


def save(folder, model):
    save_checkpoint(folder / 'best.pdparams', {
        'model': model_arrays(model), 'weights_key': 'model', 'optimizer': {}, 'epoch': 2, 'step': 4, 'best': {},
        'config': ''})


def settings(run, *flags):
    return read_arguments([f'-pretrained={run}', '-output=X', *flags])[0]


def images(count=2):
    return np.random.default_rng(5).standard_normal((count, 3, 32, 32)).astype('float32')


@pytest.fixture(scope='module')
def model(run):
    return trained(settings(run))


@pytest.fixture(scope='module')
def bf16(run, tmp_path_factory):
    """An export in bfloat16."""
    folder = tmp_path_factory.mktemp('exports') / 'bf16'
    export(settings(run), folder, precision='bf16', features=True)
    return folder


@pytest.fixture(scope='module')
def int8(run, tmp_path_factory):
    """An export in int8, for ONNX too where its packages are installed."""
    folder = tmp_path_factory.mktemp('exports') / 'int8'
    onnx = all(importlib.util.find_spec(name) for name in ('onnx', 'onnxruntime'))
    export(settings(run), folder, precision='int8', agreement=0.8,  # ONNX Runtime's ranges are coarser
           formats=('paddle', 'onnx-int8') if onnx else ('paddle',))
    return folder


def test_a_program_in_bf16_is_the_model_in_bf16(bf16, model, run):
    want = dygraph_program(pack(fuse(model, final_norm=True), 'bf16'))(images())
    found = load_paddle_program(str(bf16 / 'model'))(images())[:, :4]
    scale = np.abs(want).max()
    np.testing.assert_allclose(found, want, atol=1e-4 * scale)
    rounded = np.abs(found - load_paddle_program(str(bf16 / 'model_native'))(images())[:, :4]).max()
    assert 1e-4 * scale < rounded < 0.05 * scale
    assert Predictor(str(bf16), features=True).precision == 'bf16'
    logits = {precision: Predictor(str(run), device='cpu', backend='dygraph', precision=precision).predictions(
        range(2), list(images()))[0].logits for precision in (None, 'fp32', 'bf16', 'auto')}
    assert np.array_equal(logits[None], logits['fp32']) and np.array_equal(logits['auto'], logits[fastest_precision()])
    np.testing.assert_allclose(logits['bf16'], want[0], atol=5e-3 * scale)  # its final norm is folded
    assert not np.array_equal(logits['bf16'], logits['fp32'])


def test_the_certificate_says_what_bf16_costs(bf16, data):
    certificate = json.loads((bf16 / 'certificate.json').read_text())
    assert certificate['precision'] == 'bf16' and certificate['rounding'] == {
        'compared_on': f'24 images ({data}/val_list.txt)', 'required_agreement': 0.995}
    program, native = certificate['programs']['model'], certificate['programs']['model_native']
    assert native['precision'] == 'fp32' and native['max_difference'] < 1e-4 * program['rounding']['largest_logit']
    cost = program['rounding']
    assert cost['images'] == 24 == cost['decided'] + cost['near_ties'] and cost['changed'] == 0
    assert 0 < cost['distances']['features'] < 0.15
    assert 0 < cost['mean_difference'] < cost['max_difference'] == program['max_difference']
    assert cost['accuracy'] == {'fp32': 1, 'rounded': 1}
    text = exporting.table(certificate)
    assert 'model, in bf16, compared with float32 on 24 images' in text and 'top-1 accuracy' in text
    size = {name: (bf16 / f'{name}.pdiparams').stat().st_size for name in ('model', 'model_native')}
    assert size['model'] < 0.75 * size['model_native']


def test_an_export_is_computed_in_its_own_precision(bf16, monkeypatch, capsys):
    assert Predictor(str(bf16), precision='fp32').origin.endswith('model_native')
    assert Predictor(str(bf16), precision='bf16').origin.endswith('model')
    with pytest.raises(UserError, match=r'contains no such program \(bf16, fp32\); export one with `export.py -prec'):
        Predictor(str(bf16), precision='int8')
    monkeypatch.setattr(predicting.build, 'reason_unavailable', lambda: 'no compiler')
    predictor = Predictor(str(bf16))
    assert predictor.precision == 'fp32' and predictor.origin.endswith('model_native')
    with pytest.raises(UserError, match='-precision=bf16: `model` in .* does not run here: no compiler'):
        Predictor(str(bf16), precision='bf16')


def test_a_hook_on_a_norm_does_not_stop_a_model_in_bf16(model):
    merged = pack(in_form(model, 'merged'), 'bf16')
    want, block = dygraph_program(merged)(images()), merged.stages[1].blocks[0]
    seen = []
    for norm in (block.pre_large_kernel_bn, block.pw_conv_2.norm):  # around a map and before a residual
        norm.register_forward_post_hook(lambda layer, inputs, output: seen.append(output.dtype))
    # other layers round maps to bfloat16 after other sums, and later layers amplify that
    np.testing.assert_allclose(dygraph_program(merged)(images()), want, atol=3e-2 * np.abs(want).max())
    assert seen == [paddle.float32] * 2


def test_the_default_is_float32_as_before(run, model):
    _, arguments = read_arguments([f'-pretrained={run}', '-output=X'])
    assert arguments['precision'] == 'fp32' == exporting._checked_precision(exporting.ExportOptions())
    programs = {program.name: program for program in exporting._programs(fuse(model), exporting.ExportOptions(), None,
                                                                         None)}
    assert {program.precision for program in programs.values()} == {'fp32'}
    np.testing.assert_array_equal(dygraph_program(programs['model'].model)(images()),
                                  dygraph_program(pack(fuse(model)))(images()))


@pytest.mark.parametrize(('options', 'words'), [
    ({'precision': 'bf16', 'form': 'training'}, 'needs -form=fused or merged'),
    ({'precision': 'int8', 'form': 'merged'}, 'needs -form=fused, not merged'),
    ({'precision': 'bf16', 'formats': ('onnx',)}, 'model.onnx is in float32'),
    ({'formats': ('onnx-int8',)}, 'add -precision=int8'),
    ({'agreement': 0.9}, 'checked with -tolerance')])
def test_options_that_do_not_go_together(run, tmp_path, options, words):
    with pytest.raises(UserError, match=words) as caught:
        export(settings(run), tmp_path / 'out', **options)
    assert '\n' not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(('flag', 'words'), [('-precision=int4', "invalid choice: 'int4'"),
                                             ('-agreement=99', 'a share is a number from 0 to 1'),
                                             ('-agreement=all', 'all: a share is a number from 0 to 1')])
def test_wrong_flags_are_one_line_errors(run, flag, words, capsys):
    with pytest.raises(SystemExit) as caught:
        read_arguments([f'-pretrained={run}', '-output=X', flag])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and error.count('\n') == 1


def test_where_bf16_is_refused(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match='choose from fp32, bf16, int8, auto'):
        Predictor(str(run), precision='half')
    with pytest.raises(UserError, match=r'calibrate on; export the model with `export.py -precision=int8'):
        Predictor(str(run), device='cpu', precision='int8')
    with pytest.raises(UserError, match='on gpu it is not supported'):
        predicting._precision_of_weights('bf16', 'gpu')
    assert predicting._precision_of_weights('auto', 'gpu') == 'fp32'
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', 'native')
    with pytest.raises(UserError, match='-precision=bf16: it needs the C\\+\\+ operator: LARGE_KERNEL_CONV_IMPL'):
        Predictor(str(run), device='cpu', precision='bf16')
    monkeypatch.setattr(predicting, 'fastest_precision', lambda: 'bf16')
    assert predicting._precision_of_weights('auto', 'cpu') == 'fp32'
    monkeypatch.delenv('LARGE_KERNEL_CONV_IMPL')
    assert predicting._precision_of_weights('auto', 'cpu') == 'bf16'
    monkeypatch.setattr(exporting, 'reason_unavailable', lambda: 'no C++ compiler')
    with pytest.raises(UserError, match='-precision=bf16: needs the C.. operator: no C.. compiler'):
        export(settings(run), tmp_path / 'out', precision='bf16')


def useless_weights(model):
    """Makes int8 useless in one layer: the scale of its weights becomes that of some which have no effect."""
    block = model.stages[3].blocks[1]
    for tensor in (block.pw_conv_1.conv.weight, block.pw_conv_1.norm.bias, block.pw_conv_1.norm._mean):
        values = tensor.numpy()
        values[5] = 0  # GELU(0) = 0, so the next layer's input channel 5 is 0
        tensor.set_value(values)
    values = block.pw_conv_2.conv.weight.numpy() * 30
    values[:, 5] = 1e5
    block.pw_conv_2.conv.weight.set_value(values)


def rounding_of(run, model, precision, **arguments):
    config = settings(run)
    return Rounding(model, comparison_images(config, exporting.ExportOptions()), precision, **arguments)


def test_int8_leaves_out_a_layer_that_it_would_spoil(run, monkeypatch):
    model = trained(settings(run), useless_weights)
    rounding, twin = rounding_of(run, model, 'int8'), fuse(model)
    assert rounding.description.endswith('val_list.txt, also calibrated on)')
    quantised, report = choose_int8_layers(twin, rounding)
    bad = 'stages.3.blocks.1.pw_conv_2.conv'
    assert report['kept'][0]['layer'] == bad and report['of'] - 3 <= report['layers'] == len(quantised)
    assert report['otherwise'] == fastest_precision() and bad not in quantised
    assert rounding.holds(rounding.cost(dygraph_program(pack(copy.deepcopy(twin), report['otherwise'], quantised))))
    assert f'{bad} (in int8, it changes a logit by' in '\n'.join(rounding_table(
        {'rounding': {'int8': report}, 'programs': {}}))
    monkeypatch.setattr(deploy.rounding, 'layer_effects', lambda twin, wide, quantised, calibration: dict.fromkeys(
        quantised, 1.0))
    monkeypatch.setattr(rounding, 'cost', lambda program, name: None)
    with pytest.raises(CertificateError, match='with any 1x1 convolution in int8'):
        choose_int8_layers(twin, rounding)


def test_the_export_in_int8(int8, data):
    certificate = json.loads((int8 / 'certificate.json').read_text())
    report = certificate['rounding']['int8']
    assert report['layers'] == report['of'] >= 20 and not report['kept']
    program = certificate['programs']['model']
    assert program['precision'] == 'int8' and program['rounding']['changed'] == 0
    predictor = Predictor(str(int8))
    assert predictor.precision == 'int8'
    assert [prediction.classes[0] for prediction in predictor([str(data / f'{i}.png') for i in range(4)])] == [
        0, 1, 2, 3]


def test_a_program_that_decides_otherwise_is_refused(run, model):
    rounding = rounding_of(run, model, 'bf16')
    with pytest.raises(CertificateError, match=r'in bf16, X decides 24 of 24 images otherwise than float32, an '
                       r'agreement of 0.00%; at least 99.50% is required \(-agreement\)'):
        rounding.check('X', lambda images: -dygraph_program(model)(images))
    with pytest.raises(CertificateError, match='in bf16, outputs of X are not finite'):
        rounding.check('X', lambda images: np.full((len(images), 4), np.nan))
    assert rounding.check('X', dygraph_program(model))['top1_agreement'] == 1


def test_features_and_inputs_of_other_sizes_are_compared(run, model):
    config = settings(run)
    exact = dygraph_program(exporting.WithFeatures(model))
    rounding = Rounding(model, comparison_images(config, exporting.ExportOptions(dynamic=True)), 'bf16', original=exact)
    found = rounding.check('X', exact)['rounding']['distances']
    assert found == {'features': 0, 'logits at another size': 0}

    def wrong_features(images):
        return np.concatenate([exact(images)[:, :4], exact(images)[:, :3:-1]], 1)

    def wrong_size(images):
        return exact(images) * (1 if images.shape[2] == config.DATA.IMAGE_SIZE else 0)
    for program, what in ((wrong_features, 'features'), (wrong_size, '(logits at another size|features)')):
        with pytest.raises(CertificateError, match=rf"{what} of X differ from float32's by \d+% of their size, "
                           'over the limit of 25%'):
            rounding.check('X', program)


def test_without_images_int8_is_refused_and_bf16_compared_on_generated_ones(run, model, tmp_path):
    config = settings(run, '-opts', 'DATA.DATA_PATH', str(tmp_path / 'none'))
    with pytest.raises(UserError, match='-precision=int8: needs images to calibrate on'):
        export(config, tmp_path / 'out', precision='int8')
    assert not list(tmp_path.iterdir())
    rounding = Rounding(model, comparison_images(config, exporting.ExportOptions()), 'bf16')
    assert rounding.description == '8 images (generated)'
    assert 'accuracy' not in rounding.cost(dygraph_program(model))


def test_near_ties_do_not_count_and_are_reported():
    expected = np.log([[0.6, 0.3, 0.1], [0.401, 0.4, 0.199], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1]])
    found = np.log([[0.6, 0.3, 0.1], [0.4, 0.401, 0.199], [0.2, 0.41, 0.4], [0.1, 0.8, 0.1]])
    cost = rounding_cost(expected, found, np.array([0, 1, 2, 2]))
    names = 'images', 'decided', 'changed', 'near_ties', 'near_ties_changed'
    assert [cost[name] for name in names] == [4, 3, 1, 1, 1]
    assert cost['agreement'] == pytest.approx(2 / 3) and cost['agreement_with_near_ties'] == 0.5
    assert cost['accuracy'] == {'fp32': 0.5, 'rounded': 0.5}
    assert decisions(np.zeros((2, 1)))[1].tolist() == [True, True]
    def text(cost):
        return '\n'.join(rounding_table({'rounding': {'compared_on': 'X'}, 'programs': {
            'model': {'precision': 'bf16', 'rounding': cost}}}))
    assert 'says nothing' in text(rounding_cost(expected[1:2], found[1:2])) and 'says nothing' not in text(cost)
    several = rounding_cost(np.array([[3.0, 0.001], [-3, 2]]), np.array([[3.0, -0.001], [-3, -2]]), multi_label=True)
    assert (several['decided'], several['changed'], several['near_ties_changed']) == (3, 1, 1)


def test_onnx_in_int8_has_the_same_layers(int8):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    certificate = json.loads((int8 / 'certificate.json').read_text())
    program = certificate['programs']['model_int8.onnx']
    assert program['precision'] == 'int8' and program['rounding']['images'] == 24
    graph = onnx.load(str(int8 / 'model_int8.onnx')).graph
    weights = [tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8
               and tensor.name.endswith('weight_quantized')]
    assert len(weights) == certificate['rounding']['int8']['layers']


def test_onnx_in_int8_needs_a_package(monkeypatch, tmp_path):
    pytest.importorskip('onnx')
    monkeypatch.setitem(sys.modules, 'onnxruntime.quantization', None)
    with pytest.raises(UserError, match='-format=onnx-int8 needs the package onnxruntime: pip install'):
        write_onnx_int8('a.onnx', tmp_path / 'b.onnx', [], [])


def test_precisions_of_the_benchmark(tiny_yaml, monkeypatch):
    monkeypatch.setattr(benchmark.harness, 'import_paddle', lambda threads: paddle)
    yaml = tiny_yaml.parent / 'wide.yaml'
    yaml.write_text(tiny_yaml.read_text().replace('[4, 6, 8, 10]', '[16, 32, 16, 48]'))
    case = {'model': str(yaml), 'form': 'fused', 'backend': 'dygraph', 'threads': 1, 'size': 32, 'batch': 1}
    for precision in ('fp32', 'bf16', 'int8'):
        built = benchmark.build({**case, 'precision': precision})
        assert precision in {layer.precision for layer in built.sublayers() if isinstance(layer, PackedConv2D)}
    with pytest.raises(UserError, match='int8 needs the fused form'):
        benchmark.build({**case, 'precision': 'int8', 'form': 'merged'})


@pytest.mark.long
def test_benchmark_of_all_precisions(run_script, run, tmp_path):
    done = run_script('benchmark.py', f'-model={run}', '-image_size=32', '-batch_size=1', '-form=fused', '-budget=1',
                      '-precision=fp32,bf16,int8', '-threads=1', '-patience=0', '-output=b.json', cwd=tmp_path)
    assert done.returncode == 0 and 'left out' not in done.stderr, done.stderr
    rows = json.loads((tmp_path / 'b.json').read_text())['results']
    assert [(r['backend'], r['precision']) for r in rows] == [
        (backend, precision) for backend in ('dygraph', 'inference') for precision in ('fp32', 'bf16', 'int8')]


@pytest.mark.long
def test_the_commands(run_script, run, data, tmp_path):
    done = run_script('export.py', f'-pretrained={run}', '-output=out', '-precision=bf16', cwd=tmp_path)
    assert done.returncode == 0 and 'in bf16, compared with float32' in done.stdout, done.stderr
    done = run_script('predict.py', data / 'val_list.txt', '-model=out', cwd=tmp_path)
    assert done.returncode == 0 and 'out/model, inference, bf16' in done.stderr
    done = run_script('predict.py', data / 'val_list.txt', f'-model={run}', '-precision=int8', cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'export.py' in done.stderr
