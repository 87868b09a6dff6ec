"""Slow, obvious twins of what relora_core does cleverly."""

import math

import torch
from torch import Tensor, nn

import relora_core as relora


class DenseLowRank(nn.Module):
    """W + s B A formed whole, by plain autograd."""

    def __init__(self, site: relora.Site) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(site.lora_A.detach().clone())
        self.lora_B = nn.Parameter(site.lora_B.detach().clone())
        self.scale = site.low_rank.alpha / site.low_rank.rank

    def forward(self, base: Tensor) -> Tensor:
        return base + self.scale * (self.lora_B @ self.lora_A).view(base.shape)


def dense_twin(module: nn.Module, tensor_name: str = "weight") -> tuple[nn.Module, DenseLowRank]:
    """Return a copy of a low-rank module whose parametrization forms the dense sum."""
    import copy

    site = relora.Site(module, tensor_name)
    plain = copy.deepcopy(module)
    relora.remove_low_rank(plain, tensor_name, merge=False)
    dense = DenseLowRank(site)
    plain.get_parameter(tensor_name).requires_grad_(False)
    nn.utils.parametrize.register_parametrization(plain, tensor_name, dense)
    return plain, dense


def dropped(entries: int, ratio: float) -> int:
    """How many entries go: what lies at or below the quantile at `ratio`."""
    return math.floor(ratio * (entries - 1)) + 1 if entries else 0


def mask_by_sorting(tensor: Tensor, ratio: float) -> Tensor:
    """Mark the entries that go, by a stable sort of the magnitudes."""
    magnitudes = tensor.abs().flatten()
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    mask[magnitudes.argsort(stable=True)[: dropped(tensor.numel(), ratio)]] = True
    return mask.view(tensor.shape)


def randomize_(model: nn.Module, std: float = 0.5) -> None:
    """Give every site factors that matter."""
    for _, site in relora.low_rank_sites(model):
        nn.init.normal_(site.lora_A, std=std)
        nn.init.normal_(site.lora_B, std=std)


def ulp(value: Tensor) -> float:
    """Return the distance between the floating-point numbers around a scalar."""
    return torch.finfo(value.dtype).eps * 2 ** math.floor(math.log2(abs(value.item())))


def ulp_distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference in units of the last place of the largest value."""
    largest = torch.maximum(one.abs().max(), other.abs().max())
    return (one.double() - other.double()).abs().max().item() / ulp(largest)


def authors_cosine_restarts(
    step: int,
    *,
    total: int,
    first_warmup: int,
    every: int,
    warmup: int,
    low: float,
    adjust: int = 0,
) -> float:
    """The learning-rate factor of the authors' `cosine_restarts`, as a formula.

    Source: https://github.com/Guitaricet/relora, peft_pretraining/training_utils.py.
    """

    def cosine(t: int) -> float:
        progress = (t - first_warmup) / max(1, total - first_warmup)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))

    if step < first_warmup:
        return step / first_warmup
    moved = step + adjust
    since = moved % every
    if since < warmup and step >= every:  # asks the step that is not moved
        return since / warmup * cosine(moved - since + warmup)
    return cosine(moved)
