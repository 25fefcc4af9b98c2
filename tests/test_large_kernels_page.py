"""The examples of docs/large_kernels.md."""
import importlib.util
import re
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

import replknet
from replknet import RepLKNet

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / 'docs' / 'large_kernels.md').read_text()


def test_large_kernels_in_your_own_network():
    code, = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
    names = {}
    exec(code, names)
    net = names['net']
    assert all(np.abs(p.grad.numpy()).max() > 0 for p in net[1].mix[0].parameters()[:1])
    stock = nn.Conv2D(16, 16, 31, padding=15, groups=16)
    stock.set_state_dict(net[1].mix[0].state_dict())
    x = paddle.randn([1, 16, 16, 16])
    np.testing.assert_allclose(net[1].mix[0](x).numpy(), stock(x).numpy(), atol=1e-4)


def test_files_in_the_commands_exist():
    for name in re.findall(r'python ([a-z_/]+\.py)', PAGE):
        assert (ROOT / name).is_file(), name


def test_training_without_the_shortcut(monkeypatch):
    spec = importlib.util.spec_from_file_location('wrapper', ROOT / 'benchmarks' / 'train_without_shortcut.py')
    wrapper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wrapper)
    model = RepLKNet([5, 5, 5, 5], [1, 1, 1, 1], [4, 4, 4, 4], small_kernel=3, num_classes=3)
    model.eval()
    block, x = model.stages[0].blocks[0], paddle.randn([1, 4, 8, 8])
    expected = block(x) - x
    monkeypatch.setattr(replknet.RepLKBlock, 'forward', wrapper.without_shortcut)
    np.testing.assert_allclose(block(x).numpy(), expected.numpy(), atol=1e-5)
