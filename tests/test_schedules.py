"""Learning rate and weight decay over a run: shapes, end points, and edge cases of warm-up and cool-down."""
import math

import numpy as np
import pytest

from config import ConfigError, get_config
from training.schedules import Schedule, build_schedule, build_weight_decay

NAMES = ['cosine', 'polynomial', 'step', 'multistep', 'exponential', 'constant']


def rates(count, **changes):
    lr_at = Schedule(**{'base_lr': 1.0, 'start_lr': 0.1, 'end_lr': 0.2, 'total_steps': count, 'decay_steps': 25,
                        'decay_rate': 0.8, 'milestones': (30, 60), **changes})
    return np.array([lr_at(step) for step in range(count + 2)])


def test_the_default_warms_up_linearly_and_falls_as_a_cosine():
    got = rates(110, warmup_steps=10)
    np.testing.assert_allclose(got[:11], np.linspace(0.1, 1.0, 11))
    np.testing.assert_allclose(got[10:111], 0.2 + 0.4 * (1 + np.cos(np.pi * np.arange(101) / 100)))


@pytest.mark.parametrize(('name', 'decayed'), [
    ('polynomial', lambda t: 0.2 + 0.8 * (1 - t / 80) ** 3), ('step', lambda t: 0.8 ** (t // 25)),
    ('multistep', lambda t: 0.8 ** (1 * (t >= 20) + (t >= 50))), ('exponential', lambda t: 0.8 ** (t / 25)),
    ('constant', lambda t: 1.0 + 0 * t), ('cosine', lambda t: 0.2 + 0.4 * (1 + np.cos(np.pi * t / 80)))])
def test_each_schedule_has_its_shape_between_warm_up_and_cool_down(name, decayed):
    got = rates(100, name=name, warmup_steps=10, cooldown_steps=10, power=3)
    np.testing.assert_allclose(got[:10], np.linspace(0.1, 1.0, 11)[:10])
    np.testing.assert_allclose(got[10:90], decayed(np.arange(80)))
    np.testing.assert_array_equal(got[90:], 0.2)


@pytest.mark.parametrize('name', ['step', 'multistep', 'exponential'])
def test_a_decay_stops_at_the_end_rate(name):
    assert rates(100, name=name, decay_rate=0.3, decay_steps=10)[99] == 0.2


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(('total', 'warmup', 'cooldown', 'expected'), [
    (1, 0, 0, [1.0]), (1, 1, 0, [0.1]), (1, 0, 1, [0.2]), (2, 1, 1, [0.1, 0.2]), (3, 3, 0, [0.1, 0.4, 0.7]),
    (3, 0, 3, [0.2, 0.2, 0.2]), (3, 1, 1, [0.1, 1.0, 0.2])])
def test_edges(name, total, warmup, cooldown, expected):
    got = rates(total, name=name, warmup_steps=warmup, cooldown_steps=cooldown)
    np.testing.assert_allclose(got[:total], expected)
    assert np.isfinite(got).all()  # also for two steps beyond the end


def test_a_schedule_is_built_from_the_settings():
    config = get_config(None, ['TRAIN.NUM_EPOCHS', 10, 'TRAIN.WARMUP_EPOCHS', 0.5, 'TRAIN.COOLDOWN_EPOCHS', 2,
                               'TRAIN.LR_SCHEDULER.NAME', 'multistep', 'TRAIN.LR_SCHEDULER.MILESTONES', '[3, 6.5]',
                               'TRAIN.LINEAR_SCALED_LR', 256])
    lr_at = build_schedule(config, steps_per_epoch=6, world=2)  # 2 x 64 images
    assert lr_at == Schedule(base_lr=2e-3, start_lr=5e-7, end_lr=5e-7, total_steps=60, warmup_steps=3,
                             cooldown_steps=12, name='multistep', decay_steps=180, milestones=(18, 39))
    assert [lr_at(s) for s in (3, 17, 18, 39, 47, 48)] == pytest.approx([2e-3, 2e-3, 2e-4, 2e-5, 2e-5, 5e-7])


def test_weight_decay_is_constant_or_follows_a_cosine():
    assert build_weight_decay(get_config(), 10)(7) == 0.05
    got = [build_weight_decay(get_config(None, ['TRAIN.WEIGHT_DECAY_END', 0.45]), 10)(s) for s in (0, 1, 5, 10, 11)]
    assert got == pytest.approx([0.05, 0.45 - 0.2 * (1 + math.cos(0.1 * math.pi)), 0.25, 0.45, 0.45])


@pytest.mark.parametrize(('opts', 'words'), [
    (['TRAIN.LR_SCHEDULER.NAME', 'linear'], 'choose from cosine'),
    (['TRAIN.LR_SCHEDULER.NAME', 'multistep'], 'MILESTONES is empty'),
    (['TRAIN.LR_SCHEDULER.MILESTONES', '[20, 10]'], 'ascending'),
    (['TRAIN.LR_SCHEDULER.MILESTONES', '[300]'], 'ascending'),
    (['TRAIN.LR_SCHEDULER.DECAY_RATE', '2'], 'from 0 to 1'),
    (['TRAIN.COOLDOWN_EPOCHS', '291'], 'COOLDOWN_EPOCHS is 291.0, more than TRAIN.WARMUP_EPOCHS 10.0 leaves')])
def test_contradictions_are_refused(opts, words):
    with pytest.raises(ConfigError, match=words):
        get_config(None, opts)
