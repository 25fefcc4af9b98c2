"""hubconf.py through paddle.hub, from another working directory."""
import os
from pathlib import Path

import numpy as np
import paddle
import pytest

from replknet import VARIANTS, RepLKNet
from run_folder.checkpoint import model_arrays

ROOT = str(Path(__file__).parents[1])
TINY = {'layers': [1, 1, 1, 1], 'channels': [4, 6, 8, 10], 'large_kernel_sizes': [9, 7, 5, 5]}


@pytest.fixture
def weights(tmp_path):
    """A file of weights of a tiny model of 4 classes, and the model."""
    model = RepLKNet(**TINY, num_classes=4)
    paddle.save({name: paddle.to_tensor(array) for name, array in model_arrays(model).items()},
                str(tmp_path / 'w.pdparams'))
    return str(tmp_path / 'w.pdparams'), model


def test_a_fresh_process_elsewhere_lists_and_loads(run_script, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(f'''
import paddle
print(paddle.hub.list({ROOT!r}, source='local'))
assert 'replknet_31b_22k1k_384' in paddle.hub.help({ROOT!r}, 'replknet_31b', source='local')
model = paddle.hub.load({ROOT!r}, 'replknet_xl', source='local', num_classes=None, out_indices=(1, 3), **{TINY})
print([list(x.shape) for x in model(paddle.zeros([1, 3, 64, 64]))])
''')
    done = run_script(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(sorted(VARIANTS)), '[[1, 6, 8, 8], [1, 10, 2, 2]]']


def test_weights_load_into_any_head(weights):
    path, model = weights
    model.eval()
    x = paddle.randn([2, 3, 64, 64])

    def load(**arguments):
        loaded = paddle.hub.load(ROOT, 'replknet_31b', source='local', pretrained=path, **TINY, **arguments)
        loaded.eval()
        return loaded

    assert np.array_equal(load(num_classes=4)(x), model(x))
    features = model.forward_features(x)
    other = load(num_classes=7)
    assert other(x).shape == [2, 7] and np.array_equal(other.forward_features(x)[-1], features[-1])
    backbone = load(num_classes=None, out_indices=(0, 2), norm_intermediate_features=True)
    norm = backbone.stages[2].norm  # newly initialised
    assert np.array_equal(backbone(x)[1], norm(features[2])) and float(norm.weight.sum()) == 8


def test_mistakes(weights, tmp_path):
    with pytest.raises(ValueError, match='no published weights'):
        paddle.hub.load(ROOT, 'replknet_13b', source='local', pretrained=True, **TINY)
    with pytest.raises(FileNotFoundError, match=f'replknet_31l_22k1k_384: not in {tmp_path}'):
        paddle.hub.load(ROOT, 'replknet_31l', source='local', pretrained=True, weights_dir=str(tmp_path), **TINY)
    with pytest.raises(ValueError, match='do not fit'):
        paddle.hub.load(ROOT, 'replknet_31b', source='local', pretrained=weights[0], **{**TINY, 'layers': [1, 1, 1, 2]})
    assert not os.path.exists(tmp_path / 'weights')
