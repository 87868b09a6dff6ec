"""A weight that stands for W + s B A and is formed only when an operation needs it whole."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_core._torch_private import grouped_mm
from relora_core.products.factored import Factored
from relora_core.products.forms import (
    einsum_of,
    embedding,
    grouped_product,
    holds_lazy,
    in_order,
    linear,
    materialized,
    product_of,
    sum_with_product,
)

_OPERATORS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv"),
    *("floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "neg", "pos", "abs"),
    *("lt", "le", "gt", "ge", "eq", "ne"),
)
_PRODUCTS = (
    *(torch.matmul, torch.mm, torch.bmm),
    *(torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm),
)
# Each would act on a temporary.
_LOST = ("data", "out", "register_hook", "register_post_accumulate_grad_hook", "retain_grad")


class LazyWeight(Factored):
    r"""What `module.weight` evaluates to at a low-rank site: $W + s B A$, not yet formed.

    `F.linear`, `F.embedding` and products (matmul, bmm, grouped products, einsum) compute two
    paths. Every other function, method or operator receives the materialized tensor. So every
    module computes the right result, and these functions are fast. For a bank, `weight[i]` is the
    lazy weight of one matrix; a transpose is lazy too. A LazyWeight is not a Tensor, because
    `torch.compile` cannot trace tensor subclasses inside the layer that owns them.

    Args:
        base: $W$, of any shape `(out, ...)`, or a bank of such matrices.
        lora_A: $A$, `(rank, in)`, where `in` is the product of `base`'s other dimensions; for a
            bank, after the bank's leading dimensions.
        lora_B: $B$, `(out, rank)`; for a bank, after the bank's leading dimensions.
        scale: $s$; a tensor of one entry if it is trained.
        dropout: the probability with which `F.linear` zeroes each entry of the low-rank path's
            input, scaling the others by 1 / (1 - dropout): y = x Wᵀ + s (dropout(x) Aᵀ) Bᵀ.
        merged: [V | B] with V = W + s B A, which is then used in place of $W$; None if there is no
            merged copy.

    Raises:
        ValueError: if `dropout` is set and anything but `F.linear` uses the weight.
        AttributeError: for an in-place method, `data`, `out=`, a hook or setting an attribute: each
            would change a temporary tensor and be lost. A write to a view
            (`weight.detach().zero_()`) is lost without an error. Write to
            `parametrizations.weight.original` instead.

    Examples:
        >>> W, A, B = torch.eye(2), torch.ones(1, 2), torch.ones(2, 1)
        >>> weight = LazyWeight(W, A, B, 0.5)
        >>> F.linear(torch.ones(1, 2), weight)  # two paths
        tensor([[2., 2.]])
        >>> weight + 0                          # anything else: materialized
        tensor([[1.5000, 0.5000],
                [0.5000, 1.5000]])
    """

    def transpose(self, dim0: int, dim1: int) -> Any:
        """Exchange two dimensions."""
        if self.has_paths() and {dim0 % self.ndim, dim1 % self.ndim} == {
            self.ndim - 2,
            self.ndim - 1,
        }:
            return self.transposed()
        return self.materialize().transpose(dim0, dim1)

    @property
    def mT(self) -> Any:
        """Every matrix transposed."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:
        """The matrix transposed."""
        return self.transpose(0, 1) if self.ndim == 2 else self.materialize().T

    def t(self) -> Any:
        """Return the matrix transposed."""
        return self.transpose(0, 1) if self.ndim == 2 else self.materialize().t()

    def matmul(self, other: Any) -> Any:
        """Return V x."""
        return product_of(torch.matmul, self, other)

    __matmul__ = matmul

    def __rmatmul__(self, other: Any) -> Any:
        return product_of(torch.matmul, other, self)

    def __getitem__(self, index: Any) -> Any:
        lead = index if isinstance(index, tuple) else (index,)
        if not 0 < len(lead) <= self.batch_dims or not all(_picks(one) for one in lead):
            return self.materialize()[materialized(index)]
        return type(self)(self.base[index], self.lora_A[index], self.lora_B[index], self.scale)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise AttributeError(_lost("setting entries"))

    def unbind(self, dim: int = 0) -> tuple[Any, ...]:
        """Return the slices along a dimension, each without that dimension."""
        if dim % self.ndim or not self.batch_dims:
            return self.materialize().unbind(dim)
        factors = zip(self.base.unbind(), self.lora_A.unbind(), self.lora_B.unbind(), strict=True)
        return tuple(type(self)(W, A, B, self.scale) for W, A, B in factors)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind())

    def __len__(self) -> int:
        return len(self.base)

    @property
    def requires_grad(self) -> bool:
        """Whether W, A or B is trained."""
        return any(t.requires_grad for t in (self.base, self.lora_A, self.lora_B))

    def size(self, dim: int | None = None) -> torch.Size | int:
        """W's size."""
        return self.base.shape if dim is None else self.base.shape[dim]

    @property
    def grad(self) -> Tensor | None:
        """W's gradient: None where it is frozen."""
        return self.base.grad

    @property
    def is_meta(self) -> bool:
        """Whether W has no memory."""
        return self.base.is_meta

    def data_ptr(self) -> int:
        """W's address."""
        return self.base.data_ptr()

    def dim(self) -> int:
        """W's number of dimensions."""
        return self.base.ndim

    def numel(self) -> int:
        """W's number of entries."""
        return self.base.numel()

    def __repr__(self) -> str:
        rank = self.lora_A.shape[-2]
        return f"LazyWeight(shape={tuple(self.shape)}, rank={rank}, dtype={self.dtype})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse_write(name)
        if not hasattr(torch.Tensor, name):  # an attribute that was set on the Parameter
            return getattr(self.base, name)
        return getattr(self.materialize(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(_FREEZE if name == "requires_grad" else _lost(f"setting {name}"))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return linear(*args, **kwargs)
        if func is F.embedding:
            return embedding(*args, **kwargs)
        if len(args) == 2 and not kwargs and any(func is product for product in _PRODUCTS):
            if func is torch.Tensor.matmul and torch.compiler.is_compiling():
                return product_of(torch.matmul, *in_order(*args))
            return product_of(func, *args)
        if func is grouped_mm:
            return grouped_product(*args, **kwargs)
        if func is torch.addmm and "out" not in kwargs:
            return sum_with_product(*args, **kwargs)
        if func is torch.einsum:
            return einsum_of(*args)
        if args and func is torch.transpose and holds_lazy(args[0]):
            return args[0].transpose(*args[1:], **kwargs)
        if args and func is torch.unbind and holds_lazy(args[0]):
            return args[0].unbind(*args[1:], **kwargs)
        if not torch.compiler.is_compiling():  # dynamo (torch 2.13) cannot read __name__
            written = args[0] if args else next(iter(kwargs.values()), None)
            if holds_lazy(written):
                _refuse_write(getattr(func, "__name__", ""))
            if holds_lazy(kwargs.get("out")):
                _refuse_write("out")
        return func(*materialized(args), **materialized(kwargs))


def _picks(index: Any) -> bool:
    """Whether an index selects along one dimension."""
    if isinstance(index, Tensor):
        return index.dtype not in (torch.bool, torch.uint8) or index.ndim == 1
    return isinstance(index, (int, slice, torch.SymInt)) and not isinstance(index, bool)


def _refuse_write(name: str) -> None:
    if name == "requires_grad_":
        raise AttributeError(_FREEZE)
    if name in _LOST or (name.endswith("_") and not name.endswith("__")):
        raise AttributeError(_lost(f"a write through {name}"))


def _lost(write: str) -> str:
    return (
        f"{write} would change a temporary copy of the weight and be lost: a low-rank site's "
        "weight is computed. Write to `parametrizations.weight.original`; read through .detach()"
    )


_FREEZE = (
    "a low-rank site's weight is computed, and W is frozen. To freeze the site, freeze its "
    "factors: `parametrizations.weight[0].requires_grad_(False)`"
)


def _define_operator(name: str) -> None:
    def operator(self: LazyWeight, *others: Any) -> Any:
        return getattr(self.materialize(), name)(*materialized(others))

    operator.__name__ = name
    setattr(LazyWeight, name, operator)


for _name in _OPERATORS:
    _define_operator(f"__{_name}__")
LazyWeight.__hash__ = object.__hash__  # type: ignore[method-assign]
