"""The dense twin of a module: the same module with W replaced by the dense matrix W + s B A."""

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

_CLOSE = 1e-5  # relative to the largest value; modules may compute some parts in float32


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return a copy of a model's state dict, including extra state of any type."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()
    }


def same_state(actual: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raise if two states differ in any bit; the message is `what` and the differing name."""
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
    """Raise if the block changes a Parameter that is not the W, A or B of a site.

    With `buffers`, also raise if it changes a buffer; a redraw may count restarts in one.
    """
    own = {id(t) for site in found.values() for t in (site.weight, site.lora_A, site.lora_B)}
    rest: dict[str, Tensor] = dict(model.named_parameters())
    rest |= dict(model.named_buffers()) if buffers else {}
    rest = {name: p for name, p in rest.items() if id(p) not in own}
    before = {name: p.detach().clone() for name, p in rest.items()}
    yield
    for name, p in rest.items():
        if not torch.equal(p.detach(), before[name]):
            raise PropertyError(f"{what} changed {name!r}, which is neither W nor a factor")


def same_outputs(
    one: Callable[..., object], other: Callable[..., object], inputs: Sequence[Tensor], what: str
) -> None:
    """Raise if the outputs of two modules differ by more than rounding."""
    with torch.no_grad():
        pairs = list(zip(outputs(one(*inputs)), outputs(other(*inputs)), strict=True))
    for actual, expected in pairs:
        close(actual, expected, what)


def close(actual: Tensor, expected: Tensor, what: str, *, beside: float = 0.0) -> None:
    """Raise if two tensors differ by more than a small fraction of the largest value.

    Args:
        actual: tensor to check.
        expected: reference tensor. Both must be finite at the same entries.
        what: beginning of the error message.
        beside: largest value in the same computation, whose rounding error is also allowed.
    """
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        raise PropertyError(f"{what}: only one of them is finite at some entries")
    if not finite.any():
        return
    one, other = actual[finite], expected[finite]
    largest = float(torch.maximum(one.abs().max(), other.abs().max()))
    error = float((one - other).abs().max())
    if not error <= _CLOSE * largest + 1e-9 * beside:
        raise PropertyError(f"{what}: the error is {error:.3g}; the largest value is {largest:.3g}")


def gradients_of(result: object, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a random linear function of the outputs; missing ones are zero."""
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
    """Run the block with torch's global generator in a state that differs between processes."""
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
    """A copy of a model that computes every site with the dense matrix W + s B A.

    Gradients come from plain autograd. This library's sites are removed from the copy, which leaves
    torch's own layers. In your own layers, W becomes W + s B A and B becomes zero, so that the
    low-rank path adds nothing.

    Args:
        model: model in float64.
        sites: function that finds the model's sites.

    Attributes:
        leaves: trained tensors by name: factors, trained scales and all other trained Parameters.
        whole: W + s B A of the last call, by site name.

    Raises:
        TypeError: if a W, or the B of your own layer, is not a Parameter or buffer of the model.
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
                    f"W and B of {name!r} must be Parameters or buffers of the model, the same "
                    "objects at each access; got a view or a copy, such as a transpose"
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
