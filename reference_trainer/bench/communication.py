"""The bytes that a process sends in a training step and in a restart, by collective."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

import relora_core as relora
from reference_trainer.bench.layouts import Step, fill_, laid_out, world_of
from reference_trainer.flops import block_matrices
from reference_trainer.train import forward_backward
from relora_core.distributed.local import local


@dataclass(frozen=True)
class Sent:
    """The bytes that a process sent in one kind of collective over one kind of group.

    Args:
        collective: "all-gather", "reduce-scatter", "all-reduce", "broadcast" or "all-to-all".
        processes: number of processes in the group.
        stride: difference between consecutive process ranks in the group.
        calls: number of calls.
        bytes: bytes sent in all calls.
    """

    collective: str
    processes: int
    stride: int
    calls: int
    bytes: int

    @property
    def kind(self) -> tuple[str, int, int]:
        """The collective, the group's size and its stride, by which calls are counted together."""
        return self.collective, self.processes, self.stride


@dataclass(frozen=True)
class _Collective:
    """The cost of one of torch's collectives with the ring algorithm over n processes.

    Args:
        name: name in tables.
        whole: index of the argument that holds the tensor or tensors.
        passes: number of times that a process sends (n - 1) / n of the full size.
        times_n: whether the argument has 1 / n of the full size.
    """

    name: str
    whole: int
    passes: int = 1
    times_n: bool = False


_KNOWN = {
    "c10d::_allgather_base_": _Collective("all-gather", 0),
    "c10d::_reduce_scatter_base_": _Collective("reduce-scatter", 1),
    "c10d::allreduce_": _Collective("all-reduce", 0, passes=2),
    "c10d::broadcast_": _Collective("broadcast", 0),
    "_c10d_functional::all_gather_into_tensor": _Collective("all-gather", 0, times_n=True),
    "_c10d_functional::reduce_scatter_tensor": _Collective("reduce-scatter", 0),
    "_c10d_functional::all_reduce": _Collective("all-reduce", 0, passes=2),
    "_c10d_functional::all_to_all_single": _Collective("all-to-all", 0),
}
_FEW, _MORE = 3, 4  # blocks
_KINDS = ("c10d", "_c10d_functional", "c10d_functional", "_dtensor")
_SILENT = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")


# Torch has no types for the mode or for its `__init__`.
class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that this process sends while the block runs.

    Raises:
        NotImplementedError: if a collective is unknown, because the count would be too small.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: dict[tuple[str, int, int], list[int]] = {}

    def sent(self) -> list[Sent]:
        """Return what this process has sent so far."""
        return [Sent(*key, calls, bytes) for key, (calls, bytes) in self._found.items()]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kind, _, name = func._schema.name.partition("::")
        if kind in _KINDS and name not in _SILENT:
            known = _KNOWN.get(func._schema.name)
            if known is None:
                raise NotImplementedError(f"{func._schema.name} is not in _KNOWN: add it")
            self._add(known, args)
        return func(*args, **(kwargs or {}))

    def _add(self, known: _Collective, args: tuple[Any, ...]) -> None:
        ranks = dist.get_process_group_ranks(_group(args))
        n = len(ranks)
        if n == 1:
            return
        given = args[known.whole]
        tensors = given if isinstance(given, list | tuple) else [given]
        whole = sum(t.nbytes for t in tensors) * (n if known.times_n else 1)
        found = self._found.setdefault((known.name, n, ranks[1] - ranks[0]), [0, 0])
        found[0] += 1
        found[1] += known.passes * whole * (n - 1) // n


def _group(args: tuple[Any, ...]) -> dist.ProcessGroup:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
    names: list[Any] = [arg for arg in args if isinstance(arg, str) and not arg.isalpha()]
    group: dist.ProcessGroup = torch._C._distributed_c10d._resolve_process_group(names[-1])
    return group


def sent_by(run: Callable[[], object]) -> list[Sent]:
    """Return what this process sends while `run` runs."""
    with Counter() as counter:
        run()
    found: list[Sent] = counter.sent()
    return found


