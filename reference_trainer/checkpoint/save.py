"""Checkpoints written while training continues."""

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from reference_trainer.checkpoint.find import complete_checkpoints
from reference_trainer.checkpoint.format import FORMAT, MANIFEST, STATE, Position, folder_of, named
from reference_trainer.checkpoint.streamed import StreamedWriter
from reference_trainer.checksums import checksum, write_sealed
from reference_trainer.distributed import World
from reference_trainer.errors import SharedError
from reference_trainer.files import write_whole
from reference_trainer.logging.console import log
from relora_core.distributed.local import local


class Saver:
    """Writes a run's checkpoints, one at a time, in a thread of its own.

    `save` copies the state into host memory and returns. Writing, checksums, the manifest and the
    removal of old checkpoints follow while training continues, over a process group of their own.
    If training waits for the checkpoint anyway, nothing is copied and no more memory is needed.
    Every process must make the same calls.

    Args:
        directory: the directory of all the run's checkpoints; it exists.
        world: the processes.
        fixed: the values that may not change in the run; each checkpoint holds a copy of them.
        keep: how many of the newest checkpoints to keep.
        keep_every: checkpoints at multiples of this step are kept, too.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        *,
        fixed: dict[str, Any],
        keep: int,
        keep_every: int | None = None,
    ) -> None:
        self.fixed = fixed
        self._directory = directory
        self._world = world.apart()
        self._keep = keep
        self._keep_every = keep_every
        self._thread = ThreadPoolExecutor(1, "saver", _give_way)
        self._pending: Future[Path] | None = None
        self._copies: dict[str, Any] = {}

    def save(
        self,
        position: Position,
        tensors: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Tensor]],
        *,
        copied: bool,
    ) -> None:
        """Begin to write a checkpoint.

        This first waits until the previous checkpoint is complete. Each step has its own name, so
        no complete checkpoint is overwritten.

        Args:
            position: the position of the run.
            tensors: the model's state by name, sharded or not.
            states: the optimizer's state, by parameter and key.
            copied: whether the state is copied first; otherwise nothing may change it before `wait`
                has returned.

        Raises:
            SharedError: if the previous checkpoint could not be written.
        """
        if self._pending is not None:
            self.wait()
        text = json.dumps(asdict(position))  # now, because the schedule will change
        state = named(tensors, states)
        self._copies = self._copied(state) if copied else {}
        target = folder_of(self._directory, position.step)
        written = self._copies if copied else state
        self._pending = self._thread.submit(self._write, target, text, written)

    @property
    def failed(self) -> bool:
        """Whether this process already knows that its checkpoint could not be written."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> Path:
        """Wait until the last checkpoint that was begun is complete, and return its path.

        Raises:
            SharedError: if it could not be written; the first process has printed why.
        """
        assert self._pending is not None
        return self._pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()  # what has begun is still completed

    @torch.no_grad()
    def _copied(self, state: dict[str, Any]) -> dict[str, Any]:
        copies = self._copies
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in copies.items()}:
            self._copies.clear()  # frees the old copies before new ones are made
            copies = {name: _on_host(tensor) for name, tensor in state.items()}
        for name, tensor in state.items():
            local(copies[name]).copy_(local(tensor), non_blocking=True)
        if any(tensor.is_cuda for tensor in state.values()):
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(self, target: Path, position: str, state: dict[str, Any]) -> Path:
        world = self._world
        before = complete_checkpoints(self._directory)[-1:]
        goes_on = f"continues from {before[0].name}" if before else "starts again"
        failing = f"could not write {target} (once that is fixed, --resume {goes_on})"
        try:
            world.on_first(lambda: _make(target), failing)
            writer = StreamedWriter(target)
            try:
                dcp_save(
                    state,
                    storage_writer=writer,
                    no_dist=world.alone,
                    process_group=world.group,
                )
            except CheckpointException as error:
                rank, (cause, _) = min(error.failures.items())
                world.refuse(f"{failing}: on process rank {rank}: {cause}")
            checksums = writer.checksums
            world.on_first(lambda: self._complete(target, position, checksums), failing)
        except SharedError:
            with contextlib.suppress(OSError):  # it is ignored, but takes space
                if world.first:
                    _remove(target)
            raise
        return target

    def _complete(self, target: Path, position: str, checksums: dict[str, str]) -> None:
        write_whole(target / STATE, position)
        checksums = {**checksums, STATE: checksum(target / STATE)}
        write_sealed(target / MANIFEST, {"format": FORMAT, "checksums": checksums})
        # Later checkpoints do not count: they are damaged, and the run was resumed before them.
        found = [c for c in complete_checkpoints(self._directory) if c.name <= target.name]
        every = self._keep_every
        kept = [*found[-self._keep :], *(c for c in found if every and _step(c) % every == 0)]
        for old in self._directory.glob("step-*"):
            if old.name < target.name and old not in kept:  # incomplete ones too
                try:
                    _remove(old)
                except OSError as error:  # in use, for example; the next save tries again
                    log.warning(f"{old} could not be removed yet: {error}")
        log.debug(f"written: {target}")


def _give_way() -> None:
    """Let this thread run only when training leaves a core free, where threads have priorities."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _on_host(tensor: Tensor) -> Tensor:
    """Return host memory for this process's part; pinned if the part is on a GPU."""
    own = local(tensor)
    copy = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.is_cuda)
    if not isinstance(tensor, DTensor):
        return copy
    # Not from_local, which would move the copy to the mesh's device. Torch has no types for it.
    return DTensor(copy, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _make(target: Path) -> None:
    if target.exists():  # left incomplete by a crash; a complete one would have been resumed
        _remove(target)
    target.mkdir()


def _remove(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink(missing_ok=True)  # from here on, the checkpoint is ignored
    shutil.rmtree(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
