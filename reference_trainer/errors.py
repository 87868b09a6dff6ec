"""Errors that the user can fix: one line, without a traceback."""


class UserError(ValueError):
    """An error in the input: one line that names the rule, the value and the fix.

    The command line prints it without a traceback and exits with 2.
    """


class SharedError(UserError):
    """A UserError that every process raises, after the first has printed it (`World.refuse`)."""


class DamagedError(UserError):
    """A file is not as it was written; the message names the file."""


class Stopped(Exception):  # noqa: N818 - not an error, and so not called one
    """A run was asked to stop before its end, and has saved a checkpoint."""


def one_line(error: object) -> str:
    """Return an error's text on one line; the middle of a very long text is left out.

    Examples:
        >>> one_line("a   b")
        'a b'
    """
    text = " ".join(str(error).split())
    return text if len(text) <= 800 else f"{text[:600]} ... {text[-190:]}"
