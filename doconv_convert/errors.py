"""The errors a user can cause. Each message names the thing, got, expected and the fix."""


class DoconvError(Exception):
    """Something the user gave cannot be used: a file, a model, a value. The command line exits with 1."""


class CheckFailedError(DoconvError):
    """A check of ours found what it looks for. The command line exits with 3."""


class UsageError(DoconvError, ValueError):
    """The call itself is wrong: an option's or an argument's value. The command line exits with 2."""
