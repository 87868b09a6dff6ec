"""Schedules that torch's classes make together, by names that can be printed."""

import torch
from torch.optim import lr_scheduler


def inverse_time(step: int) -> float:
    """Return 1 / (1 + step), for `LambdaLR`.

    Examples:
        >>> inverse_time(1)
        0.5
    """
    return 1 / (1 + step)


def nineteen_twentieths(step: int) -> float:
    """Return 0.95 at any step, for `MultiplicativeLR`.

    Examples:
        >>> nineteen_twentieths(1)
        0.95
    """
    return 0.95


def warmup_then_cosine(
    optimizer: torch.optim.Optimizer, *, milestone: int
) -> lr_scheduler.SequentialLR:
    """Return a warm-up followed by a cosine, by torch's `SequentialLR`.

    Args:
        optimizer: whose rate it drives.
        milestone: the cosine's first step.

    Examples:
        >>> from torch import nn
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> warmup_then_cosine(optimizer, milestone=5).get_last_lr()
        [0.1]
    """
    parts: list[lr_scheduler.LRScheduler] = [
        lr_scheduler.LinearLR(optimizer, 0.1),
        lr_scheduler.CosineAnnealingLR(optimizer, 30),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[milestone])


def constant_times_exponential(
    optimizer: torch.optim.Optimizer, *, gamma: float
) -> lr_scheduler.ChainedScheduler:
    """Return two schedulers that act together, by torch's `ChainedScheduler`.

    Args:
        optimizer: whose rate they drive.
        gamma: of the exponential one.

    Examples:
        >>> from torch import nn
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> constant_times_exponential(optimizer, gamma=0.5).get_last_lr()
        [0.5]
    """
    parts: list[lr_scheduler.LRScheduler] = [
        lr_scheduler.ConstantLR(optimizer, 0.5, 4),
        lr_scheduler.ExponentialLR(optimizer, gamma),
    ]
    return lr_scheduler.ChainedScheduler(parts)
