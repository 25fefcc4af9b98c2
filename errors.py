"""Errors with a one-line message for the user, which the scripts print without a traceback."""
import argparse
import errno
import os
import sys
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

    def error(self, message):
        self.exit(2, f'{self.prog}: {message} (see -h)\n')


class CheckpointError(UserError):
    """A file is not a checkpoint, is corrupt, or contains more than data; the message names it in one line."""


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

    When several processes of a run fail, only the first one reports; the others usually fail as a consequence.

    Returns:
        the return value of `function`, or 0 for None; 1 if training had to stop or a traceback was printed; 2 for a
        user's mistake, reported in one line; 128 + the number of the signal that ended the run.
    """
    try:
        return function(*args) or 0
    except (UserError, FileNotFoundError) as error:
        status, message = 2, str(error)
    except TrainingStopped as error:
        status, message = 1, str(error)
    except Interrupted as error:
        status, message = 128 + error.signal, str(error)
    except OSError as error:  # a path that the user has chosen, if it has a name
        status, message = (2, f'{error.filename}: {error.strerror}') if error.filename else (1, _traceback())
    except Exception:
        status, message = 1, _traceback()
    if first_to_report():
        print(message, file=sys.stderr, flush=True)
    return status


def _traceback():
    return traceback.format_exc().rstrip()


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
