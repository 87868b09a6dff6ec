"""The cost of a restart, against an optimizer step of full rank on the same shapes."""

from typing import Any

import torch
from torch import nn

import relora_core as relora
from reference_trainer.bench.arms import ours_
from reference_trainer.bench.measure import Timed, interleaved, now
from reference_trainer.flops import block_matrices
from reference_trainer.model.llama import LlamaShape

QUANTILE = 2**24  # the most that torch.quantile takes


def measure_restart(
    shape: LlamaShape, device: torch.device, *, blocks: int, rank: int, repeats: int
) -> list[dict[str, Any]]:
    """Time `restart_` and AdamW, as torch runs it by default and fused, over blocks' matrices.

    Args:
        shape: of the model that has the blocks.
        device: where.
        blocks: how many; every cost grows alike with it.
        rank: of the sites.
        repeats: timed rounds.
    """
    timed: dict[str, Timed] = {}
    for name, fused in (("AdamW step, full rank", None), ("the same, fused", True)):
        parameters = list(_matrices(shape, blocks, device).parameters())
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=fused)
        timed[name] = _timed(optimizer, device)

    model = _matrices(shape, blocks, device)
    ours_(model, rank)
    factors = [p for p in model.parameters() if p.requires_grad]
    for p in factors:
        p.grad = torch.randn_like(p)
    adamw = torch.optim.AdamW(factors, lr=1e-6)

    def restart() -> dict[str, float]:
        adamw.step()  # so that there is something to merge, and moments to prune
        began = now(device)
        relora.restart_(model, adamw)
        return {"step": now(device) - began}

    timed["restart_"] = restart
    subject = f"{blocks} block(s)"
    return _records(subject, interleaved(timed, repeats, "restart"))


def measure_prune(device: torch.device, *, entries: int, repeats: int) -> list[dict[str, Any]]:
    """Time pruning twice as many entries as torch.quantile gets, a power of two, against it."""
    whole = torch.randn(entries, device=device)
    double = torch.randn(2 * entries, device=device)

    def quantile() -> dict[str, float]:
        began = now(device)
        torch.quantile(whole.abs(), 0.99)
        return {"step": now(device) - began}

    def prune() -> dict[str, float]:
        pruned = double.clone()
        began = now(device)
        relora.magnitude_prune_(pruned, ratio=0.99)
        return {"step": now(device) - began}

    power = entries.bit_length() - 1
    timed = {f"torch.quantile, 2^{power}": quantile, f"magnitude_prune_, 2^{power + 1}": prune}
    return _records("pruning", interleaved(timed, repeats, "pruning"))


def _matrices(shape: LlamaShape, blocks: int, device: torch.device) -> nn.ModuleDict:
    with device:
        return nn.ModuleDict(
            {
                f"{block}_{index}_proj": nn.Linear(inner, out, bias=False)
                for block in range(blocks)
                for index, (out, inner) in enumerate(block_matrices(shape))
            }
        )


def _timed(optimizer: torch.optim.Optimizer, device: torch.device) -> Timed:
    def run() -> dict[str, float]:
        began = now(device)
        optimizer.step()
        return {"step": now(device) - began}

    return run


def _records(subject: str, seconds: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    return [
        {
            "event": "arm",
            "subject": subject,
            "arm": name,
            "step_seconds": [parts["step"] for parts in runs],
        }
        for name, runs in seconds.items()
    ]
