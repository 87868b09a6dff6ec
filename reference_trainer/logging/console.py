"""Output on the terminal: log lines by level, and progress bars."""

import logging
import sys

from tqdm import tqdm

log = logging.getLogger("reference_trainer")


class _Lines(logging.Handler):
    """Writes lines above a progress bar: warnings to stderr, everything else to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        stream = sys.stderr if warning else sys.stdout
        tqdm.write(f"{'warning: ' if warning else ''}{record.getMessage()}", file=stream)
        stream.flush()  # a job's log is read while it runs


def open_terminal(level: int) -> None:
    """Write log records of `level`, one of `logging`'s levels, and above."""
    log.handlers = [_Lines()]
    log.setLevel(level)


def hidden() -> bool | None:
    """Return tqdm's `disable`: None for a bar only on a terminal, or True if output is quiet."""
    return None if log.isEnabledFor(logging.INFO) else True
