"""The kernels of an operation: their arithmetic, and the bytes that they read and write."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Kernel:
    """A kernel that a GPU launches.

    Args:
        name: name of the operation, with sizes for products.
        flops: floating-point operations of its products; a multiplication and an addition count as
            two. 0 without a product.
        read: bytes read.
        written: bytes written.
        dtype: dtype of the product; None without a product.
        times: number of launches.
    """

    name: str
    flops: int
    read: int
    written: int
    dtype: torch.dtype | None = None
    times: int = 1

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def repeated(kernels: Iterable[Kernel], times: int) -> list[Kernel]:
    """Return the kernels with each launched `times` times as often."""
    return [replace(one, times=one.times * times) for one in kernels]


def together(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Return the kernels with equal ones combined and their launches added."""
    times: dict[Kernel, int] = {}
    for one in kernels:
        kind = replace(one, times=1)
        times[kind] = times.get(kind, 0) + one.times
    return [replace(kind, times=count) for kind, count in times.items()]


def product(a: Tensor, b: Tensor, out: Tensor, *, addend: Tensor | None = None) -> Kernel:
    """Return the kernel of `a @ b`, which may be batched and may also add `addend`."""
    *batch, rows, inner = a.shape
    columns = b.shape[-1]
    flops = 2 * prod(batch) * rows * inner * columns
    read = size(a) + size(b) + (0 if addend is None else size(addend))
    name = f"product {rows} x {inner} x {columns}"
    return Kernel(name, flops, read, size(out), a.dtype)


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor; entries repeated by a stride of 0 count once."""
    shape = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(shape) * tensor.element_size()


def of_call(operation: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Kernel]:
    """Return the kernels of one call of an operation of torch or this library.

    Args:
        operation: overload, such as `torch.ops.aten.mm.default`.
        args: positional arguments; tensors need only sizes and strides.
        kwargs: keyword arguments.
        out: return value of the call.
    """
    name = operation.name() if hasattr(operation, "name") else str(operation)
    known = _KNOWN.get(name.split(".")[0])
    if known is not None:
        return list(known(args, kwargs, out))
    if is_free(operation):
        return []
    writes, reads = _writes(operation, args, kwargs), _tensors([args, kwargs])
    outs = writes or _tensors([out])
    only_written = name.split("::")[-1].split(".")[0] in _OVERWRITES or "out" in kwargs
    read = [t for t in reads if not (only_written and any(t is w for w in writes))]
    label = name.split("::")[-1].split(".")[0]
    return [Kernel(label, 0, sum(map(size, read)), sum(map(size, outs)))]


def is_free(operation: Any) -> bool:
    """Whether an operation launches no kernel: a view, an allocation, or a host query."""
    if not hasattr(operation, "_schema"):
        return True
    namespace, _, rest = operation.name().partition("::")
    if namespace in ("prim", "profiler", "c10d", "_c10d_functional", "symm_mem"):
        return True
    if rest.split(".")[0] in _FREE:
        return True
    returns = [r.alias_info for r in operation._schema.returns]
    return bool(returns) and all(info is not None and not info.is_write for info in returns)


def _writes(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    found = []
    for index, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            found += _tensors([given])
    return found


def _tensors(tree: Any) -> list[Tensor]:
    unique = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    return list(unique.values())


_FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"),
    *("detach", "lift_fresh", "resize_", "record_stream", "_reshape_alias", "is_pinned"),
    *("_local_scalar_dense", "scalar_tensor"),
}
_OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_"}


def _mm(args: Any, kwargs: Any, out: Tensor) -> Iterator[Kernel]:
    yield product(args[0], args[1], out)


def _addmm(args: Any, kwargs: Any, out: Tensor) -> Iterator[Kernel]:
    addend, a, b = args[:3]
    if addend.ndim == 2:  # torch copies it into the output first
        yield Kernel("copy of an addend", 0, size(addend), size(out))
        addend = out
    yield product(a, b, out, addend=addend)


def _addmm_(args: Any, kwargs: Any, out: Tensor) -> Iterator[Kernel]:
    total, a, b = args[:3]
    yield product(a, b, total, addend=total)


def _sum_of_products(args: Any, kwargs: Any, out: Tensor) -> Iterator[Kernel]:
    u, v, x, w = args[:4]
    yield product(u, v, out)
    yield product(x, w, out, addend=out)


def _attention(args: Any, kwargs: Any, out: Any) -> Iterator[Kernel]:
    q, k, v = args[:3]
    yield Kernel("attention", _attended(q, k, 2), sum(map(size, (q, k, v))), size(q), q.dtype)


def _attention_backward(args: Any, kwargs: Any, out: Any) -> Iterator[Kernel]:
    q, k, v = args[1:4]
    read, written = 2 * size(q) + sum(map(size, (q, k, v))), sum(map(size, (q, k, v)))
    yield Kernel("attention backward", _attended(q, k, 5), read, written, q.dtype)


def _attended(q: Tensor, k: Tensor, products: int) -> int:
    """Return the operations of `products` products of causal attention, half of the full ones."""
    b, h, t, e = q.shape
    return products * 2 * b * h * t * k.shape[-2] * e // 2


def _embedding(args: Any, kwargs: Any, out: Tensor) -> Iterator[Kernel]:
    yield Kernel("embedding", 0, size(out) + size(args[1]), size(out))


def _embedding_backward(args: Any, kwargs: Any, out: Tensor) -> Iterator[Kernel]:
    yield Kernel("fill", 0, 0, size(out))
    yield Kernel("embedding backward", 0, size(args[0]) + size(args[1]), 2 * size(args[0]))


def _nll(args: Any, kwargs: Any, out: Any) -> Iterator[Kernel]:
    yield Kernel("loss", 0, 2 * size(args[1]), 8)


def _nll_backward(args: Any, kwargs: Any, out: Tensor) -> Iterator[Kernel]:
    yield Kernel("fill", 0, 0, size(out))
    yield Kernel("loss backward", 0, 2 * size(args[2]), size(args[2]))


def _adamw(args: Any, kwargs: Any, out: Any) -> Iterator[Kernel]:
    parameters, gradients, first, second = args[:4]
    state = sum(map(size, (*parameters, *first, *second)))
    yield Kernel("AdamW", 0, state + sum(map(size, gradients)), state)


def _copy_in(args: Any, kwargs: Any, out: Any) -> Iterator[Kernel]:
    moved = sum(map(size, args[0]))
    yield Kernel("copy into what is gathered", 0, moved, moved)


_KNOWN = {
    "aten::mm": _mm,
    "aten::bmm": _mm,
    "aten::addmm": _addmm,
    "aten::addmm_": _addmm_,
    "relora::sum_of_products": _sum_of_products,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::embedding": _embedding,
    "aten::embedding_dense_backward": _embedding_backward,
    "aten::nll_loss_forward": _nll,
    "aten::nll_loss_backward": _nll_backward,
    "aten::_fused_adamw_": _adamw,
    "fsdp::all_gather_copy_in": _copy_in,
}
