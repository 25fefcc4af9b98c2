"""Test-time augmentation: the mean of the probabilities of an image and of its mirror image.

Probabilities are averaged, not logits: only differences between the logits of an image mean anything, and one view with
large logits would outvote the other. The cross-entropy of the mean is at most the mean of the two cross-entropies.
"""
import math

import paddle
import paddle.nn.functional as F
from paddle import nn


def mean_of_two(one, other):
    """Logits whose softmax is the mean of the softmax of two views.

    Args:
        one, other: logits [N, K] of any float dtype.
    Returns:
        log-probabilities, float32 [N, K].
    """
    one, other = (F.log_softmax(logits.astype('float32'), axis=1) for logits in (one, other))
    high = paddle.maximum(one, other)
    return high + paddle.log1p(paddle.exp(paddle.minimum(one, other) - high)) - math.log(2)


class FlipAveraged(nn.Layer):
    """A classifier that averages over an image and its mirror image: [N, 3, H, W] -> log-probabilities [N, K]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return mean_of_two(self.model(images), self.model(paddle.flip(images, axis=[3])))


def flip_averaged(compute, classes):
    """The same for a function of NumPy arrays, whose outputs may continue with features; these are of the image itself.

    Args:
        compute: function from images [N, 3, H, W] to [N, classes + C].
        classes: number of classes.
    Returns:
        function like `compute`, with log-probabilities in place of the logits.
    """
    def run(images):
        output = compute(images).copy()
        mirrored = compute(images[..., ::-1].copy())
        output[:, :classes] = mean_of_two(*(paddle.to_tensor(o[:, :classes]) for o in (output, mirrored))).numpy()
        return output
    return run
