"""All processes that share a model say that they are here, or an error names those that are not."""

from datetime import timedelta
from hashlib import blake2b

import torch.distributed as dist
from torch import nn

from relora_core._sharding import sharers

_LONGEST = 4000  # characters of an answer


def roll_call(model: nn.Module, answer: str, timeout: timedelta) -> None:
    """Wait until every process that shares `model` is here with the same `answer`.

    A process that skips a call would leave the others in a collective that never ends, or, where
    there is none, go on with other weights than theirs. This uses the store that the processes met
    through, and no collective. What makes a model shared is a DTensor among its parameters, or
    DistributedDataParallel around it.

    Args:
        model: sharded, replicated or neither, in which case nothing happens.
        answer: what must be the same everywhere.
        timeout: how long to wait for the last one.

    Raises:
        RuntimeError: if processes do not come in time; it names them. Or on every process, if
            answers differ.
    """
    ranks = sharers(model)
    if len(ranks) < 2:
        return
    store = dist.distributed_c10d._get_default_store()
    key = f"relora/{blake2b(str(ranks).encode(), digest_size=8).hexdigest()}"
    # Nobody is counted for the next call before all were counted for this one.
    number = store.add(f"{key}/answers", 1) - 1
    call, last = f"{key}/{number // len(ranks)}", number % len(ranks) == len(ranks) - 1
    mine = dist.get_rank()
    store.set(f"{call}/{mine}", answer[:_LONGEST])
    if last:
        others = {rank: store.get(f"{call}/{rank}").decode() for rank in ranks}
        different = [rank for rank, other in others.items() if other != others[ranks[0]]]
        verdict = ""
        if different:
            verdict = (
                f"rank {ranks[0]} calls {others[ranks[0]]}, but rank {different[0]} calls "
                f"{others[different[0]]}: every process that shares the model must do the same"
            )
        store.set(f"{call}/verdict", verdict)
        for rank in ranks:
            store.delete_key(f"{call}/{rank}")
    try:
        store.wait([f"{call}/verdict"], timeout)
    except RuntimeError:  # a store of another kind than TCP has no error of its own for this
        absent = [rank for rank in ranks if not store.check([f"{call}/{rank}"])]
        if not absent:
            raise
        raise RuntimeError(
            f"{answer}: of the processes that share the model, {_named(absent)} did not come in "
            f"{timeout.total_seconds():g} s: every one must call it, before the same step"
        ) from None
    verdict = store.get(f"{call}/verdict").decode()
    if verdict:
        raise RuntimeError(verdict)


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
    return f"{len(ranks)} (rank {shown})"
