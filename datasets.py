"""ImageNet-style list datasets: decoding, samplers and loaders.

A data folder contains `train_list.txt` and `val_list.txt` with one 'relative/path label' per line; paths may contain
spaces. With DATA.DATASET image_folder it contains folders train/CLASS and val/CLASS instead. Predictions show the class
names in `classes.txt`, if the folder has one: a name per line, class 0 first.

Every random draw depends only on (seed, epoch, image) or (seed, epoch), not on the worker or the process.
"""
import contextlib
import errno
import glob
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
import time

import numpy as np
import paddle
from paddle.base.multiprocess_utils import _cleanup_mmap

from errors import UserError, why_unreadable
from image_files.decode import DataError, decode_image, to_rgb  # noqa: F401 - also imported from here
from image_files.folders import read_folder
from image_files.lists import read_class_names, read_list  # noqa: F401 - also imported from here
from transforms import eval_transform, train_transform
from utils import (
    STREAM_AUGMENT,
    STREAM_ORDER,
    STREAM_REPLACE,
    device_count,
    logger,
    random_generator,
    require_locks,
)

DATASETS = ('imagenet2012', 'image_folder')
MODES = ('train', 'val')
CHECK_FILES_UP_TO = 20_000  # lines; in longer lists a missing image is reported when it is read, for a quick start
PREFETCH_FACTOR = 2  # batches prefetched per worker


class ImageNet2012Dataset(paddle.io.Dataset):
    """Images and labels of a list file.

    Args:
        root: data folder.
        list_file: path of the list, relative to root.
        transform: callable(image), or callable(image, rng) with `train`, -> float32 array [3, H, W] or
            [views, 3, H, W].
        num_classes: labels must be in [0, num_classes); None for no limit.
        train: bool, whether the transform takes a random generator.
        seed: int >= 0, seed of the augmentation.
        exif: bool, whether to turn images as their EXIF orientation says.

    Attributes:
        labels: int64 array [len(dataset)].

    Raises:
        FileNotFoundError: the list does not exist.
        DataError: a line is blank or malformed, its label is out of range or (in lists of up to CHECK_FILES_UP_TO
            lines) its image is missing.
    """

    def __init__(self, root, list_file, transform, num_classes=None, train=False, seed=0, exif=False):
        super().__init__()
        self.root, self.transform, self.train, self.seed, self.exif = root, transform, train, seed, exif
        self.list_file = os.path.join(root, list_file)
        # arrays, not lists of objects, whose reference counts would make workers copy the shared memory
        self._paths, self.labels = self._read(list_file, num_classes)
        if len(self) <= CHECK_FILES_UP_TO:
            for index in range(len(self)):
                if not os.path.isfile(self.path(index)):
                    reason = why_unreadable(self.path(index))
                    problem = 'no such image' if reason in ('', os.strerror(errno.ENOENT)) else reason
                    raise DataError(f'{self._where(index)}{self.path(index)}: {problem}')

    def _read(self, _, num_classes):
        return read_list(self.list_file, num_classes)

    def _where(self, index):
        """Where an image is named, for messages about it."""
        return f'{self.list_file}:{index + 1}: '

    @property
    def paths(self):
        """Paths of the images as in the list, a bytes array [len(dataset)]."""
        return self._paths

    def path(self, index):
        """Path of an image file."""
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def stand_ins(self, key):
        """Keys of up to ten other images of the same class, drawn from a generator of the seed and the key."""
        epoch, index, *copy = key if isinstance(key, tuple) else (0, key)
        same_class = np.flatnonzero(self.labels == self.labels[index])
        rng = random_generator(self.seed, STREAM_REPLACE, epoch, index, *copy)
        return [(epoch, int(other), *copy) for other in rng.permutation(same_class[same_class != index])[:10]]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        """Returns the transformed image and its int64 label.

        Args:
            key: (epoch, index), (epoch, index, copy), or index alone for epoch 0; the transform's random draws depend
                only on the seed and the key.

        Raises:
            DataError: the image is missing or corrupt.
        """
        epoch, index, *copy = key if isinstance(key, tuple) else (0, key)
        try:
            image = decode_image(self.path(index), self.exif)
        except DataError as error:
            raise DataError(f'{self._where(index)}{error}') from error
        if self.train:
            pixels = self.transform(image, random_generator(self.seed, STREAM_AUGMENT, epoch, index, *copy))
        else:
            pixels = self.transform(image)
        return pixels, self.labels[index]


