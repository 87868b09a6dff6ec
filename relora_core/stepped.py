"""The gradients that an optimizer has stepped by already.

A restart may come upon gradients: of a step that is done, in a loop that clears them before its
next backward, or of one that is to come, half accumulated. Only these belong to a step yet.
"""

from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from relora_core._sharding import local

# Of each optimizer the gradients of its last step, by identity, and how often each was written to.
_last: WeakKeyDictionary[Optimizer, dict[int, tuple[ref[Tensor], int]]] = WeakKeyDictionary()


def was_stepped(grad: Tensor) -> bool:
    """Whether a torch optimizer has stepped by a gradient as it is now."""
    found = (gradients.get(id(grad)) for gradients in _last.values())
    return any(one and one[0]() is grad and one[1] == local(grad)._version for one in found)


def steppers() -> list[Optimizer]:
    """Return the optimizers that have taken a step and are there yet."""
    return list(_last)


def _note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    _last[optimizer] = {
        id(grad): (ref(grad), local(grad)._version) for grad in grads if grad is not None
    }


register_optimizer_step_post_hook(_note)
