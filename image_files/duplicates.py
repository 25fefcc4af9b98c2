"""Finds images that show the same: copies, and copies that were resized, compressed again or slightly edited.

Two images are near duplicates if the difference hashes (dHash) of their grey values differ in at most HASH_BITS of 64
bits and the mean of their small versions differs by at most THUMBNAIL_LEVELS of 255 levels. Mirrored, rotated and
strongly cropped copies are not recognised, nor are copies with another brightness or colour.
"""
import hashlib

import numpy as np
from PIL import Image

HASH_BITS = 4
THUMBNAIL_LEVELS = 6
THUMBNAIL = (8, 9, 3)  # shape; the hash compares neighbours in each of the 8 rows
_BANDS = np.array_split(np.arange(64), HASH_BITS + 1)  # hashes that differ in fewer bits agree in one of the bands
_ONES = np.array([bin(number).count('1') for number in range(1 << 16)], np.uint8)


def digest(image):
    """SHA-256 of the pixels of an RGB image, 32 bytes: the same for all files that are decoded alike."""
    return hashlib.sha256(b'%d %d ' % image.size + image.tobytes()).digest()


def thumbnail(image):
    """A small version of an RGB image, uint8 THUMBNAIL."""
    height, width, _ = THUMBNAIL
    return np.asarray(image.resize((width, height), Image.BOX))


def difference_hashes(thumbnails):
    """dHash of small versions [N, *THUMBNAIL]: uint64 [N], a bit for each pair of horizontal neighbours."""
    grey = thumbnails @ np.array([0.299, 0.587, 0.114], np.float32)
    bits = grey[:, :, 1:] > grey[:, :, :-1]
    return np.packbits(bits.reshape(-1, 64), axis=1).view(np.uint64)[:, 0]


def duplicate_groups(digests, thumbnails):
    """Groups of images that are the same or near duplicates, directly or through others.

    Args:
        digests: list of N results of `digest`.
        thumbnails: uint8 [N, *THUMBNAIL].
    Returns:
        int array [N]: the lowest index in the group of each image; its own index where it has no duplicate.
    """
    parents = np.arange(len(digests))

    def root(index):
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    def join(a, b):
        a, b = sorted((root(a), root(b)))
        parents[b] = a

    first = {}
    for index, key in enumerate(digests):
        join(index, first.setdefault(key, index))
    unique = np.array(sorted(first.values()), dtype=int)
    for a, b in _near_pairs(thumbnails[unique]):
        join(unique[a], unique[b])
    return np.array([root(index) for index in range(len(digests))], dtype=int)


def _near_pairs(thumbnails):
    """Yields the pairs of indices that are near duplicates, some of them more than once."""
    if len(thumbnails) < 2:
        return
    hashes, levels = difference_hashes(thumbnails), thumbnails.reshape(len(thumbnails), -1).astype(np.int16)
    for bits in _BANDS:
        mask = np.uint64(sum(1 << int(bit) for bit in bits))
        order = np.argsort(hashes & mask, kind='stable')
        keys = (hashes & mask)[order]
        starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
        for bucket in np.split(order, starts[1:]):
            for position, index in enumerate(bucket[:-1]):
                others = bucket[position + 1:]
                others = others[_ones(hashes[others] ^ hashes[index]) <= HASH_BITS]
                if len(others):
                    difference = np.abs(levels[others] - levels[index]).mean(axis=1)
                    yield from ((index, other) for other in others[difference <= THUMBNAIL_LEVELS])


def _ones(numbers):
    """Number of bits that are 1 in each uint64."""
    return _ONES[numbers.view(np.uint16).reshape(-1, 4)].sum(axis=1)
