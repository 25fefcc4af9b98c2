"""Effective receptive fields: of networks whose field is known, against PyTorch, and the command erf.py."""
import csv
import io
import shutil

import numpy as np
import paddle
import pytest
from paddle import nn
from PIL import Image

import erf
from config import get_config
from deploy.predictor import load_model
from errors import Interrupted, UserError, exit_status
from evaluation.figures import draw_receptive_fields
from evaluation.receptive_field import (
    FieldSum,
    area_ratios,
    contributions,
    drop_small_kernels,
    log_scaled,
    receptive_field,
    stage_layers,
)
from fuse import fuse, in_form
from large_kernel import DepthwiseConv2D
from port_weights.load import load_weights
from port_weights.names import to_paddle_names
from port_weights.safe_load import find_weights, read_checkpoint
from replknet import RepLKNet

# ---- networks whose field is known

def depthwise(kernel, stride=1):
    layer = DepthwiseConv2D(3, kernel.shape[-1], stride, bias_attr=False)
    layer.weight.set_value(kernel[:, None])
    return layer


def composed(first, second, stride):
    """The kernel [K, K] of a convolution at `stride` followed by another one."""
    size = len(first) + stride * (len(second) - 1)
    kernel = np.zeros([size, size])
    for row in range(len(second)):
        for column in range(len(second)):
            kernel[stride * row:stride * row + len(first), stride * column:stride * column + len(first)] += (
                second[row, column] * first)
    return kernel


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('split', [True, False])
def test_field_of_a_linear_network(stride, split):
    rng = np.random.default_rng(2)
    first, second = (rng.uniform(-1, 1, [3, k, k]).astype('float32') for k in (7, 5))
    images = rng.standard_normal([2, 3, 40, 52]).astype('float32')
    layers = [depthwise(first, stride), depthwise(second)]
    field = receptive_field(layers if split else nn.Sequential(*layers), images)

    expected, used = np.zeros([40, 52]), 0
    for image in images:
        for channel in range(3):
            kernel = composed(first[channel], second[channel], stride)
            # the centre of the map, [20 / stride, 26 / stride], is on the pixel [20, 26] of the image
            top, left = 20 - len(kernel) // 2, 26 - len(kernel) // 2
            seen = np.s_[top:top + len(kernel), left:left + len(kernel)]
            if (kernel * image[channel][seen]).sum() > 0:
                expected[seen] += np.maximum(kernel, 0) / 2
                used += 1
    assert 0 < used < 6  # some outputs are negative, and their gradients 0
    np.testing.assert_allclose(field, expected, atol=1e-6)


# ---- against PyTorch

@pytest.fixture(scope='module')
def tiny(request):
    folder = request.path.parent / 'golden'
    weights = to_paddle_names(find_weights(read_checkpoint(folder / 'tiny.pth'))[0])
    model = RepLKNet([31, 29, 27, 13], [1, 1, 2, 1], [8, 16, 24, 32], num_classes=10)
    load_weights(model, weights, 'tiny.pth')
    return model


@pytest.mark.parametrize('form', ['training', 'merged', 'fused'])
@pytest.mark.parametrize('stage', [0, 3])
def test_field_is_that_of_the_official_definition_in_pytorch(golden, tiny, form, stage):
    found = receptive_field(stage_layers(in_form(tiny, form), stage), np.load(golden / 'input.npy'))
    expected = np.load(golden / 'erf.npz')[f'stage{stage}']
    np.testing.assert_allclose(found, expected, atol=2e-5 * expected.max())


def test_field_without_small_kernels_and_areas_are_those_of_pytorch(golden, tiny):
    images, expected = np.load(golden / 'input.npy'), np.load(golden / 'erf.npz')
    whole = receptive_field(stage_layers(fuse(tiny), 3), images)
    np.testing.assert_allclose([area.ratio for area in area_ratios(log_scaled(whole)).values()], expected['areas'])
    model = in_form(tiny, 'merged')  # a copy
    with pytest.raises(UserError, match='merged'):
        drop_small_kernels(model)
    dropped = RepLKNet([31, 29, 27, 13], [1, 1, 2, 1], [8, 16, 24, 32], num_classes=10)
    dropped.set_state_dict(tiny.state_dict())
    drop_small_kernels(dropped)
    found = receptive_field(stage_layers(fuse(dropped), 3), images)
    np.testing.assert_allclose(found, expected['stage3_no_small_kernel'], atol=2e-5 * found.max())
    assert abs(found - whole).max() > 1e-3 * found.max()
    with pytest.raises(UserError, match='no small'):
        drop_small_kernels(dropped)


