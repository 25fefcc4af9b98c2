"""Losses against their definitions in float64."""
import numpy as np
import paddle
import pytest

from losses import CrossEntropyLoss, LabelSmoothingCrossEntropyLoss, SoftTargetCrossEntropyLoss, build_loss


def log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@pytest.fixture(params=[(1, 2), (5, 10), (7, 1)])
def batch(request):
    n, classes = request.param
    generator = np.random.default_rng(n)
    logits = (5 * generator.standard_normal((n, classes))).astype(np.float32)
    return logits, generator.integers(0, classes, n), generator.dirichlet(np.ones(classes), n).astype(np.float32)


def test_values_and_gradients(batch):
    logits, labels, soft = batch
    one_hot = np.eye(logits.shape[1])[labels]
    for loss, target, expected in (
            (CrossEntropyLoss(), labels, one_hot),
            (LabelSmoothingCrossEntropyLoss(0.0), labels, one_hot),
            (LabelSmoothingCrossEntropyLoss(0.1), labels, 0.9 * one_hot + 0.1 / logits.shape[1]),
            (SoftTargetCrossEntropyLoss(), soft, soft)):
        tensor = paddle.to_tensor(logits, stop_gradient=False)
        value = loss(tensor, paddle.to_tensor(target))
        assert value.dtype == paddle.float32 and list(value.shape) == []
        np.testing.assert_allclose(float(value), -(expected * log_softmax(logits)).sum(1).mean(), rtol=1e-5, atol=1e-6)
        value.backward()
        np.testing.assert_allclose(tensor.grad.numpy(), (np.exp(log_softmax(logits)) - expected) / len(logits),
                                   atol=1e-6)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('loss', [build_loss(False, 0.0), build_loss(False, 0.1), build_loss(True, 0.1)])
def test_half_precision_logits_are_computed_in_float32(loss, dtype):
    """Over 4,096 equal classes a sum in half precision is far off; log(4096) is not."""
    logits = paddle.full([3, 4096], 2.0).astype(dtype)
    targets = paddle.to_tensor([0, 1, 4095])
    if isinstance(loss, SoftTargetCrossEntropyLoss):
        targets = paddle.full([3, 4096], 1 / 4096).astype('float32')
    value = loss(logits, targets)
    assert value.dtype == paddle.float32
    assert float(value) == pytest.approx(np.log(4096), rel=1e-4)


def test_large_logits_stay_finite():
    logits = paddle.to_tensor([[1e4, -1e4, 0.0]])
    assert float(CrossEntropyLoss()(logits, paddle.to_tensor([0]))) == pytest.approx(0, abs=1e-6)
    assert float(LabelSmoothingCrossEntropyLoss(0.3)(logits, paddle.to_tensor([0]))) == pytest.approx(3000, rel=1e-4)
    soft = paddle.to_tensor([[0.0, 1.0, 0.0]])
    assert float(SoftTargetCrossEntropyLoss()(logits, soft)) == pytest.approx(2e4, rel=1e-4)


def test_build_loss_and_smoothing_out_of_range():
    assert isinstance(build_loss(True, 0.1), SoftTargetCrossEntropyLoss)
    assert isinstance(build_loss(False, 0.0), CrossEntropyLoss)
    smooth = build_loss(False, 0.2)
    assert isinstance(smooth, LabelSmoothingCrossEntropyLoss) and smooth.smoothing == 0.2
    with pytest.raises(ValueError, match='smoothing'):
        LabelSmoothingCrossEntropyLoss(1.0)
