"""Losses against their definitions in float64."""
import numpy as np
import paddle
import pytest

from losses import (
    AsymmetricLoss,
    AsymmetricSingleLabelLoss,
    BinaryCrossEntropyLoss,
    CrossEntropyLoss,
    JsdCrossEntropyLoss,
    LabelSmoothingCrossEntropyLoss,
    SoftTargetCrossEntropyLoss,
    build_loss,
)


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
@pytest.mark.parametrize('loss', [build_loss(smoothing=0.0), build_loss(smoothing=0.1), build_loss(mixup=True)])
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


# The published formulas in float64, without precautions for large logits: one_hot [N, K] or distributions y.

def bce(x, y):
    p = 1 / (1 + np.exp(-x))
    return -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()


def jsd(x, y, splits, alpha):
    """Mean over the clean images of cross-entropy + alpha / splits x sum of KL(p_i || mean p)."""
    p = np.exp(log_softmax(x)).reshape(splits, -1, x.shape[1])
    mixture = p.mean(0)
    divergence = sum((view * np.log(view / mixture)).sum(1).mean() for view in p) / splits
    return -(y * np.log(p[0])).sum(1).mean() + alpha * divergence


def asymmetric(x, y, gamma_neg, gamma_pos, clip):
    p = 1 / (1 + np.exp(-x))
    p_m = np.maximum(p - clip, 0)
    positive, negative = (1 - p) ** gamma_pos * np.log(p), p_m ** gamma_neg * np.log(1 - p_m)
    return -(y * positive + (1 - y) * negative).sum(1).mean()


def asymmetric_single(x, labels, gamma_neg, gamma_pos, smoothing):
    p, total = np.exp(log_softmax(x)), 0
    for row, label in zip(p, labels):
        for k, share in enumerate(row):
            weight = (1 - share) ** gamma_pos if k == label else share ** gamma_neg
            total -= ((1 - smoothing) * (k == label) + smoothing / len(row)) * weight * np.log(share)
    return total / len(labels)


