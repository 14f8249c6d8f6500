"""The one exception for bad input."""


class ReproError(Exception):
    """Something the user gave cannot be used; the message is one sentence: what, where, what to do.

    The command line prints it without a traceback and exits with 2.
    """
