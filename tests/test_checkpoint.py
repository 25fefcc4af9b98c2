"""Checkpoints: atomic, strict, and independent of how many layers the process has built before."""
import os
import re
from pathlib import Path

import numpy as np
import paddle
import pytest

from errors import UserError
from port_weights.load import load_weights
from replknet import RepLKNet
from run_folder import checkpoint
from run_folder.writer import RunFolder
from tests.test_run_state import build as build_run_state
from training.amp import LossScaler
from training.ema import ModelEMA
from training.masters import MasterWeights
from training.optim import build_optimizer, parameter_groups


def small(num_classes=3):
    return RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=num_classes)


def train(model, optimizer, steps, seed):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        optimizer.set_lr(1e-2)
        images = paddle.to_tensor(rng.standard_normal((2, 3, 32, 32), 'float32'))
        (model(images) ** 2).sum().backward()
        optimizer.step()
        optimizer.clear_grad()


def adamw(model):
    return build_optimizer('adamw', parameter_groups(model, 0.05, 0.9))


OPTIMIZERS = ['adamw', 'sgd', 'momentum', 'nadam', 'lion', 'adan', 'lamb']


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_optimizer_state_loads_into_a_model_built_later(name):
    def build(model):
        betas = (0.98, 0.92, 0.99) if name == 'adan' else (0.9, 0.999)
        return build_optimizer(name, parameter_groups(model, 0.05, 0.9), betas=betas)

    model = small()
    optimizer = build(model)
    train(model, optimizer, 2, seed=0)
    weights = checkpoint.model_arrays(model)
    state = checkpoint.optimizer_arrays(optimizer, model)
    trained = {n for n, p in model.named_parameters() if not p.stop_gradient}
    assert set(state['accumulators']) == (trained if name != 'sgd' else set())
    train(model, optimizer, 2, seed=1)

    paddle.nn.Conv2D(3, 3, 3)  # shifts the counters in Paddle's own parameter names
    later = small()
    load_weights(later, weights, 'checkpoint')
    later_optimizer = build(later)
    checkpoint.load_optimizer_arrays(later_optimizer, later, state, 'checkpoint')
    train(later, later_optimizer, 2, seed=1)
    for name, array in checkpoint.model_arrays(model).items():
        np.testing.assert_array_equal(later.state_dict()[name].numpy(), array, err_msg=name)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_run_with_master_weights_continues_as_if_it_had_not_stopped(name):
    def build():
        model = small()
        masters = MasterWeights(model, lambda model: model.head.to(dtype='bfloat16'))
        betas = (0.98, 0.92, 0.99) if name == 'adan' else (0.9, 0.999)
        groups = parameter_groups(model, 0.05, 0.9, masters.by_name)
        return model, masters, build_optimizer(name, groups, betas=betas)

    def step(model, masters, optimizer):
        optimizer.set_lr(1e-4)  # single steps are too small to change bfloat16 weights
        for parameter in model.parameters():
            if not parameter.stop_gradient:
                parameter.grad = paddle.ones_like(parameter)
        masters.take_gradients()
        optimizer.step()
        optimizer.clear_grad()
        masters.update_model()

    model, masters, optimizer = build()
    step(model, masters, optimizer)
    weights = checkpoint.model_arrays(model)
    state = checkpoint.optimizer_arrays(optimizer, model, masters.by_name)
    assert set(state['master_weights']) == {'head.weight', 'head.bias'} == set(masters.by_name)
    if name != 'sgd':
        assert set(state['accumulators']['head.weight']) == set(state['accumulators']['stem.0.conv.weight'])
    step(model, masters, optimizer)

    paddle.nn.Conv2D(3, 3, 3)  # shifts the counters in Paddle's own parameter names
    later, later_masters, later_optimizer = build()
    load_weights(later, weights, 'checkpoint')
    checkpoint.load_optimizer_arrays(later_optimizer, later, state, 'checkpoint', later_masters.by_name)
    step(later, later_masters, later_optimizer)
    for key, array in checkpoint.model_arrays(model).items():
        np.testing.assert_array_equal(checkpoint.model_arrays(later)[key], array, err_msg=key)
    for key, master in masters.by_name.items():
        np.testing.assert_array_equal(later_masters.by_name[key].numpy(), master.numpy(), err_msg=key)


def test_optimizer_states_of_earlier_runs_with_master_weights_load():
    """They were written by Paddle's multi-precision optimizers, under the same names."""
    model = small()
    masters = MasterWeights(model, lambda model: model.head.to(dtype='bfloat16'))
    optimizer = build_optimizer('momentum', parameter_groups(model, 0.0, masters=masters.by_name))
    ones = np.ones(masters.by_name['head.bias'].shape, 'float32')
    state = {'name': 'Momentum', 'accumulators': {'head.bias': {'velocity': 3 * ones}},
             'master_weights': {'head.bias': 2 * ones}}
    checkpoint.load_optimizer_arrays(optimizer, model, state, 'file', masters.by_name)
    optimizer.set_lr(1.0)
    masters.by_name['head.bias'].grad = paddle.zeros(ones.shape)
    optimizer.step()
    np.testing.assert_allclose(masters.by_name['head.bias'].numpy(), 2 - 0.9 * 3, rtol=1e-6)
    state['master_weights']['head.bias'] = np.inf * ones
    with pytest.raises(UserError, match=r'not finite .*: head.bias \(master weight\)'):
        checkpoint.load_optimizer_arrays(optimizer, model, state, 'file', masters.by_name)


def test_optimizer_state_of_another_model_is_refused():
    model = small()
    optimizer = adamw(model)
    train(model, optimizer, 1, seed=0)
    state = checkpoint.optimizer_arrays(optimizer, model)
    state['accumulators']['no.such.weight'] = state['accumulators'].pop('head.weight')
    with pytest.raises(UserError, match='file.pdparams: .*no.such.weight'):
        checkpoint.load_optimizer_arrays(adamw(model), model, state, 'file.pdparams')


