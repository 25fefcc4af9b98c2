"""A DataLoader whose workers report one line and end with their process, and the shared memory that they use."""
import contextlib
import errno
import glob
import multiprocessing
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

from errors import UserError
from image_files.decode import DataError, ShardError
from loading.batches import collate, normalized
from utils import logger

PREFETCH_FACTOR = 2  # batches prefetched per worker
SLOW, STUCK = 30, 600  # seconds that an image may take before a warning, and before the process gives up


class _ErrorsAsValues(paddle.io.Dataset):
    """Adds to each sample '' or the message about the image that it replaces; returns a DataError, where nothing does.

    Paddle would print an error that a worker raises as pages of traceback.

    Args:
        dataset: ImageNet2012Dataset, or one without `levels` whose images are normalised already.
        replace: whether other images of their class replace images that cannot be decoded.
    """

    def __init__(self, dataset, replace):
        super().__init__()
        self.dataset, self.replace = dataset, replace
        self._read = getattr(dataset, 'levels', dataset.__getitem__)
        self.progress = None  # of all workers, set for each iteration

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        try:
            return *self._sample(key), ''
        except DataError as error:
            if self.replace and not isinstance(error, ShardError):
                for other in self.dataset.stand_ins(key):
                    try:
                        return *self._sample(other), str(error)
                    except ShardError as damage:
                        return damage
                    except DataError:
                        continue
            return error

    def _sample(self, key):
        if self.progress is None:
            return self._read(key)
        worker = paddle.io.get_worker_info()
        with self.progress.of(worker.id if worker else 0, key[1] if isinstance(key, tuple) else key):
            return self._read(key)


class _Progress:
    """Which image each worker is reading, in memory that the main process shares with them.

    Without workers, the main process reads the images and has the number 0.
    """

    def __init__(self, workers):
        self._slots = multiprocessing.RawArray('q', 2 * max(1, workers))  # index of an image; number of starts and ends

    @contextlib.contextmanager
    def of(self, worker, index):
        """Within this block, `worker` reads the image `index`."""
        self._slots[2 * worker] = index
        self._slots[2 * worker + 1] += 1
        try:
            yield
        finally:
            self._slots[2 * worker + 1] += 1

    def read(self, worker):
        """(index of the current or last image of a worker, number of its starts and ends: odd while it reads)."""
        return self._slots[2 * worker], self._slots[2 * worker + 1]


def _collate(samples):
    """Samples -> [images, labels, erased, messages about replaced images, error message or ''] of `DataLoader`.

    `images` and `erased` are those of `batches.collate`.
    """
    for sample in samples:
        if isinstance(sample, DataError):
            return [np.zeros(1, np.float32), np.zeros(1, np.int64), [], '', str(sample)]
    images, labels, replaced = zip(*samples)
    labels = np.array(labels)  # uint8 [n, classes] where an image has several
    labels = labels.astype(np.int64 if labels.ndim == 1 else np.float32)
    images, erased = collate(images)
    return [images, labels, erased, '\n'.join(filter(None, replaced)), '']


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
def _exit_if_one_dies(workers, progress, dataset):
    """Exits this process with a message when one of its workers dies or hangs; Paddle would wait for it forever.

    The message names the image that the worker reads, or read last. A worker hangs if an image takes STUCK seconds;
    from SLOW on, a warning is logged. Time in which this process is stopped does not count. Without workers, the same
    holds for the images that this process reads, unless a library hangs without releasing Python's lock.
    """
    over, reader = threading.Event(), 'a DataLoader worker' if workers else 'this process'

    def watch():
        alive = dict(enumerate(workers))
        waits = dict.fromkeys(alive or [0], ((0, 0), 0))  # {worker: (its progress, for how many seconds)}
        while (alive or not workers) and not over.is_set():
            ended = multiprocessing.connection.wait([worker.sentinel for worker in alive.values()], timeout=1)
            codes = {number: worker.exitcode for number, worker in alive.items()} if workers else {0: None}
            alive = {number: worker for number, worker in alive.items() if codes[number] is None}
            for number, code in codes.items():
                if over.is_set():
                    return
                index, events = state = progress.read(number)
                if code:
                    _give_up(f'{reader} exited with status {code}{_cause(code)}', *_last_image(dataset, index, events))
                seconds = waits[number][1] + (not ended) if waits[number][0] == state and events % 2 else 0
                waits[number] = state, seconds
                if seconds == SLOW and not ended:
                    logger.warning(f'{dataset.name(index)}: {reader} has been reading this image for {SLOW} s; '
                                   'does the file system still answer?')
                elif seconds == STUCK:
                    _give_up(f'{reader} has been reading {dataset.name(index)} for {STUCK} s')

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _last_image(dataset, index, events):
    """What a worker that ended did, as the arguments of `_give_up`; see `_Progress.read`."""
    if events == 0:
        return '', ''
    name = dataset.name(index)
    return (f' while it read {name}', '') if events % 2 else ('', f' (the last image that it read: {name})')


def _give_up(reason, where='', detail=''):
    print(f'{reason}{where}; start the run again to continue from its last checkpoint{detail}',
          file=sys.stderr, flush=True)
    os._exit(1)


class DataLoader(paddle.io.DataLoader):
    """Paddle's DataLoader for the datasets of this module; a worker's DataError is raised in the main process.

    Workers pass images on as uint8, and the device of the main process normalises them: see loading/batches.py. On a
    GPU, batches arrive through pinned memory while it computes.

    Yields images, float32 [n, 3, H, W], or [views x n, 3, H, W] with the first view of all images before the second,
    and labels, int64 [n], or float32 [n, classes] where an image has several.
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
        progress = self.dataset.progress = _Progress(self.num_workers)
        try:
            batches = super().__iter__()
        except OSError as error:
            cure = (', or raise the limit of open files (ulimit -n)' if error.errno == errno.EMFILE else '')
            raise UserError(f'-num_workers={self.num_workers}: the DataLoader workers cannot be started '
                            f'({error.strerror}); use fewer{cure}') from None
        if signal.getsignal(signal.SIGCHLD) is not handler:  # Paddle's raises wherever the main thread is
            signal.signal(signal.SIGCHLD, handler)
        self.replaced = 0
        with _exit_if_one_dies(getattr(batches, '_workers', []), progress, self.dataset.dataset):
            for images, labels, erased, replaced, error in batches:
                if error:
                    raise DataError(error)
                for message in filter(None, replaced.split('\n')):
                    self.replaced += 1
                    if message not in self._reported:
                        self._reported.add(message)
                        logger.warning(f'{message}; another image of its class takes its place')
                yield normalized(images, erased, getattr(self.dataset.dataset, 'transform', None)), labels


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


def free_shared_memory():
    """Free bytes of /dev/shm."""
    try:
        stats = os.statvfs('/dev/shm')
    except (OSError, AttributeError):
        return 0
    return stats.f_bavail * stats.f_frsize
