"""Parameters as views of long ones: the same training, bit for bit, with a few operators, and the same checkpoints."""
import types
from dataclasses import replace

import numpy as np
import paddle
import pytest
from paddle import profiler

from config import get_config
from replknet import RepLKNet
from run_folder import checkpoint
from training.amp import Amp
from training.ema import ModelEMA
from training.engine import _apply_gradients, _finish_gradients, train_one_epoch
from training.flat import ALIGNMENT, FlatParameters
from training.masters import MasterWeights
from training.optim import (
    build_optimizer,
    clip_gradients,
    flatten,
    gradient_norm,
    parameter_groups,
    set_weight_decay,
)
from training.run import Start
from training.setup import TrainingParts, build_training


def batches(steps=2):
    rng = np.random.default_rng(0)
    return [(paddle.to_tensor(rng.standard_normal((4, 3, 32, 32), 'float32')), paddle.to_tensor(rng.integers(0, 3, 4)))
            for _ in range(steps)]


def training(opts=(), flat=True):
    """TrainingParts and RunState of a small model; without `flat` each parameter stays on its own."""
    config = get_config(None, ['DATA.BATCH_SIZE', 4, 'TRAIN.NUM_EPOCHS', 2, 'TRAIN.WARMUP_EPOCHS', 0,
                               'TRAIN.MIXUP_PROB', 0.0, 'TRAIN.SMOOTHING', 0.0, 'MODEL.NUM_CLASSES', 3,
                               'TRAIN.WEIGHT_DECAY_END', 0.01, *opts])
    paddle.seed(0)
    network = RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [3, 5, 7, 9], num_classes=3, drop_path=0.2)
    loader = type('Loader', (list,), {'dataset': range(8)})([None] * 2)
    parts, state = build_training(config, 'cpu', Amp(config, 'cpu'), Start(network, None, None), loader,
                                  types.SimpleNamespace(identity={}))
    if not flat:
        groups = parameter_groups(parts.model, config.TRAIN.WEIGHT_DECAY, config.TRAIN.LAYER_DECAY)
        optimizer = build_optimizer(config.TRAIN.OPTIMIZER.NAME, groups, betas=config.TRAIN.OPTIMIZER.BETAS,
                                    eps=config.TRAIN.OPTIMIZER.EPS)
        parts = replace(parts, optimizer=optimizer, flat=())
        state.optimizer, state.flat = optimizer, ()
    return parts, state


def arrays(state):
    """All arrays that a checkpoint would contain, {path: array}."""
    found, captured = {}, state.capture()

    def collect(path, value):
        for key, inner in value.items():
            collect(f'{path}/{key}', inner) if isinstance(inner, dict) else found.update({f'{path}/{key}': inner})
    for key in ('model', 'model_ema', 'optimizer'):
        collect(key, captured[key])
    return {path: value for path, value in found.items() if isinstance(value, np.ndarray)}


def assert_same(found, right):
    assert set(found) == set(right)
    for path, array in right.items():
        assert array.shape == found[path].shape and array.tobytes() == found[path].tobytes(), path


@pytest.mark.parametrize('opts', [[], ['TRAIN.OPTIMIZER.NAME', 'momentum', 'TRAIN.LAYER_DECAY', 0.7],
                                  ['TRAIN.OPTIMIZER.NAME', 'lion', 'TRAIN.ACCUM_ITER', 2], ['TRAIN.FREEZE', 2],
                                  ['TRAIN.GRAD_CLIP', 0.01, 'TRAIN.GRAD_CLIP_MODE', 'value']])
def test_training_is_the_same_bit_for_bit(opts):
    results = []
    for flat in (True, False):
        parts, state = training(opts, flat)
        train_one_epoch(parts, batches(), epoch=1, first_step=0)
        results.append(arrays(state))
    assert_same(*results)


@pytest.mark.parametrize('name', ['lamb', 'nadam', 'adan'])
def test_optimizers_of_single_parameters_continue_bit_for_bit(name):
    opts = ['TRAIN.OPTIMIZER.NAME', name, 'TRAIN.OPTIMIZER.BETAS', [0.98, 0.92, 0.99][:3 if name == 'adan' else 2]]
    parts, state = training(opts)
    train_one_epoch(parts, batches(), epoch=1, first_step=0)
    saved = state.capture()
    resumed, its_state = training(opts)
    resumed.model.set_state_dict({key: paddle.to_tensor(array) for key, array in saved['model'].items()})
    its_state.restore(saved, 'saved')
    for one in (parts, resumed):
        train_one_epoch(one, batches(), epoch=1, first_step=2)
    assert_same(arrays(its_state), arrays(state))


