"""The dense twin: the same module, with W + s B A formed whole in its W's place."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from relora_core.low_rank.register import remove_low_rank
from relora_core.sites.site import Site
from relora_core.testing.inputs import loss_of, outputs
from relora_core.testing.subjects import LowRankSite, PropertyError, Sites, trained_scale

_CLOSE = 1e-5  # of the largest value: float64 in all but what a module computes in float32 itself


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return a copy of a model's state dict, in which a module's extra state may be anything."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()
    }


def same_state(actual: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raise unless two states are the same, bit for bit; `what` precedes the name that differs."""
    for name in sorted(expected.keys() | actual.keys()):
        one, other = actual.get(name), expected.get(name)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            same = torch.equal(one, other)
        else:
            same = name in actual and name in expected and bool(one == other)
        if not same:
            raise PropertyError(f"{what} {name!r}")


@contextmanager
def only_sites_change(
    model: nn.Module, found: Mapping[str, LowRankSite], what: str, *, buffers: bool
) -> Iterator[None]:
    """Raise if a Parameter that is no W, A or B of a site is another at the end of the block.

    Or a buffer, if `buffers`: a redraw may count in one.
    """
    own = {id(t) for site in found.values() for t in (site.weight, site.lora_A, site.lora_B)}
    rest: dict[str, Tensor] = dict(model.named_parameters())
    rest |= dict(model.named_buffers()) if buffers else {}
    rest = {name: p for name, p in rest.items() if id(p) not in own}
    before = {name: p.detach().clone() for name, p in rest.items()}
    yield
    for name, p in rest.items():
        if not torch.equal(p.detach(), before[name]):
            raise PropertyError(f"{what} changed {name!r}, which is no W and no factor")


def same_outputs(
    one: Callable[..., object], other: Callable[..., object], inputs: Sequence[Tensor], what: str
) -> None:
    """Raise unless two modules return the same, to a fraction of the largest value."""
    with torch.no_grad():
        pairs = list(zip(outputs(one(*inputs)), outputs(other(*inputs)), strict=True))
    for actual, expected in pairs:
        close(actual, expected, what)


def close(actual: Tensor, expected: Tensor, what: str, *, beside: float = 0.0) -> None:
    """Raise unless two tensors are the same, to a fraction of the largest value.

    Args:
        actual: one.
        expected: the other. What is infinite or NaN must be so in both.
        what: begins the message.
        beside: how large values are that these were computed with, which leave their rounding.
    """
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        raise PropertyError(f"{what}: one is finite where the other is not")
    if not finite.any():
        return
    one, other = actual[finite], expected[finite]
    largest = float(torch.maximum(one.abs().max(), other.abs().max()))
    error = float((one - other).abs().max())
    if not error <= _CLOSE * largest + 1e-9 * beside:
        raise PropertyError(f"{what}: by {error:.3g}, of {largest:.3g} at most")


def gradients_of(result: object, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a random linear function of outputs, zero where there is none."""
    loss = loss_of(result, seed=0)
    if not loss.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in of.items()}
    found = torch.autograd.grad(loss, list(of.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if g is None else g
        for (name, tensor), g in zip(of.items(), found, strict=True)
    }


@contextmanager
def disturbed(process: int) -> Iterator[None]:
    """Let torch's global generator be that of a process that has used it in its own way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + process)
        torch.rand(process + 1)
        yield


@dataclass(frozen=True)
class _Term:
    site: str
    W: str
    B: str | None
    lora_A: Tensor
    lora_B: Tensor
    scale: Tensor | float


class DenseTwin:
    """A model whose every site computes with a plain matrix, W + s B A, by plain autograd.

    A site of this library is removed from a copy, which leaves torch's own layer. In a layer of
    your own B is zero and W is the sum, so that its low-rank path adds nothing.

    Args:
        model: in float64.
        sites: finds its sites.

    Attributes:
        leaves: what has a gradient, by name: factors, trained scales, and all else that is trained.
        whole: W + s B A of the last call, by site.

    Raises:
        TypeError: if W or B of a layer of your own is a view.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self._plain = copy.deepcopy(model)
        found = sites(self._plain)
        bases = {name: site.weight for name, site in found.items()}
        factors = {
            f"{name}.{key}": getattr(site, key)
            for name, site in found.items()
            for key in ("lora_A", "lora_B")
        }
        trained = {name: trained_scale(site) for name, site in found.items()}
        factors |= {f"{n}.lora_scale": s for n, s in trained.items() if s is not None}
        scales = {name: site.scale for name, site in found.items()}
        for site in found.values():
            if isinstance(site, Site):
                remove_low_rank(site.module, site.tensor_name, merge=False)
        self.leaves = {n: f.detach().clone().requires_grad_() for n, f in factors.items()}
        known = {id(tensor) for tensor in (*bases.values(), *factors.values())}
        names = {id(t): name for name, t in self._tensors().items()}
        self.leaves |= {
            name: p
            for name, p in self._plain.named_parameters()
            if p.requires_grad and id(p) not in known
        }
        for name, site in found.items():
            own = [] if isinstance(site, Site) else [factors[f"{name}.lora_B"]]
            if any(id(tensor) not in names for tensor in (bases[name], *own)):
                raise TypeError(
                    f"W and B of {name!r} must be Parameters or buffers of the model themselves, "
                    "the same objects each time; no views of them, such as a transpose"
                )
        self.whole: dict[str, Tensor] = {}
        self._terms = [
            _Term(
                name,
                names[id(W)],
                names.get(id(factors[f"{name}.lora_B"])),
                self.leaves[f"{name}.lora_A"],
                self.leaves[f"{name}.lora_B"],
                self.leaves.get(f"{name}.lora_scale", scales[name]),
            )
            for name, W in bases.items()
        ]

    def __call__(self, *inputs: Tensor) -> Any:
        """Return what the model returns for `inputs`."""
        own = self._tensors()
        replaced: dict[str, Tensor] = {}
        for term in self._terms:
            W, update = own[term.W].detach(), term.scale * (term.lora_B @ term.lora_A)
            self.whole[term.site] = replaced[term.W] = W + update.view(W.shape)
            if term.B is not None:
                replaced[term.B] = torch.zeros_like(own[term.B])
        return functional_call(self._plain, replaced, inputs)

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self._plain.named_parameters()), **dict(self._plain.named_buffers())}