def measure_traffic(step: Step) -> dict[str, Any]:
    """Return what a process sends in a step and in a restart, over the current process group."""
    layout, shape = step.layout, step.shape
    sent, further = sent_in_step(step), sent_in_micro_step(step)
    processes = dist.get_world_size()
    record: dict[str, Any] = {"event": "traffic", "arm": layout.name, "processes": processes}
    record["step"] = [asdict(each) for each in sent]
    record["micro_step"] = [asdict(each) for each in further]
    if layout.low_rank:
        pretends = dist.get_backend() == "fake"
        restart = sent_at_depth(step, sent_in_restart) if pretends else sent_in_restart(step)
        record["restart"] = [asdict(each) for each in restart]
        entries = shape.layers * sum(out * inner for out, inner in block_matrices(shape))
        record["gather_of_W"] = 4 * entries * (processes - 1) // processes  # in fp32
    return record


def sent_in_micro_step(step: Step) -> list[Sent]:
    """Return what a process sends in each micro-step of a training step except the last."""
    return difference(sent_in_step(step, micro_steps=2), sent_in_step(step))


def difference(more: Iterable[Sent], less: Iterable[Sent]) -> list[Sent]:
    """Return what `more` sent in addition to `less`.

    Examples:
        >>> one = Sent("all-gather", 2, 1, calls=3, bytes=30)
        >>> difference([replace(one, calls=4, bytes=50)], [one])
        [Sent(collective='all-gather', processes=2, stride=1, calls=1, bytes=20)]
    """
    before = {sent.kind: sent for sent in less}
    found = []
    for sent in more:
        known = before.get(sent.kind, replace(sent, calls=0, bytes=0))
        found.append(replace(sent, calls=sent.calls - known.calls, bytes=sent.bytes - known.bytes))
    return [sent for sent in found if sent.calls]


def sent_in_step(step: Step, *, micro_steps: int = 1) -> list[Sent]:
    """Return what a process sends in a training step.

    In a pretended process group the tensors are fake: they have sizes but no values.
    """
    world = world_of(step.layout)
    pretends = dist.get_backend() == "fake"
    memory = FakeTensorMode(allow_non_fake_inputs=True) if pretends else nullcontext()
    state = laid_out(step, world, memory=memory)
    if not pretends:
        fill_(state.model)
    with memory:
        parts = step.parts(micro_steps)

        def take() -> None:
            forward_backward(state.model, parts, world, step.reduce)
            clip_grad_norm_(state.parameters.values(), 1.0)
            state.optimizer.step()  # also refreshes the merged copies

        return sent_by(take)


def sent_at_depth(step: Step, count: Callable[[Step], list[Sent]]) -> list[Sent]:
    """Return the result of `count`, extrapolated from models of three and four blocks.

    Every further block adds the same bytes. It also adds the same number of calls, except for
    tensors that are gathered in buckets of a fixed size.

    Args:
        step: training step in the current process group.
        count: function such as `sent_in_step`.
    """
    layers = step.shape.layers
    if layers <= _MORE:
        return count(step)
    few, more = (
        {sent.kind: sent for sent in count(step.of_blocks(blocks))} for blocks in (_FEW, _MORE)
    )
    further = layers - _MORE
    return [
        replace(
            sent,
            calls=sent.calls + further * (sent.calls - few[kind].calls),
            bytes=sent.bytes + further * (sent.bytes - few[kind].bytes),
        )
        for kind, sent in more.items()
    ]


def sent_in_restart(step: Step) -> list[Sent]:
    """Return what a process sends in a restart; tensors are real because pruning reads values."""
    state = laid_out(step, world_of(step.layout))
    fill_(state.model)
    for p in state.parameters.values():
        p.grad = torch.zeros_like(p)
        local(p.grad).normal_()
    state.optimizer.step()
    return sent_by(lambda: relora.restart_(state.model, state.optimizer))