class ImageFolderDataset(ImageNet2012Dataset):
    """The same for images in folders root/MODE/CLASS, labelled by the sorted names of the class folders.

    Args:
        root: data folder; `list_file` is 'train' or 'val', see `folders.read_folder`.
    """

    def _read(self, mode, num_classes):
        return read_folder(self.root, mode, num_classes)

    def _where(self, _):
        return ''


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
            order, copies = rng.permutation(self.size), None
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


class _ErrorsAsValues(paddle.io.Dataset):
    """Adds to each sample '' or the message about the image that it replaces; returns a DataError, where nothing does.

    Paddle would print an error that a worker raises as pages of traceback.

    Args:
        dataset: ImageNet2012Dataset.
        replace: whether other images of their class replace images that cannot be decoded.
    """

    def __init__(self, dataset, replace):
        super().__init__()
        self.dataset, self.replace = dataset, replace

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        try:
            return *self.dataset[key], ''
        except DataError as error:
            if self.replace:
                for other in self.dataset.stand_ins(key):
                    with contextlib.suppress(DataError):
                        return *self.dataset[other], str(error)
            return error


def _collate(samples):
    """Samples -> [images, labels, messages about replaced images, error message or ''], as in `DataLoader`."""
    for sample in samples:
        if isinstance(sample, DataError):
            return [np.zeros(1, np.float32), np.zeros(1, np.int64), '', str(sample)]
    images, labels, replaced = zip(*samples)
    images = np.stack(images)
    if images.ndim == 5:
        images = images.swapaxes(0, 1).reshape(-1, *images.shape[2:])
    return [images, np.array(labels, dtype=np.int64), '\n'.join(filter(None, replaced)), '']


def _exit_with_parent(_):
    """Makes a worker exit when the main process ends, even if that is killed (Paddle's would stay), or terminates it.

    A SIGTERM from elsewhere, such as a cluster sends to all processes, is ignored: the main process finishes its step
    first.
    """
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            received = signal.sigtimedwait([signal.SIGTERM], 1)
            if received is not None and received.si_pid == parent:
                break
        _cleanup_mmap()
        os._exit(0)

    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)  # Paddle's handlers print lines of their own
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=watch, daemon=True).start()


def _cause(code):
    """What an exit status of a worker may mean."""
    causes = {-signal.SIGKILL: ' (out of memory?)', -signal.SIGBUS: ' (is /dev/shm full?)',
              -signal.SIGSEGV: ' (a crash in a library that decodes images?)'}
    return causes.get(code, '')


@contextlib.contextmanager
def _exit_if_one_dies(workers):
    """Exits this process with a message when one of its workers dies; Paddle would wait for it forever."""
    over = threading.Event()

    def watch():
        alive = workers
        while alive and not over.is_set():
            multiprocessing.connection.wait([worker.sentinel for worker in alive], timeout=1)
            codes = {worker.exitcode for worker in alive} - {None, 0}
            if codes and not over.is_set():
                code = codes.pop()
                print(f'a DataLoader worker exited with status {code}{_cause(code)}; start the run again to '
                      'continue from its last checkpoint', file=sys.stderr, flush=True)
                os._exit(1)
            alive = [worker for worker in alive if worker.exitcode is None]

    if workers:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