def test_an_optimizer_state_that_is_not_finite_is_refused():
    model = small()
    optimizer = adamw(model)
    train(model, optimizer, 1, seed=0)
    state = checkpoint.optimizer_arrays(optimizer, model)
    state['accumulators']['norm.bias']['moment2'].fill(np.inf)
    with pytest.raises(UserError, match=r'file: the optimizer state is not finite .*: norm.bias \(moment2\)'):
        checkpoint.load_optimizer_arrays(optimizer, model, state, 'file')


def test_optimizer_state_of_another_kind_of_optimizer_is_refused():
    model = small()
    state = checkpoint.optimizer_arrays(build_optimizer('sgd', parameter_groups(model, 0.0)), model)
    with pytest.raises(UserError, match='trained with SGD, but TRAIN.OPTIMIZER.NAME selects AdamW'):
        checkpoint.load_optimizer_arrays(adamw(model), model, state, 'file.pdparams')


@pytest.mark.parametrize(('change', 'words'), [
    (lambda w: w.pop('norm.bias'), '1 missing: norm.bias'),
    (lambda w: w.update(extra=np.zeros(1)), '1 surplus: extra'),
    (lambda w: w.update({'norm.bias': np.zeros(3)}), r'1 of another shape: norm.bias \[3\] for \[10\]'),
    (lambda w: w['norm._variance'].fill(np.inf), r'file: contains values that are not finite .*: norm._variance;'),
    (lambda w: w['head.bias'].fill(np.nan), r'file: contains values that are not finite .*: head.bias;')])
def test_weights_that_do_not_fit_are_refused_and_nothing_changes(change, words):
    model = small()
    before = checkpoint.model_arrays(model)
    weights = {name: array + 1 for name, array in before.items()}
    change(weights)
    with pytest.raises(UserError, match=words):
        load_weights(model, weights, 'file')
    for name, array in checkpoint.model_arrays(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_only_a_head_with_another_class_count_is_dropped_and_only_with_drop_head():
    weights = {name: array + 1 for name, array in checkpoint.model_arrays(small(5)).items()}
    model = small(3)
    with pytest.raises(UserError, match='head.weight'):
        load_weights(model, weights, 'file')
    head = model.head.weight.numpy()
    weights['head.bias'].fill(np.nan)  # does not matter, since it is dropped
    assert load_weights(model, weights, 'file', drop_head=True) == ['head.weight', 'head.bias']
    np.testing.assert_array_equal(model.head.weight.numpy(), head)
    np.testing.assert_array_equal(model.norm.bias.numpy(), weights['norm.bias'])
    for name in ('head.weight', 'head.bias'):
        del weights[name]
    with pytest.raises(UserError, match='2 missing: head.weight, head.bias'):
        load_weights(model, weights, 'file')
    assert load_weights(model, weights, 'file', drop_head=True) == ['head.weight', 'head.bias']


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'last.pdparams'
    checkpoint.save_checkpoint(path, {'epoch': 1})
    old = path.read_bytes()
    with pytest.raises(TypeError):
        checkpoint.save_checkpoint(path, {'epoch': open(os.devnull)})  # noqa: SIM115 - cannot be pickled
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ['last.pdparams']


def test_paddle_load_reads_a_checkpoint_too(tmp_path):
    path = tmp_path / 'last.pdparams'
    model = small()
    checkpoint.save_checkpoint(path, {'model': checkpoint.model_arrays(model), 'epoch': 3})
    state = paddle.load(str(path))
    assert state['epoch'] == 3
    np.testing.assert_array_equal(np.asarray(state['model']['norm.weight']), model.norm.weight.numpy())


def test_a_checkpoint_of_a_run_has_the_keys_and_types_of_the_schema(tmp_path):
    run_state = build_run_state(folder=str(tmp_path))
    run_state.scaler = LossScaler()
    folder = RunFolder(run_state.config)
    folder.save_last(run_state.capture())
    state = checkpoint.read_run_checkpoint(tmp_path / 'last.pdparams')
    assert {key: type(value) for key, value in state.items()} == {
        key: entry.type for key, entry in checkpoint.SCHEMA.items()}


def test_the_documentation_lists_the_keys_of_the_schema():
    text = (Path(__file__).parents[1] / 'docs' / 'training.md').read_text()
    table = text.split('### Keys of a checkpoint')[1].split('\n## ')[0]
    cells = [line.split('|')[1] for line in table.splitlines() if line.startswith('| `')]
    keys = [key for cell in cells for key in re.findall('`(.+?)`', cell)]
    assert sorted(keys) == sorted(checkpoint.SCHEMA)


@pytest.mark.parametrize('state', [{'model': {}}, {'weights': np.zeros(3)}])
def test_weights_alone_cannot_be_resumed(tmp_path, state):
    path = tmp_path / 'weights.pdparams'
    paddle.save(state, str(path))
    with pytest.raises(UserError, match='cannot be resumed'):
        checkpoint.read_run_checkpoint(path)


def test_moving_average_follows_weights_and_statistics():
    model = small()
    ema = ModelEMA(model, 0.9)
    before = checkpoint.model_arrays(model)
    for tensor in model.state_dict().values():
        tensor.set_value(tensor + 1)
    ema.update(model)
    for name, array in checkpoint.model_arrays(ema.module).items():
        np.testing.assert_allclose(array, before[name] + 0.1, rtol=1e-5, atol=1e-6, err_msg=name)
    assert not any(p.trainable and not p.stop_gradient for p in ema.module.parameters())
