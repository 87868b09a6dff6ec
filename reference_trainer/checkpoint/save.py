"""Checkpoints written while the training goes on."""

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


class Saver:
    """Writes a run's checkpoints, one at a time, in a thread of its own.

    `save` copies what is to be written into the host's memory, and returns. Writing, checksums, the
    manifest and the removal of what need not stay follow while the training goes on, over a process
    group of their own. Where the training waits for it, nothing is copied, and a process needs no
    more memory than it has. Every process calls everything alike.

    Args:
        directory: of all the run's checkpoints; it exists.
        world: the processes.
        fixed: what may not change in the run, of which each checkpoint holds a copy.
        keep: how many of the newest stay.
        keep_every: those of its multiples stay too.
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

        Waits first until the one before is complete. The name is new for each step, so nothing
        complete is written over.

        Args:
            position: where the run stands.
            tensors: the model's state by name, sharded or not.
            states: the optimizer's, by parameter and key.
            copied: whether what is written is copied first; otherwise nothing may change it before
                `wait` has returned.

        Raises:
            SharedError: if the one before could not be written.
        """
        if self._pending is not None:
            self.wait()
        text = json.dumps(asdict(position))  # now: a schedule goes on
        state = named(tensors, states)
        self._copies = self._copied(state) if copied else {}
        target = folder_of(self._directory, position.step)
        written = self._copies if copied else state
        self._pending = self._thread.submit(self._write, target, text, written)

    @property
    def failed(self) -> bool:
        """Whether it is known by now that this process's checkpoint could not be written."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> Path:
        """Wait until the checkpoint begun last is complete, and return where it lies.

        Raises:
            SharedError: if it could not be written, which the first process has told.
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
            self._copies.clear()  # before there are others
            copies = {name: _on_host(tensor) for name, tensor in state.items()}
        for name, tensor in state.items():
            _local(copies[name]).copy_(_local(tensor), non_blocking=True)
        if any(tensor.is_cuda for tensor in state.values()):
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(self, target: Path, position: str, state: dict[str, Any]) -> Path:
        world = self._world
        before = complete_checkpoints(self._directory)[-1:]
        goes_on = f"goes on from {before[0].name}" if before else "begins again"
        failing = f"could not write {target} (once that is mended, --resume {goes_on})"
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
                world.refuse(f"{failing}: on rank {rank}: {cause}")
            checksums = writer.checksums
            world.on_first(lambda: self._complete(target, position, checksums), failing)
        except SharedError:
            with contextlib.suppress(OSError):  # it does not count, but takes space
                if world.first:
                    _remove(target)
            raise
        return target

    def _complete(self, target: Path, position: str, checksums: dict[str, str]) -> None:
        write_whole(target / STATE, position)
        checksums = {**checksums, STATE: checksum(target / STATE)}
        write_sealed(target / MANIFEST, {"format": FORMAT, "checksums": checksums})
        # The run was resumed from before later ones, as they are damaged: they do not count.
        found = [c for c in complete_checkpoints(self._directory) if c.name <= target.name]
        every = self._keep_every
        kept = [*found[-self._keep :], *(c for c in found if every and _step(c) % every == 0)]
        for old in self._directory.glob("step-*"):
            if old.name < target.name and old not in kept:  # incomplete ones too
                try:
                    _remove(old)
                except OSError as error:  # somebody reads it, say; the next one tries again
                    log.warning(f"{old} could not be removed yet: {error}")
        log.debug(f"written: {target}")


def _give_way() -> None:
    """Let this thread compute when the training leaves a core free, where threads may differ."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _on_host(tensor: Tensor) -> Tensor:
    """Return memory of the host for this process's part; of a GPU's pinned, to which it copies."""
    own = _local(tensor)
    copy = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.is_cuda)
    if not isinstance(tensor, DTensor):
        return copy
    # Not from_local: it would move the copy to where the mesh computes. Torch has no types for it.
    return DTensor(copy, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _make(target: Path) -> None:
    if target.exists():  # left incomplete by a crash: else it would have been resumed from
        _remove(target)
    target.mkdir()


def _remove(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink(missing_ok=True)  # from here on it does not count
    shutil.rmtree(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
