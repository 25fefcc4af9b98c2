"""Divides images into a training and a validation list."""
import numpy as np


def stratified_split(labels, groups, share, seed):
    """Which images are for validation: a share of each class, and of each group all images or none.

    A class with several groups has images in both lists; one with a single group is for training only. (Groups with
    images of several classes may prevent the first.)

    Args:
        labels: int array [N].
        groups: int array [N], see `duplicates.duplicate_groups`.
        share: of the images of each class for validation, above 0 and below 1.
        seed: int >= 0. The result depends on it and on the order of the images, on nothing else.
    Returns:
        bool array [N].
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    is_val = {}  # {group: bool} of those that are assigned
    for label in np.unique(labels):
        names, sizes = np.unique(groups[labels == label], return_counts=True)
        total, count = sizes.sum(), sum(size for name, size in zip(names, sizes) if is_val.get(name))
        target = min(max(1, round(share * total)), total - 1)
        free = [index for index in np.random.default_rng((seed, int(label))).permutation(len(names))
                if names[index] not in is_val]
        for index in free:
            is_val[names[index]] = bool(count + sizes[index] <= target)
            count += sizes[index] if is_val[names[index]] else 0
        if count == 0 and free and len(names) > 1:  # every group is larger than the target
            is_val[names[min(free, key=lambda index: sizes[index])]] = True
    return np.array([is_val[group] for group in groups])
