"""Training losses; all compute in float32, for logits of any dtype and under automatic mixed precision."""
import math

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

MULTI_LABEL_LOSSES = ('bce', 'asymmetric')  # those that compare each class with the others by itself


def _log_softmax(logits):
    # F.log_softmax clips its result at -64
    logits = logits.astype('float32')
    return logits - paddle.logsumexp(logits, axis=-1, keepdim=True)


def _distributions(targets, num_classes, smoothing):
    """Converts labels [N] to smoothed distributions [N, K]; distributions are returned unchanged."""
    if targets.ndim == 1:
        return F.one_hot(targets, num_classes) * (1 - smoothing) + smoothing / num_classes
    return targets.astype('float32')


def _power(base, exponent):
    """max(base, 0) ** exponent; the gradient is 0, not NaN or infinite, where the base is 0."""
    return (exponent * base.clip(min=1e-30).log()).exp()


def _check_smoothing(smoothing):
    if not 0 <= smoothing < 1:
        raise ValueError(f'label smoothing must be in [0, 1), got {smoothing}')


def _check_focusing(*gammas):
    if min(gammas) < 0:
        raise ValueError(f'focusing parameters must not be negative, got {", ".join(map(str, gammas))}')


class SoftTargetCrossEntropyLoss(nn.Layer):
    """Cross-entropy with a distribution as the target of each sample, as `mixup.Mixup` returns them."""

    def forward(self, logits, targets):
        """logits [N, K], targets [N, K] -> mean over the batch, float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            return -(targets.astype('float32') * _log_softmax(logits)).sum(axis=-1).mean()


class LabelSmoothingCrossEntropyLoss(nn.Layer):
    """Cross-entropy with label smoothing (arXiv 1512.00567): targets are s / K, and 1 - s + s / K at the label.

    Args:
        smoothing: float s in [0, 1).

    Raises:
        ValueError: smoothing is out of range.
    """

    def __init__(self, smoothing=0.1):
        super().__init__()
        _check_smoothing(smoothing)
        self.smoothing = smoothing

    def forward(self, logits, labels):
        """logits [N, K], labels [N] int64 -> mean over the batch, float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            log_probs = _log_softmax(logits)
            return (1 - self.smoothing) * F.nll_loss(log_probs, labels) - self.smoothing * log_probs.mean()


class ClassWeightedCrossEntropyLoss(nn.Layer):
    """Cross-entropy in which each class counts by its weight.

    Args:
        weights: K numbers.
        smoothing: float s in [0, 1), smoothing of labels; distributions are used unchanged.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, weights, smoothing=0.1):
        super().__init__()
        _check_smoothing(smoothing)
        if min(weights) < 0:
            raise ValueError('class weights must not be negative')
        self.smoothing = smoothing
        self.weights = paddle.to_tensor(weights, dtype='float32')

    def forward(self, logits, targets):
        """logits [N, K], targets [N, K] or labels [N] int64 -> mean over the batch, float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            targets = _distributions(targets, logits.shape[1], self.smoothing)
            return -(targets * self.weights * _log_softmax(logits)).sum(axis=-1).mean()


def class_weights(labels, num_classes, kind='balanced'):
    """Weights for `ClassWeightedCrossEntropyLoss` whose mean over the images is 1.

    Args:
        labels: int64 array, the labels of all training images.
        num_classes: number of classes; those without images get the weight of one with a single image.
        kind: 'balanced' (inverse to the number of images of a class) or 'sqrt' (to its square root).
    Returns:
        float64 array [num_classes].
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights = np.maximum(counts, 1) ** {'balanced': -1.0, 'sqrt': -0.5}[kind]
    return weights * (counts.sum() / (counts @ weights))


class CrossEntropyLoss(nn.Layer):
    """Cross-entropy with hard labels."""

    def forward(self, logits, labels):
        """logits [N, K], labels [N] int64 -> mean over the batch, float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            return F.cross_entropy(logits.astype('float32'), labels)


