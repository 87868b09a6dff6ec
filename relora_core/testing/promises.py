"""What a module with low-rank sites promises, an assertion each."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from relora_core.register import register_low_rank, remove_low_rank
from relora_core.serialization import merged_state_dict
from relora_core.sites import Site, low_rank_sites
from relora_core.testing.subjects import (
    BrokenPromiseError,
    LowRankSite,
    Sites,
    exact_update,
    exact_weight,
    find_sites,
    fitting,
    loss_of,
    outputs,
    scale_of,
    trained_scale,
    wide_copy,
)
from relora_core.testing.twin import DenseTwin

_CLOSE = 1e-5  # of the largest value: float64 in all but what a module computes in float32 itself


def assert_is_dense(model: nn.Module, *inputs: Tensor, sites: Sites = find_sites) -> None:
    r"""Assert that the module computes with $W + s B A$ and with nothing else.

    Args:
        model: with low-rank sites; a copy in float64 is what is looked at.
        inputs: of one call of it.
        sites: finds the sites of layers of your own.

    Raises:
        BrokenPromiseError: if an output is another than the dense twin's.

    Example:
        >>> from relora_core import register_low_rank
        >>> assert_is_dense(register_low_rank(nn.Linear(3, 2), rank=1), torch.ones(1, 3))
    """
    wide, x = wide_copy(model), [t.double() if t.is_floating_point() else t for t in inputs]
    _same_outputs(wide, DenseTwin(wide, sites), x, "the output is not that of W + s B A")


def assert_gradients_are_dense(
    model: nn.Module, *inputs: Tensor, sites: Sites = find_sites
) -> None:
    """Assert that all gradients are those of the dense twin, and that W has none.

    Those of A, B and whatever else is trained, and of the inputs: of a random linear function of
    the outputs.

    Args:
        model: with low-rank sites.
        inputs: of one call of it.
        sites: finds the sites of layers of your own.

    Raises:
        BrokenPromiseError: if one is another, or W is trained.

    Example:
        >>> from relora_core import register_low_rank
        >>> assert_gradients_are_dense(register_low_rank(nn.Linear(3, 2), rank=1), torch.ones(1, 3))
    """
    wide = wide_copy(model)
    found = sites(wide)
    for name, site in found.items():
        if site.weight.requires_grad:
            raise BrokenPromiseError(f"W of {name!r} is trained: freeze it (requires_grad_(False))")
    x = [t.double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    twin = DenseTwin(wide, sites)
    own: dict[str, Tensor] = {n: p for n, p in wide.named_parameters() if p.requires_grad}
    for name, site in found.items():
        own |= {f"{name}.lora_A": site.lora_A, f"{name}.lora_B": site.lora_B}
        scale = trained_scale(site)
        own |= {} if scale is None else {f"{name}.lora_scale": scale}
    floats = {f"input {i}": t for i, t in enumerate(x) if t.requires_grad}
    names = [n for n in twin.leaves if n in own and own[n].requires_grad]
    actual = _gradients(wide(*x), {**{n: own[n] for n in names}, **floats})
    expected = _gradients(twin(*x), {**{n: twin.leaves[n] for n in names}, **floats})
    for name in (*names, *floats):
        _close(actual[name], expected[name], f"the gradient of {name!r} is not the dense one")


def assert_merge_keeps_function(
    model: nn.Module, *inputs: Tensor, sites: Sites = find_sites
) -> None:
    """Assert that a merge of all sites changes no output.

    Args:
        model: with low-rank sites.
        inputs: of one call of it.
        sites: finds the sites of layers of your own.

    Raises:
        BrokenPromiseError: if an output moves.

    Example:
        >>> from relora_core import register_low_rank
        >>> layer = register_low_rank(nn.Linear(3, 2), rank=1)
        >>> assert_merge_keeps_function(layer, torch.ones(1, 3))
    """
    wide, x = wide_copy(model), [t.double() if t.is_floating_point() else t for t in inputs]
    merged = copy.deepcopy(wide)
    for site in sites(merged).values():
        site.merge_()
    _same_outputs(merged, wide, x, "a merge moved the output")


def assert_merge_adds_update(model: nn.Module, *, sites: Sites = find_sites) -> None:
    """Assert that a merge makes of W the number nearest to W + s B A, and nothing else.

    W may be half a unit of its last place away, and what a product in fp32 (or W's dtype, if that
    is wider) may be. W stays the same Parameter, frozen; B becomes zero, or A does; nothing else of
    the model changes.

    Args:
        model: with low-rank sites.
        sites: finds the sites of layers of your own.

    Raises:
        BrokenPromiseError: if not.

    Example:
        >>> from relora_core import register_low_rank
        >>> assert_merge_adds_update(register_low_rank(nn.Linear(3, 2), rank=1))
    """
    merged = copy.deepcopy(model)
    found = sites(merged)
    expected = {n: exact_weight(s) + exact_update(s) for n, s in found.items()}
    allowed = {n: _rounding(s) for n, s in found.items()}
    bases = {n: (s.weight, s.weight.dtype) for n, s in found.items()}
    written = {id(t) for s in found.values() for t in (s.weight, s.lora_A, s.lora_B)}
    rest = {n: p for n, p in merged.named_parameters() if id(p) not in written}
    before = {n: p.detach().clone() for n, p in rest.items()}
    for site in found.values():
        site.merge_()
    for name, site in found.items():
        W, dtype = bases[name]
        if site.weight is not W or W.dtype != dtype or W.requires_grad or W.grad_fn:
            raise BrokenPromiseError(
                f"a merge must write into W, which stays a frozen Parameter: {name!r}"
            )
        error = (exact_weight(site) - expected[name]).abs()
        if not bool((error <= allowed[name]).all()):
            worst = int((error / allowed[name].clamp(min=1e-300)).argmax())
            raise BrokenPromiseError(
                f"a merge left W of {name!r} {error.flatten()[worst].item():.3g} away from "
                f"W + s B A; rounding explains {allowed[name].flatten()[worst].item():.3g}"
            )
        if exact_update(site).any():
            raise BrokenPromiseError(f"a merge must zero B, or s B A counts twice: {name!r}")
    for name, p in rest.items():
        if not torch.equal(p.detach(), before[name]):
            raise BrokenPromiseError(f"a merge changed {name!r}, which is no W and no factor")


def assert_merge_is_idempotent(model: nn.Module, *, sites: Sites = find_sites) -> None:
    """Assert that merging twice is merging once, bit for bit.

    Args:
        model: with low-rank sites.
        sites: finds the sites of layers of your own.

    Raises:
        BrokenPromiseError: if the second merge changes anything.

    Example:
        >>> from relora_core import register_low_rank
        >>> assert_merge_is_idempotent(register_low_rank(nn.Linear(3, 2), rank=1))
    """
    merged = copy.deepcopy(model)
    for _ in range(2):
        before = _state(merged)
        for site in sites(merged).values():
            site.merge_()
    _same_state(_state(merged), before, "a second merge changed")


def assert_merges_add_up(
    model: nn.Module, *, sites: Sites = find_sites, may_lose: float = 0.05
) -> None:
    r"""Assert that W keeps what ten small merges add to it.

    $\lVert (W_{10} - W_0) - \sum_i s B_i A_i \rVert^2 \le$ `may_lose`$^2$
    $\cdot \sum_i \lVert s B_i A_i \rVert^2$, with each $\lVert s B_i A_i \rVert$ a thousandth of
    $\lVert W \rVert$. A W of 16 bits loses more than half: `split_bases_` keeps what it lacks.

    Args:
        model: with low-rank sites.
        sites: finds the sites of layers of your own.
        may_lose: the fraction that may be lost.

    Raises:
        BrokenPromiseError: if more is lost.

    Example:
        >>> from relora_core import register_low_rank
        >>> assert_merges_add_up(register_low_rank(nn.Linear(3, 2), rank=1))
    """
    merged = copy.deepcopy(model)
    for name, site in sites(merged).items():
        first = exact_weight(site)
        norm = float(first.norm()) or 1.0
        total = torch.zeros_like(first)
        for number in range(10):
            _fill_B_(site, seed=number)
            size = float(exact_update(site).norm())
            if not size:
                break  # no A to speak of: another promise
            with torch.no_grad():
                site.lora_B.mul_(1e-3 * norm / size)
            total += exact_update(site)
            site.merge_()
            site.redraw_()
        added = 1e-3 * norm * math.sqrt(10)
        lost = float((exact_weight(site) - first - total).norm()) / added
        if not lost <= may_lose:
            raise BrokenPromiseError(
                f"ten small merges into W of {name!r} ({site.weight.dtype}) lost {lost:.0%} of "
                "what they added: keep its fp32 value (split_bases_, or W in float32)"
            )


def assert_redraw_is_keyed(model: nn.Module, *, sites: Sites = find_sites) -> None:
    """Assert that a redraw depends on nothing that processes may not have in common.

    Copies of the model that have used torch's global generator differently draw the same A, bit
    for bit; each draw is another than the one before and than that of another site; B is zero and
    W stays.

    Args:
        model: with low-rank sites.
        sites: finds the sites of layers of your own.

    Raises:
        BrokenPromiseError: if not.

    Example:
        >>> from relora_core import register_low_rank
        >>> assert_redraw_is_keyed(register_low_rank(nn.Linear(3, 2), rank=1))
    """
    draws: list[dict[str, Tensor]] = []
    for process in range(2):
        with _global_generator(process):
            drawn = copy.deepcopy(model)
            found = sites(drawn)
            bases = {name: exact_weight(site) for name, site in found.items()}
            taken = [site.lora_A.detach().clone() for site in found.values()]
            draws.append({})
            for number in (1, 2):
                for name, site in found.items():
                    site.redraw_()
                    A = site.lora_A.detach()
                    if site.lora_B.any() or not torch.equal(exact_weight(site), bases[name]):
                        raise BrokenPromiseError(f"a redraw must zero B and leave W: {name!r}")
                    if any(A.shape == other.shape and torch.equal(A, other) for other in taken):
                        raise BrokenPromiseError(
                            f"redraw {number} of {name!r} gave an A that there was already: key it "
                            "by the site's name and by the number of the restart"
                        )
                    taken.append(A.clone())
                    draws[-1][f"{name} at redraw {number}"] = taken[-1]
    for which, A in draws[0].items():
        if not torch.equal(A, draws[1][which]):
            raise BrokenPromiseError(
                f"two processes that had used torch's global generator differently drew another A "
                f"of {which}: draw from a generator of its own, seeded by (seed, name, restart)"
            )


def assert_learns(model: nn.Module, *inputs: Tensor, sites: Sites = find_sites) -> None:
    """Assert that every site learns: B from the first step of each cycle on, A from the second.

    As the model is, and after each of two restarts: that B has a gradient, and A once B has
    followed it.

    Args:
        model: with low-rank sites, just made.
        inputs: of one call of it.
        sites: finds the sites of layers of your own.

    Raises:
        BrokenPromiseError: if a factor has none.

    Example:
        >>> from relora_core import register_low_rank
        >>> assert_learns(register_low_rank(nn.Linear(3, 2), rank=1), torch.ones(1, 3))
    """
    wide, x = wide_copy(model), [t.double() if t.is_floating_point() else t for t in inputs]
    found = {name: site for name, site in sites(wide).items() if site.lora_B.requires_grad}
    for cycle in range(3):
        for which in ("lora_B", "lora_A"):
            factors = {name: getattr(site, which) for name, site in found.items()}
            gradients = _gradients(wide(*x), factors)
            for name, gradient in gradients.items():
                if not gradient.any():
                    when = f"after {cycle} restarts" if cycle else "at first"
                    raise BrokenPromiseError(f"{which} of {name!r} has no gradient {when}")
                with torch.no_grad():
                    factors[name].sub_(gradient * (0.1 / gradient.norm()))
        for site in found.values():
            site.merge_()
            site.redraw_()


def assert_rank_grows(model: nn.Module, *, sites: Sites = find_sites) -> None:
    r"""Assert that $r < \mathrm{rank}(W_k - W_0) \le k r$ after $k$ = 2 and 3 restarts.

    The lower bound holds where W has a rank above r to give.

    Args:
        model: with low-rank sites.
        sites: finds the sites of layers of your own.

    Raises:
        BrokenPromiseError: if not.

    Example:
        >>> from relora_core import register_low_rank
        >>> assert_rank_grows(register_low_rank(nn.Linear(3, 2), rank=1))
    """
    wide = wide_copy(model)
    for name, site in sites(wide).items():
        first, rank = exact_weight(site), site.lora_A.shape[0]
        most = min(first.shape[0], first[0].numel())
        for k in (1, 2, 3):
            _fill_B_(site, seed=k)
            site.merge_()
            site.redraw_()
            change = (exact_weight(site) - first).flatten(1)
            found = int(torch.linalg.matrix_rank(change, rtol=1e-6))
            if found > k * rank:
                raise BrokenPromiseError(
                    f"W of {name!r} has changed by rank {found} after {k} merges of rank {rank}"
                )
            if k > 1 and found <= rank < most:
                raise BrokenPromiseError(
                    f"W of {name!r} has changed by rank {found} after {k} restarts, no more than "
                    f"one of rank {rank} gives: A must be drawn anew"
                )


def assert_saves_and_loads(
    model: nn.Module, make: Callable[[], nn.Module], *inputs: Tensor, sites: Sites = find_sites
) -> None:
    """Assert that a state dict holds all there is: loaded anew, the model goes on the same.

    A model that is made anew, from another state of the global generator, and loads it gives the
    same outputs, and after merges and redraws of both the same state, bit for bit.

    Args:
        model: with low-rank sites.
        make: returns another of its kind.
        inputs: of one call of it.
        sites: finds the sites of layers of your own.

    Raises:
        BrokenPromiseError: if not.

    Example:
        >>> from relora_core import register_low_rank
        >>> make = lambda: register_low_rank(nn.Linear(3, 2), rank=1)
        >>> assert_saves_and_loads(make(), make, torch.ones(1, 3))
    """
    one = copy.deepcopy(model).eval()
    with _global_generator(3):
        other = make().eval()
        other.load_state_dict(_state(one))
        x = fitting(inputs, one)
        with torch.no_grad():
            for y, again in zip(outputs(one(*x)), outputs(other(*x)), strict=True):
                if not torch.equal(y, again):
                    raise BrokenPromiseError(
                        "a model that loaded the state dict computes otherwise"
                    )
    for number in (1, 2):
        for process, which in enumerate((one, other)):
            with _global_generator(process):
                found = sites(which)
                for site in found.values():
                    site.merge_()
                for site in found.values():
                    site.redraw_()
        what = f"restart {number} after saving and loading differs from one without in"
        _same_state(_state(other), _state(one), what)


def assert_copies_are_independent(
    model: nn.Module, *inputs: Tensor, sites: Sites = find_sites
) -> None:
    """Assert that a forward pass changes nothing, nor does a merge of a deep copy.

    Args:
        model: with low-rank sites.
        inputs: of one call of it.
        sites: finds the sites of layers of your own.

    Raises:
        BrokenPromiseError: if one does.

    Example:
        >>> from relora_core import register_low_rank
        >>> layer = register_low_rank(nn.Linear(3, 2), rank=1)
        >>> assert_copies_are_independent(layer, torch.ones(1, 3))
    """
    one = copy.deepcopy(model).eval()
    before = _state(one)
    other = copy.deepcopy(one)
    with torch.no_grad():
        one(*fitting(inputs, one))
    _same_state(_state(one), before, "a forward pass changed")
    for site in sites(other).values():
        site.merge_()
        site.redraw_()
    _same_state(_state(one), before, "a merge of a deep copy changed")


def assert_removal_cancels(model: nn.Module, *inputs: Tensor) -> None:
    """Assert that register and remove cancel, and that removal after a merge keeps the function.

    Of sites of this library: the Parameters of the plain module are the same objects, in the same
    order, with the same bits, however often sites come and go; merged, the plain module computes
    the same, and has the state that `merged_state_dict` gives.

    Args:
        model: with low-rank sites.
        inputs: of one call of it.

    Raises:
        BrokenPromiseError: if not.

    Example:
        >>> from relora_core import register_low_rank
        >>> assert_removal_cancels(register_low_rank(nn.Linear(3, 2), rank=1), torch.ones(1, 3))
    """
    plain = copy.deepcopy(model)
    places = [(site, site.low_rank) for _, site in low_rank_sites(plain)]
    for site, _ in places:
        remove_low_rank(site.module, site.tensor_name, merge=False)
    first = [(name, p, p.detach().clone()) for name, p in plain.named_parameters()]
    for site, low_rank in places:
        register_low_rank(site.module, site.tensor_name, rank=low_rank.rank)
    for site, _ in places:
        remove_low_rank(site.module, site.tensor_name)
    again = list(plain.named_parameters())
    if [name for name, *_ in first] != [name for name, _ in again]:
        raise BrokenPromiseError("register and remove changed the Parameters' names or their order")
    for (name, p, value), (_, same) in zip(first, again, strict=True):
        if p is not same or not torch.equal(value, same.detach()):
            raise BrokenPromiseError(
                f"register and remove changed {name!r}, or put another in its place"
            )

    wide, x = wide_copy(model), [t.double() if t.is_floating_point() else t for t in inputs]
    merged = copy.deepcopy(wide)
    state = {name: tensor.clone() for name, tensor in merged_state_dict(merged).items()}
    for site, _ in [(site, None) for _, site in low_rank_sites(merged)]:
        remove_low_rank(site.module, site.tensor_name)
    _same_outputs(merged, wide, x, "removing the merged sites moved the output")
    _same_state(_state(merged), state, "merged_state_dict is not the merged module's state:")


def _rounding(site: LowRankSite) -> Tensor:
    """Return how far rounding may leave W from W + s B A, entry by entry."""
    W, total = exact_weight(site), exact_weight(site) + exact_update(site)
    A, B = site.lora_A.detach().double().abs(), site.lora_B.detach().double().abs()
    summed = W.abs() + abs(scale_of(site)) * (B @ A).view(W.shape)
    stored = site.weight.dtype
    if isinstance(site, Site) and site.low_rank.split_from is not None:
        stored = torch.float32
    computed = torch.promote_types(stored, torch.float32)
    unit = torch.finfo(computed).eps * summed * (A.shape[0] + 4)
    last_place = torch.finfo(stored).eps * torch.maximum(W.abs(), total.abs()) / 2
    return unit + last_place + torch.finfo(stored).smallest_normal


def _fill_B_(site: LowRankSite, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        site.lora_B.copy_(torch.randn(site.lora_B.shape, generator=generator))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _same_state(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    for name in expected.keys() | actual.keys():
        one, other = actual.get(name), expected.get(name)
        if one is None or other is None or not torch.equal(one, other):
            raise BrokenPromiseError(f"{what} {name!r}")


def _same_outputs(
    one: Callable[..., object], other: Callable[..., object], inputs: list[Tensor], what: str
) -> None:
    with torch.no_grad():
        pairs = list(zip(outputs(one(*inputs)), outputs(other(*inputs)), strict=True))
    for actual, expected in pairs:
        _close(actual, expected, what)


def _close(actual: Tensor, expected: Tensor, what: str) -> None:
    largest = float(torch.maximum(actual.abs().max(), expected.abs().max()))
    error = float((actual - expected).abs().max())
    if not error <= _CLOSE * largest:
        raise BrokenPromiseError(f"{what}: by {error:.3g}, of {largest:.3g} at most")


def _gradients(result: object, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    loss = loss_of(result, seed=0)
    if not loss.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in of.items()}
    found = torch.autograd.grad(loss, list(of.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if g is None else g
        for (name, tensor), g in zip(of.items(), found, strict=True)
    }


@contextmanager
def _global_generator(process: int) -> Iterator[None]:
    """Let torch's global generator be that of a process that has used it in its own way."""
    before = torch.random.get_rng_state()
    torch.manual_seed(1000 + process)
    torch.rand(process + 1)
    try:
        yield
    finally:
        torch.random.set_rng_state(before)