# ---- any layer

def test_the_layer_is_as_before():
    layer = nn.Sequential(nn.Conv2D(3, 4, 3, padding=1), nn.BatchNorm2D(4), nn.Dropout(0.9))
    layer[2].eval()
    before = {name: tensor.numpy().copy() for name, tensor in layer.state_dict().items()}
    images = np.random.default_rng(0).standard_normal([2, 3, 8, 8]).astype('float32')
    field = receptive_field(layer, images)
    assert field.any() and not field[:3].any()  # a kernel of 3 about [4, 4], and dropout is off
    assert [part.training for part in layer.sublayers(include_self=True)] == [True, True, True, False]
    assert not any(parameter.stop_gradient for parameter in layer[0].parameters())
    for name, tensor in layer.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name])


@pytest.mark.parametrize(('layer', 'message'), [
    (nn.Sequential(nn.Conv2D(3, 2, 3), nn.Flatten()), r'returns a tensor of shape \[1, 72\], not a feature map'),
    (lambda x: [x], 'returns a list, not a feature map'),
    (lambda x: x.detach(), 'does not depend on the image'),
    (lambda x: paddle.ones([1, 1, 4, 4]), 'does not depend on the image')])
def test_layers_without_a_field(layer, message):
    with pytest.raises(ValueError, match=message):
        receptive_field(layer, np.ones([1, 3, 8, 8], np.float32))


def test_images_that_are_not_finite_are_left_out():
    layer, good = depthwise(np.ones([3, 3, 3], np.float32)), np.ones([3, 8, 8], np.float32)
    bad = good.copy()
    bad[:, 4, 4] = np.nan
    np.testing.assert_array_equal(receptive_field(layer, [good, bad, good]), receptive_field(layer, [good]))
    total = FieldSum().add(contributions([layer], bad), 'bad.png')
    assert total.done == 1 and total.left_out == ('bad.png: its gradients are not finite',)
    with pytest.raises(UserError, match='no image has a map; the first one: bad.png'):
        total.mean()


# ---- areas

@pytest.mark.parametrize(('field', 'expected'), [
    (np.ones([10, 10]), [(5, .25), (7, .49), (9, .81), (10, 1)]),  # 6 x 6 is not centred on a pixel
    (np.ones([9, 9]), [(5, 25 / 81), (5, 25 / 81), (7, 49 / 81), (9, 1)]),
    (np.ones([4, 12]), [(3, 9 / 48), (5, 20 / 48), (7, 28 / 48), (12, 1)]),
    (np.pad([[1.]], (4, 3)), [(1, 1 / 64)] * 4)])
def test_areas(field, expected):
    shares = (.2, .3, .5, .99) if len(field) != 4 else (.18, .3, .5, .99)
    np.testing.assert_allclose(list(area_ratios(field, shares).values()), expected)


def test_areas_of_nothing_are_not_numbers():
    assert np.isnan(list(area_ratios(np.zeros([4, 4])).values())).all()


def test_only_the_log_scaled_map_depends_on_the_scale_of_the_gradients():
    distance = np.hypot(*np.indices([65, 65]) - 32)
    field = np.exp(-distance / 4)
    raw, small, large = area_ratios(field), area_ratios(log_scaled(1e-3 * field)), area_ratios(log_scaled(1e3 * field))
    assert area_ratios(1e3 * field) == raw
    assert small[.5].side <= raw[.5].side + 2 < large[.5].side


def test_titles_of_many_maps_fit_into_the_figure():
    pytest.importorskip('matplotlib')
    drawn = io.BytesIO()
    draw_receptive_fields([('run\nstage 1, no small kernels', np.eye(8))] * 8, drawn)
    assert np.asarray(Image.open(drawn).convert('L'))[0].min() == 255  # nothing touches the border


# ---- the command

