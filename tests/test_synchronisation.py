"""Host and device meet once per optimizer step: what the device has computed is read in one piece."""
import contextlib
from dataclasses import replace

import numpy as np
import paddle
import pytest
from test_engine import CPU, HalfLinear
from test_flat import batches, training

from losses import CrossEntropyLoss, SoftTargetCrossEntropyLoss
from mixup import Mixup
from training.amp import LossScaler
from training.ema import ModelEMA
from training.engine import train_one_epoch
from training.masters import MasterWeights
from training.optim import build_optimizer, flatten, parameter_groups
from training.setup import StepSettings, TrainingParts

READS = ('numpy', 'item', 'tolist', '__float__', '__int__', '__index__', '__bool__', '__array__', '__len__', 'cpu')


@contextlib.contextmanager
def reads(monkeypatch):
    """List of the names of the conversions of tensors to host values that are made within this block."""
    found, inside = [], []
    with monkeypatch.context() as patch:
        for name in READS:
            original = getattr(paddle.Tensor, name)

            def counted(self, *args, name=name, original=original, **kwargs):
                if not inside and name != '__len__':  # of a shape
                    found.append(name)
                inside.append(name)
                try:
                    return original(self, *args, **kwargs)
                finally:
                    inside.pop()
            patch.setattr(paddle.Tensor, name, counted)
        yield found


CLIP, BY_VALUE = ['TRAIN.GRAD_CLIP', 1.0], ['TRAIN.GRAD_CLIP', 1.0, 'TRAIN.GRAD_CLIP_MODE', 'value']


@pytest.mark.parametrize(('opts', 'scaled', 'mixed', 'report'), [
    ([], False, False, False), (CLIP, False, True, True), (CLIP, True, True, False), (BY_VALUE, True, False, True),
    (['TRAIN.ACCUM_ITER', 2], True, True, False)])
def test_a_step_reads_once(opts, scaled, mixed, report, monkeypatch):
    parts, _ = training(opts)
    parts = replace(parts, criterion=SoftTargetCrossEntropyLoss() if mixed else CrossEntropyLoss(),
                    mixup=Mixup(num_classes=3) if mixed else None,
                    # Paddle has no autocast on the CPU; what the host does besides is the same
                    scaler=LossScaler(1024.0) if scaled else None)
    count(parts, parts.settings.accum_iter, monkeypatch, report)


@pytest.mark.parametrize(('scaled', 'flat', 'clip'), [(False, True, 0.0), (True, True, 1.0), (True, False, 0.0)])
def test_a_step_of_half_precision_weights_reads_once(scaled, flat, clip, monkeypatch):
    model = HalfLinear(12, 3)
    ema, masters = ModelEMA(model, 0.5), MasterWeights(model, lambda model: model.to(dtype='float16'))
    groups = parameter_groups(model, 0.0, masters=masters.by_name)
    long = ()
    if flat:
        long, groups = flatten('adamw', groups, model, masters.by_name)
    parts = TrainingParts(model, CrossEntropyLoss(), build_optimizer('adamw', groups), lambda step: 0.1, CPU,
                          masters=masters, flat=tuple(long), scaler=LossScaler(1024.0) if scaled else None, ema=ema,
                          settings=StepSettings(grad_clip=clip))
    count(parts, 1, monkeypatch, size=2)


def count(parts, accumulated, monkeypatch, report=False, size=32):
    steps, per_step = 3, []
    loader = [(images[:, :, :size, :size], labels) for images, labels in batches(steps * accumulated)]
    with reads(monkeypatch) as found:
        train_one_epoch(parts, loader, epoch=1, first_step=0, after_step=lambda: per_step.append(list(found)),
                        on_report=(lambda **values: None) if report else None)
    assert [len(calls) for calls in per_step] == [1, 2, 3], per_step[-1]
    assert np.isfinite(np.concatenate([p.astype('float32').numpy().ravel() for p in parts.model.parameters()])).all()


def test_a_conversion_is_noticed(monkeypatch):
    with reads(monkeypatch) as found:
        tensor = paddle.to_tensor(1.0)
        float(tensor), tensor.item(), tensor.tolist(), np.asarray(tensor), bool(tensor > 0), tensor.numpy()
    assert len(found) == 6
