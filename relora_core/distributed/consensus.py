"""A roll call of the processes that share a model; an error names those that are absent."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from hashlib import blake2b

import torch.distributed as dist
from torch import nn

from relora_core._torch_private import default_store
from relora_core.distributed.sharding import sharers

_AGREED = "agreed"


class OutOfStepError(RuntimeError):
    """A process that shares a model was absent from a call, made another call, or failed.

    The message names that process. Every process that made the call raises this error, and none
    has changed anything.
    """


@contextmanager
def agreed(model: nn.Module, call: str, timeout: timedelta) -> Iterator[None]:
    """Run a block that changes nothing, and continue only if it succeeds on every process.

    Args:
        model: as for `roll_call`.
        call: the call that the block belongs to; it must be the same on every process.
        timeout: how long to wait for the last process.

    Raises:
        OutOfStepError: if a process is absent, makes another call, or alone raises an error.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        roll_call(model, f"{call}, which raises an error: {error}", timeout)
        raise
    roll_call(model, call, timeout)


def roll_call(model: nn.Module, answer: str, timeout: timedelta) -> None:
    """Wait until every process that shares `model` has arrived here with the same `answer`.

    A process that skips a call would leave the others in a collective that never ends or, without a
    collective, continue with different weights. The roll call uses the default process group's
    store, and no collective. A model is shared if one of its parameters is a DTensor, or if
    DistributedDataParallel wraps it.

    Each call ends in one verdict for all processes, from the last process to arrive or from the
    first to time out. Processes that arrive later find that verdict.

    Args:
        model: the model. If it is neither sharded nor replicated, nothing happens.
        answer: the text that must be the same on every process.
        timeout: how long to wait for the last process.

    Raises:
        OutOfStepError: on every process, if some do not arrive in time (the message names them) or
            if answers differ.
    """
    ranks = sharers(model)
    if len(ranks) < 2:
        return
    store, mine = default_store(), dist.get_rank()
    key = f"relora/{blake2b(str(ranks).encode(), digest_size=8).hexdigest()}"
    call = f"{key}/{store.add(f'{key}/calls of {mine}', 1)}"
    store.set(f"{call}/{mine}", answer)
    if store.add(f"{call}/here", 1) == len(ranks):
        answers = {rank: store.get(f"{call}/{rank}").decode() for rank in ranks}
        store.compare_set(f"{call}/verdict", "", _compared(answers))
        for rank in ranks:
            store.delete_key(f"{call}/{rank}")
    try:
        store.wait([f"{call}/verdict"], timeout)
    except RuntimeError:  # only TCPStore has its own error for a timeout
        absent = [rank for rank in ranks if not store.check([f"{call}/{rank}"])]
        store.compare_set(f"{call}/verdict", "", f"{answer}: {_missed(absent, timeout)}")
    verdict = store.get(f"{call}/verdict").decode()
    if verdict != _AGREED:
        raise OutOfStepError(verdict)


def _compared(answers: dict[int, str]) -> str:
    (first, said), *others = answers.items()
    for rank, other in others:
        if other != said:
            return (
                f"process rank {first} calls {said}, but process rank {rank} calls {other}: every "
                "process that shares the model must do the same"
            )
    return _AGREED


def _missed(ranks: list[int], timeout: timedelta) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
    return (
        f"{len(ranks)} of the processes that share the model (process rank {shown}) did not call "
        f"it within {timeout.total_seconds():g} s: every one must call it, before the same step"
    )
