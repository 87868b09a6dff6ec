"""The tiny run of `tests/trainer`."""

from tests.trainer.conftest import tiny

__all__ = ["tiny"]
