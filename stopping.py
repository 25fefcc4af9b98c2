"""SIGTERM and SIGINT: the first asks a run to save and to end, a second one ends it at once.

From `listen` to `begin`, while modules are imported, a signal ends the process; later it raises `Interrupted`, at
once or at the end of a block of `deferred`.
"""
import contextlib
import os
import signal
import threading
import time

from errors import Interrupted

STOP_SECONDS = 28  # what clusters grant, 30, less the time to end


class StopSignals:
    """The signals of this process.

    Attributes:
        asked: number of the signal that came first, 0 before.
    """

    def __init__(self):
        self.asked = 0
        self._begun, self._deferred = False, False

    def listen(self):
        """Takes over both signals, but for one that the parent process has this one ignore."""
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def begin(self):
        """From here on the first signal is an exception, no longer the end; after the imports, Paddle takes SIGTERM."""
        self.listen()
        self._begun = True

    def _handle(self, number, _):
        if self.asked or not self._begun:
            os._exit(128 + number)
        self.asked = number
        timer = threading.Timer(STOP_SECONDS, os._exit, (128 + number,))  # the last checkpoint is whole
        timer.daemon = True
        timer.start()
        if not self._deferred:
            self.check()

    @contextlib.contextmanager
    def deferred(self):
        """A signal within this block raises `Interrupted` at its end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()

    def check(self):
        """Raises `Interrupted` where a signal has come."""
        if self.asked:
            self.interrupt()

    def interrupt(self, where=''):
        """Raises `Interrupted`; without a signal here, another rank has got one."""
        raise Interrupted(self.asked or signal.SIGTERM, f'stopped by a signal{where}')


stop = StopSignals()


def end_with_parent(before=None):
    """Ends this process within a second after the one that started it, even if that was killed.

    Args:
        before: called first, with no arguments.
    """
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        if before is not None:
            before()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
