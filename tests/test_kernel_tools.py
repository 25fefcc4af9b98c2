"""tools/show_kernels.py, tools/enlarge_kernels.py and tools/shape_bias.py."""
import importlib.util
import json
import os

import numpy as np
import paddle
import pytest

from deploy.predictor import load_model
from errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def tool(name):
    spec = importlib.util.spec_from_file_location(name, f'{ROOT}/tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_main(name, monkeypatch, *arguments):
    module = tool(name)
    monkeypatch.setattr('sys.argv', [name, *map(str, arguments)])
    return module.main()


# ---- kernel surgery

def test_enlarged_kernels_compute_the_same_logits(random_run, tmp_path, monkeypatch):
    assert run_main('enlarge_kernels', monkeypatch, f'-model={random_run}', '-kernels=31,29,27,13',
                    f'-output={tmp_path}/new') == 0
    (old, _), (new, config) = load_model(str(random_run)), load_model(str(tmp_path / 'new'))
    assert config.MODEL.LARGE_KERNEL_SIZES == [31, 29, 27, 13]
    images = paddle.randn([2, 3, 64, 64])
    with paddle.no_grad():
        expected, found = old(images).numpy(), new(images).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    before, after = ({name: value.numpy() for name, value in model.state_dict().items()} for model in (old, new))
    for name, array in after.items():  # bit for bit: the old weights, and zeros around the large kernels
        margin = (array.shape[-1] - before[name].shape[-1]) // 2 if array.ndim == 4 else 0
        inner = array[:, :, margin:-margin, margin:-margin] if margin else array
        assert np.array_equal(inner, before[name]), name
        assert np.count_nonzero(array) == np.count_nonzero(before[name]), name
    grown = [name for name in after if after[name].shape != before[name].shape]
    assert len(grown) == 5 and all('large_kernel_origin.conv' in name for name in grown)


def test_kernels_do_not_shrink(random_run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match='5 for stage 0, whose kernel is 9x9'):
        run_main('enlarge_kernels', monkeypatch, f'-model={random_run}', '-kernels=5', f'-output={tmp_path}/new')
    with pytest.raises(UserError, match='even kernel 10'):
        run_main('enlarge_kernels', monkeypatch, f'-model={random_run}', '-kernels=10', f'-output={tmp_path}/new')
    with pytest.raises(UserError, match='2 sizes, but the model has 4 stages'):
        run_main('enlarge_kernels', monkeypatch, f'-model={random_run}', '-kernels=31,31', f'-output={tmp_path}/new')
    assert not (tmp_path / 'new').exists()


# ---- images of kernels

def test_the_mass_of_a_kernel_is_that_of_its_squares():
    kernel = np.zeros([1, 5, 5])
    kernel[0, 2, 2], kernel[0, 1, 2], kernel[0, 0, 4] = 2, -1, 1
    assert tool('show_kernels').mass_within(kernel) == [0.5, 0.75, 1]


def test_shown_kernels_are_those_of_the_merged_model(random_run):
    model, _ = load_model(str(random_run))
    shown = tool('show_kernels').blocks_of(model)
    model.structural_reparam()
    assert len(shown) == 5
    for (stage, number), kernels in tool('show_kernels').blocks_of(model).items():
        np.testing.assert_allclose(shown[stage, number]['merged'], kernels['merged'], rtol=1e-5, atol=1e-7)


def test_images_and_shares_are_written(random_run, tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    run_main('show_kernels', monkeypatch, f'-model={random_run}', f'-output={tmp_path}/kernels')
    assert {f'kernels_{stage}.png' for stage in range(4)} | {'mass.png', 'mass.json'} == set(
        os.listdir(tmp_path / 'kernels'))
    mass = json.loads((tmp_path / 'kernels/mass.json').read_text())['model']
    assert len(mass['0.0']) == 5 and mass['0.0'][-1] == pytest.approx(1)


# ---- shape bias

def test_the_classes_are_those_of_the_published_protocol():
    counts = {name: len(tool('shape_bias').members(name)) for name in tool('shape_bias').NAMES}
    assert counts == {'airplane': 1, 'bear': 4, 'bicycle': 2, 'bird': 49, 'boat': 5, 'bottle': 7, 'car': 3, 'cat': 6,
                      'chair': 4, 'clock': 3, 'dog': 109, 'elephant': 2, 'keyboard': 2, 'knife': 1, 'oven': 1,
                      'truck': 8}


def test_probabilities_are_averaged_and_images_without_conflict_left_out(tmp_path, monkeypatch, capsys):
    names = ['cat1-dog2.png', 'cat2-dog1.png', 'cat3-cat1.png', 'dog1-car3.png', 'dog2-car1.png']
    logits = np.full([5, 1000], -20.0)
    logits[0, 281] = logits[2, 281] = 5  # cat: the shape, twice
    logits[1, 152] = 5  # dog: the texture
    logits[3, 499] = 5  # knife: neither
    logits[4, 152:192] = 3  # the sum over dogs is larger, the mean over cars too small
    logits[4, 817] = 5.5
    for name in names:
        (tmp_path / name[:3]).mkdir(exist_ok=True)
        (tmp_path / name[:3] / name).touch()
    np.savez(tmp_path / 'logits.npz', paths=names, logits=logits)
    run_main('shape_bias', monkeypatch, tmp_path, f'-predictions={tmp_path}/logits.npz', f'-output={tmp_path}/t.csv')
    rows = dict(line.split(',', 1) for line in (tmp_path / 't.csv').read_text().splitlines())
    assert rows['cat'] == '2,1,1,0.5' and rows['dog'] == '2,0,1,0.0' and rows['all'] == f'4,1,2,{1 / 3}'
    assert rows['bear'] == '0,0,0,' and '33.3%' in capsys.readouterr().out


def test_other_file_names_are_refused():
    cues = tool('shape_bias').cues
    assert cues('a/0001_dog10-bird2.png') == ('dog', 'bird')
    for name in ('cat.png', 'cat1-horse2.png'):
        with pytest.raises(UserError, match=f'{name}: is not named like'):
            cues(name)


# ---- the large-kernel convolution in one's own network

def test_the_example_of_the_guidelines_trains():
    text = open(f'{ROOT}/docs/large_kernels_guidelines.md', encoding='utf-8').read()
    scope = {}
    exec(text.split('```python\n')[1].split('```')[0], scope)
    block = scope['LargeKernelBlock'](4, 13)
    x = paddle.randn([2, 4, 16, 16])
    y = block(x)
    y.mean().backward()
    assert y.shape == x.shape and all(p.grad is not None for p in block.parameters() if not p.stop_gradient)
