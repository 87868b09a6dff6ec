"""Small models that many tests train."""

import copy

import pytest
import torch
from torch import nn

import relora_core as relora

RANK = 2


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 12), "down": nn.Linear(12, width)})

    def forward(self, x):
        x = x + self.self_attn["q_proj"](self.norm(x))
        return x + self.mlp["down"](self.mlp["up"](x).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


TARGETS = ["*.self_attn.*", "*.mlp.*"]


class ByOperators(nn.Module):
    """A layer that uses its weight in ways of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        w = self.weight
        y = x @ w.T + (2 * w - w / 3).sum() + w[0] + torch.cat([w, w]).mean() + abs(w).max()
        return y + (+w % 2).sum()


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def low_rank():
    torch.manual_seed(2)
    return relora.add_low_rank_(net(), "*", rank=2)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def backward(model, seed=0):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()


def factors(model):
    return [p for _, site in relora.low_rank_sites(model) for p in (site.lora_A, site.lora_B)]


def assert_untouched(model, optimizer, call, error=ValueError, match=""):
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(error, match=match):
        call()
    after = model.state_dict(), optimizer.state_dict()
    for old, new in zip(
        torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True
    ):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


def training(dtype=torch.float32, **options):
    model = relora.add_low_rank_(Model().to(dtype), TARGETS, rank=RANK, alpha=1.0, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, relora.ResettableOptimizer(torch.optim.AdamW(trained, lr=1e-2))
