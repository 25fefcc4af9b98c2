"""Chooses an implementation by measuring the candidates, as cuDNN's benchmark mode does."""
import logging
import time

import paddle

ROUNDS = 3
HOPELESS = 3.0  # a candidate whose first run takes this many times the best time is not run again

_logger = logging.getLogger('large_kernel')
_choices = {}


def choose(candidates, x, weight, stride, training):
    """Name of the fastest of `candidates`, {name: function(x, weight, bias, stride)}, for tensors like these.

    Measured once per device, dtype, shape and need for gradients, on separate tensors: random state and gradients
    stay untouched. On the CPU, where time is proportional to the batch size, one image is measured.
    """
    device = str(x.place)
    shape = ([1] if x.place.is_cpu_place() else [x.shape[0]]) + list(x.shape[1:])
    key = (device, str(x.dtype), tuple(shape), weight.shape[-1], stride, training)
    if key not in _choices:
        times = _measure(candidates, shape, x.dtype, weight, stride, training)
        _choices[key] = (min(times, key=times.get), times)
        _logger.info('large_kernel: %s', _describe(key))
    return _choices[key][0]


def describe():
    """The choices made so far, one line each."""
    return '\n'.join(_describe(key) for key in _choices)


def _describe(key):
    device, dtype, shape, kernel, stride, training = key
    name, times = _choices[key]
    measured = ', '.join(f'{n} {t * 1e3:.2f} ms' for n, t in sorted(times.items(), key=lambda item: item[1]))
    return (f'{name} for {list(shape)} {dtype} k{kernel} s{stride} {"training" if training else "inference"} on '
            f'{device} ({measured})')


def _measure(candidates, shape, dtype, weight, stride, training):
    x = paddle.full(shape, 0.5, dtype)
    w = paddle.full(weight.shape, 0.5, weight.dtype)
    x.stop_gradient = w.stop_gradient = not training
    best = {}
    for name, function in candidates.items():
        try:
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
        paddle.device.synchronize()
    return time.perf_counter() - start
