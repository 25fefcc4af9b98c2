"""One epoch and one evaluation: what they count, average and skip, and when training stops."""
import dataclasses
import math
import types

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

import utils
from config import get_config
from errors import TrainingStopped
from losses import JsdCrossEntropyLoss
from training.amp import Amp, LossScaler
from training.ema import ModelEMA
from training.engine import MAX_SKIPPED_STEPS, evaluate, train_one_epoch
from training.masters import MasterWeights
from training.optim import build_optimizer, parameter_groups
from training.progress import epoch_sums
from training.setup import StepSettings, TrainingParts
from utils import accuracy_line

CPU = Amp(get_config(), 'cpu')


def linear(classes=3):
    paddle.seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))


def batches(sizes, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return [(paddle.to_tensor(rng.standard_normal((n, 3, 2, 2), 'float32')),
             paddle.to_tensor(rng.integers(0, classes, n))) for n in sizes]


def train(model, loader, lr=0.1, **kwargs):
    """`train_one_epoch` with plain SGD on the CPU; keywords as for it, `TrainingParts` and `StepSettings`."""

    def taken(kind):
        return {field.name: kwargs.pop(field.name) for field in dataclasses.fields(kind) if field.name in kwargs}

    parts = {'criterion': nn.CrossEntropyLoss(), 'lr_at': lambda step: lr, 'amp': CPU,
             'settings': StepSettings(**taken(StepSettings)), **taken(TrainingParts)}
    if 'optimizer' not in parts:
        parts['optimizer'] = build_optimizer('sgd', parameter_groups(model, 0.0))
    return train_one_epoch(TrainingParts(model, **parts), loader, **{'epoch': 1, 'first_step': 0, **kwargs})


@pytest.mark.parametrize(('sizes', 'accum'), [([2] * 6, 3), ([2] * 5, 2), ([2] * 7, 4), ([2], 4)])
def test_accumulated_gradients_are_those_of_the_joined_batch(sizes, accum):
    loader = batches(sizes)
    accumulated, joined = linear(), linear()
    metrics = train(accumulated, loader, accum_iter=accum)
    groups = [loader[i:i + accum] for i in range(0, len(loader), accum)]
    train(joined, [tuple(paddle.concat(parts) for parts in zip(*group)) for group in groups])
    assert metrics['steps'] == len(groups) == math.ceil(len(sizes) / accum)
    for a, b in zip(accumulated.parameters(), joined.parameters()):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6)


def test_views_of_an_image_count_once():
    rng = np.random.default_rng(0)
    loader = [(paddle.to_tensor(rng.standard_normal((3 * n, 3, 2, 2), 'float32')), paddle.to_tensor([0] * n))
              for n in (4, 4, 1)]
    model, loss = linear(), JsdCrossEntropyLoss(3)
    expected = sum(float(loss(model(x), y)) * len(y) for x, y in loader) / 9
    metrics = train(model, loader, lr=0.0, criterion=loss)
    assert metrics['images'] == 9 and metrics['loss'] == pytest.approx(expected, rel=1e-6)


def test_learning_rate_is_set_per_optimizer_step():
    seen = []
    metrics = train(linear(), batches([2] * 5), accum_iter=2, first_step=7, lr_at=lambda s: seen.append(s) or s * 0.01)
    assert seen == [7, 8, 9]
    assert metrics['lr'] == pytest.approx(0.09)


def test_loss_is_the_mean_over_images():
    loader = batches([4, 4, 2])
    model = linear()
    expected = sum(float(nn.functional.cross_entropy(model(x), y)) * len(y) for x, y in loader) / 10
    metrics = train(model, loader, lr=0.0)
    assert metrics['loss'] == pytest.approx(expected, rel=1e-6)
    assert metrics['images'] == 10 and metrics['skipped'] == 0


def test_gradients_are_clipped_by_value():
    free, clipped = linear(), linear()
    before = free[1].weight.numpy()
    loader = [(x * 5, y) for x, y in batches([4])]
    train(free, loader, lr=1.0)
    train(clipped, loader, lr=1.0, grad_clip=0.25, grad_clip_mode='value')
    step = free[1].weight.numpy() - before
    assert 0 < (abs(step) > 0.25).mean() < 1
    np.testing.assert_allclose(clipped[1].weight.numpy() - before, step.clip(-0.25, 0.25), atol=1e-6)


