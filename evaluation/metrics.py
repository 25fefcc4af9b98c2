"""Metrics of a classifier by class and by confidence, from one prediction per image. Needs NumPy only."""
from typing import NamedTuple

import numpy as np

BINS = 15  # equal widths, as in "On Calibration of Modern Neural Networks" (arXiv 1706.04599)


class Outcome(NamedTuple):
    """The predictions for n images, in the order of their list.

    Attributes:
        labels, predicted: classes, int64 [n].
        confidence, label_probability: probabilities of the predicted class and of the label, float64 [n].
    """
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    label_probability: np.ndarray


class ClassMetrics(NamedTuple):
    """Arrays [classes]; a share whose denominator is 0 is NaN.

    Attributes:
        support: images with this label, a count.
        predictions: images predicted to be of this class, a count.
        correct: images of both kinds, a count.
        recall: correct / support: the accuracy of the class.
        precision: correct / predictions.
        f1: harmonic mean of the two, 2 correct / (support + predictions).
    """
    support: np.ndarray
    predictions: np.ndarray
    correct: np.ndarray
    recall: np.ndarray
    precision: np.ndarray
    f1: np.ndarray


def class_metrics(outcome, classes):
    """The `ClassMetrics` of an outcome for all `classes`, also those without images."""
    def count(values):
        return np.bincount(values, minlength=classes)

    support, predictions = count(outcome.labels), count(outcome.predicted)
    correct = count(outcome.labels[outcome.labels == outcome.predicted])
    with np.errstate(invalid='ignore'):  # 0 / 0
        return ClassMetrics(support, predictions, correct, correct / support, correct / predictions,
                            2 * correct / (support + predictions))


def confusion_cells(outcome, classes):
    """The cells of the confusion matrix that are not 0, by label and predicted class; a full matrix of 21,841 classes
    would take gigabytes.

    Returns:
        int64 arrays (labels, predicted classes, numbers of images).
    """
    cells, counts = np.unique(outcome.labels * classes + outcome.predicted, return_counts=True)
    return cells // classes, cells % classes, counts


def confused_pairs(outcome, classes):
    """The cells off the diagonal, most images first: int64 arrays like those of `confusion_cells`."""
    labels, predicted, counts = confusion_cells(outcome, classes)
    wrong = labels != predicted
    order = np.argsort(-counts[wrong], kind='stable')
    return labels[wrong][order], predicted[wrong][order], counts[wrong][order]


class Calibration(NamedTuple):
    """How confidence and accuracy compare in bins of confidence (edges[b], edges[b + 1]]; NaN in empty bins.

    Attributes:
        edges: [BINS + 1], from 0 to 1.
        images: [BINS], a count.
        confidence, accuracy: means, [BINS].
        ece: expected calibration error: the mean of |accuracy - confidence| over the bins, weighted by images.
    """
    edges: np.ndarray
    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float


def calibration(outcome):
    """The `Calibration` of an outcome."""
    edges = np.linspace(0, 1, BINS + 1)
    bins = np.searchsorted(edges[1:-1], outcome.confidence)
    images = np.bincount(bins, minlength=BINS)
    confidence = np.bincount(bins, outcome.confidence, BINS)
    correct = np.bincount(bins, outcome.labels == outcome.predicted, BINS)
    with np.errstate(invalid='ignore'):
        return Calibration(edges, images, confidence / images, correct / images,
                           float(np.abs(correct - confidence).sum() / images.sum()))


def mistakes(outcome):
    """Indices of the images that are predicted wrongly, most confident first."""
    wrong = np.flatnonzero(outcome.labels != outcome.predicted)
    return wrong[np.argsort(-outcome.confidence[wrong], kind='stable')]
