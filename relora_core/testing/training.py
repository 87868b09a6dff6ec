"""An optimizer in the middle of a training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.optim.moments import inner_optimizers
from relora_core.testing.expressions import as_factory

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Trained:
    """An optimizer in the middle of a training, made the same each time that it is called.

    Args:
        factory: makes the optimizer from a list of Parameters.
        shapes: of the Parameters.
        steps: taken so far.
        seed: of values and gradients.
        ties: whether all entries of a gradient are equal in magnitude, as those of pruned or
            clipped ones may be.
        dtype: of the Parameters.

    Examples:
        >>> optimizer, params = Trained(torch.optim.AdamW, shapes=((2, 3),), steps=4)()
        >>> optimizer.state[params[0]]["step"]
        tensor(4.)
    """

    factory: OptimizerFactory
    shapes: tuple[tuple[int, ...], ...] = ((4, 3), (5,))
    steps: int = 3
    seed: int = 0
    ties: bool = False
    dtype: torch.dtype = torch.float32

    def __call__(self) -> tuple[Optimizer, list[nn.Parameter]]:
        """Make the Parameters and the optimizer, and take the steps."""
        values = torch.Generator().manual_seed(self.seed)
        params = [
            nn.Parameter(torch.randn(shape, generator=values).to(self.dtype))
            for shape in self.shapes
        ]
        optimizer = self.factory(params)
        for one in (optimizer, *inner_optimizers(optimizer)):
            if hasattr(one, "train"):  # schedule-free
                one.train()
            for group in one.param_groups:
                if "weight_decay" in group:
                    group["weight_decay"] = 0.0  # it moves what has no gradient
        for step in range(self.steps):
            self.step_(optimizer, params, step)
        return optimizer, params

    def step_(self, optimizer: Optimizer, params: Sequence[nn.Parameter], number: int) -> None:
        """Take step `number` of the training."""
        for index, p in enumerate(params):
            key = 1_000_003 * self.seed + 1009 * number + index + 1
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(key))
            if self.ties:
                gradient = gradient.sign() + (gradient == 0)
            p.grad = gradient.to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()

    def __repr__(self) -> str:
        factory = as_factory(self.factory, "params")
        return (
            f"testing.Trained({factory}, shapes={self.shapes!r}, steps={self.steps}, "
            f"seed={self.seed}, ties={self.ties}, dtype={self.dtype})"
        )


def moved_without_gradient(optimizer: Optimizer, params: Sequence[nn.Parameter]) -> list[Tensor]:
    """Take a step with zero gradients; return for each parameter which entries it moved."""
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return [p.detach() != old for p, old in zip(params, before, strict=True)]
