"""Run a function on several gloo processes and bring back the tensors it returns."""

import faulthandler
import gc
import multiprocessing
import random
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

Returns = dict[str, Tensor]

# One process imports these, and all others are forked from it: an import of torch takes seconds.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.distributed.preloaded"])


def on_processes(
    function: Callable[..., Returns], world_size: int, directory: Path, *arguments: Any
) -> list[Returns]:
    """Return each rank's result of `function(rank, world_size, *arguments)`."""
    directory.mkdir()
    inputs = (function, world_size, str(directory), arguments)
    mp.start_processes(_enter, inputs, nprocs=world_size, start_method="forkserver")
    return [load_file(directory / f"{rank}.safetensors") for rank in range(world_size)]


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor, gathered if it is sharded, in memory of its own."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def assert_same_run(
    results: Iterable[Returns], expected: Returns, *, exact: tuple[str, ...]
) -> None:
    """Assert that every rank has what is expected to 1e-5, and bit for bit what `exact` begins."""
    for result in results:
        assert result.keys() == expected.keys()
        for name, tensor in expected.items():
            if name.startswith(exact):
                assert torch.equal(result[name], tensor), name
            else:
                torch.testing.assert_close(result[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def _enter(
    rank: int, function: Callable[..., Returns], world_size: int, directory: str, arguments: Any
) -> None:
    faulthandler.enable()  # a crash in torch or gloo says where
    gc.freeze()  # what was imported before the fork is not looked at again
    torch.set_num_threads(1)
    # Ranks that agree only because they seeded alike would be found out.
    torch.manual_seed(1000 + rank)
    torch.rand(rank + 1)
    random.seed(rank)
    store = dist.FileStore(f"{directory}/store", world_size)
    late = timedelta(minutes=2)  # a test that hangs fails
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=late)
    try:
        result = function(rank, world_size, *arguments)
        whole = {name: tensor.detach().clone().contiguous() for name, tensor in result.items()}
        save_file(whole, f"{directory}/{rank}.safetensors")
        dist.barrier()
    finally:
        dist.destroy_process_group()
