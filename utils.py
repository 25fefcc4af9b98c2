"""Shared helpers: devices, processes, random seeds, logs and files of JSON lines."""
import contextlib
import itertools
import json
import logging
import logging.handlers
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle.base.core import create_or_get_global_tcp_store

from atomic_file import append_whole
from errors import UserError

logger = logging.getLogger('replknet')
_LOGGERS = (logger, logging.getLogger('large_kernel'))  # the latter reports which implementation it chose


# ---- devices and processes

DEVICES = ('gpu', 'cpu', 'npu', 'xpu')


def device_count(kind):
    """Number of devices of a kind ('gpu', 'xpu', 'npu') that this Paddle can use on this machine; 1 for 'cpu'."""
    if kind == 'gpu':
        return paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if kind == 'xpu':
        return paddle.base.core.get_xpu_device_count() if paddle.is_compiled_with_xpu() else 0
    if kind == 'npu':
        return sum(name.split(':')[0] == 'npu' for name in paddle.device.get_available_custom_device())
    return 1


def resolve_device(name, half=False):
    """The kind of device for the setting DEVICE; 'auto' is 'gpu' if there is one, else 'cpu'.

    Warns where 'auto' leaves the machine's GPUs unused.

    Args:
        half: whether half precision is asked for, which no CPU has.
    Raises:
        UserError: `name` is no kind of device, this machine has no such device, or with `half` GPUs that 'auto' would
            leave unused.
    """
    if name == 'auto':
        unused = unused_gpus()
        if unused and half:
            raise UserError(f'-amp: {unused}; or choose -device=cpu, which computes in float32')
        if unused:
            logger.warning(f'computing on the CPU: {unused}; -device=cpu ends this warning')
        return 'gpu' if device_count('gpu') else 'cpu'
    if name.split(':')[0] not in DEVICES:
        raise UserError(f'-device={name}: choose auto, {", ".join(DEVICES)}')
    if not device_count(name):
        raise UserError(f'-device={name}: Paddle {paddle.__version__} finds no {name} on this machine; '
                        'use -device=cpu, or install the Paddle build for it')
    return name


def unused_gpus():
    """Why Paddle does not find the NVIDIA cards of this machine, and what to do, in one line; None if all is well.

    CUDA_VISIBLE_DEVICES may hide the cards on purpose.
    """
    if os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1') or device_count('gpu'):
        return None
    cards = _nvidia_cards()
    if not cards:
        return None
    if paddle.is_compiled_with_cuda():
        advice = 'check that nvidia-smi works here, and that the container was started with its GPUs'
    else:
        advice = 'it is a build for CPUs; install one for GPUs as requirements-gpu.txt says'
    return f'Paddle {paddle.__version__} finds none of the {cards} NVIDIA cards of this machine: {advice}'


def _nvidia_cards(folder='/proc/driver/nvidia/gpus'):
    """Number of NVIDIA cards that the driver or nvidia-smi lists, whether Paddle can use them or not."""
    with contextlib.suppress(OSError):
        return len(os.listdir(folder))
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # under Windows, Linux has no such folder
        listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, timeout=20)
        return sum(line.startswith('GPU ') for line in listed.stdout.splitlines())
    return 0


def rank():
    """Index of this process among all processes of the run."""
    return dist.get_rank()


def world_size():
    """Number of processes of the run."""
    return dist.get_world_size()


def is_main():
    """Whether this process writes the logs and checkpoints."""
    return rank() == 0


def require_locks(otherwise):
    """Refuses to start processes where they cannot share locks, for which Linux needs /dev/shm.

    Args:
        otherwise: what to do without, for the message.
    Raises:
        UserError: a lock cannot be made.
    """
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise UserError(f'processes cannot share locks ({error.strerror}): make /dev/shm a writable tmpfs, {otherwise}'
                        ) from None


def all_reduce_sum(values):
    """Sums each number of a list over all processes, in float64; returns floats."""
    if world_size() == 1:
        return [float(v) for v in values]
    tensor = paddle.to_tensor([float(v) for v in values], dtype='float64')
    dist.all_reduce(tensor)
    return tensor.tolist()


def all_reduce_measured(measured, values, own=None):
    """`all_reduce_sum` of a number that the device has computed and of other numbers, with one wait for the device.

    Args:
        measured: float32 scalar tensor.
        values: numbers.
        own: float32 scalar tensor to read with them, which is not summed, or None.
    Returns:
        list of floats: the sums of measured and of values, and own or None.
    """
    if world_size() == 1:
        read = (measured if own is None else paddle.stack([measured, own])).numpy().ravel().tolist()
        return [read[0], *(float(v) for v in values), None if own is None else read[1]]
    tensor = paddle.concat([measured.reshape([1]).astype('float64'), to_device(np.array(values, np.float64))])
    dist.all_reduce(tensor)
    if own is None:
        return [*tensor.tolist(), None]
    return paddle.concat([tensor, own.reshape([1]).astype('float64')]).tolist()


def to_device(array):
    """A tensor of an array on the current device; without waiting for what a GPU still computes."""
    if not paddle.get_device().startswith('gpu'):
        return paddle.to_tensor(array)
    return paddle.to_tensor(array, place=paddle.CUDAPinnedPlace()).cuda(blocking=False)


def all_reduce_array(array, largest=False):
    """Sums an array of the same shape over all processes, or takes the largest of each element; in its own dtype."""
    if world_size() == 1:
        return array
    tensor = paddle.to_tensor(array)
    dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor.numpy()


def all_gather_values(value):
    """The numbers passed by all processes, in the order of their ranks."""
    mine = [0.0] * world_size()
    mine[rank()] = value
    return all_reduce_sum(mine)


