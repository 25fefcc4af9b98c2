"""Test-time augmentation: the mean of the probabilities of an image and of its mirror image.

Probabilities are averaged, not logits: only differences between the logits of an image mean anything, and one view with
large logits would outvote the other. The cross-entropy of the mean is at most the mean of the two cross-entropies.
"""
import math

import paddle
import paddle.nn.functional as F
from paddle import nn


def mean_of_two(one, other, multi_label=False):
    """Logits whose softmax, or with `multi_label` sigmoid, is the mean of that of two views.

    Args:
        one, other: logits [N, K] of any float dtype.
        multi_label: whether the scores are sigmoids.
    Returns:
        log-probabilities, or with `multi_label` logits, float32 [N, K].
    """
    if multi_label:
        one, other = one.astype('float32'), other.astype('float32')
        return paddle.logaddexp(F.log_sigmoid(one), F.log_sigmoid(other)) - paddle.logaddexp(
            F.log_sigmoid(-one), F.log_sigmoid(-other))
    one, other = (F.log_softmax(logits.astype('float32'), axis=1) for logits in (one, other))
    high = paddle.maximum(one, other)
    return high + paddle.log1p(paddle.exp(paddle.minimum(one, other) - high)) - math.log(2)


class FlipAveraged(nn.Layer):
    """A classifier that averages over an image and its mirror image: [N, 3, H, W] -> log-probabilities [N, K]."""

    def __init__(self, model, multi_label=False):
        super().__init__()
        self.model, self.multi_label = model, multi_label

    def forward(self, images):
        return mean_of_two(self.model(images), self.model(paddle.flip(images, axis=[3])), self.multi_label)


def flip_averaged(compute, classes, multi_label=False):
    """The same for a function of NumPy arrays, whose outputs may continue with features; these are of the image itself.

    Args:
        compute: function from images [N, 3, H, W] to [N, classes + C].
        classes: number of classes.
        multi_label: see `mean_of_two`.
    Returns:
        function like `compute`, with log-probabilities in place of the logits.
    """
    def run(images):
        output = compute(images).copy()
        mirrored = compute(images[..., ::-1].copy())
        output[:, :classes] = mean_of_two(*(paddle.to_tensor(o[:, :classes]) for o in (output, mirrored)),
                                          multi_label).numpy()
        return output
    return run
