"""Metrics of a classifier with several labels per image; scores are sigmoids of the logits.

The main one is the mAP: the mean over the classes, those that have positives, of their average precision (AP).
"""
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F

from errors import UserError
from utils import all_reduce_array, sigmoid


def average_precision(scores, targets):
    """AP of a class: the sum over the thresholds of precision x increase of recall, as in scikit-learn.

    Args:
        scores: [n]; equal ones share a threshold, so the order of the images does not matter.
        targets: [n], 1 for positives and 0 for negatives.
    Returns:
        float; NaN without positives.
    """
    order = np.argsort(-scores, kind='stable')
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # the last image of each threshold
    hits = np.cumsum(targets[order], dtype=np.int64)[ends]
    if not hits[-1]:
        return np.nan
    return float(np.sum(np.diff(hits, prepend=0) * (hits / (ends + 1))) / hits[-1])


def average_precisions(scores, targets):
    """The `average_precision` of each class, float64 [K], for scores and targets [n, K]."""
    return np.array([average_precision(scores[:, k], targets[:, k]) for k in range(scores.shape[1])])


class ClassMetrics(NamedTuple):
    """Arrays [K]; a share whose denominator is 0 is NaN.

    Attributes:
        ap: average precision.
        support, predictions, correct: images with the label, with a score that reaches the threshold, and with both.
        recall, precision, f1: correct / support, correct / predictions, and their harmonic mean.
    """
    ap: np.ndarray
    support: np.ndarray
    predictions: np.ndarray
    correct: np.ndarray
    recall: np.ndarray
    precision: np.ndarray
    f1: np.ndarray


def class_metrics(logits, targets, threshold=0.5):
    """The `ClassMetrics` of logits and targets [n, K]."""
    chosen = sigmoid(logits) >= threshold
    support, predictions, correct = targets.sum(0, dtype=int), chosen.sum(0), (chosen & (targets > 0)).sum(0)
    with np.errstate(invalid='ignore'):  # 0 / 0
        return ClassMetrics(average_precisions(logits, targets), support, predictions, correct, correct / support,
                            correct / predictions, 2 * correct / (support + predictions))


class Scores:
    """Collects the logits of an evaluation, of all images and processes.

    The logits of a whole dataset take 4 bytes x images x classes in each process.

    Attributes:
        logits, targets: after `metrics`: float32 and uint8 [n, K], of all images in the order of the list.
    """

    def __init__(self):
        self._rows, self._targets, self.logits, self.targets = [], [], None, None

    def add(self, logits, targets):
        """Adds a batch of logits and targets, tensors [N, K].

        Returns:
            two tensors: the sum over the images of the mean binary cross-entropy of their classes, in float64, and
            the number of images with a logit that is not finite.
        """
        logits, targets = logits.astype('float32'), targets.astype('float32')
        self._rows.append(logits.numpy())
        self._targets.append(targets.numpy().astype(np.uint8))
        loss = -(targets * F.log_sigmoid(logits) + (1 - targets) * F.log_sigmoid(-logits)).mean(axis=1)
        broken = paddle.logical_not(paddle.isfinite(logits)).any(axis=1).astype('int64').sum()
        return loss.astype('float64').sum(), broken

    def metrics(self, loss, size, indices=None):
        """The metrics of the whole dataset. Every rank calls it.

        Args:
            loss: sum over all images of the first result of `add`.
            size: number of images in the dataset.
            indices: positions in it of the images that this process has added; None for all in their order.
        Returns:
            dict of mAP (percent), loss, images and classes (those with positives, over which the mean is taken).
        Raises:
            UserError: no image has a label.
        """
        indices = range(size) if indices is None else indices
        rows, targets = (np.concatenate(part) if part else None for part in (self._rows, self._targets))
        width = self._width(rows)
        self.logits, self.targets = np.zeros([size, width], np.float32), np.zeros([size, width], np.uint8)
        if rows is not None:  # a process may have had no batch
            self.logits[indices], self.targets[indices] = rows, targets
        # sums with zeros, so exact
        self.logits = all_reduce_array(self.logits)
        self.targets = all_reduce_array(self.targets.astype(np.int32)).astype(np.uint8)
        found = average_precisions(self.logits, self.targets)
        if np.isnan(found).all():
            raise UserError('no image has a label, so the mAP is not defined')
        return {'mAP': 100 * float(np.nanmean(found)), 'loss': loss / size, 'images': int(size),
                'classes': int(np.isfinite(found).sum())}

    @staticmethod
    def _width(rows):
        return int(all_reduce_array(np.array([0 if rows is None else rows.shape[1]], np.int32), largest=True)[0])
