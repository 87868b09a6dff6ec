"""The restart clock, and learning rates that ramp around restarts, in optimizer steps."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler

from relora_core._torch_private import chained


@dataclass(frozen=True)
class Restarts:
    r"""The clock: a restart before every step $t = $ `first` $ + k \cdot$ `every`, $k \ge 0$.

    Args:
        every: the period, in optimizer steps.
        warmup: how many steps the learning rate takes to rise from 0, at a restart, to full; at
            least 1.
        first: the step of the first restart, at least 1; `every` if None. After a warm start of
            $w$ steps on the same clock, $w$ + `every` gives every cycle its full length.
        anneal: how many steps the learning rate takes to fall from full to 0, at a restart; 0 to
            drop at once, as in the paper.

    Raises:
        ValueError: if a value is out of range, or `warmup + anneal` leaves no step of a period at
            the full rate.
        TypeError: if an argument is not an int.

    Examples:
        >>> restarts = Restarts(every=10, warmup=4)
        >>> [step for step in range(31) if restarts.at(step)]
        [10, 20, 30]
        >>> [restarts.factor(step) for step in range(9, 16)]
        [1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
        >>> offset = Restarts(every=10, warmup=2, first=13, anneal=2)
        >>> [step for step in range(31) if offset.at(step)]
        [13, 23]
        >>> [offset.factor(step) for step in range(10, 16)]
        [1.0, 1.0, 0.5, 0.0, 0.5, 1.0]

    Reference: https://arxiv.org/abs/2307.05695, section 3, "jagged cosine".
    """

    every: int
    warmup: int
    first: int | None = field(default=None, kw_only=True)
    anneal: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole and not (name == "first" and value is None):
                raise TypeError(f"{name} must be an int, in optimizer steps; got {value!r}")
        if self.warmup < 1 or self.anneal < 0 or self.warmup + self.anneal >= self.every:
            raise ValueError(
                "a restart period must be longer than its warm-up and anneal together, and the "
                f"warm-up at least one step; got every={self.every}, warmup={self.warmup}, "
                f"anneal={self.anneal}"
            )
        if self.first is not None and self.first <= self.anneal:
            raise ValueError(
                "the first restart must come after its anneal and at step 1 or later; got "
                f"first={self.first}, anneal={self.anneal}"
            )

    @property
    def _first(self) -> int:
        return self.every if self.first is None else self.first

    def at(self, step: int) -> bool:
        """Whether a restart runs before `step` (counted from 0)."""
        return step >= self._first and (step - self._first) % self.every == 0

    def count(self, step: int) -> int:
        """How many restarts have run when `step` runs, the one at `step` included."""
        return 0 if step < self._first else (step - self._first) // self.every + 1

    def factor(self, step: int) -> float:
        """Return the ramp in [0, 1] at `step`: 0 at a restart, 1 outside the ramps.

        It is 1 from `warmup` steps after a restart until `anneal` steps before the next one.
        """
        since, left = self._around(step)
        up = 1.0 if since is None else min(1.0, since / self.warmup)
        down = min(1.0, left / self.anneal) if self.anneal else 1.0
        return min(up, down)

    def ramp_end(self, step: int) -> int:
        """Return where the ramp around `step` reaches the full rate; outside ramps, `step`."""
        since, left = self._around(step)
        if since is not None and since < self.warmup:
            return step - since + self.warmup
        return step + left - self.anneal if left < self.anneal else step

    @property
    def full_until(self) -> int:
        """The step at which the first restart, or its anneal, begins; the factor is 1 before it."""
        return self._first - self.anneal

    def _around(self, step: int) -> tuple[int | None, int]:
        """Return the number of steps since the last restart and until the next one."""
        since = step - self._first
        if since < 0:
            return None, -since
        return since % self.every, self.every - since % self.every


@dataclass(frozen=True)
class JaggedCosine:
    r"""A learning-rate factor: warm-up, then cosine decay, with linear ramps around restarts.

    $$f(t) = j(t) \cdot c(e(t)), \qquad
    c(t) = f_{min} + (1 - f_{min}) (1 + \cos(\pi \min(1, (t - w) / (T - w)))) / 2$$

    with $w$ = `warmup`, $T$ = `total` and $f_{min}$ = `min_ratio`. $j$ rises from 0 to 1 over the
    warm-up and is `restarts.factor` after it. Inside a ramp, $e(t)$ is the full-rate end of that
    ramp, so the ramp is a straight line between 0 and the cosine's value there. Outside ramps
    $e(t) = t$. The result equals the authors' `cosine_restarts` wherever that is defined (`total` a
    multiple of the period, `adjust_step` 0). Pass the object to `LambdaLR`.

    Args:
        total: $T$, the length of the whole schedule in steps, at least 1.
        restarts: the clock; None for a smooth schedule.
        warmup: $w$, the length of the initial warm-up in steps, less than `total`; 0 for none.
        min_ratio: the factor at the end, from 0 to 1.

    Raises:
        ValueError: if an argument is out of range, or the first restart (or its anneal) comes
            before the end of the warm-up.

    Examples:
        >>> schedule = JaggedCosine(total=100, restarts=Restarts(every=50, warmup=10), warmup=10)
        >>> [round(schedule(step), 3) for step in (0, 5, 10, 49, 50, 55, 60, 99)]
        [0.0, 0.5, 1.0, 0.644, 0.0, 0.236, 0.472, 0.1]

    Reference: https://github.com/Guitaricet/relora, `peft_pretraining/training_utils.py`.
    """

    total: int
    restarts: Restarts | None = None
    warmup: int = 0
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.total < 1:
            raise ValueError(f"total must be at least 1 step; got {self.total}")
        if not 0 <= self.warmup < self.total:
            raise ValueError(
                f"warmup must be 0 steps or more and less than total={self.total}; got "
                f"{self.warmup}"
            )
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"min_ratio must be between 0 and 1; got {self.min_ratio}")
        if self.restarts and self.restarts.full_until < self.warmup:
            raise ValueError(
                f"the warm-up must end before the first restart and its anneal, which begin at "
                f"step {self.restarts.full_until}; got warmup={self.warmup}"
            )

    def __call__(self, step: int) -> float:
        """Return the factor at `step`."""
        if step < self.warmup:
            return step / self.warmup
        if self.restarts is None:
            return self._cosine(step)
        return self.restarts.factor(step) * self._cosine(self.restarts.ramp_end(step))

    def _cosine(self, step: int) -> float:
        progress = min(1.0, (step - self.warmup) / (self.total - self.warmup))
        return self.min_ratio + (1 - self.min_ratio) * (1 + math.cos(math.pi * progress)) / 2


class JaggedLR(LRScheduler):
    r"""Any torch scheduler, times the ramp after each restart.

    $\eta(t) = j(t) \cdot \eta_{inner}(t)$ with $j$ = `restarts.factor`. Most torch schedulers
    compute the next value from `group["lr"]`. Before `inner` steps, its own value without the ramp
    is put back, so the ramp does not compound. Without a restart the rate equals `inner`'s.

    Args:
        inner: the scheduler that sets the optimizer's `lr`; step the JaggedLR in its place.
        restarts: the clock, in calls of `step`; it continues from `inner`'s current step.

    Raises:
        TypeError: if `inner` is not a torch scheduler or `restarts` not a `Restarts`.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> inner = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> schedule = JaggedLR(inner, Restarts(every=3, warmup=2))
        >>> for step in range(6):
        ...     print(step, schedule.get_last_lr())
        ...     optimizer.step(); schedule.step()
        0 [1.0]
        1 [0.5]
        2 [0.25]
        3 [0.0]
        4 [0.03125]
        5 [0.03125]
    """

    def __init__(self, inner: LRScheduler, restarts: Restarts) -> None:
        # LRScheduler.__init__ would take a step of its own.
        if not isinstance(inner, LRScheduler):
            raise TypeError(f"inner must be a torch LRScheduler; got {type(inner).__name__}")
        if not isinstance(restarts, Restarts):
            raise TypeError(f"restarts must be a Restarts; got {type(restarts).__name__}")
        self.inner = inner
        self.restarts = restarts
        self.optimizer = inner.optimizer
        while isinstance(inner, ChainedScheduler):  # it keeps no step count
            inner = chained(inner)
        self.last_epoch = inner.last_epoch
        self._apply_ramp()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Advance one optimizer step; arguments (a metric, for instance) go to `inner`.

        A learning rate that was changed by hand since the last step is taken as the ramped rate:
        `inner` continues from that value divided by the ramp's factor.
        """
        factor = self.restarts.factor(self.last_epoch)
        groups = self.optimizer.param_groups
        for group, smooth, last in zip(groups, self._smooth, self._last_lr, strict=False):
            _set_lr(group, _unramped(group["lr"], smooth, last, factor))
        self.inner.step(*args, **kwargs)
        self.last_epoch += 1
        self._apply_ramp()

    def get_last_lr(self) -> list[float | Tensor]:
        """Return each group's current learning rate, ramp included."""
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, `inner`'s included."""
        return {
            "inner": self.inner.state_dict(),
            "restarts": asdict(self.restarts),
            "last_epoch": self.last_epoch,
            "smooth": list(self._smooth),
            "last_lr": list(self._last_lr),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; `lr` itself is in the optimizer's own state.

        Raises:
            ValueError: if the state was saved under another clock. Nothing is changed then.
        """
        saved, own = Restarts(**state_dict["restarts"]), self.restarts
        if replace(saved, first=saved._first) != replace(own, first=own._first):
            raise ValueError(
                f"the clock must be the one that was saved, {state_dict['restarts']}; got "
                f"{asdict(self.restarts)}: a run keeps one clock"
            )
        self.inner.load_state_dict(state_dict["inner"])
        self.last_epoch = state_dict["last_epoch"]
        self._smooth = list(state_dict["smooth"])
        self._last_lr = list(state_dict["last_lr"])

    def _apply_ramp(self) -> None:
        groups = self.optimizer.param_groups
        self._smooth = [_copied(group["lr"]) for group in groups]
        factor = self.restarts.factor(self.last_epoch)
        if factor != 1.0:
            for group in groups:
                _set_lr(group, group["lr"] * factor)
        self._last_lr: list[float | Tensor] = [_copied(group["lr"]) for group in groups]


def _copied(lr: Any) -> Any:
    return lr.clone() if isinstance(lr, Tensor) else lr


def _unramped(now: Any, smooth: Any, last: Any, factor: float) -> Any:
    """Return the rate without the ramp: `smooth`, unless `now` was changed since it was set."""
    changed = now / factor if factor else now
    if isinstance(now, Tensor):  # computed on its device, so that the host does not wait
        return torch.where(now == last, smooth, changed)
    return smooth if now == last else changed


def _set_lr(group: dict[str, Any], lr: Any) -> None:
    # A captured CUDA graph may read a tensor rate, so the tensor is written in place.
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(lr)
    else:
        group["lr"] = lr
