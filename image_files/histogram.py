"""How many images each class has, as lines of text."""
import math

import numpy as np

BAR = 40  # characters of the longest bar


def class_rows(title, labels, classes, bars=True, names=None, known="the head's classes"):
    """Rows about the images per class.

    Args:
        title: of the first row.
        labels: int array [N], not empty; or uint8 [N, K] where images have several, 1 for each label.
        classes: number of outputs of the model.
        bars: whether to add a bar for each class, or with many classes for each range of counts.
        names: names of the classes, or None.
        known: what the classes are called.
    Returns:
        list of (label, text).
    """
    if labels.ndim == 1:
        (found, counts), several = np.unique(labels, return_counts=True), ''
    else:
        counts, sizes = labels.sum(0, dtype=int), labels.sum(1, dtype=int)
        found = np.flatnonzero(counts)
        counts = counts[found]
        several = f'; labels per image: mean {sizes.mean():.2f}, max {sizes.max():,}, {(sizes == 0).sum():,} without'
        if not len(found):
            return [(title, f'{len(labels):,} images, all without labels')]
    rows = [(title, f'{len(labels):,} images, {len(found):,} classes, {classes - (found < classes).sum():,} of '
                   f'{known} without images; images per class: min {counts.min():,}, median '
                   f'{np.median(counts):,.0f}, max {counts.max():,}{several}')]
    low, high = counts.min(), counts.max() + 1
    if not bars or classes > 12 and high - low == 1:
        return rows
    if classes <= 12:
        present = dict(zip(found, counts))
        named = names or [f'class {label}' for label in range(classes)]
        bars, unit = [(named[label], present.get(label, 0)) for label in range(classes)], 'images'
    else:
        totals, edges = np.histogram(counts, bins=min(8, high - low), range=(low, high))
        bars, unit = [(f'{math.ceil(a):,} to {math.ceil(b) - 1:,}', total)
                      for a, b, total in zip(edges, edges[1:], totals)], 'classes'
    longest = max(1, *(count for _, count in bars))
    return rows + [(f'  {label}', f'{"#" * math.ceil(BAR * count / longest):<{BAR}} {count:,} {unit}')
                   for label, count in bars]
