"""Class activation maps: exact, in the right place, and drawn beside the image."""
import numpy as np
import paddle
import pytest
from PIL import Image

import predict
from deploy.contact_sheets import LINE, MARGIN
from deploy.predictor import load_model
from errors import exit_status
from evaluation.activation_maps import COLOURS, SIDE, at_pixels, class_maps, grad_cam, overlay
from export import export
from fuse import fuse, in_form, pack
from replknet import RepLKNet


@pytest.fixture(scope='module')
def network(random_run):
    return load_model(str(random_run))[0]


@pytest.fixture(scope='module')
def images():
    paddle.seed(0)
    return paddle.randn([2, 3, 64, 96])


@pytest.mark.parametrize('form', ['training', 'merged', 'fused', 'packed'])
def test_the_mean_of_a_map_is_the_logit(network, images, form):
    form, packed = ('fused', True) if form == 'packed' else (form, False)
    model = in_form(network, form)
    model = pack(model) if packed else model
    classes = [2, 0, 3]
    maps = class_maps(model, images, classes)
    assert maps.shape == [2, 3, 2, 3] and float(maps.std()) > 1e-3
    with paddle.no_grad():
        own, expected = model(images).numpy()[:, classes], network(images).numpy()[:, classes]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(maps.numpy().mean((2, 3)), own, atol=1e-6 * scale)
    np.testing.assert_allclose(own, expected, atol=1e-4 * scale)


@pytest.mark.parametrize('form', ['training', 'fused'])
def test_grad_cam_of_the_last_stage_is_the_exact_map_without_its_constant(network, images, form):
    model = in_form(network, form)
    maps, exact = grad_cam(model, images, [1, 2], 3).numpy(), class_maps(model, images, [1, 2]).numpy()
    with paddle.no_grad():  # where the features are 0, the exact map is the shift of the norm and the bias
        zero = model.head(model.norm(paddle.zeros([1, model.head.weight.shape[0], 1, 1]))[:, :, 0, 0]).numpy()[0]
    expected = np.maximum(exact - zero[[1, 2]][:, None, None], 0) / exact[0, 0].size
    np.testing.assert_allclose(maps, expected, atol=1e-5 * expected.max())
    assert maps.max() > 0


@pytest.mark.parametrize('stage', [0, 1, 2])
def test_grad_cam_of_an_inner_stage(network, images, stage):
    """Against gradients of the whole network, with respect to what is added to the stage's map."""
    maps = grad_cam(fuse(network), images, [1], stage).numpy()
    sizes = (64 >> stage + 2, 96 >> stage + 2)
    assert maps.shape == (2, 1, *sizes)
    kept = []

    def add_nothing(layer, inputs, output):
        kept[:] = [output, paddle.zeros_like(output)]
        kept[1].stop_gradient = False
        return output + kept[1]

    hook = network.stages[stage].register_forward_post_hook(add_nothing)
    gradient, = paddle.grad(network(images)[:, 1].sum(), kept[1])
    hook.remove()
    weights = gradient.numpy().mean((2, 3), keepdims=True)
    expected = np.maximum((weights * kept[0].numpy()).sum(1), 0)
    np.testing.assert_allclose(maps[:, 0], expected, atol=1e-4 * expected.max())


