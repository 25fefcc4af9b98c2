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
    groups = _Groups(len(digests))
    first = {}
    for index, key in enumerate(digests):
        groups.join(index, first.setdefault(key, index))
    unique = np.array(sorted(first.values()), dtype=int)
    hashes, levels = difference_hashes(thumbnails), thumbnails.reshape(-1, np.prod(THUMBNAIL)).astype(np.int16)
    means = levels.mean(axis=1)
    for bits in _BANDS:
        keys = hashes[unique] & np.uint64(sum(1 << int(bit) for bit in bits))
        order = np.argsort(keys, kind='stable')
        starts = np.flatnonzero(np.diff(keys[order])) + 1
        for bucket in np.split(unique[order], starts):
            for position, index in enumerate(bucket[:-1]):
                others = bucket[position + 1:]
                others = others[np.abs(means[others] - means[index]) <= THUMBNAIL_LEVELS]  # or they differ by more
                others = others[groups.of[others] != groups.of[index]]
                if not len(others):
                    continue
                others = others[_ones(hashes[others] ^ hashes[index]) <= HASH_BITS]
                close = np.abs(levels[others] - levels[index]).mean(axis=1) <= THUMBNAIL_LEVELS
                for other in others[close]:
                    groups.join(index, other)
    return groups.lowest()


class _Groups:
    """Groups of numbers that are joined step by step; `of[i]` is the same number for all members of a group."""

    def __init__(self, count):
        self.of, self._members = np.arange(count), {}

    def join(self, a, b):
        a, b = int(self.of[a]), int(self.of[b])
        if a == b:
            return
        kept, moved = self._members.pop(a, [a]), self._members.pop(b, [b])
        if len(kept) < len(moved):
            a, kept, moved = b, moved, kept
        self.of[moved] = a
        kept.extend(moved)
        self._members[a] = kept

    def lowest(self):
        """The lowest number in the group of each, int array."""
        _, first, inverse = np.unique(self.of, return_index=True, return_inverse=True)
        return first[inverse]


def _ones(numbers):
    """Number of bits that are 1 in each uint64."""
    return _ONES[numbers.view(np.uint16).reshape(-1, 4)].sum(axis=1)
