"""The cost of a restart, against a full-rank optimizer step over the same shapes."""

from typing import Any

import torch
from torch import nn

import relora_core as relora
from reference_trainer.bench.arms import ours_
from reference_trainer.bench.measure import Timed, interleaved, now
from reference_trainer.flops import block_matrices
from reference_trainer.model.llama import LlamaShape

QUANTILE = 2**24  # the largest size that torch.quantile accepts


def measure_restart(
    shape: LlamaShape, device: torch.device, *, blocks: int, rank: int, repeats: int
) -> list[dict[str, Any]]:
    """Time `restart_`, torch's default AdamW and its fused AdamW over the matrices of blocks.

    Args:
        shape: shape of the model.
        device: device of the matrices.
        blocks: number of blocks; all costs are proportional to it.
        rank: rank of the sites.
        repeats: number of timed rounds.
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
        adamw.step()  # gives B and the moments values to merge and prune
        began = now(device)
        relora.restart_(model, adamw)
        return {"step": now(device) - began}

    timed["restart_"] = restart
    subject = f"{blocks} block(s)"
    return _records(subject, interleaved(timed, repeats, "restart"))


def measure_prune(device: torch.device, *, entries: int, repeats: int) -> list[dict[str, Any]]:
    """Time `magnitude_prune_` on 2 * entries against `torch.quantile` on entries, a power of 2."""
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
