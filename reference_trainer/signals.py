"""Requests to stop a run or to save it: signals, and a time limit."""

import signal
import time
from types import FrameType
from typing import Any, Self

_STOP, _SAVE = signal.SIGTERM, signal.SIGUSR1


class Interruption:
    """Notes SIGTERM (save and stop), SIGUSR1 (save and continue) and the time limit in its block.

    It only remembers requests; the training loop asks for them at the end of each step.

    Args:
        stop_after: minutes after which to save and stop; None for no limit.
    """

    def __init__(self, stop_after: float | None) -> None:
        self._deadline = None if stop_after is None else time.monotonic() + 60 * stop_after
        self._heard: set[int] = set()
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> tuple[bool, bool]:
        """Return whether to stop and whether to save; this clears the request to save."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        save = _SAVE in self._heard
        self._heard.discard(_SAVE)
        return late or _STOP in self._heard, save

    def __enter__(self) -> Self:
        for number in (_STOP, _SAVE):
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard.add(number)
