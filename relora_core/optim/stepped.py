"""The steps that torch's optimizers have taken: their gradients and their parameters.

A restart may find gradients on the factors. Either a finished step has used them, in a loop that
clears gradients before its next backward, or they are half accumulated for a step that has not run
yet. Only the second kind is still needed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from relora_core._torch_private import version_of
from relora_core.distributed.local import local

# For each optimizer, the gradients of its last step, by id, and how often each was written to.
_last: WeakKeyDictionary[Optimizer, dict[int, tuple[ref[Tensor], int]]] = WeakKeyDictionary()


@dataclass
class _Seen:
    """The ids of the parameters that an optimizer held in its steps.

    Args:
        held: the ids of all of them.
        reached: the ids of those that had a gradient in some step.
    """

    held: set[int]
    reached: set[int]


_seen: WeakKeyDictionary[Optimizer, _Seen] = WeakKeyDictionary()


def was_stepped(grad: Tensor) -> bool:
    """Whether a torch optimizer has stepped with this gradient, unchanged since then."""
    found = (gradients.get(id(grad)) for gradients in _last.values())
    return any(one and one[0]() is grad and one[1] == version_of(local(grad)) for one in found)


def passed_over(params: Iterable[Tensor]) -> bool:
    """Whether an optimizer that held some of `params` has stepped, but none had a gradient."""
    own = set(map(id, params))
    return any(own & seen.held for seen in _seen.values()) and not any(
        own & seen.reached for seen in _seen.values()
    )


def steppers() -> list[Optimizer]:
    """Return the optimizers that have taken a step and still exist."""
    return list(_last)


def _note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    stepped = [(id(p), p.grad) for p in params if p.grad is not None]
    _last[optimizer] = {id(grad): (ref(grad), version_of(local(grad))) for _, grad in stepped}
    seen = _seen.setdefault(optimizer, _Seen(set(), set()))
    seen.held.update(map(id, params))
    seen.reached.update(p for p, _ in stepped)


register_optimizer_step_post_hook(_note)
