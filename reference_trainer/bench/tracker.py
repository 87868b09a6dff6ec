"""Peak memory of a process in a training step, tracked on tensors that have sizes and no memory."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from reference_trainer.bench.layouts import Layout, laid_out, pretended, world_of
from reference_trainer.model import LlamaShape
from reference_trainer.train import forward_backward


def track_peak(
    layout: Layout,
    shape: LlamaShape,
    *,
    processes: int,
    rank: int,
    length: int,
    sequences: int,
    recompute: bool,
) -> dict[str, Any]:
    """Return the peak of a second step, whole and in parts, in bytes.

    It is what tensors take: neither the allocator's fragments, nor a device's context and its
    communication buffers, nor the temporaries of optimizers that work on all tensors at once.

    Args:
        layout: of the model.
        shape: of the model.
        processes: how many.
        rank: of the sites.
        length: tokens of a sequence.
        sequences: that each process computes at once.
        recompute: checkpoint the activations of each block.
    """
    with pretended(processes):
        world = world_of(layout)
        memory = FakeTensorMode(allow_non_fake_inputs=True)
        stage = laid_out(layout, shape, world, rank=rank, recompute=recompute, memory=memory)
        with memory:
            batch = torch.zeros(sequences * processes, length + 1, dtype=torch.long)
            tracker = FSDPMemTracker(stage.model, stage.optimizer)
            tracker.track_inputs((batch,))
            with tracker:
                for step in range(2):
                    forward_backward(stage.model, batch, 1, world)
                    # On all tensors at once it would be tracked at their whole sizes.
                    clip_grad_norm_(stage.parameters.values(), 1.0, foreach=False)
                    stage.optimizer.step()
                    stage.optimizer.zero_grad()
                    if step == 0:
                        tracker.reset_mod_stats()
            whole = sum(p.nbytes for p in stage.model.parameters() if not isinstance(p, DTensor))
    (found,) = tracker.get_tracker_snapshot("peak").values()
    parts = {str(getattr(kind, "value", kind)): size for kind, size in found.items()}
    return {
        "event": "peak",
        "arm": layout.name,
        "processes": processes,
        "recompute": recompute,
        "weights": parts["Sharded Param"] + whole,  # the tracker takes the whole for activations
        "optimizer": parts["OptState"],
        "total": parts["Total"],
    }
