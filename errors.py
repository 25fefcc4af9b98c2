"""The errors whose text is meant for the user: scripts print it, one line, without a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave; the text says what, where and what to do. Scripts exit with status 2."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the text says at which step and why. Scripts exit with status 1."""
