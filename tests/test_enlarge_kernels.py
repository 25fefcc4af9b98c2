"""tools/enlarge_kernels.py: the enlarged network is the same function, and a start for training."""
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from config import get_config
from deploy.predictor import load_model
from errors import UserError
from port_weights.safe_load import read_checkpoint
from run_folder.checkpoint import save_checkpoint
from run_folder.metrics import best_checkpoint
from zoo import build_model, pretrained_weights

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location('enlarge_kernels', ROOT / 'tools' / 'enlarge_kernels.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
LARGER = [31, 13, 7, 5]  # from 9, 7, 5, 5: two are enlarged to more than the map, one a little, one not at all


def surgery(monkeypatch, *flags):
    monkeypatch.setattr('sys.argv', ['enlarge_kernels.py', *map(str, flags)])
    return tool.main()


@pytest.fixture
def enlarged(random_run, tmp_path, monkeypatch, capsys):
    """A folder that the command has written."""
    assert surgery(monkeypatch, f'-pretrained={random_run}', '-kernels=31,13,7,5', f'-output={tmp_path / "new"}') == 0
    assert 'parameters instead of' in capsys.readouterr().out
    return tmp_path / 'new'


@pytest.mark.parametrize('merged', [False, True])
def test_logits_are_equal_in_both_forms(random_run, enlarged, merged):
    before, after = (load_model(str(folder))[0] for folder in (random_run, enlarged))
    if merged:
        before.structural_reparam()
        after.structural_reparam()
    images = paddle.randn([2, 3, 48, 40])
    expected, found = before(images).numpy(), after(images).numpy()
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_settings_and_kernels_are_the_larger_ones(random_run, enlarged):
    assert get_config(enlarged / 'config.yaml').MODEL.LARGE_KERNEL_SIZES == LARGER
    old, new = (read_checkpoint(folder / 'best.pdparams')['model'] for folder in (random_run, enlarged))
    assert old.keys() == new.keys()
    for name, array in new.items():
        if 'large_kernel_origin.conv' not in name:
            np.testing.assert_array_equal(array, old[name])
            continue
        size = LARGER[int(name.split('.')[1])]
        assert array.shape[-2:] == (size, size)
        assert np.count_nonzero(array) == np.count_nonzero(old[name])
        margin = (size - old[name].shape[-1]) // 2
        np.testing.assert_array_equal(array[..., margin:size - margin, margin:size - margin], old[name])


def test_the_new_outer_weights_learn(enlarged):
    model = build_model(get_config(enlarged / 'config.yaml'), *pretrained_weights(best_checkpoint(str(enlarged))))
    model.train()
    (model(paddle.randn([2, 3, 64, 64])) ** 2).mean().backward()
    ring = model.stages[0].blocks[0].large_kernel.large_kernel_origin.conv.weight.grad.numpy()[..., 0, :]
    assert np.abs(ring).max() > 0


def test_merged_weights_are_enlarged_too(random_run, tmp_path, monkeypatch):
    model, _ = load_model(str(random_run))
    model.structural_reparam()
    folder = tmp_path / 'merged'
    folder.mkdir()
    shutil.copy(random_run / 'config.yaml', folder)
    save_checkpoint(folder / 'best.pdparams', {
        'model': {name: tensor.numpy() for name, tensor in model.state_dict().items()}, 'weights_key': 'model'})
    surgery(monkeypatch, f'-pretrained={folder}', '-kernels=11,7,5,5', f'-output={tmp_path / "new"}')
    images = paddle.randn([1, 3, 32, 32])
    np.testing.assert_allclose(load_model(str(tmp_path / 'new'))[0](images).numpy(), model(images).numpy(), atol=1e-5)


@pytest.mark.parametrize(('kernels', 'message'), [
    ('31,29,27', 'the model has 4 stages'),
    ('31,5,5,5', '5 for stage 1 is smaller than now'),
    ('9,7,5,5', 'these are the kernels of the model'),
    ('12,7,5,5', 'has the even kernel 12'),
    ('301,7,5,5', 'has the kernel 301; the largest is'),
    ('9,x,5,5', 'separated by commas')])
def test_kernels_that_cannot_be_used_are_refused_in_one_line(random_run, tmp_path, monkeypatch, kernels, message):
    with pytest.raises(UserError, match=message) as error:
        surgery(monkeypatch, f'-pretrained={random_run}', f'-kernels={kernels}', f'-output={tmp_path / "new"}')
    assert str(error.value).startswith(f'-kernels={kernels}:') and '\n' not in str(error.value)
    assert not (tmp_path / 'new').exists()


def test_an_existing_folder_is_kept(random_run, monkeypatch):
    with pytest.raises(UserError, match='is not empty'):
        surgery(monkeypatch, f'-pretrained={random_run}', '-kernels=31,13,7,5', f'-output={random_run}')
