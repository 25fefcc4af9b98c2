"""Collects, batch by batch and over all processes, what a report needs of each prediction."""
import numpy as np

from evaluation.metrics import Outcome
from utils import all_reduce_sum, top_classes


class Predictions:
    """Keeps four numbers per image instead of its logits, which are 200 MB for the validation set of ImageNet-1K."""

    def __init__(self):
        self._rows = []

    def add(self, logits, labels):
        """Adds a batch of logits [N, K] of any float dtype and labels [N], both tensors."""
        predicted, labels = top_classes(logits)[:, 0].numpy(), labels.numpy()
        scores = logits.astype('float32').numpy().astype('float64')
        scores = np.exp(scores - scores.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
        each = np.arange(len(labels))
        self._rows.append(np.stack([labels, predicted, scores[each, predicted], scores[each, labels]], 1))

    def __bool__(self):
        return bool(self._rows)

    def outcome(self):
        """The `Outcome` of the images of this process, in the order in which they were added."""
        return _outcome(np.concatenate(self._rows))

    def gather(self, indices, size):
        """The `Outcome` of the images of all processes in the order of their list. Every rank calls it.

        Args:
            indices: positions in the list of the images that this process has added.
            size: number of images in the list.
        """
        rows = np.zeros([size, 4])
        if self._rows:  # a process may have had no batch
            rows[indices] = np.concatenate(self._rows)
        return _outcome(np.reshape(all_reduce_sum(rows.ravel()), [size, 4]))  # sums with zeros, so exact


def _outcome(rows):
    return Outcome(*rows[:, :2].T.astype('int64'), *rows[:, 2:].T)
