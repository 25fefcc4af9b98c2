"""SIGTERM and SIGINT: the first asks a run to save and to end, a second one ends it at once."""
import contextlib
import os
import signal
import sys
import threading
import time

from errors import Interrupted

STOP_SECONDS = 28  # what clusters grant, 30, less the time to end


class StopSignals:
    """The signals of this process.

    They are blocked and waited for in a thread: a handler would interrupt system calls, which the libraries that
    connect the ranks do not all bear.

    Attributes:
        asked: number of the signal that came first, 0 before.
    """

    def __init__(self):
        self.asked = 0
        self._numbers, self._deferred, self._lock = [], False, threading.Lock()

    def listen(self, *numbers):
        """From here on these signals end the process with status 128 + number; call before other threads start.

        A signal that the parent process has this one ignore stays ignored.
        """
        if hasattr(signal, 'pthread_sigmask'):  # not on Windows
            self._numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
            signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
            threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self):
        number = signal.sigwait(self._numbers)
        with self._lock:
            self.asked = number
            if not self._deferred:
                os._exit(128 + number)
        if signal.sigtimedwait(self._numbers, STOP_SECONDS) is None:  # no second one
            print(f'the step took longer than {STOP_SECONDS} s; the last checkpoint stays', file=sys.stderr, flush=True)
        os._exit(128 + number)

    @contextlib.contextmanager
    def deferred(self):
        """Within this block a signal is only noted in `asked`; at its end it raises `Interrupted`."""
        with self._lock:
            self._deferred = True
        if self._numbers:  # again: multiprocessing unblocks them when it starts its tracker of resources
            signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        try:
            yield
        finally:
            with self._lock:
                self._deferred = False
        if self.asked:
            self.interrupt()

    def interrupt(self, where=''):
        """Raises `Interrupted`; without a signal here, another rank has got one."""
        raise Interrupted(self.asked or signal.SIGTERM, f'stopped by a signal{where}')


stop = StopSignals()


def end_with_parent():
    """Ends this process within a second after the one that started it, even if that was killed."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