@pytest.mark.parametrize('decays', [1, 2])
def test_gradients_are_clipped_by_the_norm_of_all_of_them(decays):
    model = linear()
    loader = [(x * 100, y) for x, y in batches([4])]
    before = [p.numpy() for p in model.parameters()]
    groups = parameter_groups(model, 0.0) if decays == 1 else [
        {'params': [p], 'weight_decay': 0.0, 'learning_rate': 1.0} for p in model.parameters()]
    train(model, loader, lr=1.0, optimizer=build_optimizer('sgd', groups), grad_clip=0.5)
    moved = np.concatenate([(p.numpy() - b).ravel() for p, b in zip(model.parameters(), before)])
    assert np.linalg.norm(moved) == pytest.approx(0.5, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_and_names_the_step():
    loader = batches([2, 2, 2])
    loader[1] = (loader[1][0] * math.nan, loader[1][1])
    model = linear()
    with pytest.raises(TrainingStopped, match=r'step 11 \(epoch 3\).*rank 0'):
        train(model, loader, first_step=10, epoch=3)
    assert all(np.isfinite(p.numpy()).all() for p in model.parameters())  # the bad step was not applied


@pytest.mark.parametrize(('broken', 'words'), [
    ([0], r'gradients not finite in 0 \(weight and 1 more\);'), ([0, 1], 'no gradient is finite'),
    ([], 'all gradients are finite')])
def test_a_loss_that_is_not_finite_names_the_layers_whose_gradients_are_not(broken, words):
    paddle.seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def criterion(logits, labels):  # infinite, and so are the gradients of the broken layers
        finite = sum((p * 0).sum() for i, layer in enumerate(model) for p in layer.parameters() if i not in broken)
        infinite = sum((p * math.inf).sum() for i in broken for p in model[i].parameters())
        return finite + infinite + paddle.to_tensor(math.inf)

    loader = [(paddle.ones([2, 4]), paddle.zeros([2], 'int64'))]
    with pytest.raises(TrainingStopped, match=rf'step 0 \(epoch 1\): .* rank 0, lr 0.1, {words}'):
        train(model, loader, criterion=criterion)


@pytest.mark.parametrize('done', [0, 1, 2])
def test_an_epoch_in_two_parts_is_the_epoch(done):
    loader = batches([2, 2, 2, 4, 4])
    whole, parts = linear(), linear()
    expected = train(whole, loader, accum_iter=2, lr_at=lambda step: 0.1 * (step + 1), first_step=5)
    sums, seen = epoch_sums(), []

    class Stop(Exception):
        pass

    def stop(vote):
        seen.append((sums['steps'], vote))
        if sums['steps'] == done:
            raise Stop

    arguments = {'accum_iter': 2, 'lr_at': lambda step: 0.1 * (step + 1), 'first_step': 5, 'sums': sums}
    if done:
        with pytest.raises(Stop):
            train(parts, loader, votes=lambda: [7], after_step=stop, **arguments)
        assert seen == [(step, 7) for step in range(1, done + 1)]

    class Rest(list):  # a loader that skips the first batches; its length is still that of the whole epoch
        def __iter__(self):
            return iter(loader[2 * done:])

    metrics = train(parts, Rest(loader), **arguments)
    for key in ('loss', 'lr', 'steps', 'images', 'skipped'):
        assert metrics[key] == expected[key]
    for a, b in zip(parts.parameters(), whole.parameters()):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def overflowing(loader, steps):
    return [(x * math.inf, y) if step in steps else (x, y) for step, (x, y) in enumerate(loader)]


def test_overflowing_steps_are_skipped_counted_and_kept_out_of_the_average():
    scaled, plain = linear(), linear()
    ema = types.SimpleNamespace(calls=0)
    ema.update = lambda model, masters, flat: setattr(ema, 'calls', ema.calls + 1)
    loader, scaler = batches([2] * 4), LossScaler(1024.0)
    metrics = train(scaled, overflowing(loader, (1, 3)), scaler=scaler, ema=ema)
    train(plain, [loader[0], loader[2]])
    assert (metrics['steps'], metrics['skipped'], ema.calls, scaler.value) == (4, 2, 2, 256)
    for a, b in zip(scaled.parameters(), plain.parameters()):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize('grad_clip', [0.0, 0.5])
def test_a_loss_scale_that_is_too_high_comes_down_to_one_that_fits(grad_clip):
    scaler, model = LossScaler(2.0 ** 132), linear()  # float32 ends at 2 ** 128, and the gradients are around 1
    before = model[1].weight.numpy()
    metrics = train(model, batches([2] * 20), scaler=scaler, grad_clip=grad_clip)
    assert 4 <= metrics['skipped'] < 20
    assert scaler.value == 2.0 ** (132 - metrics['skipped'])
    assert np.isfinite(model[1].weight.numpy()).all() and (model[1].weight.numpy() != before).any()


def test_a_run_that_only_overflows_stops():
    with pytest.raises(TrainingStopped, match='in a row overflowed'):
        train(linear(), overflowing(batches([1] * MAX_SKIPPED_STEPS), range(MAX_SKIPPED_STEPS)), scaler=LossScaler())
    with pytest.raises(TrainingStopped, match='in a row overflowed'):  # the count continues across epochs
        train(linear(), overflowing(batches([1] * 2), range(2)), scaler=LossScaler(),
              sums=epoch_sums(skipped_in_a_row=MAX_SKIPPED_STEPS - 2))


class HalfLinear(nn.Linear):
    def forward(self, x):  # Paddle has no half-precision products on the CPU
        return F.linear(x.flatten(1), self.weight.astype('float32'), self.bias.astype('float32'))


@pytest.mark.parametrize('accum', [1, 2])
@pytest.mark.parametrize('size', [1e-6, 1e-7, 1e-8])
def test_small_gradients_reach_the_master_weights_of_half_precision_weights(size, accum):
    """float16 rounds 1e-7 to 1.2e-7 and 1e-8 to 0, which is what the loss scale is there to avoid."""
    model = HalfLinear(12, 3)
    start = model.weight.numpy()
    ema, masters = ModelEMA(model, 0.5), MasterWeights(model, lambda model: model.to(dtype='float16'))
    optimizer = build_optimizer('sgd', parameter_groups(model, 0.0, masters=masters.by_name))
    norms = []
    loader = [(paddle.ones([2, 3, 2, 2]), paddle.zeros([2], 'int64'))] * 4
    train(model, loader, lr=1.0, criterion=lambda logits, labels: logits.sum() * size / 2, optimizer=optimizer, ema=ema,
          masters=masters, scaler=LossScaler(), accum_iter=accum, grad_clip=size, grad_clip_mode='value',
          on_report=lambda **report: norms.append(report['grad_norm']))
    # a float32 weight near 1 cannot show changes of 1e-8, so the norm tells, over 36 weights and 3 biases
    np.testing.assert_allclose(norms, size * 39 ** 0.5, rtol=1e-3)
    np.testing.assert_allclose(masters.by_name['weight'].numpy(), start - 4 / accum * size, atol=1e-7)
    assert model.weight.dtype == paddle.float16 and model.weight.grad.astype('float32').abs().sum() == 0
    np.testing.assert_array_equal(model.weight.numpy(), masters.by_name['weight'].astype('float16').numpy())
    np.testing.assert_allclose(ema.module.weight.numpy(), start, atol=5 * size + 1e-7)  # not rounded to float16


def test_o2_casts_the_weights_and_keeps_float32_ones_for_the_optimizer(monkeypatch):
    monkeypatch.setattr(paddle.amp, 'decorate', lambda models, level, dtype: models.to(dtype=dtype))
    half = ['AMP', 'True', 'AMP_LEVEL', 'O2', 'AMP_DTYPE', 'bfloat16']
    model = linear()
    before = model[1].weight.numpy()
    masters = Amp(get_config(None, half), 'gpu').cast_weights(model)
    assert model[1].weight.dtype == paddle.bfloat16 and set(masters.by_name) == {'1.weight', '1.bias'}
    np.testing.assert_array_equal(masters.by_name['1.weight'].numpy(), before)
    assert not CPU.cast_weights(linear()).by_name


def test_the_loss_scale_doubles_after_enough_good_steps_and_continues_after_a_restart():
    scaler = LossScaler(8.0, growth_steps=3)
    values = []
    for finite in (True, True, False, True, True, True, True, True):
        restarted = LossScaler(1.0, growth_steps=3)
        restarted.load_state_dict(scaler.state_dict())
        scaler = restarted
        scaler.update(finite)
        values.append(scaler.value)
    assert values == [8, 8, 4, 4, 4, 8, 8, 8]


def test_the_settings_of_loss_scaling_are_used():
    opts = ['AMP', 'True', 'AMP_LOSS_SCALE', '256', 'AMP_LOSS_SCALE_STEPS', '7']
    scaler = Amp(get_config(None, opts), 'gpu').scaler()
    assert (scaler.value, scaler.growth_steps) == (256, 7)
    assert Amp(get_config(None, opts + ['AMP_DTYPE', 'bfloat16']), 'gpu').scaler() is None


def test_weight_decay_follows_its_schedule():
    model = linear()
    optimizer = build_optimizer('adamw', parameter_groups(model, 0.5))
    before = model[1].weight.numpy()
    loader = [(x * 0, y) for x, y in batches([2] * 3)]  # gradients of the weight are 0
    train(model, loader, lr=1e-3, optimizer=optimizer, weight_decay_at=lambda step: [1.0, 2.0, 3.0][step])
    np.testing.assert_allclose(model[1].weight.numpy(), before * 0.999 * 0.998 * 0.997, rtol=1e-6)
    assert [g['weight_decay'] for g in optimizer._param_groups] == [3.0, 0.0]


def test_moving_average_is_updated_once_per_optimizer_step():
    model = linear()
    ema = ModelEMA(model, 0.5)
    start = model[1].weight.numpy()
    train(model, batches([2] * 4), accum_iter=4, ema=ema)
    np.testing.assert_allclose(ema.module[1].weight.numpy(), (start + model[1].weight.numpy()) / 2, atol=1e-6)


@pytest.mark.parametrize('classes', [2, 3, 5, 8])
def test_evaluation_counts_top_1_and_top_5(classes):
    model = linear(classes)
    loader = batches([4, 4, 3], classes)
    metrics = evaluate(model, loader, 11, CPU)
    logits = np.concatenate([model(x).numpy() for x, _ in loader]).astype('float64')
    labels = np.concatenate([y.numpy() for _, y in loader])
    order = np.argsort(-logits, axis=1)
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(11), labels]
    assert metrics['acc1'] == pytest.approx(100 * (order[:, 0] == labels).mean())
    assert metrics['acc5'] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).mean())
    assert metrics['loss'] == pytest.approx(losses.mean(), rel=1e-5)
    assert metrics['images'] == 11


def test_evaluating_another_number_of_images_than_the_dataset_has_is_an_error():
    with pytest.raises(RuntimeError, match='11 images of a dataset of 12'):
        evaluate(linear(), batches([11]), 12, CPU)


def test_accuracy_line_has_a_fixed_format():
    metrics = {'acc1': 97.5, 'acc5': 100 * 359 / 360, 'loss': 0.12341, 'images': 360}
    assert accuracy_line(metrics) == 'Acc@1 97.500 Acc@5 99.722 loss 0.1234 images 360'


def test_mixed_precision_on_the_cpu_is_off_and_logged_once(monkeypatch):
    lines = []
    monkeypatch.setattr('utils.logger.info', lines.append)
    monkeypatch.setattr(utils.log_once, '__defaults__', (set(),))  # other tests may have logged it
    config = get_config(None, ['AMP', 'True'])
    amps = [Amp(config, 'cpu') for _ in range(2)]
    assert not any(amp.enabled for amp in amps)
    assert [amp.scaler() for amp in amps] == [None, None]
    assert len(lines) == 1 and 'float32' in lines[0]
