"""Samplers: the order of the images, and which of them a process gets."""
import numpy as np

from errors import UserError
from utils import STREAM_ORDER, random_generator


class TrainBatchSampler:
    """Shuffled batches of (epoch, index) keys for one process, of (epoch, index, copy) with repeated augmentation.

    The permutation depends only on (seed, epoch). With repeated augmentation (arXiv 1901.09335) each image appears
    `repeats` times in a row, and the list is truncated to the size of the dataset: an epoch keeps its length and shows
    only some of the images. The list is cut into global batches, an incomplete last one is dropped, and the images of a
    global batch are distributed over the processes in turn, so that the copies of an image go to different processes.
    Every process has the same number of full batches, and a global batch contains the same images for any number of
    processes.

    Args:
        size: number of images.
        batch_size: images per process and batch.
        rank, world_size: rank of this process and number of processes.
        seed: int >= 0.
        repeats: copies of each image; 0 or 1 for no repeated augmentation.
        labels: int64 array [size] to show each class equally often, see `balanced_order`; None for each image once.

    Raises:
        UserError: the dataset is smaller than one global batch.
    """

    def __init__(self, size, batch_size, rank=0, world_size=1, seed=0, repeats=0, labels=None):
        self.size, self.batch_size, self.rank, self.world_size, self.seed = size, batch_size, rank, world_size, seed
        self.repeats, self.labels = repeats, labels
        self.epoch = self.start_batch = 0
        if len(self) == 0:
            raise UserError(f'{size} training images are fewer than one global batch of {batch_size * world_size} '
                            f'({batch_size} x {world_size} processes): lower -batch_size')

    def set_epoch(self, epoch, start_batch=0):
        """Sets the epoch and the first batch of the next iteration (above 0 to resume within an epoch)."""
        self.epoch, self.start_batch = epoch, start_batch

    def __iter__(self):
        rng = random_generator(self.seed, STREAM_ORDER, self.epoch)
        if self.labels is None:
            # rng.permutation(size) in half the memory
            order, copies = np.arange(self.size, dtype=np.uint32 if self.size < 1 << 32 else np.int64), None
            rng.shuffle(order)
        else:
            order, copies = balanced_order(self.labels, rng)
        global_batch = self.batch_size * self.world_size
        for batch in range(self.start_batch, len(self)):
            positions = range(batch * global_batch + self.rank, (batch + 1) * global_batch, self.world_size)
            if self.repeats > 1:
                yield [(self.epoch, int(order[p // self.repeats]), p % self.repeats) for p in positions]
            elif copies is not None:
                yield [(self.epoch, int(order[p]), int(copies[p])) for p in positions]
            else:
                yield [(self.epoch, int(order[p])) for p in positions]

    def __len__(self):
        """Batches of a whole epoch; `start_batch` is not subtracted."""
        return self.size // (self.batch_size * self.world_size)


def balanced_order(labels, rng):
    """An order of as many images as there are labels, in which all classes appear equally often (or once more).

    Within a class, no image appears again before all others have.

    Args:
        labels: int64 array [images].
        rng: np.random.Generator.
    Returns:
        int64 arrays [images]: indices of the images, and how often each has appeared before.
    """
    by_class = np.split(np.argsort(labels, kind='stable'), np.flatnonzero(np.diff(np.sort(labels))) + 1)
    counts = np.full(len(by_class), len(labels) // len(by_class))
    counts[rng.permutation(len(by_class))[:len(labels) % len(by_class)]] += 1
    chosen, copies = [], []
    for images, count in zip(by_class, counts):
        rounds = [rng.permutation(images) for _ in range(-(-count // len(images)))]
        chosen.append(np.concatenate([*rounds, images[:0]])[:count])
        copies.append(np.arange(count) // len(images))
    order = rng.permutation(len(labels))
    return np.concatenate(chosen)[order], np.concatenate(copies)[order]


class EvalBatchSampler:
    """Consecutive images in order, without padding or shuffling: each image once, over all processes.

    Whole batches go to the processes in turn (batch k to rank k % world_size), so the contents of a batch do not depend
    on the number of processes; a process may get one batch fewer than another, or none.
    """

    def __init__(self, size, batch_size, rank=0, world_size=1):
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size

    def _starts(self):
        return range(self.rank * self.batch_size, self.size, self.world_size * self.batch_size)

    def __iter__(self):
        for start in self._starts():
            yield list(range(start, min(start + self.batch_size, self.size)))

    def __len__(self):
        return len(self._starts())
