"""Injects disk faults into a process that has this folder on its PYTHONPATH.

    DISK_FAULT=KIND:N[,N...]    the N-th disk operations of the process fail, counted from 1

Operations are writes, fsync and renames of temporary files (`atomic_file.atomic_file`), and writes to metrics.jsonl.
KIND is `kill` (half a write, then SIGKILL), `ENOSPC`, `EIO`, `EROFS`, `short` (a write of half the bytes that returns
their number) or `lost` (a write of half the bytes of a checkpoint that reports all as written). DISK_FAULT_LOG names a
file to which every operation adds a line.
"""
import builtins
import errno
import io
import os
import signal

KIND, _, _points = os.environ.get('DISK_FAULT', '').partition(':')
POINTS = {int(point) for point in _points.split(',') if point}
_done = 0


def _next(name):
    """Counts an operation; returns the kind of fault to inject into it, or None."""
    global _done
    _done += 1
    if 'DISK_FAULT_LOG' in os.environ:
        with _open(os.environ['DISK_FAULT_LOG'], 'a') as log:
            log.write(f'{name}\n')
    fault = KIND if _done in POINTS else None
    if fault in ('ENOSPC', 'EIO', 'EROFS'):
        raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))
    return fault


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


class FaultyFile(io.FileIO):
    def write(self, data):
        fault = _next(f'write {self.name}')
        if fault is None or fault == 'lost' and '.pdparams.' not in self.name:
            return super().write(data)
        written = super().write(bytes(data)[:len(data) // 2])
        if fault == 'kill':
            _kill()
        return written if fault == 'short' else len(data)


def _faulty_open(file, mode='r', buffering=-1, *args, **kwargs):
    if isinstance(file, str) and (mode == 'xb' and file.endswith('.tmp') or mode == 'ab' and buffering == 0):
        raw = FaultyFile(file, mode)
        return raw if buffering == 0 else io.BufferedWriter(raw)
    return _open(file, mode, buffering, *args, **kwargs)


def _faulty(function):
    def call(*args):
        if _next(function.__name__) == 'kill':
            _kill()
        return function(*args)
    return call


_open = open
if KIND:
    builtins.open = _faulty_open
    os.fsync, os.replace = _faulty(os.fsync), _faulty(os.replace)
