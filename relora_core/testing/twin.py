"""The dense twin: the same module, with W + s B A formed whole in its W's place."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from relora_core.low_rank.register import remove_low_rank
from relora_core.sites.site import Site
from relora_core.testing.subjects import Sites, trained_scale


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