def test_positions_of_a_map_are_where_its_receptive_field_is_centred():
    """With constant positive weights, the gradient of a position is symmetric about its centre in the image."""
    model = RepLKNet([3, 3, 3, 3], [1, 1, 1, 1], [2, 2, 2, 2], num_classes=None, small_kernel=0)
    model.eval()
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.set_value(paddle.full(parameter.shape, 0.1))
    images = paddle.ones([1, 3, 608, 608])
    images.stop_gradient = False
    for stage, features in enumerate(model.forward_features(images)):
        stride, position = 4 * 2 ** stage, features.shape[2] // 2
        gradient, = paddle.grad(features[0, 0, position, position], images, retain_graph=True)
        weight = np.abs(gradient.numpy()[0]).sum((0, 1)).astype('float64')
        assert weight[0] == weight[-1] == 0
        assert (weight * np.arange(608)).sum() / weight.sum() == pytest.approx(position * stride, abs=1e-3)
        ramp = at_pixels(np.arange(features.shape[2], dtype=float), 608, 608, stride)
        assert ramp[position * stride] == position and ramp[position * stride + stride // 2] == position + 0.5


def test_the_colours_cover_an_image_of_any_resolution():
    heat = np.zeros([7, 7])
    heat[2, 5] = 3.0
    for width, height in ((224, 224), (448, 300)):
        black = Image.new('RGB', (width, height))
        pixels = np.asarray(overlay(black, heat, 224, 32), int).sum(2)
        row, column = np.unravel_index(pixels.argmax(), pixels.shape)
        assert abs(row - (64 + 0.5) * height / 224) <= 1 and abs(column - (160 + 0.5) * width / 224) <= 1
    same = overlay(Image.new('RGB', (40, 30), 'red'), np.ones([1, 1]), 32, 32)
    assert len(same.getcolors()) == 1
    matplotlib = pytest.importorskip('matplotlib')
    expected = 255 * matplotlib.colormaps['inferno'](np.linspace(0, 1, len(COLOURS)))[:, :3]
    assert np.abs(COLOURS - expected).max() <= 1.5


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr('sys.argv', ['predict.py', *map(str, arguments), '-device=cpu'])
    status = exit_status(predict.main)
    return status, [line for line in capsys.readouterr().err.splitlines() if not line.startswith('weights of')]


@pytest.mark.parametrize('stage', [None, 1])
@pytest.mark.parametrize('protocol', ['crop', 'warp'])
def test_a_file_for_each_image(random_run, tmp_path, monkeypatch, capsys, stage, protocol):
    cfg = tmp_path / 'settings.yaml'
    cfg.write_text(f'BASE: [{random_run}/config.yaml]\nDATA:\n  EVAL_PROTOCOL: {protocol}\n')
    rng = np.random.default_rng(0)
    lines = []
    for index, (folder, name) in enumerate((('a', '1.png'), ('b', '1.png'), ('b', '1_2.jpg'), ('b', 'broken.png'))):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 80, 3), dtype=np.uint8)).save(tmp_path / folder / name)
        lines.append(f'{folder}/{name} {index}\n')
    (tmp_path / 'b/broken.png').write_bytes(b'no image')
    (tmp_path / 'list.txt').write_text(''.join(lines))
    more = [] if stage is None else [f'-cam_stage={stage}']
    status, errors = call(monkeypatch, capsys, tmp_path / 'list.txt', f'-model={random_run}', f'-cfg={cfg}',
                          f'-cam={tmp_path}/new/maps', f'-output={tmp_path}/o.csv', *more)
    assert status == 1 and errors[-1] == '1 of 4 images could not be read'
    maps = tmp_path / 'new/maps'
    assert sorted(path.name for path in maps.iterdir()) == ['1.png', '1_2.png', '1_2_2.png']
    guesses = [int(line.split(',')[3]) for line in (tmp_path / 'o.csv').read_text().splitlines()[1:4]]
    panels = [2 if guess == label else 3 for label, guess in enumerate(guesses)]
    assert 3 in panels
    height = SIDE if protocol == 'crop' else SIDE // 2
    for name, count in zip(('1.png', '1_2.png', '1_2_2.png'), panels):
        with Image.open(maps / name) as image:
            assert image.size == (count * (SIDE + MARGIN) + MARGIN, height + 2 * MARGIN + LINE)


def test_mistakes_on_the_command_line(random_run, tmp_path, monkeypatch, capsys):
    image = tmp_path / 'a.png'
    Image.new('RGB', (40, 30), 'red').save(image)
    from config import get_config
    export(get_config(random_run / 'config.yaml', flags={
        'eval': True, 'pretrained': str(random_run / 'best.pdparams')}), tmp_path / 'export')
    for model, flags, words in (
            (tmp_path / 'export', [f'-cam={tmp_path}/new'], 'does not give its feature maps; name its weights instead'),
            (random_run, [f'-cam={tmp_path}/new', '-cam_stage=4'], 'has the stages 0 to 3'),
            (random_run, [f'-cam={tmp_path}/new', '-cam_stage=-1'], 'has the stages 0 to 3'),
            (random_run, ['-cam_stage=1'], '-cam_stage=1: name a folder'),
            (random_run, [f'-cam={tmp_path}'], f'-cam={tmp_path}: is not empty')):
        status, errors = call(monkeypatch, capsys, image, f'-model={model}', *flags)
        assert status == 2 and len(errors) == 1 and words in errors[0], errors
    assert not (tmp_path / 'new').exists()