@pytest.mark.parametrize(('name', 'betas'), [('nadam', (0.9, 0.999)), ('adan', (0.98, 0.92, 0.99))])
def test_nadam_and_adan_update_long_parameters_on_gpus(name, betas):
    """Bit for bit as single ones where no tensor ends within a vector register, as a GPU does it everywhere."""
    def train(model, device, steps, saved=None):
        groups = parameter_groups(model, 0.1, layer_decay=1.0)
        flat, groups = flatten(name, groups, model, device=device)
        optimizer = build_optimizer(name, groups, betas=betas)
        long = () if device == 'cpu' else flat
        if saved is not None:
            checkpoint.load_optimizer_arrays(optimizer, model, saved, 'saved', flat=long)
        optimizer.set_lr(0.01)
        for step in steps:
            paddle.seed(step)
            model(paddle.randn([4, 64])).square().sum().backward()
            for group in flat:
                group.collect()
            operators = launches(optimizer.step) if paddle.version.full_version >= '3' else optimizer.step()
            optimizer.clear_grad()
            for group in flat:
                group.whole.grad.zero_()
        return checkpoint.optimizer_arrays(optimizer, model, flat=long), operators

    results, counts = [], []
    for first, second in (('cpu', 'cpu'), ('gpu', 'gpu'), ('cpu', 'gpu'), ('gpu', 'cpu')):
        paddle.seed(0)
        before, model = (paddle.nn.Sequential(*(paddle.nn.Linear(64, 64) for _ in range(4))) for _ in range(2))
        saved, _ = train(before, first, range(3))
        model.set_state_dict(before.state_dict())
        found, operators = train(model, second, range(3, 5), saved)
        counts.append(operators)
        results.append({**{key: value.numpy() for key, value in model.state_dict().items()},
                        **{f'{key}/{kind}': array for key, kinds in found['accumulators'].items()
                           for kind, array in kinds.items()}})
    for one in results[1:]:
        assert_same(one, results[0])
    assert counts[0] is None or 3 * counts[1] < counts[0]


def test_checkpoints_of_both_kinds_continue_each_other():
    parts, state = training()
    train_one_epoch(parts, batches(), epoch=1, first_step=0)
    saved, results = state.capture(), []
    for flat in (True, False):
        parts, state = training((), flat)
        parts.model.set_state_dict({name: paddle.to_tensor(array) for name, array in saved['model'].items()})
        parts.ema.module.set_state_dict({name: paddle.to_tensor(array) for name, array in saved['model_ema'].items()})
        checkpoint.load_optimizer_arrays(parts.optimizer, parts.model, saved['optimizer'], 'saved', flat=parts.flat)
        train_one_epoch(parts, batches(), epoch=1, first_step=2)
        results.append(arrays(state))
    assert_same(*results)


def test_clipping_scales_all_gradients_by_one_norm():
    parts, _ = training(['TRAIN.GRAD_CLIP', 1e-3])
    norms, plain = [], training(['TRAIN.GRAD_CLIP', 1e-3], flat=False)[0]
    for one in (parts, plain):
        one.training_mode()
        paddle.seed(1)
        one.model(batches()[0][0]).square().sum().backward()
        for group in one.flat:
            group.collect()
        norm = gradient_norm(one.trained_parameters)
        clip_gradients(one.trained_parameters, 1e-3, 'norm', norm)
        norms.append(float(norm))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for (name, p), q in zip(parts.model.named_parameters(), plain.model.parameters()):
        if not p.stop_gradient:
            np.testing.assert_allclose(p.grad.numpy(), q.grad.numpy(), rtol=1e-4, atol=1e-12, err_msg=name)


def test_what_paddle_replaces_becomes_a_view_again():
    layer = paddle.nn.Linear(3, 2)
    before = layer.weight.numpy()
    group = FlatParameters(dict(layer.named_parameters()))
    np.testing.assert_array_equal(layer.weight.numpy(), before)
    assert layer.bias.data_ptr() - layer.weight.data_ptr() == 4 * ALIGNMENT
    layer(paddle.ones([1, 3])).sum().backward()
    group.collect()
    assert float(group.whole.grad.sum()) == 8
    paddle.ones([3, 2])._share_buffer_to(layer.weight)  # elsewhere in memory
    layer.weight.grad = paddle.full([3, 2], 5.0)
    group.collect()
    assert float(group.whole.sum()) == 6 and float(group.whole.grad.sum()) == 32
    with paddle.no_grad():
        group.whole.scale_(2.0)
    np.testing.assert_array_equal(layer.weight.numpy(), np.full((3, 2), 2.0))


