"""GPUs that are not there, not used or too old, with the queries of the machine replaced."""
import os
import subprocess
import sys
from pathlib import Path

import paddle
import pytest

import utils
from config import get_config
from dry_run.report import report
from errors import UserError
from training.amp import check_card
from training.running_statistics import sync_batch_norm_works

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cards(monkeypatch):
    """A machine with two NVIDIA cards that Paddle does not find; returns the warnings logged."""
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr(utils, 'device_count', lambda kind: int(kind == 'cpu'))
    monkeypatch.setattr(utils, '_nvidia_cards', lambda: 2)
    warned = []
    monkeypatch.setattr(utils.logger, 'warning', warned.append)
    return warned


def test_auto_warns_of_cards_that_paddle_does_not_find_and_refuses_half_precision(cards, monkeypatch):
    assert utils.resolve_device('auto') == 'cpu'
    assert len(cards) == 1 and 'none of the 2 NVIDIA cards' in cards[0]
    with pytest.raises(UserError, match='-amp: Paddle .* none of the 2 NVIDIA cards .*or choose -device=cpu'):
        utils.resolve_device('auto', half=True)
    for compiled, words in ((False, 'requirements-gpu.txt'), (True, 'nvidia-smi works')):
        monkeypatch.setattr(paddle, 'is_compiled_with_cuda', lambda compiled=compiled: compiled)
        assert words in utils.unused_gpus() and '\n' not in utils.unused_gpus()


@pytest.mark.parametrize('hidden', ['', '-1'])
def test_cards_that_are_hidden_or_not_asked_for_are_no_mistake(cards, monkeypatch, hidden):
    assert utils.resolve_device('cpu', half=True) == 'cpu'
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', hidden)
    assert utils.resolve_device('auto', half=True) == 'cpu'
    assert not cards


def test_a_machine_without_cards_uses_its_cpu_silently(cards, monkeypatch):
    monkeypatch.setattr(utils, '_nvidia_cards', lambda: 0)
    assert utils.resolve_device('auto', half=True) == 'cpu' and not cards


def test_a_dry_run_names_cards_that_paddle_does_not_find(cards):
    config = get_config(ROOT / 'configs/replknet_nano_digits.yaml', [], {'dry_run': True})
    assert 'none of the 2 NVIDIA cards' in report(config, 'cpu', 1)
    config = get_config(ROOT / 'configs/replknet_nano_digits.yaml', [], {'dry_run': True, 'device': 'cpu'})
    assert 'NVIDIA' not in report(config, 'cpu', 1)


def test_cards_are_counted_by_the_driver_or_by_nvidia_smi(tmp_path, monkeypatch):
    (tmp_path / 'gpus/0000:00:1e.0').mkdir(parents=True)
    assert utils._nvidia_cards(tmp_path / 'gpus') == 1
    monkeypatch.setenv('PATH', str(tmp_path))
    assert utils._nvidia_cards(tmp_path / 'none') == 0
    (tmp_path / 'nvidia-smi').write_text('#!/bin/sh\necho "GPU 0: A (UUID: x)"\necho "GPU 1: A (UUID: y)"\n')
    (tmp_path / 'nvidia-smi').chmod(0o755)
    assert utils._nvidia_cards(tmp_path / 'none') == 2
    (tmp_path / 'nvidia-smi').write_text('#!/bin/sh\necho "NVIDIA-SMI has failed"\nexit 9\n')
    assert utils._nvidia_cards(tmp_path / 'none') == 0


def test_spaces_between_visible_devices_do_not_matter():
    """Paddle's spawn looks a card up by its name without the spaces around it."""
    code = ('import paddle_env, os\n'
            'from paddle.distributed.utils.launch_utils import get_gpus\n'
            'print(get_gpus(os.environ["CUDA_VISIBLE_DEVICES"]), os.environ["XPU_VISIBLE_DEVICES"])')
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '2, 3', 'XPU_VISIBLE_DEVICES': ' 0 ,1'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.stdout.strip() == '[0, 1] 0,1', done.stderr


def test_the_tests_do_not_see_gpus():
    assert os.environ['CUDA_VISIBLE_DEVICES'] == '' and paddle.device.get_device() == 'cpu'


@pytest.mark.parametrize(('capability', 'dtype', 'level', 'outcome'), [
    ((6, 1), 'float16', 'O2', 'refused'), ((6, 1), 'float16', 'O1', 'warned'), ((7, 5), 'bfloat16', 'O2', 'refused'),
    ((7, 5), 'bfloat16', 'O1', 'warned'), ((7, 0), 'float16', 'O2', ''), ((8, 0), 'bfloat16', 'O2', '')])
def test_a_card_without_the_half_precision_type(cards, monkeypatch, capability, dtype, level, outcome):
    monkeypatch.setattr(paddle.device.cuda, 'get_device_capability', lambda: capability)
    config = get_config(None, ['AMP', 'True', 'AMP_DTYPE', dtype, 'AMP_LEVEL', level])
    if outcome == 'refused':
        with pytest.raises(UserError, match=f'AMP_DTYPE {dtype} needs compute capability .* has {capability[0]}.'):
            check_card(config, 'gpu')
    else:
        check_card(config, 'gpu')
        assert len(cards) == (outcome == 'warned')
    check_card(config, 'cpu')


class AloneNorm(paddle.nn.BatchNorm2D):
    """What SyncBatchNorm is if it does not synchronise; it has no kernel for the CPU."""


class BrokenNorm(paddle.nn.BatchNorm2D):
    def forward(self, x):
        raise ValueError('an empty tensor is saved')


class TogetherNorm(paddle.nn.BatchNorm2D):
    def forward(self, x):
        return super().forward(paddle.full([2, 1, 1, 1], 0.5) + 0 * x)


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize(('kind', 'works'), [(AloneNorm, False), (BrokenNorm, False), (TogetherNorm, True)])
def test_a_batch_norm_that_does_not_synchronise_is_found(monkeypatch, kind, works, recompute):
    def mean_of(rank):
        means = []
        monkeypatch.setattr(utils, 'rank', lambda: rank)
        monkeypatch.setattr(utils, 'all_gather_values', lambda value: means.append(value) or [value])
        sync_batch_norm_works(recompute)
        return means[0]

    monkeypatch.setattr(paddle.nn, 'SyncBatchNorm', kind)
    everyone = [mean_of(rank) for rank in (0, 1)]
    monkeypatch.setattr(utils, 'all_gather_values', lambda value: everyone)
    assert sync_batch_norm_works(recompute) is works