class DataLoader(paddle.io.DataLoader):
    """Paddle's DataLoader for the datasets of this module; a worker's DataError is raised in the main process.

    Yields images, float32 [n, 3, H, W], or [views x n, 3, H, W] with the first view of all images before the second,
    and labels, int64 [n].
    Workers are started for each iteration, in about 0.1 s: Paddle's persistent workers take longer to resume and fail
    after an iteration that was not finished.

    Attributes:
        replaced: number of images of the current iteration in whose place others of their class were yielded, because
            they cannot be decoded; each is logged once. Only with `replace_bad`.
    """

    def __init__(self, dataset, batch_sampler, num_workers=0, use_shared_memory=True, replace_bad=False):
        self.replaced, self._reported = 0, set()
        super().__init__(_ErrorsAsValues(dataset, replace_bad), batch_sampler=batch_sampler, collate_fn=_collate,
                         num_workers=num_workers, prefetch_factor=PREFETCH_FACTOR,
                         use_shared_memory=use_shared_memory,
                         worker_init_fn=_exit_with_parent)

    def set_epoch(self, epoch, start_batch=0):
        """See `TrainBatchSampler.set_epoch`."""
        self.batch_sampler.set_epoch(epoch, start_batch)

    def __iter__(self):
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            batches = super().__iter__()
        except OSError as error:
            cure = (', or raise the limit of open files (ulimit -n)' if error.errno == errno.EMFILE else '')
            raise UserError(f'-num_workers={self.num_workers}: the DataLoader workers cannot be started '
                            f'({error.strerror}); use fewer{cure}') from None
        if signal.getsignal(signal.SIGCHLD) is not handler:  # Paddle's raises wherever the main thread is
            signal.signal(signal.SIGCHLD, handler)
        self.replaced = 0
        with _exit_if_one_dies(getattr(batches, '_workers', [])):
            for images, labels, replaced, error in batches:
                if error:
                    raise DataError(error)
                for message in filter(None, replaced.split('\n')):
                    self.replaced += 1
                    if message not in self._reported:
                        self._reported.add(message)
                        logger.warning(f'{message}; another image of its class takes its place')
                yield images, labels


def eval_protocol(config):
    """'crop' or 'warp', after DATA.EVAL_PROTOCOL; 'auto' warps from 384 pixels up, for the published checkpoints."""
    if config.DATA.EVAL_PROTOCOL == 'auto':
        return 'warp' if config.DATA.IMAGE_SIZE >= 384 else 'crop'
    return config.DATA.EVAL_PROTOCOL


def get_transform(config, mode):
    """The transform for mode 'train' or 'val' with the settings in `config`, see transforms.py."""
    common = dict(interpolation=config.DATA.INTERPOLATION, mean=config.DATA.IMAGENET_MEAN,
                  std=config.DATA.IMAGENET_STD)
    if mode == 'val':
        return eval_transform(config.DATA.IMAGE_SIZE, crop_pct=config.DATA.CROP_PCT, protocol=eval_protocol(config),
                              **common)
    train = config.TRAIN
    return train_transform(config.DATA.IMAGE_SIZE, scale=train.RANDOM_RESIZED_CROP.SCALE,
                           ratio=train.RANDOM_RESIZED_CROP.RATIO, hflip=train.HFLIP, vflip=train.VFLIP,
                           color_jitter=train.COLOR_JITTER, auto_augment=train.AUTO_AUGMENT,
                           re_prob=train.RANDOM_ERASE_PROB, re_mode=train.RANDOM_ERASE_MODE,
                           re_count=train.RANDOM_ERASE_COUNT, views=max(1, train.AUG_SPLITS), **common)


def source_name(config, mode):
    """What in the data folder names the images for mode 'train' or 'val': a list, or a folder of class folders."""
    return mode if config.DATA.DATASET == 'image_folder' else f'{mode}_list.txt'


