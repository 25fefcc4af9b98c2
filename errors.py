"""Errors with a one-line message for the user, which the scripts print without a traceback."""
import argparse
import contextlib
import errno
import gc
import os
import re
import signal
import sys
import threading
import time
import traceback


class UserError(ValueError):
    """A mistake in the user's input; the message says what, where and what to do. Scripts exit with status 2."""


class TrainingStopped(RuntimeError):
    """Training cannot continue; the message says at which step and why. Scripts exit with status 1."""


class Interrupted(BaseException):
    """A signal ended the run; the message says what was saved. Scripts exit with status 128 + `signal`."""

    def __init__(self, signal, message):
        super().__init__(message)
        self.signal = int(signal)


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake on the command line in one line and exits with status 2; flags cannot be abbreviated."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)  # keeps the examples' lines

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_home(text) for text in args], namespace)

    def error(self, message):
        self.exit(2, f'{self.prog}: {message} (see -h)\n')


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # what a disk may answer to a correct command


def _with_home(argument):
    """Replaces ~ at the start of an argument or of a flag's value, as a shell does only for some of them."""
    flag, path = re.fullmatch(r'(--?\w+=)?(.*)', argument, re.DOTALL).groups()
    return (flag or '') + os.path.expanduser(path)


class CheckpointError(UserError):
    """A file is not a checkpoint, is corrupt, or contains more than data; the message names it in one line."""


def one_line(error):
    """The text of an error in one line, or its type if it has none."""
    return ' '.join(str(error).split()) or type(error).__name__


def why_unreadable(path):
    """Why a file or folder cannot be read, such as 'Permission denied'; '' if it can be."""
    try:
        if os.path.isfile(path):
            open(path, 'rb').close()
        else:
            os.stat(path)
            if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
                return os.strerror(errno.EACCES)
    except OSError as error:
        return error.strerror
    return ''


# This environment variable names a file that the first process to report an error creates: if all processes of a run
# fail alike, the error is printed once.
REPORTED = 'REPLKNET_ERROR_REPORTED'


def exit_status(function, *args):
    """Calls `function` and turns its errors into messages on standard error and an exit status.

    Meanwhile SIGINT, SIGTERM and SIGHUP raise `Interrupted` in the main thread, see `_signals_interrupt`, and standard
    output and standard error escape the characters that they cannot encode. When several processes of a run fail, only
    the first one reports; the others usually fail as a consequence.

    Returns:
        the return value of `function`, or 0 for None; 1 if training had to stop, a disk is full or a traceback was
        printed; 2 for a user's mistake, reported in one line; 128 + the number of the signal that ended the run; 141,
        without a message, if standard output is a pipe that its reader has closed (the status of other tools then).
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    # What has been imported stays until the process ends. Otherwise the interpreter spends most of a second at its end
    # on freeing the reference cycles of Paddle's modules, and every full garbage collection of a run visits them again.
    gc.freeze()
    try:
        with _signals_interrupt():
            try:
                return function(*args) or 0
            finally:
                _write(sys.stdout)  # here a failure still has an effect on the status
    except TrainingStopped as error:
        status, message = 1, str(error)
    except Interrupted as error:
        status, message = 128 + error.signal, str(error)
    except UserError as error:
        status, message = 2, str(error)
    except OSError as error:
        status, message = _describe(error)
    except Exception:
        status, message = 1, traceback.format_exc().rstrip()
    if message and first_to_report():
        with contextlib.suppress(OSError):
            _write(sys.stderr, message + '\n')
    return status


def default_interrupt():
    """Makes Ctrl-C end this process without a traceback: for the long imports of a script, before `exit_status`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def _signals_interrupt(patience=3):
    """Within this block SIGINT, SIGTERM and SIGHUP raise `Interrupted` in the main thread.

    Further signals in the first `patience` seconds are ignored (`timeout` sends two at once); after that, they end the
    process at once. A signal that the process ignores stays ignored. Nothing changes where training.signals has blocked
    them.
    """
    received, earlier = [], {}

    def interrupt(number, _):
        if not received:
            received.append(time.monotonic())
            raise Interrupted(number, 'stopped by a signal')
        if time.monotonic() - received[0] > patience:
            os._exit(128 + number)

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) if hasattr(signal, 'pthread_sigmask') else ()
    if threading.current_thread() is threading.main_thread() and signal.SIGTERM not in blocked:
        for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                earlier[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _write(stream, text=''):
    """Writes to a standard stream and flushes it. If that fails, the stream discards everything from then on.

    Otherwise Python would try again when it ends, and print a traceback.

    Raises:
        OSError: the disk is full, or the reader of a pipe has closed it; `filename` is the name of the stream.
    """
    if stream is None:  # closed when the process started
        return
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
        error.filename = 'standard output' if stream is sys.stdout else 'standard error'
        raise


def _describe(error):
    """Exit status and message of an OSError; '' for no message."""
    if error.filename is None and (error.errno in DISK_FULL or isinstance(error, BrokenPipeError)):
        try:  # a failed `print` may leave nothing in the buffer to try again
            _write(sys.stdout, '\n')
            _write(sys.stderr, '\n')
        except OSError as failure:
            error = failure
    status = 1 if error.errno in DISK_FULL else 2
    if error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return (141, '') if isinstance(error, BrokenPipeError) else (status, f'{name}: {error.strerror}')
    if status == 1 or isinstance(error, FileNotFoundError):
        return status, str(error)
    return 1, traceback.format_exc().rstrip()


def first_to_report():
    """Whether this is the first process of the run to report an error: always, where that cannot be noted."""
    marker = os.environ.get(REPORTED)
    if not marker:
        return True
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:  # the folder cannot be written, or is gone because the first process of the run has ended
        pass
    return True
