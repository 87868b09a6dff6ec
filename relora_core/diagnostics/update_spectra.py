"""The spectrum of W_k - W_0 of every site, accumulated over restarts without keeping W_0."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta

import torch
from torch import Tensor, nn

from relora_core.diagnostics.spectrum import Spectrum
from relora_core.distributed.consensus import agreed
from relora_core.distributed.local import local
from relora_core.distributed.sharding import (
    copy_from_full_,
    full,
    local_part,
    shard_sum,
    sharded_like,
    split_once,
)
from relora_core.products.delta import Delta
from relora_core.restart import refuse_overflow, update_norms
from relora_core.sites.globs import matching
from relora_core.sites.site import Site, sites_of

Factors = tuple[Tensor, Tensor]


class UpdateSpectra:
    r"""The factors of all updates that restarts merge; the sum of these updates is $W_k - W_0$.

    $$W_k - W_0 = \sum_{j \le k} s_j B_j A_j = B A, \qquad
    \sigma_i^2 = \lambda_i\left((A A^\top)^{1/2} B^\top B \, (A A^\top)^{1/2}\right)$$

    with all $B_j$ (times $s_j$) side by side in $B$, and all $A_j$ stacked in $A$. A site `(m, n)`
    of rank r keeps r (m + n) numbers per restart, sharded as W is; once k r exceeds min(m, n), it
    keeps the sum of the updates instead. If FSDP2 offloads W to the CPU, the kept factors are on
    the GPU. A spectrum costs two all-reduces of (k r) x (k r) numbers and the eigenvalues of
    matrices of that size, in float64. Singular values below 1e-7 of the largest are rounding error.

    The sum consists of the exact updates. It ignores what a 16-bit W loses by rounding in a merge,
    and it misses a `merge_` that is called without `keep_` and `restart_`.

    Args:
        model: a model with low-rank sites; shard it first, if it is to be sharded. Every process
            must make this object and call its methods in the same way.
        targets: globs over the names of sites; those that match are followed.
        timeout: how long the processes that share the model wait for each other in `keep_` and
            `measure`.

    Raises:
        ValueError: if there is no site or no glob, or a glob matches no site or a bank.

    Examples:
        >>> from relora_core import add_low_rank_, low_rank_sites, restart_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=1)
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        >>> spectra = UpdateSpectra(model)
        >>> for _ in range(3):
        ...     for _, site in low_rank_sites(model):
        ...         _ = nn.init.normal_(site.lora_B)  # for a cycle of training
        ...     spectra.keep_()
        ...     _ = restart_(model, optimizer)
        >>> spectra.measure()["0"].rank()
        3

    Reference: https://arxiv.org/abs/2307.05695, equation 1: the rank of a sum of updates.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: str | Iterable[str] = "*",
        *,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        sites = dict(sites_of(model))
        self._model = model
        self._timeout = timeout
        self._names = matching(targets, sites, "low-rank site")
        banks = [name for name in self._names if sites[name].low_rank.batch_dims]
        if banks:
            raise ValueError(
                f"a spectrum must be of one matrix, and {banks[0]} is a bank of several: leave "
                "banks out of targets"
            )
        self._next = {name: torch.tensor(sites[name].restart, device="cpu") for name in self._names}
        self._kept: dict[str, Factors] = {}

    @torch.no_grad()
    def keep_(self) -> None:
        """Keep the update of the ending cycle; call this before each `restart_`.

        Raises:
            ValueError: if this cycle's update is kept already, an earlier one is missing, or a
                factor is not finite. Nothing is kept then.
            OutOfStepError: if a process does not call this in time, or it alone raises an error;
                the message names the process.
        """
        sites = self._sites()
        with self._agreed("keep_", sites):
            for name, site in sites:
                if not self._is_new(name, site):
                    raise ValueError(
                        f"{name}: the update of cycle {site.restart} is kept already: call keep_ "
                        "only once before each restart_"
                    )
        with self._agreed("keep_", sites):
            updates = [site._delta() for _, site in sites]
            refuse_overflow(sites, update_norms(sites, updates))
        for (name, site), update in zip(sites, updates, strict=True):
            self._kept[name] = _compressed(*self._so_far(name, _factors(site, update)))
            self._next[name] = self._next[name] + 1  # not in place: a state dict may hold it

    @torch.no_grad()
    def measure(self) -> dict[str, Spectrum]:
        """Return each site's spectrum of W + s B A - W_0; W_0 is W when this object was made.

        Raises:
            ValueError: if a restart ran without `keep_`, or a factor is not finite.
            OutOfStepError: if a process does not call this in time, or it alone raises an error;
                the message names the process.
        """
        found = {}
        sites = self._sites()
        with self._agreed("measure", sites):
            new = {name: self._is_new(name, site) for name, site in sites}
        for name, site in sites:
            B, A = self._so_far(name, _factors(site)) if new[name] else self._kept[name]
            shape = (B.shape[0], A.shape[1:].numel())
            grams = _grams(B, A)
            if not all(gram.isfinite().all() for gram in grams):
                raise ValueError(f"{name}: the update is not finite")
            found[name] = Spectrum(_singular_values(*grams)[: min(shape)].cpu(), shape)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Return the kept tensors by name, with their sharding and without copies.

        `torch.distributed.checkpoint` fills it in place after `reserve_`.
        """
        state = {f"{name}.restart": restart for name, restart in self._next.items()}
        for name, (B, A) in self._kept.items():
            state |= {f"{name}.lora_B": B, f"{name}.lora_A": A}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned, in this layout or another, whole or sharded.

        Raises:
            ValueError: if the state belongs to other sites. Nothing is changed then.
        """
        parts = ("restart",) if len(state) == len(self._names) else ("restart", "lora_B", "lora_A")
        expected = {f"{name}.{part}" for name in self._names for part in parts}
        if state.keys() != expected:
            different = ", ".join(sorted(state.keys() ^ expected)[:4])
            raise ValueError(
                f"the state must be of the same {len(self._names)} sites; its keys differ in "
                f"{different}: give the targets that it was made with"
            )
        whole = {name: full(tensor) for name, tensor in state.items()}
        counts = {name: whole[f"{name}.lora_B"].shape[1] for name in self._names if len(parts) > 1}
        kept = self._room(counts)
        for name, factors in kept.items():
            for part, own in zip(parts[1:], factors, strict=True):
                found = whole[f"{name}.{part}"].shape
                if found != own.shape:
                    raise ValueError(
                        f"{name}.{part} must have shape {tuple(own.shape)}; got {tuple(found)}: "
                        "the state is of another model"
                    )
        self._kept = kept
        for name, own in self.state_dict().items():
            copy_from_full_(own, whole[name])

    def reserve_(self, restarts: int) -> None:
        """Allocate the tensors kept after `restarts` restarts, for a checkpoint to fill in place.

        Args:
            restarts: the number of restarts, 0 or more.
        """
        ranks = {name: site.rank for name, site in self._sites()}
        self._kept = self._room({n: restarts * rank for n, rank in ranks.items() if restarts})

    @torch.no_grad()
    def _room(self, counts: Mapping[str, int]) -> dict[str, Factors]:
        """Return zero factors for the sites in `counts`, which says how many columns and rows."""
        room = {}
        for name, site in self._sites() if counts else []:
            B, A = _factors(site)
            count = min(counts[name], _most(B, A))
            columns = local(B).new_zeros(len(local(B)), count)
            rows = local(A).new_zeros(count, *local(A).shape[1:])
            room[name] = _spread((columns, rows), B, A)
        return room

    def _agreed(self, call: str, sites: list[tuple[str, Site]]) -> AbstractContextManager[None]:
        name, site = sites[0]
        return agreed(self._model, f"{call} of {name} in cycle {site.restart}", self._timeout)

    def _sites(self) -> list[tuple[str, Site]]:
        sites = dict(sites_of(self._model))
        return [(name, sites[name]) for name in self._names]

    def _is_new(self, name: str, site: Site) -> bool:
        """Whether the site is in a cycle whose update is not kept yet."""
        ahead = site.restart - int(self._next[name])
        if ahead not in (0, -1):
            raise ValueError(
                f"{name} is in cycle {site.restart}, and the updates of the cycles before "
                f"{int(self._next[name])} are kept: call keep_ before each restart_, and load "
                "its state together with the model's"
            )
        return ahead == 0

    def _so_far(self, name: str, new: Factors) -> Factors:
        """Return the kept factors, joined with those of the current cycle."""
        if name not in self._kept:
            return new
        (before_B, before_A), (B, A) = self._kept[name], new
        both = torch.cat([local(before_B), local(B)], 1), torch.cat([local(before_A), local(A)])
        return _spread(both, B, A)