def smooth(labels, classes, smoothing):
    return (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes


LABELS = np.array([2, 0, 4, 1, 1, 3])
SOFT = np.random.default_rng(3).dirichlet(np.ones(5), 6)
MANY = (SOFT > 0.2).astype(float)  # several labels per image
PUBLISHED = {
    'bce': (BinaryCrossEntropyLoss(0.0), LABELS, lambda x: bce(x, smooth(LABELS, 5, 0))),
    'bce smoothed': (BinaryCrossEntropyLoss(0.1), LABELS, lambda x: bce(x, smooth(LABELS, 5, 0.1))),
    'bce soft': (BinaryCrossEntropyLoss(0.1), SOFT, lambda x: bce(x, SOFT)),
    'bce threshold': (BinaryCrossEntropyLoss(0.1, 0.2), SOFT, lambda x: bce(x, MANY)),
    'jsd': (JsdCrossEntropyLoss(3, 12.0, 0.0), LABELS[:2], lambda x: jsd(x, smooth(LABELS[:2], 5, 0), 3, 12)),
    'jsd smoothed': (JsdCrossEntropyLoss(2, 5.0, 0.1), LABELS[:3],
                     lambda x: jsd(x, smooth(LABELS[:3], 5, 0.1), 2, 5)),
    'asymmetric': (AsymmetricLoss(), MANY, lambda x: asymmetric(x, MANY, 4, 0, 0.05)),
    'asymmetric other': (AsymmetricLoss(2.5, 1.5, 0.2), MANY, lambda x: asymmetric(x, MANY, 2.5, 1.5, 0.2)),
    'asymmetric gentle': (AsymmetricLoss(0.5, 0.5, 0.0), MANY, lambda x: asymmetric(x, MANY, 0.5, 0.5, 0.0)),
    'asymmetric is bce': (AsymmetricLoss(0, 0, 0), SOFT, lambda x: 5 * bce(x, SOFT)),
    'asymmetric smoothed': (AsymmetricLoss(smoothing=0.1), LABELS,
                            lambda x: asymmetric(x, smooth(LABELS, 5, 0.1), 4, 0, 0.05)),
    'single': (AsymmetricSingleLabelLoss(), LABELS, lambda x: asymmetric_single(x, LABELS, 4, 0, 0.1)),
    'single other': (AsymmetricSingleLabelLoss(1.5, 0.5, 0.3), LABELS,
                     lambda x: asymmetric_single(x, LABELS, 1.5, 0.5, 0.3)),
    'single is cross-entropy': (AsymmetricSingleLabelLoss(0, 0, 0.1), LABELS,
                                lambda x: -(smooth(LABELS, 5, 0.1) * log_softmax(x)).sum(1).mean()),
}


def value_and_gradient(loss, logits, targets):
    logits = paddle.to_tensor(logits, 'float32', stop_gradient=False)
    targets = paddle.to_tensor(targets if targets.dtype.kind == 'i' else targets.astype(np.float32))
    value = loss(logits, targets)
    value.backward()
    return float(value), logits.grad.numpy()


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_formulas_and_their_gradients(name):
    loss, targets, formula = PUBLISHED[name]
    generator = np.random.default_rng(11)
    for scale in (0.3, 2.0, 6.0):
        logits = (scale * generator.standard_normal((6, 5))).astype(np.float32)
        logits[0, 0] = 0  # an unlucky value of some implementations
        value, gradient = value_and_gradient(loss, logits, targets)
        exact = logits.astype(np.float64)
        assert value == pytest.approx(formula(exact), rel=2e-5)
        for index in np.ndindex(6, 5):
            step = np.zeros((6, 5))
            step[index] = 1e-5
            difference = (formula(exact + step) - formula(exact - step)) / 2e-5
            assert gradient[index] == pytest.approx(difference, rel=2e-4, abs=2e-6), (scale, index)


@pytest.mark.parametrize('name', PUBLISHED)
def test_large_logits_give_finite_values_and_gradients(name):
    loss, targets, _ = PUBLISHED[name]
    for logits in (np.full((6, 5), 1e4), np.full((6, 5), -1e4), np.resize([1e4, -1e4, 0, 100, -100, 1e4, 5], (6, 5))):
        value, gradient = value_and_gradient(loss, logits, targets)
        assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('name', PUBLISHED)
def test_half_precision_logits_give_the_value_of_float32(name, dtype):
    loss, targets, _ = PUBLISHED[name]
    logits = paddle.to_tensor(np.random.default_rng(0).standard_normal((6, 5)), 'float32').astype(dtype)
    targets = paddle.to_tensor(targets if targets.dtype.kind == 'i' else targets.astype(np.float32))
    value = loss(logits, targets)
    assert value.dtype == paddle.float32 and float(value) == float(loss(logits.astype('float32'), targets))


def test_limits_of_large_logits():
    """Where the float64 formulas overflow, the limits are known."""
    right, wrong = 1e4 * (2 * np.eye(5)[LABELS] - 1), 1e4 * (1 - 2 * np.eye(5)[LABELS])
    for loss, good, bad in (
            (BinaryCrossEntropyLoss(0.0), 0, 1e4), (AsymmetricLoss(), 0, 1e4 - 4 * 0.95 ** 4 * np.log(0.05)),
            (AsymmetricLoss(clip=0), 0, 5e4), (AsymmetricSingleLabelLoss(smoothing=0), 0, 2e4 + np.log(4))):
        assert value_and_gradient(loss, right, LABELS)[0] == pytest.approx(good, abs=1e-6)
        assert value_and_gradient(loss, wrong, LABELS)[0] == pytest.approx(bad, rel=1e-6)
    label = np.array([0])
    views = np.array([[1e4, -1e4], [-1e4, 1e4]])  # the views contradict each other: divergence log 2
    assert value_and_gradient(JsdCrossEntropyLoss(2, 12, 0), views, label)[0] == pytest.approx(12 * np.log(2))
    views[1] = views[0]
    assert value_and_gradient(JsdCrossEntropyLoss(2, 12, 0), views, label)[0] == pytest.approx(0, abs=1e-6)


def test_build_loss():
    for arguments, kind, settings in (
            ({'mixup': True}, SoftTargetCrossEntropyLoss, {}), ({'smoothing': 0.0}, CrossEntropyLoss, {}),
            ({'smoothing': 0.2}, LabelSmoothingCrossEntropyLoss, {'smoothing': 0.2}),
            ({'name': 'soft_target'}, SoftTargetCrossEntropyLoss, {}),
            ({'name': 'label_smoothing'}, LabelSmoothingCrossEntropyLoss, {'smoothing': 0.1}),
            ({'name': 'bce', 'mixup': True, 'bce_threshold': 0.3}, BinaryCrossEntropyLoss, {'threshold': 0.3}),
            ({'name': 'jsd', 'aug_splits': 4, 'jsd_alpha': 3}, JsdCrossEntropyLoss, {'splits': 4, 'alpha': 3}),
            ({'name': 'asymmetric', 'gamma_neg': 3, 'clip': 0.1}, AsymmetricLoss, {'gamma_neg': 3, 'clip': 0.1}),
            ({'name': 'asymmetric_single', 'gamma_pos': 1}, AsymmetricSingleLabelLoss,
             {'gamma_pos': 1, 'gamma_neg': 4})):
        loss = build_loss(**arguments)
        assert type(loss) is kind and {name: getattr(loss, name) for name in settings} == settings


@pytest.mark.parametrize(('build', 'words'), [
    (lambda: LabelSmoothingCrossEntropyLoss(1.0), 'smoothing'), (lambda: BinaryCrossEntropyLoss(-0.1), 'smoothing'),
    (lambda: BinaryCrossEntropyLoss(0.1, 1.0), 'threshold'), (lambda: JsdCrossEntropyLoss(1), 'at least 2 views'),
    (lambda: AsymmetricLoss(gamma_neg=-1), 'focusing'), (lambda: AsymmetricLoss(clip=1), 'margin'),
    (lambda: AsymmetricSingleLabelLoss(gamma_pos=-1), 'focusing'), (lambda: build_loss('mse'), "'mse'"),
    (lambda: build_loss('jsd'), 'at least 2 views')])
def test_arguments_out_of_range_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