def get_dataset(config, mode='train'):
    """The dataset for mode 'train' or 'val' in the folder DATA.DATA_PATH.

    Raises:
        UserError: the name of the dataset or the mode is unknown.
        ValueError: a setting is out of range.
        FileNotFoundError, DataError: see ImageNet2012Dataset.
    """
    if config.DATA.DATASET not in DATASETS:
        raise UserError(f'unknown dataset {config.DATA.DATASET!r}: -dataset must be one of {", ".join(DATASETS)}')
    _check_mode(mode)
    kind = ImageFolderDataset if config.DATA.DATASET == 'image_folder' else ImageNet2012Dataset
    return kind(config.DATA.DATA_PATH, source_name(config, mode), get_transform(config, mode),
                num_classes=config.MODEL.NUM_CLASSES, train=mode == 'train', seed=config.SEED, exif=config.DATA.EXIF)


def get_dataloader(config, dataset, mode='train', rank=0, world_size=1):
    """The DataLoader of one process: batches of DATA.BATCH_SIZE shuffled images, or of DATA.BATCH_SIZE_EVAL in order.

    For training, call `loader.set_epoch(epoch)` before each epoch.

    Raises:
        UserError: the mode is unknown, or the dataset is smaller than one global training batch.
    """
    _check_mode(mode)
    if mode == 'train':
        sampler = TrainBatchSampler(len(dataset), config.DATA.BATCH_SIZE, rank, world_size, config.SEED,
                                    config.TRAIN.REPEATED_AUG,
                                    dataset.labels if config.TRAIN.SAMPLER == 'balanced' else None)
    else:
        sampler = EvalBatchSampler(len(dataset), config.DATA.BATCH_SIZE_EVAL, rank, world_size)
    workers = config.DATA.NUM_WORKERS
    views = max(1, config.TRAIN.AUG_SPLITS) if mode == 'train' else 1
    image_bytes = 4 * 3 * config.DATA.IMAGE_SIZE ** 2 * views
    processes = min(world_size, device_count('gpu') or world_size)  # on this machine
    # each worker fills one batch in addition to those prefetched
    needed = processes * workers * (PREFETCH_FACTOR + 1) * sampler.batch_size * image_bytes
    if workers:
        require_locks('or use -num_workers=0')
        clear_shared_memory()
    shared = _free_shared_memory() > needed
    if workers and not shared:
        logger.warning(
            'the DataLoader needs %d MB of /dev/shm, but %d MB are free: batches go through pipes, which is slower '
            '(in Docker, raise --shm-size)', needed >> 20, _free_shared_memory() >> 20)
    return DataLoader(dataset, sampler, workers, use_shared_memory=shared,
                      replace_bad=mode == 'train' and config.DATA.MAX_BAD_FRACTION > 0)


def clear_shared_memory(folder='/dev/shm', seconds=3600):
    """Deletes the batches that DataLoader workers have left in shared memory because they were killed.

    Such a file is named after its worker, which must be gone. A batch may outlive its worker for as long as it waits to
    be used, and the worker may run in another container: only files older than `seconds` are deleted.
    """
    cleared = 0
    for path in glob.glob(os.path.join(folder, 'paddle_*')):
        name = re.fullmatch(r'paddle_(\d+)_\d+_\d+', os.path.basename(path))
        with contextlib.suppress(OSError):  # another process is deleting it as well
            status = os.stat(path)
            if (name and status.st_uid == os.geteuid() and time.time() - status.st_mtime > seconds
                    and not os.path.exists(f'/proc/{name[1]}')):
                os.remove(path)
                cleared += 1
    if cleared:
        logger.info(f'{cleared} files that killed DataLoader workers had left in {folder} are deleted')


def _check_mode(mode):
    if mode not in MODES:
        raise UserError(f'unknown mode {mode!r}: use one of {", ".join(MODES)}')


def _free_shared_memory():
    """Free bytes of /dev/shm."""
    try:
        stats = os.statvfs('/dev/shm')
    except (OSError, AttributeError):
        return 0
    return stats.f_bavail * stats.f_frsize
