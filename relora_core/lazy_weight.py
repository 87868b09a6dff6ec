"""A weight that stands for W + s B A and is formed only when an operation needs it whole."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_core._sharding import is_sharded
from relora_core.bilinear import einsum, in_whole_words, left_product, right_product
from relora_core.embedding import low_rank_embedding
from relora_core.linear import autocasts, computes_in, low_rank_linear, merged_linear
from relora_core.one_path import following
from relora_core.tensor_parallel import parallel_linear

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


class LazyWeight:
    r"""What `module.weight` evaluates to at a low-rank site: $W + s B A$, not yet formed.

    `F.linear`, `F.embedding` and products (matmul, bmm, grouped products, einsum) compute two
    paths; every other function, method or operator receives the materialized tensor, so that any
    module is right and those are fast. Of a bank `weight[i]` is the lazy weight of one matrix, and
    a transpose is lazy too. It is no tensor, as `isinstance` says: `torch.compile` cannot trace
    tensor subclasses inside the layer that owns them.

    Args:
        base: $W$, of any shape `(out, ...)`, or a bank of such.
        lora_A: $A$, `(rank, in)`, where `in` is the product of `base`'s other dimensions; of a
            bank, with its leading dimensions.
        lora_B: $B$, `(out, rank)`; of a bank, likewise.
        scale: $s$; a tensor of one entry if it is trained.
        dropout: the probability with which `F.linear` zeroes each entry of the low-rank path's
            input, the others growing by 1 / (1 - dropout): y = x Wᵀ + s (dropout(x) Aᵀ) Bᵀ.
        merged: [V | B], of which V = W + s B A is then all that is used of $W$; None without.

    Raises:
        ValueError: if there is dropout and anything but `F.linear` asks for the weight.
        AttributeError: at an in-place method, `data` or `out=`: what is written would change a
            temporary, and be lost; so would a hook or an attribute. A write to a view of it
            (`weight.detach().zero_()`) is lost without notice: write to
            `parametrizations.weight.original`.

    Examples:
        >>> W, A, B = torch.eye(2), torch.ones(1, 2), torch.ones(2, 1)
        >>> weight = LazyWeight(W, A, B, 0.5)
        >>> F.linear(torch.ones(1, 2), weight)  # two paths
        tensor([[2., 2.]])
        >>> weight + 0                          # anything else: materialized
        tensor([[1.5000, 0.5000],
                [0.5000, 1.5000]])
    """

    base: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scale: float
    dropout: float
    merged: Tensor | None

    def __init__(
        self,
        base: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float | Tensor,
        dropout: float = 0.0,
        merged: Tensor | None = None,
    ) -> None:
        if isinstance(scale, Tensor):  # into A, so that s is a number wherever it is used
            lora_A, scale = scale * lora_A, 1.0
        # Past its own refusal.
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "lora_A", lora_A)
        object.__setattr__(self, "lora_B", lora_B)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "dropout", dropout)
        object.__setattr__(self, "merged", merged)

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
    def batch_dims(self) -> int:
        """How many leading dimensions number matrices of their own."""
        return self.lora_A.ndim - 2

    def has_paths(self) -> bool:
        """Whether products may take two paths."""
        return self.merged is None and not self.dropout and self.base.ndim == self.lora_A.ndim

    def transposed(self) -> "LazyWeight":
        """Return Vᵀ = Wᵀ + s Aᵀ Bᵀ, of every matrix of a bank."""
        return type(self)(self.base.mT, self.lora_B.mT, self.lora_A.mT, self.scale)

    def transpose(self, first: int, second: int) -> Any:
        """Exchange two dimensions."""
        if self.has_paths() and {first % self.ndim, second % self.ndim} == {
            self.ndim - 2,
            self.ndim - 1,
        }:
            return self.transposed()
        return self.materialize().transpose(first, second)

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
        return _product(torch.matmul, self, other)

    __matmul__ = matmul

    def __rmatmul__(self, other: Any) -> Any:
        return _product(torch.matmul, other, self)

    def __getitem__(self, index: Any) -> Any:
        lead = index if isinstance(index, tuple) else (index,)
        if not 0 < len(lead) <= self.batch_dims or not all(_picks(one) for one in lead):
            return self.materialize()[_materialized(index)]
        return type(self)(self.base[index], self.lora_A[index], self.lora_B[index], self.scale)

    def unbind(self, dim: int = 0) -> tuple[Any, ...]:
        """Return what there is along a dimension, each without it."""
        if dim % self.ndim or not self.batch_dims:
            return self.materialize().unbind(dim)
        factors = zip(self.base.unbind(), self.lora_A.unbind(), self.lora_B.unbind(), strict=True)
        return tuple(type(self)(W, A, B, self.scale) for W, A, B in factors)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind())

    def __len__(self) -> int:
        return len(self.base)

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
        rank = self.lora_A.shape[0]
        return f"LazyWeight(shape={tuple(self.shape)}, rank={rank}, dtype={self.dtype})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse_write(name)
        if not hasattr(torch.Tensor, name):  # what somebody has noted on the Parameter
            return getattr(self.base, name)
        return getattr(self.materialize(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(_lost(f"setting {name}"))

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
        if len(args) == 2 and not kwargs and any(func is product for product in _PRODUCTS):
            if func is torch.Tensor.matmul and torch.compiler.is_compiling():
                return _product(torch.matmul, *_in_order(*args))
            return _product(func, *args)
        if func is torch._grouped_mm:
            return _grouped_product(*args, **kwargs)
        if func is torch.einsum:
            return _einsum(*args)
        if func is torch.transpose and _is_lazy(args[0]):
            return args[0].transpose(*args[1:], **kwargs)
        if func is torch.unbind and _is_lazy(args[0]):
            return args[0].unbind(*args[1:], **kwargs)
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
        if torch.promote_types(input.dtype, W.dtype) == W.dtype and not autocasts(W.device.type):
            # As layers do that are kept in fp32 within a 16-bit model, if their weight is a Tensor.
            input = input.to(W.dtype)
        return low_rank_linear(input, W, A, B, s, bias, weight.dropout)
    return F.linear(*_materialized((input, weight, bias)))


def _product(func: Callable[..., Any], a: Any, b: Any) -> Any:
    """Return the product of two of which one is lazy."""
    right = isinstance(b, LazyWeight)
    lazy, x = (b, a) if right else (a, b)
    if not (isinstance(x, Tensor) and lazy.has_paths()) or _is_lazy(x) or x.is_nested:
        return func(*_materialized((a, b)))
    if lazy.ndim == 2:
        if right:
            return _linear(x, lazy.transposed())
        if x.ndim <= 2:
            return _linear(x.t(), lazy).t()
        return func(*_materialized((a, b)))
    W, A, B = lazy.base, lazy.lora_A.to(lazy.dtype), lazy.lora_B.to(lazy.dtype)
    return (right_product if right else left_product)(func, x, W, A, B, lazy.scale)


def _in_order(x: Any, weight: Any) -> tuple[Any, Any]:
    """Return the operands of @ in their order, of which dynamo (2.8 to 2.13) puts a tensor first.

    Raises:
        ValueError: where both orders have fitting shapes.
    """
    if not isinstance(weight, LazyWeight):
        return x, weight
    right = x.shape[-1] == weight.shape[-2]
    left = x.shape[max(x.ndim - 2, 0)] == weight.shape[-1]
    if left and right:
        raise ValueError(
            "torch.compile does not tell weight @ x from x @ weight, and both fit: write "
            "torch.matmul(x, weight)"
        )
    return (weight, x) if left else (x, weight)


def _grouped_product(a: Any, b: Any, offs: Any = None, bias: Any = None, **how: Any) -> Any:
    right = isinstance(b, LazyWeight)
    lazy, x = (b, a) if right else (a, b)
    if _is_lazy(x) or not lazy.has_paths() or not lazy.batch_dims or bias is not None:
        return torch._grouped_mm(*_materialized((a, b, offs, bias)), **how)

    def product(a: Tensor, b: Tensor) -> Tensor:
        whole: Tensor = torch._grouped_mm(a, b, offs, **how)
        return whole

    A, B = in_whole_words(lazy.lora_A.to(lazy.dtype), lazy.lora_B.to(lazy.dtype))
    return (right_product if right else left_product)(product, x, lazy.base, A, B, lazy.scale)


def _einsum(equation: Any, *operands: Any) -> Any:
    if isinstance(equation, str):
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = tuple(operands[0])
        place = next((i for i, one in enumerate(operands) if isinstance(one, LazyWeight)), 0)
        lazy = operands[place]
        if _is_lazy(lazy) and lazy.has_paths():
            W, A, B = lazy.base, lazy.lora_A.to(lazy.dtype), lazy.lora_B.to(lazy.dtype)
            beside = einsum(equation, operands, place, A, B, lazy.scale)
            if beside is not None:
                others = (*operands[:place], W, *operands[place + 1 :])
                return torch.einsum(equation, *others) + beside
    return torch.einsum(equation, *_materialized(operands))


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


def _picks(index: Any) -> bool:
    """Whether an index is of one dimension."""
    if isinstance(index, Tensor):
        return index.dtype not in (torch.bool, torch.uint8) or index.ndim == 1
    return isinstance(index, (int, slice, torch.SymInt)) and not isinstance(index, bool)


def _is_lazy(value: Any) -> bool:
    some = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(one, LazyWeight) for one in some)


def add_rounding_once(base: Tensor, update: Tensor) -> Tensor:
    """Return `base + update` in `base`'s dtype, added in `update`'s, which is no narrower."""
    return (base.to(update.dtype) + update).to(base.dtype)


def _refuse_write(name: str) -> None:
    if name in _LOST or (name.endswith("_") and not name.endswith("__")):
        raise AttributeError(_lost(f"a write through {name}"))


def _lost(write: str) -> str:
    return (
        f"{write} would change a temporary copy of the weight and be lost: a low-rank site's "
        "weight is computed. Write to `parametrizations.weight.original`"
    )


def _define_operator(name: str) -> None:
    def operator(self: LazyWeight, *others: Any) -> Any:
        return getattr(self.materialize(), name)(*_materialized(others))

    operator.__name__ = name
    setattr(LazyWeight, name, operator)


for _name in _OPERATORS:
    _define_operator(f"__{_name}__")
LazyWeight.__hash__ = object.__hash__  # type: ignore[method-assign]
