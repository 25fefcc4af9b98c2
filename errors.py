"""Errors with a one-line message for the user, which the scripts print without a traceback."""
import argparse


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
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f'{self.prog}: {message} (see -h)\n')
