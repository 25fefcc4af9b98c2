"""Evidence that another form of a model is the same function, and what it costs: differences, sizes, times."""
import math
import time
from statistics import median

import numpy as np
import paddle
from paddle import nn

REPEATS = 5  # timed calls, after one that warms up


class Difference:
    """How far values are from those expected, over any number of arrays.

    Attributes:
        largest, mean: of the absolute differences; scale: the largest magnitude expected. NaN where any value is.
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


def layer_groups(model):
    """The groups of a classifier's layers in their order, {name: function of a feature map}: the whole in steps."""
    groups = {'stem': nn.Sequential(*model.stem)}
    for index, stage in enumerate(model.stages):
        groups[f'stage {index}'] = stage
        if index < len(model.transitions):
            groups[f'transition {index}'] = nn.Sequential(*model.transitions[index])
    groups['head'] = lambda x: model.head(model.pool(x))
    return groups


@paddle.no_grad()
def compare_groups(model, twin, batches):
    """Differences by group of layers, each with what goes into that group of `model`, so that they do not add up.

    Args:
        model, twin: two forms of a classifier, in eval mode.
        batches: arrays of images [N, 3, H, W].
    Returns:
        {group: Difference}
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
    """(Difference of the logits, of what stands behind them, share of the images whose top class is the same).

    Args:
        expected: one array [N, classes or more] for each of `batches`.
        program: function of images, such as those of programs.py.
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
    """A model in eval mode as a function of arrays."""
    def run(images):
        with paddle.no_grad():
            return model(paddle.to_tensor(images)).numpy()
    return run


def latency_ms(program, images):
    """Median time of a call, milliseconds."""
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        program(images)
        times.append(time.perf_counter() - start)
    return 1e3 * median(times[1:])


def multiply_accumulates(model, height, width):
    """Multiply-accumulates of convolutions and head for one image; taps on padding count."""
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
