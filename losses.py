"""Training losses; all compute in float32, whatever the dtype of the logits and under automatic mixed precision."""
import paddle
import paddle.nn.functional as F
from paddle import nn


def _log_softmax(logits):
    # F.log_softmax cuts off at -64
    logits = logits.astype('float32')
    return logits - paddle.logsumexp(logits, axis=-1, keepdim=True)


class SoftTargetCrossEntropyLoss(nn.Layer):
    """Cross-entropy with one distribution per sample as target, as `mixup.Mixup` makes them."""

    def forward(self, logits, targets):
        """logits [N, K], targets [N, K] -> mean over the batch, float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            return -(targets.astype('float32') * _log_softmax(logits)).sum(axis=-1).mean()


class LabelSmoothingCrossEntropyLoss(nn.Layer):
    """Cross-entropy with label smoothing (arXiv 1512.00567): targets are s / K, and 1 - s + s / K at the label.

    Args:
        smoothing: float s in [0, 1).

    Raises:
        ValueError: smoothing is out of its range.
    """

    def __init__(self, smoothing=0.1):
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f'label smoothing must be in [0, 1), got {smoothing}')
        self.smoothing = smoothing

    def forward(self, logits, labels):
        """logits [N, K], labels [N] int64 -> mean over the batch, float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            log_probs = _log_softmax(logits)
            return (1 - self.smoothing) * F.nll_loss(log_probs, labels) - self.smoothing * log_probs.mean()


class CrossEntropyLoss(nn.Layer):
    """Cross-entropy with hard labels."""

    def forward(self, logits, labels):
        """logits [N, K], labels [N] int64 -> mean over the batch, float32 scalar."""
        with paddle.amp.auto_cast(enable=False):
            return F.cross_entropy(logits.astype('float32'), labels)


def build_loss(use_mixup, smoothing):
    """The loss of a recipe: soft targets with mixup (which smooths them itself), else smoothed or hard labels."""
    if use_mixup:
        return SoftTargetCrossEntropyLoss()
    return LabelSmoothingCrossEntropyLoss(smoothing) if smoothing else CrossEntropyLoss()
