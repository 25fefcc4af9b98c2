"""Numerical equivalence check between two forms of a model, and what each form costs."""
import math
import time
from statistics import median

import numpy as np
import paddle
from paddle import nn

TIMED_CALLS = 5  # after one untimed call


class CertificateError(RuntimeError):
    """The exported form differs from the original model; the text names the largest difference."""


class Difference:
    """Accumulates the difference between expected and computed values over any number of arrays.

    Attributes:
        largest: largest absolute difference.
        mean: mean absolute difference.
        scale: largest absolute expected value.
        All of them are NaN if a value is NaN.
    """

    def __init__(self):
        self.largest = self.scale = self._sum = np.float64(0)
        self._count = 0

    def add(self, expected, found):
        difference = np.abs(expected.astype('float64') - found)
        self.largest = np.maximum(self.largest, difference.max())
        self.scale = np.maximum(self.scale, np.abs(expected).max())
        self._sum += difference.sum()
        self._count += difference.size

    @property
    def mean(self):
        return self._sum / self._count

    @property
    def relative(self):
        """The largest difference divided by the scale, or as it is if the scale is 0."""
        return self.largest / (self.scale or 1)


def layer_groups(model):
    """Splits a classifier into consecutive groups of layers.

    Returns:
        {name: function of a feature map}; their composition, in this order, is the whole model.
    """
    groups = {'stem': nn.Sequential(*model.stem)}
    for index, stage in enumerate(model.stages):
        groups[f'stage {index}'] = stage
        if index < len(model.transitions):
            groups[f'transition {index}'] = nn.Sequential(*model.transitions[index])
    groups['head'] = lambda x: model.head(model.pool(x))
    return groups


@paddle.no_grad()
def compare_groups(model, twin, batches):
    """Compares two forms of a classifier group by group.

    Both groups get the feature map that `model` computes, so that differences do not accumulate.

    Args:
        model, twin: two forms of a classifier, in eval mode.
        batches: arrays of images [N, 3, H, W].
    Returns:
        {name of the group: Difference}, see `layer_groups`.
    """
    pairs = {name: (group, layer_groups(twin)[name]) for name, group in layer_groups(model).items()}
    differences = {name: Difference() for name in pairs}
    for images in batches:
        x = paddle.to_tensor(images)
        for name, (expected, found) in pairs.items():
            y = found(x).numpy()
            x = expected(x)
            differences[name].add(x.numpy(), y)
    return differences


def compare_outputs(expected, program, batches, classes):
    """Compares the outputs of a program with the expected ones.

    Args:
        expected: one array for each batch, logits [N, classes] or logits and features [N, classes + C].
        program: function of images, see `deploy.runtimes`.
        batches: arrays of images [N, 3, H, W].
        classes: number of classes.
    Returns:
        (Difference of the logits, Difference of the features, share of the images with the same top-1 class).
    """
    logits, features, same = Difference(), Difference(), []
    for values, images in zip(expected, batches):
        found = program(images)
        logits.add(values[:, :classes], found[:, :classes])
        if values.shape[1] > classes:
            features.add(values[:, classes:], found[:, classes:])
        same += list(values[:, :classes].argmax(1) == found[:, :classes].argmax(1))
    return logits, features, float(np.mean(same))


def dygraph_program(model):
    """A model in eval mode as a function from a numpy array to a numpy array."""
    def run(images):
        with paddle.no_grad():
            return model(paddle.to_tensor(images)).numpy()
    return run


def latency_ms(program, images):
    """Median time of a call in milliseconds."""
    times = []
    for _ in range(1 + TIMED_CALLS):
        start = time.perf_counter()
        program(images)
        times.append(time.perf_counter() - start)
    return 1e3 * median(times[1:])


def multiply_accumulates(model, height, width):
    """Multiply-accumulates of the convolutions and the head for one image, including those on padding."""
    total = model.head.weight.size
    parts = list(model.stem)
    for index, stage in enumerate(model.stages):
        parts += [stage, *(model.transitions[index] if index < len(model.transitions) else ())]
    for part in parts:
        for conv in part.sublayers():
            if isinstance(conv, nn.Conv2D):
                height, width = (math.ceil(side / conv._stride[0]) for side in (height, width))
                total += conv.weight.size * height * width
    return total
