"""Runs of the trainer as real processes, each of which may be killed at a chosen moment."""

import ctypes
import gc
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from reference_trainer import train as training
from reference_trainer.main import main
from tests.distributed.processes import FORKED
from tests.trainer.runs import leave_undrawn


def die() -> None:
    """Leave as nothing can prevent."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Fault:
    """What befalls a process.

    Args:
        moment: "file": at an event of the file system in the run's directory, such as an open or a
            rename; "restart", "hand-off" or "checkpoint": at a call of the function that does it;
            "step": at a step.
        count: the how-manieth of these.
        delay: seconds from there on.
        everywhere: whether the other processes are killed as soon as it has died.
        what: done then, by default a SIGKILL of the process itself.
    """

    moment: str
    count: int
    delay: float = 0.0
    everywhere: bool = False
    what: Callable[[], None] = die


NO_FAULT = Fault("step", 10**9)
CALLS = {
    "restart": (training, "restart_"),
    "hand-off": (training, "fill_"),
    "checkpoint": (training, "save"),
    "step": (training, "forward_backward"),
}
_FILES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def drawn(generator: random.Random) -> Fault:
    """Draw a fault: half of them hit checkpoints, a quarter restarts and the hand-off."""
    moment = generator.choices(
        ["file", "checkpoint", "restart", "hand-off", "step"], [35, 20, 15, 10, 20]
    )[0]
    most = {"file": 90, "checkpoint": 6, "restart": 2, "hand-off": 2, "step": 15}[moment]
    delay = generator.choice([0.0, generator.uniform(0, 0.005), generator.uniform(0, 0.05)])
    return Fault(moment, generator.randint(1, most), delay, generator.random() < 0.5)


def attempt(
    arguments: list[str],
    directory: Path,
    size: int,
    fault: Fault,
    *,
    number: int = 0,
    victim: int = 0,
) -> list[int]:
    """Run the trainer on `size` processes as a launcher's attempt; return their exit codes.

    Args:
        arguments: of the command line.
        directory: to run in.
        size: how many processes.
        fault: what befalls one of them; one of a count that never comes leaves the run alone.
        number: of this attempt, from 0, as torchrun counts them.
        victim: the rank that the fault hits.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[BaseProcess] = []
    for rank in range(size):
        inputs = (arguments, str(directory), rank, size, port, number)
        process = FORKED.Process(target=_live, args=(*inputs, fault if rank == victim else None))
        process.start()
        processes.append(process)
    deadline, patience = time.monotonic() + 180, 0.0 if fault.everywhere else 15.0
    failed = None
    while any(process.is_alive() for process in processes):
        now = time.monotonic()
        if failed is None and any(process.exitcode for process in processes):
            failed = now
        if now > deadline or (failed is not None and now > failed + patience):
            for process in processes:  # as launchers do
                process.kill()
        time.sleep(0.001)
    for process in processes:
        process.join()
    assert time.monotonic() < deadline, f"it hung: {fault}"
    return [process.exitcode or 0 for process in processes]


def output(directory: Path) -> str:
    """Return what the processes of all attempts have said."""
    return "\n".join(f"{p.name}:\n{p.read_text()}" for p in sorted(directory.glob("said-*")))


def command(arguments: list[str], directory: Path, *, memory: int) -> tuple[int, str]:
    """Run a command in a process of its own, in `memory` bytes; return its exit code and words."""
    process = FORKED.Process(target=_obey, args=(arguments, str(directory), memory))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"it did not end: {arguments}")
    return process.exitcode or 0, (directory / "said").read_text(errors="replace")


def _obey(arguments: list[str], directory: str, memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    torch.set_num_threads(1)
    os.chdir(directory)
    if arguments[0] == "train":
        leave_undrawn(setattr)
    sys.exit(_said(arguments, "said"))


def _live(
    arguments: list[str],
    directory: str,
    rank: int,
    size: int,
    port: int,
    number: int,
    fault: Fault | None,
) -> None:
    gc.freeze()  # what was imported before the fork is not looked at again
    os.chdir(directory)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RESTART_COUNT=str(number),
    )
    torch.set_num_threads(1)
    _mind_permissions()
    leave_undrawn(setattr)
    if fault is not None:
        _arrange(fault)
    sys.exit(_said(["train", *arguments], f"said-{number}-{rank}"))


def _said(arguments: list[str], file: str) -> int:
    with open(file, "w", buffering=1) as said:
        for descriptor in (1, 2):  # of which C++ knows, too
            os.dup2(said.fileno(), descriptor)
        try:
            return main(arguments)
        finally:
            sys.stdout.flush()


def _mind_permissions() -> None:
    """Have root's process respect what files permit, as everybody's does."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3; this thread and those it starts
        sets = (ctypes.c_uint32 * 6)()
        system = ctypes.CDLL(None, use_errno=True)
        assert system.capget(header, sets) == 0
        sets[0] &= ~(1 << 1)  # CAP_DAC_OVERRIDE among the effective ones
        assert system.capset(header, sets) == 0


def _arrange(fault: Fault) -> None:
    seen = [0]

    def come() -> None:
        seen[0] += 1
        if seen[0] == fault.count:
            if fault.delay:
                threading.Timer(fault.delay, fault.what).start()
            else:
                fault.what()

    if fault.moment == "file":

        def hear(event: str, values: tuple[object, ...]) -> None:
            if event in _FILES and "runs/" in str(values[0]):
                come()

        sys.addaudithook(hear)
        return
    where, name = CALLS[fault.moment]
    kept = getattr(where, name)

    def spoilt(*values: object, **named: object) -> object:
        come()
        return kept(*values, **named)

    setattr(where, name, spoilt)
