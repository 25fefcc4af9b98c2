"""The examples of docs/large_kernels.md, and the script of its ablations."""
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
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


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    return importlib.import_module('ablation')


def test_the_ablation_trains_what_is_missing(ablation, tmp_path, monkeypatch):
    started = []

    def run(command, stdout):
        started.append(command)
        folder = Path(next(word for word in command if word.startswith('-output=')).partition('=')[2])
        folder.mkdir()
        (folder / 'metrics.jsonl').write_text(''.join(json.dumps(
            {'event': 'eval', 'epoch': epoch, 'weights': weights, 'acc1': 10 * epoch, 'loss': 1}) + '\n'
            for epoch in (1, 2) for weights in ('model', 'model_ema')))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, 'run', run)
    args = SimpleNamespace(cfg=str(ROOT / 'configs/replknet_nano_digits.yaml'), data_path='digits',
                           output=str(tmp_path), opts=['TRAIN.NUM_EPOCHS', '2'])
    for _ in range(2):
        runs = {v: [ablation.train(v, seed, args) for seed in (1, 2)] for v in ablation.VARIANTS}
    assert len(started) == 2 * len(ablation.VARIANTS)  # the second time all runs have finished
    assert {len(evaluations) for found in runs.values() for evaluations in found} == {2}
    scripts = {Path(command[1]).name for command in started if 'no_shortcut' in str(command)}
    assert scripts == {'train_without_shortcut.py'}
    fields = dict.fromkeys(runs, np.ones([9, 9]))
    table = ablation.table(runs, fields).splitlines()
    assert table[2] == '| 3x3 | 20.0 ± 0.0 | 20.0, 20.0 | 1.000 ± 0.000 | 60.5 / 60.5 |'
    assert len(table) == 2 + len(ablation.VARIANTS)


def test_the_ablation_draws_the_field_of_a_network_without_shortcuts(ablation, tmp_path, random_run, photo):
    for name in ('k3-seed1', 'k3_no_shortcut-seed1'):
        shutil.copytree(random_run, tmp_path / name)
        (tmp_path / name / 'best.pdparams').rename(tmp_path / name / 'last.pdparams')
    photo.save(tmp_path / 'a.png')
    (tmp_path / 'val_list.txt').write_text('a.png 0\n')
    args = SimpleNamespace(output=str(tmp_path), data_path=str(tmp_path), seeds=1, erf_size=32)
    forward = replknet.RepLKBlock.forward
    whole, without = (ablation.field_of(v, args) for v in (ablation.VARIANTS[0], ablation.VARIANTS[-1]))
    assert whole.shape == without.shape == (32, 32) and whole.any() and not np.allclose(whole, without)
    assert replknet.RepLKBlock.forward is forward