class BinaryCrossEntropyLoss(nn.Layer):
    """Binary cross-entropy of each class against the others (as in arXiv 2110.00476).

    Args:
        smoothing: float s in [0, 1), smoothing of labels; distributions are used unchanged.
        threshold: float in [0, 1); if above 0, targets above it become 1 and the others 0, so that a mixed image counts
            as an example of all its classes.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, smoothing=0.1, threshold=0.0):
        super().__init__()
        _check_smoothing(smoothing)
        if not 0 <= threshold < 1:
            raise ValueError(f'the threshold of targets must be in [0, 1), got {threshold}')
        self.smoothing, self.threshold = smoothing, threshold

    def forward(self, logits, targets):
        """logits [N, K], targets [N, K] or labels [N] int64 -> mean over batch and classes, float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            logits = logits.astype('float32')
            targets = _distributions(targets, logits.shape[1], self.smoothing)
            if self.threshold:
                targets = (targets > self.threshold).astype('float32')
            # F.binary_cross_entropy_with_logits of Paddle 3.3 has a wrong gradient where a logit is 0
            return -(targets * F.log_sigmoid(logits) + (1 - targets) * F.log_sigmoid(-logits)).mean()


class JsdCrossEntropyLoss(nn.Layer):
    """Cross-entropy of the clean views + alpha x Jensen-Shannon divergence of all views (AugMix, arXiv 1912.02781).

    Args:
        splits: int >= 2, views of each image.
        alpha: weight of the divergence.
        smoothing: smoothing of the labels in the cross-entropy; 0 in the publication.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, splits=3, alpha=12.0, smoothing=0.1):
        super().__init__()
        if splits < 2:
            raise ValueError(f'the Jensen-Shannon divergence compares at least 2 views, got {splits}')
        self.splits, self.alpha = splits, alpha
        self.cross_entropy = LabelSmoothingCrossEntropyLoss(smoothing)

    def forward(self, logits, labels):
        """logits [splits x N, K], the clean views first, labels [N] int64 -> mean over the batch, float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            log_probs = _log_softmax(logits).reshape([self.splits, -1, logits.shape[1]])
            log_mixture = paddle.logsumexp(log_probs, axis=0, keepdim=True) - math.log(self.splits)
            divergence = (log_probs.exp() * (log_probs - log_mixture)).sum(axis=-1).mean()
            return self.cross_entropy(logits[:labels.shape[0]], labels) + self.alpha * divergence


class AsymmetricLoss(nn.Layer):
    """Asymmetric loss for several labels per image (ICCV 2021, arXiv 2009.14119).

    It has separate focusing parameters for positive and negative classes, and a probability margin below which
    negatives do not count. Gradients flow through the focusing weights, as in the publication.

    Args:
        gamma_neg, gamma_pos: focusing parameters >= 0.
        clip: the probability margin, in [0, 1).
        smoothing: float s in [0, 1), smoothing of labels; 0 in the publication.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, gamma_neg=4.0, gamma_pos=0.0, clip=0.05, smoothing=0.0):
        super().__init__()
        _check_smoothing(smoothing)
        _check_focusing(gamma_neg, gamma_pos)
        if not 0 <= clip < 1:
            raise ValueError(f'the probability margin must be in [0, 1), got {clip}')
        self.gamma_neg, self.gamma_pos, self.clip, self.smoothing = gamma_neg, gamma_pos, clip, smoothing

    def forward(self, logits, targets):
        """logits [N, K], targets [N, K] or labels [N] int64 -> sum over classes, mean over batch, float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            logits = logits.astype('float32')
            targets = _distributions(targets, logits.shape[1], self.smoothing)
            log_negative = F.log_sigmoid(-logits)
            positive = (self.gamma_pos * log_negative).exp() * F.log_sigmoid(logits)
            focus = _power(F.sigmoid(logits) - self.clip, self.gamma_neg)
            if self.clip:  # log(1 - max(p - clip, 0)); without a margin the argument may underflow
                log_negative = (F.sigmoid(-logits) + self.clip).clip(max=1).log()
            return -(targets * positive + (1 - targets) * focus * log_negative).sum(axis=-1).mean()


