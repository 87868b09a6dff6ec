"""Stage 8: pruning of a tensor that two gloo processes on one device share."""

import multiprocessing
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import relora_core as relora
from reference_trainer.bench.suite.records import Report
from reference_trainer.bench.suite.sizes import Sizes

_PROCESSES = 2
_RATIOS = (0.0, 0.3, 0.9, 0.99, 1.0)


def run(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Prune shards of unequal size, and compare them bit for bit with pruning in one process."""
    rows = sizes.entries // 2**8 + 1  # an odd number
    with tempfile.TemporaryDirectory() as directory:
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_shard, args=(rank, _PROCESSES, rows, str(device), directory))
            for rank in range(_PROCESSES)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            raise ValueError(f"both processes must end with 0; got {codes}")
        found = [(Path(directory) / f"{rank}").read_text() for rank in range(_PROCESSES)]
    if set(found) != {"same"}:
        raise ValueError(f"pruned shards must equal the result of one process; got {found}")
    report.measured("pruned alike, sharded or not", len(_RATIOS), "ratios", expected=len(_RATIOS))


def _shard(rank: int, processes: int, rows: int, device: str, directory: str) -> None:
    torch.manual_seed(0)
    whole = torch.randn(rows, 64, device=device)
    torch.rand(rank)  # each process has consumed a different count of numbers
    store = FileStore(str(Path(directory) / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    mesh = init_device_mesh(torch.device(device).type, (processes,))
    differing = []
    for ratio in _RATIOS:
        expected = relora.magnitude_prune_(whole.clone(), ratio=ratio)
        shared = distribute_tensor(whole.clone(), mesh, [Shard(0)], src_data_rank=None)
        relora.magnitude_prune_(shared, ratio=ratio)
        own = distribute_tensor(expected, mesh, [Shard(0)], src_data_rank=None)
        assert isinstance(shared, DTensor)
        if not torch.equal(shared.to_local(), own.to_local()):
            differing.append(ratio)
    found = f"different entries at ratios {differing}" if differing else "same"
    (Path(directory) / f"{rank}").write_text(found)
    dist.barrier()
    dist.destroy_process_group()