@pytest.fixture
def command(monkeypatch, capsys):
    """Runs erf.py in this process at 32 pixels; returns its exit status, and what it prints to each stream."""
    pytest.importorskip('matplotlib')

    def run(*arguments):
        monkeypatch.setattr('sys.argv', ['erf.py', '-size=32', '-num_images=2', '-device=cpu', *map(str, arguments)])
        try:
            status = exit_status(erf.main)
        except SystemExit as error:
            status = error.code
        return (status, *capsys.readouterr())
    return run


def rows_of(folder):
    with open(folder / 'areas.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_maps_of_stages_with_and_without_small_kernels(command, random_run, tmp_path):
    output = tmp_path / 'out'
    status, out, err = command(f'-model={random_run}', '-stage=1,3', '-without_small_kernel', f'-output={output}')
    assert status == 0, err
    names = [f'{random_run.name}-stage{stage}{kernels}' for kernels in ('', '-no_small_kernel') for stage in (1, 3)]
    rows = rows_of(output)
    assert [row['map'] for row in rows[::8]] == names and len(rows) == 8 * len(names)
    assert [line[:len(name)] for name, line in zip(names, out.splitlines()[1::2])] == names
    network, config = load_model(str(random_run))
    images = erf.Images(['synthetic'], 2, 32)
    transform = erf.eval_transform(32, protocol='warp')
    field = receptive_field(stage_layers(fuse(network), 1), [transform(images.decode(i, False)) for i in range(2)])
    np.testing.assert_array_equal(np.load(output / f'{names[0]}.npy'), field)
    maps = [np.load(output / f'{name}.npy') for name in names]
    assert all(a.any() and not np.array_equal(a, b) for a, b in zip(maps, maps[1:]))
    for name in [*names, 'erf']:
        with Image.open(output / f'{name}.png') as image:
            assert image.width > (1000 if name == 'erf' else 200)
    assert rows[0] == {'map': names[0], 'weights': str(random_run / 'best.pdparams'), 'stage': '1', 'small_kernel': '1',
                       'size': '32', 'images': '2', 'left_out': '0', 'scale': 'log', 'threshold': '0.2',
                       'side': rows[0]['side'], 'area_ratio': rows[0]['area_ratio']}
    assert float(rows[0]['area_ratio']) == pytest.approx(area_ratios(log_scaled(field))[.2].ratio, abs=1e-6)


def test_an_interrupted_command_continues(command, random_run, tmp_path, monkeypatch):
    monkeypatch.setattr(erf, 'draw_receptive_fields', lambda fields, file: file.write(fields[0][0].encode()))  # fast
    whole, output, arguments = tmp_path / 'whole', tmp_path / 'out', [f'-model={random_run}', '-num_images=4']
    assert command(*arguments, f'-output={whole}')[0] == 0
    name, calls = f'{random_run.name}-stage3', []

    def counted(*args):
        calls.append(len(calls))
        if len(calls) == 3:
            raise Interrupted(15, 'stopped by a signal')
        return contributions(*args)

    monkeypatch.setattr(erf, 'contributions', counted)
    status, _, err = command(*arguments, f'-output={output}')
    assert status == 143 and err.splitlines()[-1].startswith(f'stopped by a signal: {output} keeps the sums')
    assert command(*arguments, f'-output={output}')[0] == 0
    assert len(calls) == 5
    assert command(*arguments, f'-output={output}')[0] == 0  # nothing is left to compute
    assert len(calls) == 5
    for file in (f'{name}.npy', 'areas.csv', 'erf.png'):
        assert (whole / file).read_bytes() == (output / file).read_bytes()

    sums = output / f'{name}.sums.npz'
    before = sums.read_bytes()
    status, _, err = command(*arguments, f'-output={output}', '-size=48')
    assert status == 2 and err.splitlines()[-1] == (
        f'{sums}: belongs to other weights, images or sizes; delete it, or name another -output')
    assert sums.read_bytes() == before
    sums.write_bytes(before[:500])
    status, _, err = command(*arguments, f'-output={output}')
    assert status == 2 and err.splitlines()[-1].startswith(f'{sums}: cannot be read: ') and 'delete it' in err


def test_unreadable_images_are_left_out(command, random_run, photo, tmp_path):
    folder = tmp_path / 'photos'
    folder.mkdir()
    for name in ('a.png', 'c.png'):
        photo.save(folder / name)
    (folder / 'b.png').write_bytes(b'no image')
    status, _, err = command(f'-model={random_run}', '-images', folder, '-num_images=9', f'-output={tmp_path / "out"}')
    assert status == 1 and err.splitlines()[-1].startswith(
        f'{random_run.name}-stage3: left out: {folder / "b.png"}: ')
    row = rows_of(tmp_path / 'out')[0]
    assert (row['images'], row['left_out']) == ('2', '1')


def test_checkpoints_of_a_run_and_another_model(command, random_run, tiny_yaml, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(erf, 'draw_receptive_fields', lambda fields, file: drawn.append([title for title, _ in fields]))
    run = tmp_path / 'run'
    shutil.copytree(random_run, run)
    for epoch in (10, 2):
        shutil.copy(run / 'best.pdparams', run / f'epoch_{epoch:04}.pdparams')
    status, _, err = command(f'-model={run}', '-checkpoints', '-compare', run, tiny_yaml, f'-output={tmp_path / "o"}')
    assert status == 0, err
    labels = ['run-epoch_0002', 'run-epoch_0010', 'run', 'tiny-untrained']
    assert [row['map'] for row in rows_of(tmp_path / 'o')[::8]] == [f'{label}-stage3' for label in labels]
    assert drawn[-1] == [f'{label}\nstage 3' for label in labels]
    assert not np.array_equal(*(np.load(tmp_path / 'o' / f'{label}-stage3.npy') for label in labels[2:]))


@pytest.mark.parametrize(('arguments', 'message'), [
    (['-model=nowhere'], '-model=nowhere: no such file or folder, and not a name that'),
    (['-model=nowhere.yaml'], 'nowhere.yaml: no such file, and not a name that'),
    (['-stage=4'], '-stage: RUN has the stages 0 to 3, not 4'),
    (['-stage=3-1'], '-stage=3-1: the range is empty'),
    (['-stage=last'], '-stage=last: name stages by their numbers from 0'),
    (['-stage='], '-stage=: name stages by their numbers from 0'),
    (['-stage=0-99999999999'], '-stage=0-99999999999: name stages by their numbers from 0'),
    (['-device=tpu'], '-device=tpu: choose auto, gpu, cpu, npu, xpu'),
    (['-size=16'], '-size=16: must be at least 32 pixels'),
    (['-num_images=0'], '-num_images=0: must be at least 1'),
    (['-images', 'nowhere.txt'], 'nowhere.txt: '),
    (['-checkpoints'], '-checkpoints: RUN is not a run folder with numbered checkpoints'),
    (['-without_small_kernel', '-compare', 'replknet_xl_73m1k_320'], 'replknet_xl_73m1k_320: not in ./weights'),
    (['-output=FILE'], '-output=FILE: is a file; name a folder')])
def test_mistakes_on_the_command_line(command, random_run, tmp_path, arguments, message):
    file = tmp_path / 'file'
    file.touch()
    given = [f'-model={random_run}', f'-output={tmp_path / "out"}', *arguments]
    status, out, err = command(*(argument.replace('FILE', str(file)) for argument in given))
    assert status == 2 and not out
    assert err.splitlines()[-1].startswith(message.replace('RUN', str(random_run)).replace('FILE', str(file))), err
    assert not (tmp_path / 'out').exists()


def test_a_run_is_named_after_its_folder_also_from_within(random_run, monkeypatch):
    monkeypatch.chdir(random_run)
    assert erf._source('.', None).label == random_run.name


def test_merged_weights_and_no_small_kernel(command, random_run, tmp_path):
    from run_folder.checkpoint import model_arrays, save_checkpoint
    run = tmp_path / 'run'
    shutil.copytree(random_run, run)
    network, _ = load_model(str(run))
    network.structural_reparam()
    save_checkpoint(run / 'best.pdparams', {'model': model_arrays(network), 'weights_key': 'model', 'epoch': 0,
                                            'best': {}, 'config': ''})
    status, _, err = command(f'-model={run}', '-without_small_kernel', f'-output={tmp_path / "out"}')
    assert status == 2 and 'are merged into the large ones; name weights in the training form' in err
    assert get_config(run / 'config.yaml').MODEL.SMALL_KERNEL == 5
