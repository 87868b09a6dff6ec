"""The parametrization W + s B A: its factors, their draws and their merge."""

import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from relora_core._sharding import copy_from_full_, is_sharded, replicated, row_parts
from relora_core.lazy_weight import LazyWeight, add_rounding_once
from relora_core.randomness import keyed_uniform


class LowRank(nn.Module):
    r"""The parametrization $W \mapsto W + s B A$, with $s$ = `alpha / rank`.

    $A$ starts at `kaiming_uniform(a=sqrt(5))`, that is uniform in $\pm 1/\sqrt{in}$, and $B$ at
    zero, so the function is unchanged at first and $B$ has a gradient from the first step. The
    draw depends on nothing but (`seed`, `name`, the number of redraws so far), so every rank of
    every world size draws the same. Seed and number travel in the state dict.

    This is LoRA's initialization. The ReLoRA authors' released code zeroes both factors at first,
    which trains neither until the first restart.

    Args:
        base: $W$, `(out, ...)`; $A$ is `(rank, in)` and $B$ `(out, rank)` in its dtype and on its
            device, `in` being the product of the other dimensions.
        rank: $r$, from 1 to `min(out, in)`.
        alpha: the numerator of $s$, positive; `rank` (so $s$ = 1) if None.
        seed: of every draw, from 0 to 2**63 - 1.
        name: what tells this site's draws from another's; `add_low_rank_` gives the module's name.
        dropout: of the low-rank path's input while training, from 0 to below 1; for tensors that
            only `F.linear` uses. What is merged is s B A, the mean over what dropout does.
        trainable_scale: whether $s$ is a Parameter, `lora_scale` of shape `(1,)`, that starts at
            `alpha / rank`. A merge uses its value, and a redraw keeps it. (The authors' code
            zeroes it at a merge, after which neither it nor A and B have a gradient.)

    Raises:
        ValueError: if `base` has fewer than two dimensions, or an argument is out of range.
        TypeError: if `base` is not a floating-point tensor.

    Example:
        >>> site = LowRank(torch.zeros(4, 6), rank=2, alpha=8)
        >>> site.lora_A.shape, site.lora_B.shape, site.scale
        (torch.Size([2, 6]), torch.Size([4, 2]), 4.0)

    Reference: https://arxiv.org/abs/2307.05695, section 3.
    """

    def __init__(
        self,
        base: Tensor,
        *,
        rank: int,
        alpha: float | None = None,
        seed: int = 0,
        name: str = "",
        dropout: float = 0.0,
        trainable_scale: bool = False,
    ) -> None:
        super().__init__()
        check_low_rank(base, rank=rank, alpha=alpha, seed=seed, dropout=dropout)
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.seed = seed
        self.name = name
        self.dropout = dropout
        self.restart = 0
        self.sharded = False  # whether it has been seen sharded
        # What remove_low_rank gives back: whether W was trained, and its place among the others.
        self.base_requires_grad = base.requires_grad
        self.base_successors: tuple[str, ...] = ()
        self.lora_A = nn.Parameter(base.new_empty(rank, base[0].numel()))
        self.lora_B = nn.Parameter(base.new_empty(base.shape[0], rank))
        self.lora_scale = nn.Parameter(base.new_empty(1)) if trainable_scale else None
        self.reset_parameters()

    @property
    def scale(self) -> float | Tensor:
        """The factor s of every use of B A, the merge included; a tensor if it is trained."""
        return self.alpha / self.rank if self.lora_scale is None else replicated(self.lora_scale)

    def forward(self, base: Tensor) -> LazyWeight:
        """Return the lazy W + s B A."""
        dropout = self.dropout if self.training else 0.0
        return LazyWeight(base, self.lora_A, self.lora_B, self.scale, dropout)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A to its current draw, B to zero, s to its start; needed after `to_empty`."""
        self.refuse_gathered()
        self._draw_()
        if self.lora_scale is not None:
            self.lora_scale.fill_(self.alpha / self.rank)

    def redraw_(self) -> None:
        """Set A to its next draw and B to zero; a trained s stays."""
        self.refuse_gathered()
        self.restart += 1
        self._draw_()

    @torch.no_grad()
    def _draw_(self) -> None:
        if not self.lora_A.is_meta:
            draw = draw_A(
                torch.Size(self.lora_A.shape),
                seed=self.seed,
                name=self.name,
                restart=self.restart,
                pinned=self.lora_A.is_cuda,  # copied from there, the host need not wait
            )
            copy_from_full_(self.lora_A, draw)
        self.lora_B.zero_()

    def refuse_gathered(self) -> None:
        """Raise ValueError if the factors are FSDP's gathered copies, where writes are lost.

        It is known by their having been sharded when they were last looked at.
        """
        self.sharded = self.sharded or is_sharded(self.lora_A)
        if self.sharded and not is_sharded(self.lora_A):
            raise ValueError(
                f"the parameters of {self.name or 'a low-rank site'} are gathered, and what is "
                "written to them now would be lost: call reshard() of the FSDP module that owns "
                "them first, or pass the whole model"
            )

    @torch.no_grad()
    def merge_into_(self, base: Tensor) -> None:
        """Add s B A to `base` in place and zero B: together they keep the function.

        Sharded by rows, it needs A whole and neither W nor B. The host does not wait.

        Raises:
            ValueError: if the parameters are FSDP's gathered copies.
        """
        self.refuse_gathered()
        lazy = self(base)
        parts = row_parts(base, lazy.lora_B, lazy.lora_A)
        if parts is None:
            base.copy_(add_rounding_once(base, lazy.delta()))
        else:
            add_update_(*parts, lazy.scale)
        self.lora_B.zero_()

    def get_extra_state(self) -> Tensor:
        """Return the key of the draws and alpha, `[seed, restart, bits of alpha]`, as int64."""
        alpha = torch.tensor(self.alpha, dtype=torch.float64, device="cpu").view(torch.int64)
        key = torch.tensor([self.seed, self.restart], dtype=torch.int64, device="cpu")
        return torch.cat([key, alpha.view(1)])

    def set_extra_state(self, state: Tensor) -> None:
        """Take the key of the draws from a state dict.

        Raises:
            ValueError: if it was saved with another alpha, which would be another function.
        """
        seed, restart, _ = (int(value) for value in state.tolist())
        alpha = state.cpu()[2].view(torch.float64).item()
        if alpha != self.alpha:
            raise ValueError(
                f"{self.name or 'this low-rank site'} was saved with alpha={alpha:g} and has "
                f"alpha={self.alpha:g}: register it with the saved one"
            )
        self.seed, self.restart = seed, restart

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of this site."""
        return f"rank={self.rank}, alpha={self.alpha:g}, seed={self.seed}, restart={self.restart}"


