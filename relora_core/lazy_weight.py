"""A weight that stands for W + s B A and is formed only when an operation needs it whole."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_core._sharding import is_sharded
from relora_core.embedding import low_rank_embedding
from relora_core.linear import autocasts, computes_in, low_rank_linear, merged_linear
from relora_core.one_path import following
from relora_core.tensor_parallel import parallel_linear

_OPERATORS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul"),
    *("floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "neg", "pos", "abs"),
    *("getitem", "len", "iter", "lt", "le", "gt", "ge", "eq", "ne"),
)


class LazyWeight:
    r"""What `module.weight` evaluates to at a low-rank site: $W + s B A$, not yet formed.

    `F.linear` and `F.embedding` compute their two-path form; every other function, method or
    operator receives the materialized tensor, so that any module is right and linears are fast.
    It is not a `torch.Tensor` (`isinstance` says so): tensor subclasses cannot be traced by
    `torch.compile` inside the layer that owns them.

    Args:
        base: $W$, of any shape `(out, ...)`.
        lora_A: $A$, `(rank, in)`, where `in` is the product of `base`'s other dimensions.
        lora_B: $B$, `(out, rank)`.
        scale: $s$; a tensor of one entry if it is trained.
        dropout: the probability with which `F.linear` zeroes each entry of the low-rank path's
            input, the others growing by 1 / (1 - dropout): y = x Wᵀ + s (dropout(x) Aᵀ) Bᵀ.
        merged: [V | B], of which V = W + s B A is then all that is used of $W$; None without.

    Raises:
        ValueError: if there is dropout and anything but `F.linear` asks for the weight.
        AttributeError: at an in-place method, `data` or `out=`: what is written would change a
            temporary, and be lost. A write to a view of it (`weight[0].zero_()`,
            `weight.detach().zero_()`) is lost without notice: write to
            `parametrizations.weight.original`.

    Examples:
        >>> W, A, B = torch.eye(2), torch.ones(1, 2), torch.ones(2, 1)
        >>> weight = LazyWeight(W, A, B, 0.5)
        >>> F.linear(torch.ones(1, 2), weight)  # two paths
        tensor([[2., 2.]])
        >>> weight.t()                          # anything else: materialized
        tensor([[1.5000, 0.5000],
                [0.5000, 1.5000]])
    """

    def __init__(
        self,
        base: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float | Tensor,
        dropout: float = 0.0,
        merged: Tensor | None = None,
    ) -> None:
        self.base = base
        self.merged = merged
        self.lora_A = lora_A
        self.lora_B = lora_B
        self.dropout = dropout
        if isinstance(scale, Tensor):  # into A, so that s is a number wherever it is used
            self.lora_A, self.scale = scale * lora_A, 1.0
        else:
            self.scale = scale

    def materialize(self) -> Tensor:
        """Return W + s B A as a tensor of this dtype, differentiable in W, A and B."""
        if self.dropout:
            raise ValueError(
                "dropout acts on the input of F.linear, and this operation needs the weight "
                f"whole; got dropout={self.dropout:g}: register the tensor without it"
            )
        if self.merged is not None:
            return following(self.merged[:, : self.shape[1]], self.delta())
        return add_rounding_once(self.base, self.delta())

    def delta(self) -> Tensor:
        """Return s B A in W's shape, in W's dtype or a wider one, fp32 at least."""
        wide = torch.float32
        for tensor in (self.base, self.lora_A, self.lora_B):
            wide = torch.promote_types(wide, tensor.dtype)
        # Autocast would form it in 16 bits, whatever the weights are stored in.
        with _as_stored(self.device.type):
            return self.scale * (self.lora_B.to(wide) @ self.lora_A.to(wide)).view(self.shape)

    @property
    def shape(self) -> torch.Size:
        """W's shape."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """W's dtype, or that of its merged copy."""
        return self.base.dtype if self.merged is None else self.merged.dtype

    @property
    def device(self) -> torch.device:
        """W's device."""
        return self.base.device

    @property
    def ndim(self) -> int:
        """W's number of dimensions."""
        return self.base.ndim

    @property
    def requires_grad(self) -> bool:
        """Whether W, A or B is trained."""
        return any(t.requires_grad for t in (self.base, self.lora_A, self.lora_B))

    def size(self, dim: int | None = None) -> torch.Size | int:
        """W's size."""
        return self.base.shape if dim is None else self.base.shape[dim]

    def dim(self) -> int:
        """W's number of dimensions."""
        return self.base.ndim

    def numel(self) -> int:
        """W's number of entries."""
        return self.base.numel()

    def __repr__(self) -> str:
        rank = self.lora_A.shape[0]
        return f"LazyWeight(shape={tuple(self.shape)}, rank={rank}, dtype={self.dtype})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse_write(name)
        return getattr(self.materialize(), name)

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
            return _linear(*args, **kwargs)
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        if not torch.compiler.is_compiling():  # dynamo of torch 2.13 cannot read a name
            written = args[0] if args else next(iter(kwargs.values()), None)
            if _is_lazy(written):
                _refuse_write(getattr(func, "__name__", ""))
            if _is_lazy(kwargs.get("out")):
                _refuse_write("out")
        return func(*_materialized(args), **_materialized(kwargs))


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    others = (input, bias)
    plain = not any(isinstance(t, LazyWeight) for t in others) and not input.is_nested
    if isinstance(weight, LazyWeight) and plain:
        W, A, B, s = weight.base, weight.lora_A, weight.lora_B, weight.scale
        if weight.merged is not None and computes_in(input, weight.merged.dtype):
            return merged_linear(input, weight.merged, A, B, s, bias)
        if is_sharded(W) and is_sharded(input):
            return parallel_linear(low_rank_linear, input, W, A, B, s, bias)
        return low_rank_linear(input, W, A, B, s, bias, weight.dropout)
    return F.linear(*_materialized((input, weight, bias)))


