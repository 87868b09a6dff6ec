"""This process's part of each step's batch, read while the step before runs."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from torch import Tensor

from reference_trainer.data.batches import Batches
from reference_trainer.distributed import World


class Feed:
    """Reads one step ahead, in a thread of its own.

    Args:
        batches: by step.
        world: the processes; each reads its own sequences only.
        micro_steps: of a step.
    """

    def __init__(self, batches: Batches, world: World, micro_steps: int) -> None:
        self._batches = batches
        self._world = world
        self._micro_steps = micro_steps
        self._thread = ThreadPoolExecutor(1, "feed")
        self._next: tuple[int, Future[Tensor]] | None = None

    def at(self, step: int) -> Tensor:
        """Return this process's part of a step: (micro_steps, sequences, length + 1), ids.

        For a GPU it lies in pinned memory: copied from there, the host need not wait.
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