def draw_A(
    shape: torch.Size, *, seed: int, name: str, restart: int, pinned: bool = False
) -> Tensor:
    r"""Draw the whole of $A$, uniform in $\pm 1/\sqrt{in}$, keyed by seed, name and restart."""
    key, bound = f"{seed}/{name}/{restart}", 1 / math.sqrt(shape[1])
    return keyed_uniform(key, shape, bound=bound, pinned=pinned)


def add_update_(W: Tensor, B: Tensor, A: Tensor, s: float) -> None:
    """W += s B A in place, computed in fp32 at least and rounded once."""
    wide = torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)
    total = W.to(wide).flatten(1)  # W's own memory, unless it is narrower or not contiguous
    total.addmm_(B.to(wide), A.to(wide), alpha=s)
    if W.dtype != wide or not W.is_contiguous():
        W.copy_(total.view(W.shape))


def check_low_rank(
    base: Tensor, *, rank: int, alpha: float | None, seed: int, dropout: float
) -> None:
    """Raise what `LowRank` raises for these arguments."""
    if is_lazy(base):
        raise ValueError(
            "the weight has no shape yet (a lazy module): run one batch through it first"
        )
    if base.ndim < 2:
        shape = tuple(base.shape)
        raise ValueError(f"a low-rank weight needs two dimensions or more; got shape {shape}")
    if not base.is_floating_point():
        raise TypeError(f"a low-rank weight must be floating point; got {base.dtype}")
    if base.numel() == 0:
        raise ValueError(f"a low-rank weight needs entries; got shape {tuple(base.shape)}")
    out, inner = base.shape[0], base[0].numel()
    if not 1 <= rank <= min(out, inner):
        raise ValueError(
            f"rank must be between 1 and min(out, in) = {min(out, inner)} for a weight of "
            f"{out} x {inner}; got {rank}"
        )
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be positive and finite; got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be from 0 to below 1; got {dropout}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2**63 - 1; got {seed}")
