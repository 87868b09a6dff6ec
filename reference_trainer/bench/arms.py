"""The arms of a benchmark: training methods, each of which changes a module in place."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import relora_core as relora
from reference_trainer.errors import UserError
from relora_core.products.two_paths import TwoPathLinear

TARGETS = ("*_proj",)  # all matrices of a Llama except embedding and head
COMPILED = "-compiled"


def full_(module: nn.Module, rank: int) -> None:
    """Keep full rank: every matrix is trained."""


def dense_(module: nn.Module, rank: int) -> None:
    """Register W + s B A as a plain parametrization: autograd forms the sum and its gradient."""
    for linear in _targets(module):
        factors = _Dense(linear.weight, rank)
        linear.weight.requires_grad_(False)
        parametrize.register_parametrization(linear, "weight", factors, unsafe=True)


def plain_(module: nn.Module, rank: int) -> None:
    """Use two paths in plain PyTorch: autograd decides what to keep and compute."""
    for linear in _targets(module):
        linear.__class__ = _Plain
        _add_factors(linear, rank)


def two_paths_(module: nn.Module, rank: int) -> None:
    """Always use this library's two paths, the form that is correct for a W of any dtype."""
    for linear in _targets(module):
        linear.__class__ = _TwoPaths
        _add_factors(linear, rank)


def merged_(module: nn.Module, rank: int) -> None:
    """Always use the merged form, even where this library would not choose it.

    The library does not choose it under autocast or for 16-bit weights. For 16-bit weights only its
    cost is measured, because rounding the sum loses most of the update.
    """
    for linear in _targets(module):
        linear.__class__ = _Merged
        _add_factors(linear, rank)


def ours_(module: nn.Module, rank: int) -> None:
    """Use `relora_core.add_low_rank_`."""
    relora.add_low_rank_(module, TARGETS, rank=rank)


def peft_(module: nn.Module, rank: int) -> None:
    """Use the PEFT library's LoRA on the same matrices; all other parameters stay trained.

    Raises:
        UserError: if PEFT is not installed.
    """
    if find_spec("peft") is None:
        raise UserError("the arm peft needs the PEFT library: pip install peft, or omit the arm")
    from peft import LoraConfig, inject_adapter_in_model

    rest = [
        p for p in module.parameters() if not any(p is linear.weight for linear in _targets(module))
    ]
    options: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": r".*_proj"}
    inject_adapter_in_model(LoraConfig(**options), module)
    for p in rest:
        p.requires_grad_(True)


ARMS: dict[str, Callable[[nn.Module, int], None]] = {
    "full": full_,
    "dense": dense_,
    "plain": plain_,
    "ours": ours_,
    "two-paths": two_paths_,
    "merged": merged_,
    "peft": peft_,
}


def usual() -> list[str]:
    """Return the names of the default arms; `peft` is among them if PEFT is installed."""
    names = ["full", "dense", "plain", "ours"]
    return [*names, "peft"] if find_spec("peft") else names


def parse_arms(names: list[str]) -> list[tuple[str, str, bool]]:
    """Return (name, arm, whether it is compiled) for names such as "ours" and "ours-compiled".

    Raises:
        UserError: if a name is unknown or given twice.
    """
    parsed = [(name, name.removesuffix(COMPILED), name.endswith(COMPILED)) for name in names]
    for name, arm, _ in parsed:
        if arm not in ARMS:
            known = ", ".join(ARMS)
            raise UserError(f"--arms must be among {known}, each also with {COMPILED}; got {name}")
    if len(set(names)) < len(names):
        raise UserError(f"--arms must name each arm once; got {' '.join(names)}")
    return parsed


def _targets(module: nn.Module) -> list[nn.Linear]:
    named = module.named_modules()
    return [m for name, m in named if name.endswith("_proj") and isinstance(m, nn.Linear)]


def _add_factors(linear: nn.Linear, rank: int) -> None:
    out, inner = linear.weight.shape
    linear.weight.requires_grad_(False)
    linear.lora_A = nn.Parameter(linear.weight.new_empty(rank, inner))
    linear.lora_B = nn.Parameter(linear.weight.new_empty(out, rank))


class _Dense(nn.Module):
    def __init__(self, base: Tensor, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(base.new_empty(rank, base.shape[1]))
        self.lora_B = nn.Parameter(base.new_empty(base.shape[0], rank))

    def forward(self, base: Tensor) -> Tensor:
        return base + self.lora_B @ self.lora_A


class _Factored(nn.Linear):
    lora_A: nn.Parameter
    lora_B: nn.Parameter


class _Plain(_Factored):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_A), self.lora_B)


class _TwoPaths(_Factored):
    def forward(self, x: Tensor) -> Tensor:
        x, dtype = _computed(x)
        # Torch has no types for `apply`.
        y = TwoPathLinear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]),
            self.weight.to(dtype),
            self.lora_A.to(dtype),
            self.lora_B.to(dtype),
            None,
            1.0,
        )
        output: Tensor = y.view(*x.shape[:-1], -1)
        return output


class _Merged(_Factored):
    def forward(self, x: Tensor) -> Tensor:
        x, _ = _computed(x)
        # Torch has no types for `apply`.
        y = _MergedLinear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]), self.weight, self.lora_A, self.lora_B
        )
        output: Tensor = y.view(*x.shape[:-1], -1)
        return output


def _computed(x: Tensor) -> tuple[Tensor, torch.dtype]:
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x, x.dtype


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        return x @ _sum(W, A, B, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B = ctx.saved_tensors
        (g,) = grads
        h, u = g @ B.to(g.dtype), x @ A.to(x.dtype).t()
        dx = g @ _sum(W, A, B, x.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, (h.t() @ x).to(A.dtype), (g.t() @ u).to(B.dtype)


def _sum(W: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W + B A in `dtype`; the addition is in W's dtype, in a single kernel."""
    if W.dtype == dtype:
        return torch.addmm(W, B, A)
    return torch.add(W, B.to(dtype) @ A.to(dtype), out=torch.empty_like(W, dtype=dtype))
