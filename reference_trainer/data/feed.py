"""This process's part of each step's batch, read while the previous step runs."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from torch import Tensor

from reference_trainer.data.batches import Batches
from reference_trainer.distributed import World


class Feed:
    """Reads one step ahead, in a thread of its own.

    Args:
        batches: the batches, by step.
        world: the processes; each reads only its own sequences.
        micro_steps: the number of micro-steps in a step.
    """

    def __init__(self, batches: Batches, world: World, micro_steps: int) -> None:
        self._batches = batches
        self._world = world
        self._micro_steps = micro_steps
        self._thread = ThreadPoolExecutor(1, "feed")
        self._next: tuple[int, Future[Tensor]] | None = None

    def at(self, step: int) -> Tensor:
        """Return this process's part of a step: (micro_steps, sequences, length + 1), ids.

        For a GPU it is in pinned memory, so that the host does not wait for the copy.
        """
        ahead, self._next = self._next, None
        part = ahead[1].result() if ahead and ahead[0] == step else self._read(step)
        self._next = (step + 1, self._thread.submit(self._read, step + 1))
        return part

    def _read(self, step: int) -> Tensor:
        world, micro_steps = self._world, self._micro_steps
        part = self._batches.part(
            step, rank=world.rank, processes=world.size, micro_steps=micro_steps
        )
        return part.pin_memory() if world.device.type == "cuda" else part

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)