def barrier(_calls=itertools.count()):  # noqa: B008 - the default counts the calls in this process
    """Waits for all processes without a time limit; collectives of gloo time out after 30 s."""
    if world_size() == 1:
        return
    store, key = create_or_get_global_tcp_store(), f'replknet/barrier/{next(_calls)}'
    if store.add(key, 1) == world_size():
        store.set(key + '/all', b'1')
    store.wait(key + '/all')


# ---- seeds

# Every use of random numbers has its own stream: this number follows the seed in the key of its generator.
STREAM_MIXUP, STREAM_PADDLE, STREAM_INIT, STREAM_AUGMENT, STREAM_ORDER, STREAM_REPLACE = 1, 2, 3, 4, 5, 6


def random_generator(*key):
    """A NumPy Generator that depends only on the given integers, such as (seed, stream, epoch, image)."""
    return np.random.default_rng(key)


def seed_paddle(*key):
    """Seeds Paddle's random draws (drop path) with integers such as (seed, step, rank)."""
    paddle.seed(int(random_generator(*key).integers(2**31)))


# ---- metrics

def top_classes(logits):
    """The five classes with the highest logits, best first, or all K, if fewer: [N, K] -> int64 [N, 5]."""
    return paddle.topk(logits.astype('float32'), min(5, logits.shape[1]), axis=1)[1]


def accuracy_sums(logits, labels):
    """The sums over a batch from which `accuracy_metrics` computes the metrics of an evaluation.

    Args:
        logits: [N, K], of any float dtype.
        labels: [N], int64.
    Returns:
        four tensors: images whose highest logit is that of the label, images with the label among the five highest (or
        all K, if fewer), the sum of the cross-entropy in float64, and images with a logit that is not finite, for which
        the others mean nothing.
    """
    hits = top_classes(logits) == labels.unsqueeze(1)
    logits = logits.astype('float32')
    loss = F.cross_entropy(logits, labels, reduction='none').astype('float64').sum()
    broken = paddle.logical_not(paddle.isfinite(logits)).any(axis=1).astype('int64').sum()
    return hits[:, 0].astype('int64').sum(), hits.astype('int64').sum(), loss, broken


def accuracy_metrics(correct1, correct5, loss, images):
    """dict of acc1 and acc5 (percent), loss (mean cross-entropy) and images, from sums over all images."""
    return {'acc1': 100 * correct1 / images, 'acc5': 100 * correct5 / images, 'loss': loss / images,
            'images': int(images)}


def accuracy_line(metrics, name=''):
    """The line that every evaluation prints last, from a dict with acc1 and acc5 (percent), loss and images.

    With several labels per image, it is from one with mAP (percent), classes, loss and images. `name` tells models
    apart whose lines follow one another; it comes last.
    """
    if 'mAP' in metrics:
        return (f"mAP {metrics['mAP']:.3f} classes {metrics['classes']} loss {metrics['loss']:.4f} "
                f"images {metrics['images']}{name and ' ' + name}")
    return (f"Acc@1 {metrics['acc1']:.3f} Acc@5 {metrics['acc5']:.3f} loss {metrics['loss']:.4f} "
            f"images {metrics['images']}{name and ' ' + name}")


def sigmoid(logits):
    """Sigmoid of an array of logits, in float64 and without overflow."""
    logits = np.asarray(logits, np.float64)
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1, small) / (1 + small)


# ---- logs

def setup_logging(verbose):
    """Logs to standard output, and keeps the lines for `log_to_file`; without `verbose`, only warnings are logged."""
    console = logging.StreamHandler(sys.stdout)
    console.handleError = lambda record: _drop_closed_pipe()
    console.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%m-%d %H:%M:%S'))
    kept = logging.handlers.MemoryHandler(10000, flushLevel=logging.CRITICAL + 1)
    for source in _LOGGERS:
        source.handlers[:] = [console, kept]
        source.propagate = False
        source.setLevel(logging.INFO if verbose else logging.WARNING)


def _drop_closed_pipe():
    """Called when the console cannot be written to, which does not stop a run, see `log_to_file`.

    If the reader of a pipe has closed it, as `head` does, what is still buffered must not fail at the end of the run.
    """
    if isinstance(sys.exc_info()[1], BrokenPipeError):
        with contextlib.suppress(OSError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, sys.stdout.fileno())
            os.close(nothing)


def log_to_file(path):
    """Appends all log lines, also the earlier ones, to a file; a full disk loses lines but does not stop the run."""
    # a file name may be any bytes; FileHandler takes `errors` from Python 3.9 on
    file = logging.StreamHandler(open(path, 'a', encoding='utf-8', errors='backslashreplace'))
    file.handleError = lambda record: None
    file.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
    console, kept = logger.handlers
    kept.setTarget(file)
    kept.close()  # writes what it has kept to the file
    for source in _LOGGERS:
        source.handlers[:] = [console, file]


def log_once(message, _seen=set()):  # noqa: B006 - the default keeps the messages of this process
    """Logs a message only the first time this process passes it."""
    if message not in _seen:
        _seen.add(message)
        logger.info(message)


def append_json_line(path, record):
    """Appends a JSON object as a line and flushes it to disk; NaN and infinity become null.

    Raises:
        OSError: nothing was appended.
    """
    clean = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in record.items()}
    with open(path, 'ab', buffering=0) as file:
        append_whole(file, json.dumps(clean).encode() + b'\n', flush=True)


def truncate_lines(path, size):
    """Truncates a text file to `size` bytes, and then to the end of its last whole line."""
    with contextlib.suppress(FileNotFoundError), open(path, 'r+b') as file:
        kept = file.read(size)
        file.truncate(kept.rfind(b'\n') + 1)
