"""The parametrization W + s B A: its factors, their draws and their merge."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from relora_core._torch_private import version_of
from relora_core.distributed.fsdp import fsdp_owns
from relora_core.distributed.local import is_sharded, local, mesh_dims
from relora_core.distributed.sharding import (
    copy_from_full_,
    copy_rows_,
    new_factors,
    parts,
    replicated,
    row_parts,
    sharded_like,
    spread_like,
)
from relora_core.low_rank.low_bits import join, split
from relora_core.low_rank.ties import overlaps_itself
from relora_core.products.delta import Delta
from relora_core.products.lazy_weight import LazyWeight
from relora_core.randomness import keyed_uniform


class LowRank(nn.Module):
    r"""The parametrization $W \mapsto W + s B A$, with $s$ = `alpha / rank`.

    $A$ starts at `kaiming_uniform(a=sqrt(5))`, which is uniform in $\pm 1/\sqrt{in}$, and $B$ at
    zero, so the function is unchanged at first and $B$ has a gradient from the first step. A draw
    depends only on (`seed`, `name`, the number of redraws so far), so every process at every world
    size draws the same $A$. The seed and that number are saved in the state dict.

    This is LoRA's initialization. The ReLoRA authors' released code zeroes both factors at first,
    which trains neither until the first restart.

    Args:
        base: the base $W$, `(out, ...)`. $A$, `(rank, in)`, and $B$, `(out, rank)`, have its dtype
            and device; `in` is the product of the other dimensions. If tensor parallelism has split
            $W$ by rows, $B$ is split in the same way; if by columns, $A$ is.
        batch_dims: the number of leading batch dimensions of $W$. Each matrix has its own A and B:
            with 1, for a bank `(E, out, in)`, A is `(E, rank, in)` and B is `(E, out, rank)`.
        rank: $r$, the rank of $B A$, from 1 to `min(out, in)`.
        alpha: the numerator of $s$, positive; `rank` (so $s$ = 1) if None.
        seed: the seed of every draw, from 0 to 2**63 - 1.
        name: distinguishes this site's draws from those of other sites; `add_low_rank_` gives the
            module's name.
        dropout: the dropout probability on the low-rank path's input while training, at least 0 and
            below 1; only for tensors that `F.linear` alone uses. A merge adds s B A, the mean over
            dropout.
        trainable_scale: whether $s$ is a Parameter, `lora_scale` of shape `(1,)`, that starts at
            `alpha / rank`. A merge uses its value, and a redraw keeps it. (The authors' code
            zeroes $s$ at a merge, and then none of $s$, $A$ and $B$ has a gradient.)

    Raises:
        ValueError: if `base` has fewer than two dimensions, or an argument is out of range; under
            tensor parallelism, also if there is dropout or `base` is not two-dimensional.
        TypeError: if `base` is not a floating-point tensor, or `rank` or `seed` is not an int.

    Examples:
        >>> site = LowRank(torch.zeros(4, 6), rank=2, alpha=8)
        >>> site.lora_A.shape, site.lora_B.shape, site.scale
        (torch.Size([2, 6]), torch.Size([4, 2]), 4.0)

    Reference: https://arxiv.org/abs/2307.05695, section 3.
    """

    merged_copy: nn.Parameter | None

    def right_inverse(self, value: Tensor) -> Tensor:
        """Refuse `module.weight = value`, because a value cannot be split into W and B A.

        Raises:
            NotImplementedError: always. (Torch calls this at registration and accepts the error.)
        """
        raise NotImplementedError(
            "a low-rank site's weight is computed, and cannot be assigned or changed in place "
            "(weight *= 2): write to parametrizations.<name>.original, with torch.no_grad"
        )

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
        batch_dims: int = 0,
    ) -> None:
        super().__init__()
        check_low_rank(
            base, rank=rank, alpha=alpha, seed=seed, dropout=dropout, batch_dims=batch_dims
        )
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.seed = seed
        self.name = name
        self.dropout = dropout
        self.restart = 0
        # The number that a restart in progress will set; whether a merge is between its two writes.
        self.restarting: int | None = None
        self.torn = False
        # Set by `split_bases_`: the dtype that W had, and the low bits that W lacks since then.
        self.split_from: torch.dtype | None = None
        self.low_bits: Tensor | None = None
        # Set by `keep_merged_`: [V | B], with V = W + s B A in the dtype of the computation.
        self.register_parameter("merged_copy", None)
        # The tensors, with versions, that it was made from; whether optimizer steps rebuild it.
        self._made_of: dict[int, int] | None = None
        self.followed = False
        # Restored by remove_low_rank: whether W was trained, and its place among the Parameters.
        self.base_requires_grad = base.requires_grad
        self.base_successors: tuple[str, ...] = ()
        A, B = new_factors(base, rank, batch_dims)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.mesh_dims = mesh_dims(A)  # without those that FSDP2 adds
        self.lora_scale = nn.Parameter(base.new_empty(1)) if trainable_scale else None
        self.reset_parameters()

    @property
    def scale(self) -> float | Tensor:
        """The scale s of B A, in every use and in merges; a tensor if it is trained."""
        return self.alpha / self.rank if self.lora_scale is None else replicated(self.lora_scale)

    def forward(self, base: Tensor) -> LazyWeight:
        """Return the lazy W + s B A.

        Raises:
            ValueError: if a merge was interrupted after its first write.
        """
        self._refuse_torn(self.name)
        dropout = self.dropout if self.training else 0.0
        copy = self._fresh_copy(base) if self.merged_copy is not None else None
        return LazyWeight(base, self.lora_A, self.lora_B, self.scale, dropout, copy)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A to its current draw, B to zero, s to its initial value; needed after `to_empty`."""
        self._refuse_gathered()
        self._draw_(self.restart)
        if self.lora_scale is not None:
            self.lora_scale.fill_(self.alpha / self.rank)

    @property
    def batch_dims(self) -> int:
        """The number of leading batch dimensions of W."""
        return self.lora_A.ndim - 2

    def redraw_(self) -> None:
        """Set A to its next draw and B to zero; a trained s stays."""
        self._refuse_gathered()
        self._draw_(self.restart + 1)
        self.restart += 1  # last, so that an interrupted draw is repeated

    @torch.no_grad()
    def _draw_(self, restart: int) -> None:
        if not self.lora_A.is_meta:
            draw = draw_A(
                torch.Size(self.lora_A.shape),
                seed=self.seed,
                name=self.name,
                restart=restart,
                pinned=self.lora_A.is_cuda,  # so that the host does not wait for the copy
            )
            copy_from_full_(self.lora_A, draw)
        self.lora_B.zero_()

    def _is_fully_sharded(self) -> bool:
        """Whether FSDP2 owns the factors, whether they are sharded or gathered now."""
        return mesh_dims(self.lora_A) > self.mesh_dims or fsdp_owns(self)

    def _refuse_gathered(self) -> None:
        """Raise ValueError if the factors are FSDP's gathered copies, where writes are lost."""
        if mesh_dims(self.lora_A) == self.mesh_dims and fsdp_owns(self):
            raise ValueError(
                f"the parameters of {self.name or 'a low-rank site'} are gathered, and a write to "
                "them now would be lost: call reshard() on the FSDP module that owns them first, "
                "or pass the whole model"
            )

    def _delta(self, base: Tensor, whole_A: Tensor | None = None) -> Delta:
        """Return this process's block of s B A; missing parts of A (rarely of B) are gathered.

        Args:
            base: W.
            whole_A: the whole A, if it has been gathered already; W must be whole or split by rows.

        Raises:
            ValueError: if the parameters are FSDP's gathered copies, or a split W has been
                converted or sharded since.
        """
        self._refuse_gathered()
        self._refuse_torn(self.name)
        self._refuse_converted(base)
        A, s = self.lora_A.detach(), self.scale
        if isinstance(s, Tensor):  # scale A in fp32 at least: 16 bits would round the product
            A, s = s.detach().to(torch.promote_types(s.dtype, torch.float32)) * A, 1.0
        W, B = base.detach(), self.lora_B.detach()
        block = parts(W, B, A) if whole_A is None else (*row_parts(W, B), whole_A)
        return Delta(*block, s)

    @torch.no_grad()
    def _merge_into_(self, base: Tensor, update: Delta | None = None) -> None:
        """Zero B and add its former s B A to `base`; the function does not change.

        If W is sharded by rows, A is gathered and neither W nor B is. The host waits only for the
        low bits of a split W.

        Args:
            base: W.
            update: the result of `self._delta(base)`, if it has been computed already.

        Raises:
            ValueError: if the parameters are FSDP's gathered copies.
        """
        self._refuse_gathered()
        self._refuse_torn(self.name)
        update = update or self._delta(base)
        if self.split_from is not None:
            total = update.add_(self._exact(base))
            self._move_(self.lora_B, self._halves_write(base, total))
            return
        # A bank merges matrix by matrix, if the process holds the same matrices of B as of W.
        whole = local(self.lora_B).shape[:-2] != update.B.shape[:-2]
        if whole:
            writes = [one.prepared(one.W) for one in update.matrices()]
            self._move_(self.lora_B, lambda: [write() for write in writes])
            return
        factors = local(self.lora_B).flatten(0, -3) if self.batch_dims else [local(self.lora_B)]
        for one, B in zip(update.matrices(), factors, strict=True):
            self._move_(B, one.prepared(one.W))

    def _move_(self, B: Tensor, write: Callable[[], object]) -> None:
        """Zero B, then write its update to W; if interrupted between, nothing is added twice."""
        self.torn = True
        B.zero_()
        write()
        self.torn = False

    @torch.no_grad()
    def _merged(self, base: Tensor) -> Tensor:
        """Return W + s B A, sharded as W: the value of W after a merge."""
        total = self._delta(base).add_(self._exact(base).clone())
        return sharded_like(total.to(self.split_from or base.dtype), base)

    def _keep_merged_(self, base: Tensor, dtype: torch.dtype) -> None:
        """Make the merged copy of a linear's W: see `relora_core.keep_merged_`."""
        copy = torch.zeros(self.copy_shape(base), dtype=dtype, device=base.device)
        self.merged_copy = nn.Parameter(copy, requires_grad=False)
        self._refresh_(base)

    @torch.no_grad()
    def _merge_and_redraw_(self, base: Tensor, update: Delta) -> None:
        """Add s B A to `base`, draw a new A and zero B; V of a merged copy does not change."""
        known = self._made_of in (_SHARDED, _versions(self.lora_A, self.lora_B, base))
        self._merge_into_(base, update)
        self.redraw_()
        if self.merged_copy is not None and known:
            inner = self.lora_A.shape[1]
            local(self.merged_copy)[:, inner : inner + self.rank].zero_()
            self._note_made(base)
        else:
            self._refresh_(base, zero=True)

    def _note_made(self, base: Tensor) -> None:
        """Record which factors the merged copy was made from."""
        sharded = is_sharded(self.lora_A) or is_sharded(base)
        self._made_of = _SHARDED if sharded else _versions(self.lora_A, self.lora_B, base)

    def _fresh_copy(self, base: Tensor) -> nn.Parameter | None:
        """Return the merged copy, rebuilt if the factors have changed; None if it cannot be used.

        A change cannot be seen when compiled, or when FSDP2 has gathered the factors. Then the
        calls that change factors rebuild the copy; `keep_merged_` lists them.
        """
        assert self.merged_copy is not None
        if base.dtype.itemsize <= self.merged_copy.dtype.itemsize:  # converted since
            return None
        if self.dropout or base.requires_grad:
            return None
        if torch.compiler.is_compiling():
            return self.merged_copy if self.followed else None
        if self._made_of == _SHARDED:
            return self.merged_copy
        factors = (self.lora_A, self.lora_B, base)
        if self._made_of is not None and self._made_of.keys() != set(map(id, factors)):
            if not fsdp_owns(self):
                return None
            self._made_of = _SHARDED
        elif self._made_of is None and fsdp_owns(self):
            self._made_of = _SHARDED
        elif self._made_of != _versions(*factors):
            self._refresh_(base)
        return self.merged_copy

    def copy_shape(self, base: Tensor) -> tuple[int, int]:
        """Return the shape of [V | B], its rows padded to a multiple of 8 entries for GPUs."""
        return base.shape[0], -(-(math.prod(base.shape[1:]) + self.rank) // 8) * 8

    @torch.no_grad()
    def _refresh_(self, base: Tensor, *, zero: bool = False) -> None:
        """Rebuild the merged copy from W, A and B, if there is one.

        Args:
            base: W.
            zero: whether B is known to be zero; A is then not gathered.
        """
        if self.merged_copy is None or self.lora_A.is_meta:
            return
        self._refuse_gathered()
        rows, own = self._rows_of_copy(base)
        if zero:
            self._fill_(rows, self._exact(base), local(self.lora_B))
        else:
            self._make_rows_(rows, self._delta(base))
        if not own:
            copy_rows_(self.merged_copy, rows, base)
        self._note_made(base)

    def _rows_of_copy(self, base: Tensor) -> tuple[Tensor, bool]:
        """Return memory for this process's rows of [V | B], and whether it is the copy's own.

        It is the copy's own if the copy is sharded as W is. Otherwise it is new memory, to be
        copied into the copy.
        """
        assert self.merged_copy is not None
        own = local(self.merged_copy)
        if is_sharded(self.merged_copy) == is_sharded(base):
            return own, True
        return own.new_empty(local(base).shape[0], own.shape[1]), False

    @torch.no_grad()
    def _make_rows_(self, rows: Tensor, update: Delta) -> None:
        """Set rows of [V | B], adding as a merge does: V is W after a merge, rounded."""
        update.sum_into_(rows[:, : self.lora_A.shape[1]])
        self._fill_(rows, None, update.B)

    def _fill_(self, rows: Tensor, V: Tensor | None, B: Tensor) -> None:
        inner = self.lora_A.shape[1]
        if V is not None:
            rows[:, :inner].copy_(V)
        rows[:, inner : inner + self.rank].copy_(B)
        rows[:, inner + self.rank :].zero_()

    def _exact(self, base: Tensor) -> Tensor:
        """Return this process's part of W; for a split W, its fp32 value as a copy.

        Raises:
            ValueError: if a split W has been converted or sharded since.
        """
        part = local(base.detach())
        if self.low_bits is None:
            return part
        self._refuse_converted(base)
        return join(part, self.low_bits.to(part.device))

    @torch.no_grad()
    def _set_exact_(self, base: Tensor, value: Tensor) -> None:
        """Set this process's part of W to `value`; for a split W, both halves."""
        if self.low_bits is None:
            local(base).copy_(value)
            return
        self._halves_write(base, value)()

    def _halves_write(self, base: Tensor, value: Tensor) -> Callable[[], object]:
        """Return a function that sets both halves of a split W and allocates no memory."""
        self._refuse_converted(base)
        assert self.low_bits is not None
        upper, low = split(value)
        if base.is_cuda and not self.low_bits.is_pinned():
            self.low_bits = self.low_bits.pin_memory()
        kept = self.low_bits
        return lambda: (base.copy_(upper), kept.copy_(low))

    @torch.no_grad()
    def _split_(self, base: nn.Parameter) -> None:
        """Round `base` to bfloat16 and keep the bits that it then lacks: see `split_bases_`."""
        self.split_from = base.dtype
        value, base.data = base.data, base.data.bfloat16()
        self.low_bits = torch.zeros(base.shape, dtype=torch.int16, device="cpu")
        if value.dtype == torch.float32 and not value.is_meta:
            self._set_exact_(base, value)

    @torch.no_grad()
    def _unsplit_(self, base: nn.Parameter) -> None:
        """Undo `split_`: W has its earlier dtype again, with its value rounded to that dtype."""
        if self.split_from is not None:
            base.data = self._exact(base).to(self.split_from)
        self.split_from = self.low_bits = None

    def _refuse_converted(self, base: Tensor) -> None:
        if self.low_bits is not None and (base.dtype != torch.bfloat16 or is_sharded(base)):
            now = "sharded" if is_sharded(base) else str(base.dtype)
            raise ValueError(
                f"{self.name or 'a low-rank site'}: a split W must stay bfloat16 and whole; it is "
                f"now {now}, and its low bits no longer match: convert and shard before "
                "split_bases_, and leave W out of FSDP2 by ignored_params"
            )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.low_bits is not None:
            destination[prefix + "low_bits"] = self.low_bits
        destination.pop(prefix + "merged_copy", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if self.low_bits is not None and prefix + "low_bits" in state_dict:
            self.low_bits.copy_(state_dict.pop(prefix + "low_bits"))
        if self.merged_copy is not None:
            state_dict[prefix + "merged_copy"] = self.merged_copy
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a deep copy, whose merged copy is stale and not rebuilt by steps."""
        return self.__dict__ | {"_made_of": None, "followed": False}

    def _apply(self, *arguments: Any) -> "LowRank":
        self._made_of = None  # a converted copy differs from one made from converted factors
        super()._apply(*arguments)  # type: ignore[no-untyped-call]
        return self

    def get_extra_state(self) -> Tensor:
        """Return the key of the draws and alpha, `[seed, restart, bits of alpha]`, as int64.

        With sharded factors it is a replicated DTensor, because some loaders ask each entry of a
        state dict for its mesh. Two bits of `restart` record an interrupted restart, so that the
        next restart after loading finishes it.

        Raises:
            ValueError: if a merge was interrupted after its first write.
        """
        self._refuse_torn(self.name)
        restart = self.restart
        if self.restarting is not None:
            restart |= _UNDER_WAY | (_REDRAWN if self.restart == self.restarting else 0)
        alpha = torch.tensor(self.alpha, dtype=torch.float64, device="cpu").view(torch.int64)
        key = torch.tensor([self.seed, restart], dtype=torch.int64, device="cpu")
        return spread_like(torch.cat([key, alpha.view(1)]), self.lora_A)

    @property
    def _extra_state(self) -> Tensor:
        """The key as an attribute, because loaders look up the value that an entry replaces."""
        return self.get_extra_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Take the key of the draws from a state dict.

        Raises:
            ValueError: if it was saved with another alpha, which would change the function.
        """
        state = local(state)
        seed, restart, _ = (int(value) for value in state.tolist())
        alpha = state.cpu()[2].view(torch.float64).item()
        if alpha != self.alpha:
            raise ValueError(
                f"{self.name or 'this low-rank site'} was saved with alpha={alpha:g} and has "
                f"alpha={self.alpha:g}: register it with the saved alpha"
            )
        self.seed, self.restart = seed, restart % _REDRAWN
        redrawn = self.restart if restart & _REDRAWN else self.restart + 1
        self.restarting = redrawn if restart & _UNDER_WAY else None

    def _refuse_torn(self, name: str) -> None:
        """Raise ValueError, with the site's name, if a merge was interrupted while it wrote."""
        if self.torn:
            raise ValueError(
                f"the merge of {name or 'the site'} was interrupted while it wrote, so W may lack "
                "its update: load an earlier checkpoint into a new model"
            )

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of this site."""
        return f"rank={self.rank}, alpha={self.alpha:g}, seed={self.seed}, restart={self.restart}"


# Flags beside the number of redraws in a saved key: a restart in progress, this site redrawn.
_UNDER_WAY, _REDRAWN = 1 << 62, 1 << 61
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# For factors that FSDP2 shards: the versions of their gathered copies tell nothing.
_SHARDED: dict[int, int] = {-1: -1}


def _versions(*tensors: Tensor) -> dict[int, int]:
    """Return how often each tensor has been written to, by the tensor's id."""
    return {id(tensor): version_of(tensor) for tensor in tensors}


def draw_A(
    shape: torch.Size, *, seed: int, name: str, restart: int, pinned: bool = False
) -> Tensor:
    r"""Draw the whole of $A$, uniform in $\pm 1/\sqrt{in}$, keyed by seed, name and restart."""
    key, bound = f"{seed}/{name}/{restart}", 1 / math.sqrt(shape[-1])
    return keyed_uniform(key, shape, bound=bound, pinned=pinned)


def check_low_rank(
    base: Tensor, *, rank: int, alpha: float | None, seed: int, dropout: float, batch_dims: int = 0
) -> None:
    """Raise what `LowRank` raises for these arguments."""
    if is_lazy(base):
        raise ValueError(
            "the weight has no shape yet (a lazy module): run one batch through it first"
        )
    if base.ndim < 2:
        shape = tuple(base.shape)
        raise ValueError(f"a low-rank weight must have two dimensions or more; got shape {shape}")
    if base.dtype not in _DTYPES:
        raise TypeError(
            "a low-rank weight must be float16, bfloat16, float32 or float64, for a merge to add "
            f"to; got {base.dtype}"
        )
    if base.layout != torch.strided:
        raise TypeError(f"a low-rank weight must be dense; got {base.layout}")
    if base.numel() == 0:
        raise ValueError(f"a low-rank weight must have entries; got shape {tuple(base.shape)}")
    if overlaps_itself(local(base.detach())):
        raise ValueError(
            "a low-rank weight must have memory for each entry, and this one is expanded: give the "
            "module a copy first (.clone())"
        )
    for name, value in (("rank", rank), ("seed", seed), ("batch_dims", batch_dims)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int; got {value!r}")
    if not 0 <= batch_dims <= base.ndim - 2:
        raise ValueError(
            f"batch_dims must leave two dimensions or more of the weight's {base.ndim}; got "
            f"{batch_dims}"
        )
    if batch_dims and dropout:
        raise ValueError(
            "a bank must be without dropout, which acts on the one input of F.linear; got "
            f"dropout={dropout:g}: leave it out"
        )
    out, inner = base.shape[batch_dims], math.prod(base.shape[batch_dims + 1 :])
    if not 1 <= rank <= min(out, inner):
        raise ValueError(
            f"rank must be between 1 and min(out, in) = {min(out, inner)} for a weight of "
            f"{out} x {inner}; got {rank}"
        )
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be positive and finite; got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; got {dropout}")
    if is_sharded(base) and base.ndim != 2:
        raise ValueError(
            "under tensor parallelism a low-rank weight must be a matrix; got shape "
            f"{tuple(base.shape)}"
        )
    if is_sharded(base) and dropout:
        raise ValueError(
            "under tensor parallelism each process would drop different entries of the same input; "
            f"got dropout={dropout:g}: leave it out"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2**63 - 1; got {seed}")
