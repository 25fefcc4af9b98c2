"""The state of a run is captured and restored, and the wrong one is refused."""
import math

import numpy as np
import paddle
import pytest

from config import get_config
from errors import TrainingStopped, UserError
from replknet import RepLKNet
from training.ema import ModelEMA
from training.optim import build_optimizer, parameter_groups
from training.run_state import RunState, refuse_other_run


def build(global_batch=8, steps_per_epoch=10, folder=''):
    model = RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=3)
    optimizer = build_optimizer('adamw', parameter_groups(model, 0.05))
    config = get_config(None, ['SAVE', folder, 'DATA.BATCH_SIZE', global_batch])
    return RunState(config, model, ModelEMA(model, 0.9), optimizer, None, steps_per_epoch, own_statistics=False)


def test_a_state_with_weights_that_are_not_finite_is_not_captured():
    state = build()
    state.model.head.weight.set_value(paddle.full(state.model.head.weight.shape, math.nan))
    with pytest.raises(TrainingStopped, match=r'weights are not finite: head.weight; the last checkpoint is kept'):
        state.capture()


def test_a_moving_average_that_is_not_finite_is_not_captured():
    state = build()
    state.ema.module.head.bias.set_value(paddle.full(state.ema.module.head.bias.shape, math.inf))
    with pytest.raises(TrainingStopped, match=r'weights of the EMA are not finite: head.bias'):
        state.capture()


def test_a_shorter_list_within_an_epoch_is_named_as_what_changes_the_steps(caplog, monkeypatch):
    monkeypatch.setattr('utils.logger.propagate', True)
    state = build()
    state.sums['steps'] = 8
    other = build(steps_per_epoch=5)
    other.restore(state.capture(), 'file')
    assert other.sums['steps'] == 5 and 'which with these training images correspond to 5' in caplog.text


def test_a_captured_state_is_restored():
    state = build()
    state.epochs, state.best = 3, {'model': {'acc1': 5.0, 'epoch': 2}}
    state.sums.update(steps=4, loss=1.5, skipped_in_a_row=2)
    captured = state.capture()
    other = build()
    other.restore(captured, 'file')
    assert (other.epochs, other.step, other.sums, other.best) == (3, 34, state.sums, state.best)
    for name, tensor in other.ema.module.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), captured['model_ema'][name], err_msg=name)


@pytest.mark.parametrize(('global_batch', 'steps_per_epoch', 'steps'), [(8, 10, 4), (16, 5, 2), (12, 6, 3), (4, 20, 8),
                                                                      (1000, 1, 1)])
def test_with_another_global_batch_no_image_of_the_epoch_is_seen_twice(global_batch, steps_per_epoch, steps):
    state = build()
    state.epochs, state.sums['steps'] = 1, 4  # 32 images
    other = build(global_batch, steps_per_epoch)
    other.restore(state.capture(), 'file')
    assert (other.epochs, other.sums['steps']) == (1, steps)


def test_a_finished_run_and_another_one_are_refused():
    state = build()
    captured = state.capture()
    words = r'file: belongs to a run with other settings: TRAIN.BASE_LR 0.004 -> 1.0; restore these settings, or'
    with pytest.raises(UserError, match=words):
        refuse_other_run(get_config(None, ['TRAIN.BASE_LR', 1.0]), captured, 'file')
    state.epochs = 300
    with pytest.raises(UserError, match='all 300 epochs are done'):
        build().restore(state.capture(), 'file')
