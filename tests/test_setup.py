"""How the parts of a training run on GPUs fit together, as far as a CPU can show it."""
import types

import paddle
import pytest

import utils
from config import get_config
from replknet import RepLKNet
from training import setup
from training.amp import Amp
from training.run import Start
from training.setup import build_training

OPTS = ['DATA.BATCH_SIZE', 2, 'TRAIN.NUM_EPOCHS', 2, 'TRAIN.WARMUP_EPOCHS', 0]


def build(opts, device):
    config = get_config(None, [*OPTS, *opts])
    loader = type('Loader', (list,), {'dataset': range(8)})([None] * 4)
    start = Start(RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=3), None, None)
    return build_training(config, device, Amp(config, 'gpu'), start, loader, types.SimpleNamespace(identity={}))


@pytest.mark.parametrize('optimizer', ['adamw', 'momentum', 'lion'])
def test_under_o2_the_optimizer_updates_float32_weights_only(monkeypatch, optimizer):
    monkeypatch.setattr(paddle.amp, 'decorate', lambda models, level, dtype: models.head.to(dtype=dtype))
    parts, state = build(['AMP', 'True', 'AMP_LEVEL', 'O2', 'AMP_DTYPE', 'bfloat16', 'TRAIN.OPTIMIZER.NAME', optimizer],
                         'gpu')
    assert parts.model.head.weight.dtype == paddle.bfloat16 and parts.ema.module.head.weight.dtype == paddle.float32
    updated = [p for group in parts.optimizer._param_groups for p in group['params']]
    assert {p.name for p in updated} == {p.name for p in parts.trained_parameters}
    assert {p.dtype for p in updated} == {paddle.float32} and len(updated) == len(parts.trained_parameters)
    assert set(state.capture()['optimizer']['master_weights']) == {'head.weight', 'head.bias'}


@pytest.mark.parametrize('works', [True, False])
def test_statistics_are_averaged_where_batch_norm_does_not_synchronise(monkeypatch, works):
    warned = []
    monkeypatch.setattr(utils, 'world_size', lambda: 2)
    monkeypatch.setattr(paddle, 'DataParallel', type('DataParallel', (), {'__new__': lambda cls, model: model}))
    monkeypatch.setattr(setup, 'sync_batch_norm_works', lambda recompute: works)
    monkeypatch.setattr(setup.logger, 'warning', warned.append)
    parts, state = build([], 'gpu')
    synchronised = any(isinstance(layer, paddle.nn.SyncBatchNorm) for layer in parts.model.sublayers())
    assert synchronised == works and state.own_statistics != works
    assert [line.split(':')[0] for line in warned] == ([] if works else ['TRAIN.SYNC_BN'])