class AsymmetricSingleLabelLoss(nn.Layer):
    """Asymmetric loss for one label per image, after a softmax (authors' code of arXiv 2009.14119).

    With p the softmax, the label's term is (1 - p)^gamma_pos log p and that of every other class p^gamma_neg log p;
    the terms are weighted by the smoothed label.

    Args:
        gamma_neg, gamma_pos: focusing parameters >= 0.
        smoothing: float s in [0, 1); with 0 the other classes have no weight.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, gamma_neg=4.0, gamma_pos=0.0, smoothing=0.1):
        super().__init__()
        _check_smoothing(smoothing)
        _check_focusing(gamma_neg, gamma_pos)
        self.gamma_neg, self.gamma_pos, self.smoothing = gamma_neg, gamma_pos, smoothing

    def forward(self, logits, labels):
        """logits [N, K], labels [N] int64 -> mean over the batch, float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            log_probs = _log_softmax(logits)
            one_hot = F.one_hot(labels, logits.shape[1])
            focus = (one_hot * _power(-log_probs.expm1(), self.gamma_pos)
                     + (1 - one_hot) * (self.gamma_neg * log_probs).exp())
            targets = _distributions(labels, logits.shape[1], self.smoothing)
            return -(targets * focus * log_probs).sum(axis=-1).mean()


class SmoothedTargets(nn.Layer):
    """A loss of several labels per image with label smoothing as in `mixup.Mixup`: t becomes (1 - s) t + s / K.

    Args:
        loss: of targets [N, K].
        smoothing: float s in [0, 1).
    """

    def __init__(self, loss, smoothing):
        super().__init__()
        _check_smoothing(smoothing)
        self.loss, self.smoothing = loss, smoothing

    def forward(self, logits, targets):
        """logits [N, K], targets [N, K] of 0 and 1 -> float32 scalar."""
        return self.loss(logits, targets.astype('float32') * (1 - self.smoothing) + self.smoothing / logits.shape[1])


def build_loss(name='auto', *, mixup=False, smoothing=0.1, aug_splits=0, bce_threshold=0.0, jsd_alpha=12.0,
               gamma_neg=4.0, gamma_pos=0.0, clip=0.05, weights=None, multi_label=False):
    """The loss with a name of TRAIN.LOSS.

    'auto' is cross-entropy: with the targets of mixup (which smooths them itself) or else with smoothed labels. With
    several labels per image it is 'bce'.

    Args:
        name: name of the loss.
        mixup: whether the targets come from mixup.
        smoothing: label smoothing in [0, 1).
        aug_splits: views of each image, for 'jsd'.
        bce_threshold: see `BinaryCrossEntropyLoss`.
        jsd_alpha: see `JsdCrossEntropyLoss`.
        gamma_neg, gamma_pos, clip: see `AsymmetricLoss`.
        weights: of the classes, see `ClassWeightedCrossEntropyLoss`; None for none.
        multi_label: whether an image may have several labels: targets are then [N, K], of 0 and 1 without mixup.

    Raises:
        ValueError: the name is unknown, it has no weights, it is for one label per image, or an argument is out of
            range.
    """
    if multi_label:
        name = 'bce' if name == 'auto' else name
        if name not in MULTI_LABEL_LOSSES:
            raise ValueError(f'the loss {name!r} is for one label per image')
    if weights is not None:
        if name not in ('auto', 'soft_target', 'label_smoothing'):
            raise ValueError(f'class weights are for cross-entropy, not for the loss {name!r}')
        return ClassWeightedCrossEntropyLoss(weights, smoothing)
    if name == 'auto':
        name = 'soft_target' if mixup else 'label_smoothing'
    if name == 'soft_target':
        return SoftTargetCrossEntropyLoss()
    if name == 'label_smoothing':
        return LabelSmoothingCrossEntropyLoss(smoothing) if smoothing else CrossEntropyLoss()
    if name == 'bce':
        loss = BinaryCrossEntropyLoss(smoothing, bce_threshold)
        return SmoothedTargets(loss, smoothing) if multi_label and smoothing and not mixup else loss
    if name == 'jsd':
        return JsdCrossEntropyLoss(aug_splits, jsd_alpha, smoothing)
    if name == 'asymmetric':
        loss = AsymmetricLoss(gamma_neg, gamma_pos, clip, smoothing)
        return SmoothedTargets(loss, smoothing) if multi_label and smoothing and not mixup else loss
    if name == 'asymmetric_single':
        return AsymmetricSingleLabelLoss(gamma_neg, gamma_pos, smoothing)
    raise ValueError(f'unknown loss {name!r}')
