"""The errors whose text is meant for the user: scripts print it, one line, without a traceback."""
import argparse


class UserError(ValueError):
    """A mistake in what the user gave; the text says what, where and what to do. Scripts exit with status 2."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the text says at which step and why. Scripts exit with status 1."""


class Interrupted(BaseException):
    """A signal has ended the run; the text says what was saved. Scripts exit with 128 + `signal`."""

    def __init__(self, signal, message):
        super().__init__(message)
        self.signal = int(signal)


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake on the command line as one line, with status 2; flags are not abbreviated."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f'{self.prog}: {message} (see -h)\n')
