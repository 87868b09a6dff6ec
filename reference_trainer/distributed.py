"""The processes of a run: one or many, the same code."""

import contextlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from reference_trainer.config import ParallelConfig
from reference_trainer.errors import SharedError, Stopped, UserError, one_line
from relora_core import OutOfStepError

_GOES_ON = "`train --resume` continues from the newest checkpoint"


@dataclass(frozen=True)
class World:
    """This process among all of them.

    Args:
        rank: the process rank, from 0.
        size: the number of processes.
        device: the device that this process computes on.
        mesh: the mesh of all processes: (shards,), or (replicas, shards).
        patience: how long processes wait for each other.
        group: the process group for communication; None for the default group.
        calls: the counter of calls to `on_first`.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    patience: timedelta
    group: dist.ProcessGroup | None = None
    calls: Iterator[int] = field(default_factory=itertools.count)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process, so that DCP must not use collectives.

        On gloo, collectives would start OpenMP threads that slow down everything after them: on 2
        cores, steps took 0.22 s after a checkpoint with collectives and 0.18 s after one without.
        """
        return self.size == 1

    def apart(self) -> "World":
        """Return the same processes on their CPUs, with a group that another thread may use."""
        group = dist.new_group(backend="gloo", timeout=self.patience)
        return replace(self, device=torch.device("cpu"), group=group)

    def sum(self, value: Tensor) -> float:
        """Return the sum of a scalar over the processes."""
        value = value.detach().clone()
        dist.all_reduce(value, group=self.group)
        return value.item()

    def mean(self, value: Tensor) -> float:
        """Return the mean of a scalar over the processes."""
        return self.sum(value) / self.size

    def largest(self, value: int) -> int:
        """Return the largest of the processes' values."""
        own = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(own, dist.ReduceOp.MAX, group=self.group)
        return int(own)

    def any(self, *flags: Tensor | bool) -> list[bool]:
        """Return whether each flag is set on any process; waits for the device, once."""
        known = [not isinstance(flag, Tensor) and flag for flag in flags]
        host = torch.tensor(known, dtype=torch.float32, pin_memory=self.device.type == "cuda")
        together = host.to(self.device, non_blocking=True)
        for place, flag in zip(together, flags, strict=True):
            if isinstance(flag, Tensor):
                place.copy_(flag)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=self.group)
        return [bool(value) for value in together.tolist()]

    def share(self, value: Any) -> Any:
        """Return the first process's JSON value on every process."""
        text = json.dumps(value).encode() if self.first else b""
        length = torch.tensor([len(text)], device=self.device)
        dist.broadcast(length, src=0, group=self.group)
        padded = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.first:
            padded.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(padded, src=0, group=self.group)
        return json.loads(bytes(padded.tolist()))

    def on_first(self, action: Callable[[], Any], failing: str = "") -> Any:
        """Run `action` on the first process and return its JSON value on every one.

        The other processes wait as long as it takes, for example to tokenize a large corpus.

        Raises:
            SharedError: on every process, if `action` raises a UserError or an OSError; `failing`
                precedes its message.
        """
        value = failure = None
        if self.first:
            try:
                value = action()
            except (UserError, OSError) as error:
                failure = f"{failing}: {error}" if failing else str(error)
        if self.size > 1 and self.group is None:  # only one thread may use the store
            store = dist.distributed_c10d._get_default_store()
            key = f"on first/{next(self.calls)}"
            if self.first:
                store.set(key, "")
            store.wait([key], timedelta(days=7))
        value, failure = self.share([value, failure])
        if failure is not None:
            self.refuse(failure)
        return value

    def refuse(self, message: str) -> NoReturn:
        """Raise a SharedError on every process, after the first one has printed it."""
        self.tell(f"error: {one_line(message)}")
        raise SharedError(message)

    def tell(self, line: str) -> None:
        """Print a line on the first process, while all processes wait.

        Without the wait, a launcher could kill the first process before it has printed the line,
        because another process has exited.
        """
        if self.first:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        self.barrier()

    def barrier(self) -> None:
        """Wait for every process: none continues before all have arrived."""
        self.any(False)


def world_size() -> int:
    """Return how many processes the launcher started: 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_type(config: ParallelConfig) -> str:
    """Return the type of device that `parallel.device` means; it need not be present."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def choose_device(config: ParallelConfig) -> torch.device:
    """Return the device that `parallel.device` means for this process.

    Raises:
        UserError: if it asks for CUDA where there is none, or for more devices than there are.
    """
    if device_type(config) == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("parallel.device=cuda, but torch sees no CUDA device: use cpu or auto")
    index, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= there:
        raise UserError(
            f"the launcher starts a process for CUDA device {index}, but torch sees {there} "
            "devices: start one process per device (torchrun --nproc-per-node gpu), or use "
            "parallel.device=cpu"
        )
    return torch.device("cuda", index)


def lay_world(config: ParallelConfig, device: torch.device) -> World:
    """Return the processes of the default group, laid out as `parallel.replicas` says."""
    sizes = config.mesh(dist.get_world_size())
    names = ("replicas", "shards")[-len(sizes) :]
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    patience = timedelta(minutes=config.timeout)
    for name in names if dist.get_backend() != "fake" else ():  # a fake one has no groups
        # The mesh's own groups have torch's default timeout.
        dist.distributed_c10d._set_pg_timeout(patience, mesh.get_group(name))
    return World(dist.get_rank(), dist.get_world_size(), device, mesh, patience)


@contextmanager
def open_world(config: ParallelConfig) -> Iterator[World]:
    """Join the launcher's processes (torchrun), or be a world of one, until the block ends."""
    device = choose_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    patience = timedelta(minutes=config.timeout)
    # DCP warns of a world of one. The filter is set once: threads undo each other's filters.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=patience)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        world = lay_world(config, device)
        yield world
        world.barrier()  # a process that leaves while another still connects can abort it
    except OutOfStepError as error:
        raise UserError(f"{error}: {_GOES_ON}") from error
    except RuntimeError as error:
        # Errors of gloo have no class of their own.
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise UserError(_lost(patience, error)) from error
    finally:
        ending, several = sys.exception(), "WORLD_SIZE" in os.environ
        together = isinstance(ending, SharedError | Stopped | None)
        # Destroying an NCCL group waits for every process. If one process fails alone, the others
        # never arrive, so the group is left to the exit, which aborts it.
        if together or not several or device.type == "cpu":
            dist.destroy_process_group()


def _lost(patience: timedelta, error: RuntimeError) -> str:
    """Return the message about processes that do not answer; those that do answer name them."""
    store = dist.distributed_c10d._get_default_store()
    ranks, grace = range(dist.get_world_size()), min(patience / 10, timedelta(seconds=10))
    keys = {rank: f"left/{rank}" for rank in ranks}
    try:
        store.set(keys[dist.get_rank()], "")
        with contextlib.suppress(dist.DistStoreError):  # somebody is absent
            store.wait(list(keys.values()), grace)
        absent = [rank for rank, key in keys.items() if not store.check([key])]
    except dist.DistNetworkError:  # the store was in a process that is gone, too
        absent = []
    if not absent:
        return f"the processes have lost contact with each other: {error}"
    shown = ", ".join(map(str, absent[:16])) + (", ..." if len(absent) > 16 else "")
    minutes = f"{patience.total_seconds() / 60:g} minutes"
    return (
        f"{len(absent)} of {len(ranks)} processes (process rank {shown}) ended, as their own logs "
        f"explain, or did not answer for {minutes} (parallel.timeout): {_GOES_ON}"
    )
