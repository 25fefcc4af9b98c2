"""SIGTERM and SIGINT: the first one makes a run save and end, a second one ends it at once."""
import contextlib
import os
import signal
import sys
import threading
import time

from errors import Interrupted

STOP_SECONDS = 28  # clusters commonly allow 30 s after SIGTERM; the rest is for ending the processes


class StopSignals:
    """The stop signals of this process.

    They are blocked and received in a thread. A signal handler would interrupt system calls, and not all of the
    libraries that connect the ranks cope with that.

    Attributes:
        received: number of the first signal; 0 before.
    """

    def __init__(self):
        self.received = 0
        self._numbers, self._deferred, self._lock = [], False, threading.Lock()

    def listen(self, *numbers):
        """Makes these signals end the process with status 128 + number. To be called before other threads start.

        A signal that the process has inherited as ignored stays ignored.
        """
        if hasattr(signal, 'pthread_sigmask'):  # not on Windows
            self._numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
            signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
            threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self):
        number = signal.sigwait(self._numbers)
        with self._lock:
            self.received = number
            if not self._deferred:
                os._exit(128 + number)
        if signal.sigtimedwait(self._numbers, STOP_SECONDS) is None:  # no second signal
            print(f'the step took longer than {STOP_SECONDS} s; the last checkpoint is kept', file=sys.stderr,
                  flush=True)
        os._exit(128 + number)

    @contextlib.contextmanager
    def deferred(self):
        """Within this block a first signal only sets `received`; the end of the block then raises `Interrupted`."""
        with self._lock:
            self._deferred = True
        if self._numbers:  # once more: multiprocessing unblocks them when it starts its resource tracker
            signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        try:
            yield
        finally:
            with self._lock:
                self._deferred = False
        if self.received:
            self.interrupt()

    def interrupt(self, where=''):
        """Raises `Interrupted`, as SIGTERM when the signal went to another rank."""
        raise Interrupted(self.received or signal.SIGTERM, f'stopped by a signal{where}')


stop = StopSignals()


def end_with_parent():
    """Makes this process end within a second after its parent process, even if the parent is killed."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
