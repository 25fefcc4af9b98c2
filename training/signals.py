"""SIGTERM and SIGINT: the first one makes a run save and end, a second one ends it at once.

A run also ends with the process that started it.
"""
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

from errors import Interrupted

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
STOP_SECONDS = 28  # clusters commonly allow 30 s after SIGTERM; the rest is for ending the processes


class StopSignals:
    """The stop signals of this process.

    They are blocked and received in a thread. A signal handler would interrupt system calls, and not all of the
    libraries that connect the ranks cope with that. Until the first `deferred`, the thread does not wait for them but
    leaves them to the kernel, which ends the process even while a call holds Python's lock, as Paddle's does in which
    the ranks find each other.

    Attributes:
        received: number of the first signal; 0 before.
    """

    def __init__(self):
        self.received = 0
        self._numbers, self._deferred, self._lock = [], False, threading.Lock()
        self._waiting = threading.Event()

    def listen(self, *numbers):
        """Makes these signals end the process. To be called before other threads start.

        The status is that of a process killed by the signal, 128 + number in a shell, and after the first `deferred` it
        is 128 + number. A signal that the process has inherited as ignored stays ignored.
        """
        if hasattr(signal, 'pthread_sigmask'):  # not on Windows
            self._numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
            signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
            for number in self._numbers:
                signal.signal(number, signal.SIG_DFL)
            threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)  # in this thread: the kernel acts, without Python
        self._waiting.wait()
        signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
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
        self._waiting.set()
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


def end_with_parent(parent):
    """Makes this process end with its parent process, even if the parent is killed.

    Args:
        parent: process id of the parent, which may have ended already.
    """
    if sys.platform == 'linux':  # the kernel kills this process, whatever it is doing
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        return

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
