"""The kernels that eager or compiled code launches on fake tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from reference_trainer.bench.fusion import of_graph
from reference_trainer.bench.kernels import Kernel, of_call


# Torch has no types for the mode or for its `__init__`.
class Launched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that records the kernels of all eager operations in its block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it is dispatched again with the local tensor
        out = func(*args, **(kwargs or {}))
        self.kernels += of_call(func, args, kwargs or {}, out)
        return out


@dataclass
class Compiled:
    """The kernels of compiled graphs.

    Args:
        graphs: kernels of each graph: forward, then backward.
    """

    graphs: list[list[Kernel]] = field(default_factory=list)

    @property
    def kernels(self) -> list[Kernel]:
        """The kernels of all graphs."""
        return [kernel for graph in self.graphs for kernel in graph]


@contextmanager
def compiling() -> Iterator[tuple[Callable[..., Any], "Compiled"]]:
    """Yield a backend for `torch.compile` and the kernels that it compiles."""
    found = Compiled()

    def keep(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.graphs.append(of_graph(graph.graph))

        def run(arguments: list[Any]) -> Any:
            return graph(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    torch.compiler.reset()
    yield (
        aot_autograd(
            fw_compiler=keep,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table,
        ),
        found,
    )
    torch.compiler.reset()
