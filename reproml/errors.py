"""The exceptions that reproml raises on purpose."""


class ReproError(Exception):
    """Something the user gave cannot be used; the message is one sentence: what, where, what to do.

    The command line prints it without a traceback and exits with 2.
    """


class NotExactError(RuntimeError):
    """An operator has no exact definition here; the message names it, its operands and the caller."""
