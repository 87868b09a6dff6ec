"""Broken schedules, of (inner, restarts).

Each is a bug of public ReLoRA or LoRA code as it stood in 2026, in a few lines.
"""

import warnings

from torch.optim import lr_scheduler

from relora_core import JaggedLR, Restarts


class Recursive(lr_scheduler.LRScheduler):
    """axolotl's: multiplies what the inner one computes from a rate that has the ramp in it."""

    def __init__(self, inner, restarts):
        self.inner, self.restarts = inner, restarts
        super().__init__(inner.optimizer)

    def get_lr(self):
        self.inner.last_epoch = self.last_epoch
        ramp = self.restarts.factor(self.last_epoch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch advises against what goes wrong here
            return [lr * ramp for lr in self.inner.get_lr()]


def unmoved(inner, restarts):
    """The authors': the dip is passed over before `every` steps, whatever the first restart is."""

    def factor(step):
        return 0.9**step * (1.0 if step < restarts.every else restarts.factor(step))

    return lr_scheduler.LambdaLR(inner.optimizer, factor)


def one_step_late(inner, restarts):
    """The authors': the merge runs one step after the rate's restart."""
    first = restarts.first or restarts.every
    early = Restarts(restarts.every, restarts.warmup, first=first - 1) if first > 1 else restarts
    return lr_scheduler.LambdaLR(inner.optimizer, lambda step: 0.9**step * early.factor(step))


class Scaled(lr_scheduler.LRScheduler):
    """A wrapper that is sound but for its state, which it has none of."""

    ramp = staticmethod(lambda restarts, step: restarts.factor(step))

    def __init__(self, inner, restarts):
        self.inner, self.restarts, self.optimizer = inner, restarts, inner.optimizer
        self.count, self.smooth = 0, self.rates()

    def step(self, *metric):
        for group, lr in zip(self.optimizer.param_groups, self.smooth, strict=True):
            group["lr"] = lr
        self.inner.step(*metric)
        self.count += 1
        self.smooth = self.rates()
        for group in self.optimizer.param_groups:
            group["lr"] *= self.ramp(self.restarts, self.count)

    def rates(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self):
        return self.rates()


class Forgetful(Scaled):
    """A wrapper whose state lacks the inner one's."""

    def state_dict(self):
        return {"count": self.count, "smooth": self.smooth}

    def load_state_dict(self, state):
        self.__dict__.update(state)


class OneStepShort(Scaled):
    """The rate is back before the warm-up's end."""

    @staticmethod
    def ramp(restarts, step):
        factor = restarts.factor(step)
        return 1.0 if restarts.warmup > 1 and factor == 1 - 1 / restarts.warmup else factor


class NeverBack(Scaled):
    """The first restart's zero stays."""

    @staticmethod
    def ramp(restarts, step):
        return 0.0 if restarts.count(step) else 1.0


class TellsAnother(Scaled):
    """`get_last_lr` is of something else."""

    def get_last_lr(self):
        return [123.0]


class Deaf(JaggedLR):
    """Sets what it had in mind, whatever somebody has set since."""

    def step(self, *args, **kwargs):
        for group, rate in zip(self.optimizer.param_groups, self.get_last_lr(), strict=True):
            group["lr"] = rate
        super().step(*args, **kwargs)