@pytest.mark.parametrize('name', ['adamw', 'momentum', 'lion'])
def test_a_weight_that_no_loss_depends_on_keeps_its_value(name):
    results = []
    for flat in (True, False):
        paddle.seed(0)
        model = paddle.nn.LayerDict({'used': paddle.nn.Linear(3, 2), 'unused': paddle.nn.Linear(3, 2),
                                     'frozen': paddle.nn.Linear(3, 2), 'later': paddle.nn.Linear(3, 2)})
        for parameter in model['frozen'].parameters():
            parameter.stop_gradient = True
        before = {key: value.numpy() for key, value in model.state_dict().items()}
        groups = parameter_groups(model, 0.5)
        long, groups = flatten(name, groups, model) if flat else ((), groups)
        optimizer = build_optimizer(name, groups)
        set_weight_decay(optimizer, 0.5)
        optimizer.set_lr(0.1)
        parts = TrainingParts(model, None, optimizer, None, Amp(get_config(), 'cpu'), flat=tuple(long))
        for step in range(4):
            y = model['used'](paddle.ones([1, 3])) + model['frozen'](paddle.ones([1, 3]))
            (y if step < 2 else y + model['later'](paddle.ones([1, 3]))).sum().backward()
            _apply_gradients(parts, _finish_gradients(parts, measure=False), True)
            after = {key: value.numpy() for key, value in model.state_dict().items()}
            changed = {key for key in after if (after[key] != before[key]).any()}
            assert changed == {f'{key}.{kind}' for key in ('used', 'later')[:1 + (step > 1)]
                               for kind in ('weight', 'bias')}
        results.append(after)
    if name == 'lion':  # the others count the steps of a long parameter, and add the decay to the momentum
        assert_same(*results)


def test_averages_follow_statistics_that_paddle_replaces():
    norm = paddle.nn.BatchNorm1D(2)
    ema = ModelEMA(norm, 0.5)
    flat, _ = flatten('adamw', parameter_groups(norm, 0.0), norm)
    ema.update(norm, flat=flat)
    paddle.full([2], 8.0)._share_buffer_to(norm._mean)
    ema.update(norm, flat=flat)
    norm._mean.set_value(paddle.full([2], 16.0))
    ema.update(norm, flat=flat)
    np.testing.assert_array_equal(ema.module._mean.numpy(), [10.0, 10.0])
    np.testing.assert_array_equal(ema.module.weight.numpy(), [1.0, 1.0])


def test_half_precision_weights_follow_their_long_masters():
    layer = paddle.nn.Linear(3, 2)
    masters = MasterWeights(layer, lambda layer: layer.to(dtype='float16'))
    flat, groups = flatten('sgd', parameter_groups(layer, 0.0, masters=masters.by_name), layer, masters.by_name)
    optimizer = build_optimizer('sgd', groups)
    optimizer.set_lr(1.0)
    start = masters.by_name['weight'].numpy()
    for _ in range(2):
        layer.weight.grad, layer.bias.grad = (paddle.full(p.shape, 1.0, 'float16') for p in (layer.weight, layer.bias))
        masters.take_gradients()
        for group in flat:
            group.collect()
        optimizer.step()
        masters.update_model()
        optimizer.clear_grad()
        masters.clear_gradients()
    np.testing.assert_array_equal(masters.by_name['weight'].numpy(), start - 1 - 1)
    np.testing.assert_array_equal(layer.weight.numpy(), paddle.to_tensor(start - 2).astype('float16').numpy())


def launches(run):
    def count(node):
        return str(node.type).endswith('DygraphKernelLaunch') + sum(map(count, node.children_node))
    with profiler.Profiler(targets=[profiler.ProfilerTarget.CPU], on_trace_ready=lambda _: None) as profile:
        run()
    return sum(map(count, profile.profiler_result.get_data().values()))


@pytest.mark.skipif(paddle.version.full_version < '3', reason='its profiler needs a GPU driver')
def test_a_step_takes_few_operators_after_the_backward_pass():
    parts, _ = training(['TRAIN.GRAD_CLIP', 1.0])
    for _ in range(2):
        parts.training_mode()
        parts.model(batches(1)[0][0]).square().sum().backward()
        operators = launches(lambda: _apply_gradients(parts, _finish_gradients(parts, measure=True), True))
    assert 0 < operators < 60 < len(list(parts.model.parameters()))
