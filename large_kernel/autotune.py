"""Chooses an implementation by measuring the candidates, as cuDNN's benchmark mode does."""
import contextlib
import functools
import json
import logging
import time

import paddle

ROUNDS = 3
HOPELESS = 3.0  # a candidate whose first run takes this many times the best time is not run again

_logger = logging.getLogger('large_kernel')
_choices = {}  # {key: {name: seconds}}, see `choose`
_restored = {}  # the same from another process, to be taken in place of a measurement
share = None  # in a run of several processes: callable(key as text, measure) -> `measure()` of the first that has asked
for_training = False  # within `measuring_for_training`


@contextlib.contextmanager
def measuring_for_training():
    """Within this block, what is chosen is for training, also without gradients.

    Measurements need gradients, which the hooks of recomputation would take for those of the recomputed block. So it
    is run in this block first.
    """
    global for_training
    before, for_training = for_training, True
    try:
        yield
    finally:
        for_training = before


def choose(candidates, x, weight, stride, training):
    """Name of the fastest of `candidates`, {name: function(x, weight, bias, stride)}, for tensors like these.

    Measured once per kind of device, dtype, shape and need for gradients, on separate tensors: random state and
    gradients stay untouched. On the CPU, where time is proportional to the batch size, one image is measured.
    """
    on_cpu = x.place.is_cpu_place()
    device = str(x.place)[len('Place('):-1].split(':')[0]  # without its number, which differs from process to process
    shape = ([1] if on_cpu else [x.shape[0]]) + list(x.shape[1:])
    key = (device, str(x.dtype), tuple(shape), weight.shape[-1], stride, training)
    if key not in _choices:
        measure = functools.partial(_measure, candidates, shape, x.dtype, weight, stride, training, warm_up=not on_cpu)
        if key in _restored:
            measure = functools.partial(_restored.get, key)
        _choices[key] = measure() if share is None else share(json.dumps(key), measure)
        if key not in _restored:
            _logger.info('large_kernel: %s', _describe(key))
    return _fastest(key)


def choices():
    """The choices made so far, {key as text, with the name of the card: {name: seconds}}, for `restore`."""
    return {json.dumps((f'{device} {_card(device)}'.strip(), *rest)): times
            for (device, *rest), times in {**_restored, **_choices}.items()}


def restore(saved):
    """Takes over the result of `choices` from another process, so that the same choices need not be made again.

    Those of another model of card, or of an earlier version that did not name it, are left out.
    """
    for text, times in saved.items():
        device, dtype, shape, *rest = json.loads(text)
        kind, _, card = device.partition(' ')
        if card == _card(kind):
            _restored[(kind, dtype, tuple(shape), *rest)] = dict(times)


def _card(kind):
    """Name of the model of the current device; '' for other kinds than 'gpu'."""
    return paddle.device.cuda.get_device_name() if kind == 'gpu' else ''


def _fastest(key):
    return min(_choices[key], key=_choices[key].get)


def describe():
    """The choices made so far, one line each."""
    return '\n'.join(_describe(key) for key in _choices)


def _describe(key):
    device, dtype, shape, kernel, stride, training = key
    measured = ', '.join(f'{n} {t * 1e3:.2f} ms' for n, t in sorted(_choices[key].items(), key=lambda item: item[1]))
    return (f'{_fastest(key)} for {list(shape)} {dtype} k{kernel} s{stride} '
            f'{"training" if training else "inference"} on {device} ({measured})')


def _measure(candidates, shape, dtype, weight, stride, training, warm_up=False):
    """{name: seconds of its best run}, without candidates that fail.

    With `warm_up` a run of each comes before, in which a GPU loads its kernels; without it, the first run may already
    show that a candidate is hopeless.
    """
    x = paddle.full(shape, 0.5, dtype)
    w = paddle.full(weight.shape, 0.5, weight.dtype)
    x.stop_gradient = w.stop_gradient = not training
    best = {}
    for name, function in candidates.items():
        try:
            if warm_up:
                _time(function, x, w, stride, training)
            for _ in range(1 + ROUNDS):
                seconds = _time(function, x, w, stride, training)
                if name in best:
                    best[name].append(seconds)
                else:  # the first run is the warm-up
                    best[name] = []
                    first = seconds
                if len(best) > 1 and first > HOPELESS * min(min(t) for t in best.values() if t):
                    break
            best[name] = best[name] or [first]
        except (RuntimeError, MemoryError, OSError) as error:  # out of memory, or no such kernel on this device
            best.pop(name, None)
            _logger.info('large_kernel: %s cannot be used: %s', name, str(error).strip().splitlines()[-1:])
    if not best:
        raise RuntimeError(f'no implementation of the depthwise convolution works for input {shape} of {dtype}')
    return {name: min(times) for name, times in best.items()}


def _time(function, x, w, stride, training):
    start = time.perf_counter()
    with paddle.amp.auto_cast(enable=False):
        if training:
            with paddle.enable_grad():
                y = function(x, w, None, stride)
                paddle.grad([y], [x, w])
        else:
            with paddle.no_grad():
                function(x, w, None, stride)
    if not x.place.is_cpu_place():
        paddle.device.synchronize()  # that of `cuda` raises on other devices
    return time.perf_counter() - start