def _factors(site: Site, update: Delta | None = None) -> Factors:
    """Return copies of s B, `(m, r)`, and A, `(r, ...)`, in fp32 at least, sharded as W is."""
    update = update or site._delta()
    wide = torch.promote_types(update.A.dtype, torch.float32)
    A = update.A.to(wide, copy=True)
    return split_once(site.weight, update.B.to(wide) * update.s, A)


def _grams(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return Bᵀ B and A Aᵀ on every process, in float64."""
    columns, rows = local(B).double(), local(A).flatten(1).double()
    return shard_sum(columns.t() @ columns, B), shard_sum(rows @ rows.t(), A)


def _singular_values(BB: Tensor, AA: Tensor) -> Tensor:
    """Return the singular values of B A, descending: A Aᵀ = V Λ Vᵀ; from Λ^½ Vᵀ Bᵀ B V Λ^½."""
    L, V = torch.linalg.eigh(AA)
    half = V * L.clamp(min=0).sqrt()
    squares: Tensor = torch.linalg.eigvalsh(half.t() @ BB @ half)
    return squares.clamp(min=0).sqrt().flip(0)


def _compressed(B: Tensor, A: Tensor) -> Factors:
    """Return B and A or, if they have more columns than B A can have rank, B A and an identity.

    The identity then has the size of the smaller side of B A, and either B or A is gathered.
    """
    most = _most(B, A)
    if B.shape[1] <= most:
        return B, A
    eye = torch.eye(most, dtype=B.dtype, device=B.device)
    if B.shape[0] == most:
        product = full(B).double() @ local(A).flatten(1).double()
        rows = product.to(A.dtype).view(most, *local(A).shape[1:])
        return _spread((local_part(eye, B), rows), B, A)
    columns = local(B).double() @ full(A).flatten(1).double()
    return _spread((columns.to(B.dtype), local_part(eye.view(most, *A.shape[1:]), A)), B, A)


def _spread(parts: Factors, B: Tensor, A: Tensor) -> Factors:
    """Return the factors of which this process holds `parts`, sharded as B and A are."""
    count = len(parts[1])
    return (
        sharded_like(parts[0], B, (B.shape[0], count)),
        sharded_like(parts[1], A, (count, *A.shape[1:])),
    )


def _most(B: Tensor, A: Tensor) -> int:
    """Return the highest rank that B A can have."""
    return min(B.shape[0], A.shape[1:].numel())