def _embedding(
    input: Tensor,
    weight: LazyWeight,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None:
        raise ValueError(
            "an embedding with max_norm rewrites its weight at every look-up, which a low-rank "
            f"site forbids; got max_norm={max_norm}: build the embedding without it"
        )
    if scale_grad_by_freq or weight.dropout:  # which refuses dropout
        whole = weight.materialize()
        return F.embedding(input, whole, padding_idx, None, norm_type, True, sparse)
    W, A, B, s = weight.base, weight.lora_A, weight.lora_B, weight.scale
    # Autocast would round s B A, beside rows of W that it does not round.
    with _as_stored(weight.device.type):
        return low_rank_embedding(input, W, A, B, s, padding_idx, sparse)


def _materialized(value: Any) -> Any:
    if isinstance(value, LazyWeight):
        return value.materialize()
    if isinstance(value, (tuple, list)):
        return type(value)(_materialized(item) for item in value)
    if isinstance(value, dict):
        return {key: _materialized(item) for key, item in value.items()}
    return value


def _as_stored(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def _is_lazy(value: Any) -> bool:
    some = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(one, LazyWeight) for one in some)


def add_rounding_once(base: Tensor, update: Tensor) -> Tensor:
    """Return `base + update` in `base`'s dtype, added in `update`'s, which is no narrower."""
    return (base.to(update.dtype) + update).to(base.dtype)


def _refuse_write(name: str) -> None:
    if name in ("data", "out") or (name.endswith("_") and not name.endswith("__")):
        raise AttributeError(
            f"a write through {name} would change a temporary copy of the weight and be lost: a "
            "low-rank site's weight is computed. Write to `parametrizations.weight.original`"
        )


def _define_operator(name: str) -> None:
    def operator(self: LazyWeight, *others: Any) -> Any:
        return getattr(self.materialize(), name)(*_materialized(others))

    operator.__name__ = name
    setattr(LazyWeight, name, operator)


for _name in _OPERATORS:
    _define_operator(f"__{_name}__")
LazyWeight.__hash__ = object.__hash__  # type: ignore[method-assign]
