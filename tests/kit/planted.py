"""A sound low-rank layer, optimizers, resets and schedules as users write them, and broken ones.

Each broken one is a bug of public ReLoRA or LoRA code as it stood in 2026, in a few lines.
"""

import copy
import warnings

import torch
from torch import nn
from torch.optim import lr_scheduler

from relora_core import Restarts, low_rank_sites, reset_optimizer_, restart_


class Layer(nn.Module):
    """x (W + s B A)ᵀ, sound."""

    def __init__(self, inner=3, out=2, rank=1, alpha=1.0, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, inner, dtype=dtype), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(rank, inner, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, dtype=dtype))
        self.register_buffer("restart", torch.tensor(0))
        self.scale = alpha / rank

    def forward(self, x):
        return x @ self.weight.T + self.scale * (x @ self.lora_A.T @ self.lora_B.T)

    @torch.no_grad()
    def merge_(self):
        self.weight += self.scale * (self.lora_B @ self.lora_A)
        self.lora_B.zero_()

    @torch.no_grad()
    def redraw_(self):
        self.restart += 1
        generator = torch.Generator().manual_seed(int(self.restart))
        self.lora_A.copy_(torch.randn(self.lora_A.shape, generator=generator))
        self.lora_B.zero_()


class ZeroFactors(Layer):
    """The authors' first cycle: A and B are both zero."""

    def __init__(self, **options):
        super().__init__(**options)
        nn.init.zeros_(self.lora_A)


class MergeWithoutScale(Layer):
    """relora-pico's merge."""

    @torch.no_grad()
    def merge_(self):
        self.weight += self.lora_B @ self.lora_A
        self.lora_B.zero_()


class MergeKeepsB(Layer):
    """A merge that forgets that B A is in W now."""

    @torch.no_grad()
    def merge_(self):
        self.weight += self.scale * (self.lora_B @ self.lora_A)


class MergeThroughHalf(Layer):
    """axolotl's merge into shards of float16."""

    @torch.no_grad()
    def merge_(self):
        super().merge_()
        self.weight.copy_(self.weight.half())


class MergeInGraph(Layer):
    """The authors' functional merge, outside no_grad: W is another Parameter, and trained."""

    def merge_(self):
        self.weight = nn.Parameter(self.weight + self.scale * (self.lora_B @ self.lora_A))
        nn.init.zeros_(self.lora_B)


class MergeIsNotCalled(Layer):
    """Lightning-ReLoRA's merge: named, and not called."""

    def merge_(self):
        super().merge_  # noqa: B018 - the bug


class MergeRaises(Layer):
    """The authors' 8-bit merge: a slip of the pen."""

    def merge_(self):
        self.self.lora_B.zero_()


class SixteenBits(Layer):
    """W in bfloat16, as everywhere: it loses most of what is merged (peft #1388)."""

    def __init__(self, **options):
        super().__init__(dtype=torch.bfloat16, **options)


class SixteenBitsRoundedOnce(SixteenBits):
    """The same, with a sum in float32: what is less than half a unit of W is lost all the same."""

    @torch.no_grad()
    def merge_(self):
        update = self.scale * (self.lora_B.float() @ self.lora_A.float())
        self.weight.copy_(self.weight.float() + update)
        self.lora_B.zero_()


class DeadScale(Layer):
    """The authors' trainable scaling: tanh of a number that a merge zeroes."""

    def __init__(self, **options):
        super().__init__(**options)
        del self.scale
        self.scaling = nn.Parameter(torch.ones(1))

    @property
    def scale(self):
        return self.scaling.tanh()

    @scale.deleter
    def scale(self):
        pass

    @scale.setter
    def scale(self, value):
        pass

    @torch.no_grad()
    def merge_(self):
        super().merge_()
        self.scaling.zero_()


class GlobalDraw(Layer):
    """A redraw from torch's global generator, which processes use differently."""

    @torch.no_grad()
    def redraw_(self):
        nn.init.kaiming_uniform_(self.lora_A)
        self.lora_B.zero_()


class SameDraw(Layer):
    """A redraw that is seeded alike on all processes, and at all restarts."""

    @torch.no_grad()
    def redraw_(self):
        generator = torch.Generator().manual_seed(0)
        self.lora_A.copy_(torch.randn(self.lora_A.shape, generator=generator))
        self.lora_B.zero_()


class SpectralDraw(Layer):
    """A redraw as PiSSA's or OLoRA's first one: both factors from W, which changes the function."""

    @torch.no_grad()
    def redraw_(self):
        U, S, Vh = torch.linalg.svd(self.weight, full_matrices=False)
        rank = len(self.lora_A)
        self.lora_A.copy_(S[:rank, None] * Vh[:rank])
        self.lora_B.copy_(U[:, :rank])


class CountIsNotSaved(Layer):
    """A resume that forgets how many redraws there were."""

    def __init__(self, **options):
        super().__init__(**options)
        del self.restart
        self.restart = 0


class TrainedBase(Layer):
    """W is not frozen."""

    def __init__(self, **options):
        super().__init__(**options)
        self.weight.requires_grad_(True)


class TiedPair(nn.Module):
    """Two layers over one W: a merge of either moves the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Layer(inner=2), Layer(inner=2)
        self.second.weight = self.first.weight
        self.second.restart += 7

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Unused(nn.Module):
    """A plain layer that keeps its weight from before it became low-rank, as caches do."""

    def __init__(self):
        super().__init__()
        self.in_features = 3
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.cached = [self.weight]

    def forward(self, x):
        return x @ self.cached[0].T


# Resets: of (optimizer, params, ratio).


def _moments(optimizer, params):
    return [optimizer.state[p][key] for p in params for key in ("exp_avg", "exp_avg_sq")]


def by_quantile(optimizer, params, ratio):
    """The authors': one threshold, which all equal entries miss, and 2**24 entries at most."""
    for p in params:
        for key in ("exp_avg", "exp_avg_sq"):
            if key in optimizer.state.get(p, {}):
                moment = optimizer.state[p][key]
                moment.mul_(moment.abs() > torch.quantile(moment.abs(), ratio))


def apart(optimizer, params, ratio):
    """The authors' masks: m and v each by itself."""
    reset_optimizer_(optimizer, params, prune_ratio=ratio, masks="independent")


def passing_over_the_large(optimizer, params, ratio):
    """axolotl's: what torch.quantile cannot take is left as it is."""
    small = [p for p in params if p.numel() <= 2**24]
    reset_optimizer_(optimizer, small, prune_ratio=ratio)


def of_codes(optimizer, params, ratio):
    """axolotl's: 8-bit codes are taken for values."""
    for p in params:
        for key in ("state1", "state2"):
            codes = optimizer.state.get(p, {}).get(key)
            if codes is not None:
                codes[codes.float() <= torch.quantile(codes.float(), ratio)] = 0


def nearly_all(optimizer, params, ratio):
    """The authors' "full reset": 999 of a thousand, at random."""
    if ratio < 1:
        reset_optimizer_(optimizer, params, prune_ratio=ratio)
        return
    for p in params:
        for value in optimizer.state.get(p, {}).values():
            if value.shape == p.shape:
                value.mul_(torch.rand(p.shape, generator=torch.Generator().manual_seed(8)) > 0.9)


def nothing(optimizer, params, ratio):
    """axolotl's for eight months: "Percent of optimizer states zeroed: 0.00"."""


def deleting(optimizer, params, ratio):
    """ReMoRA's: the state is deleted, count of steps included."""
    for p in params:
        optimizer.state.pop(p, None)


def of_everything(optimizer, params, ratio):
    """A reset that asks for no parameters."""
    every = [p for group in optimizer.param_groups for p in group["params"]]
    reset_optimizer_(optimizer, every, prune_ratio=ratio)


def looking(optimizer, params, ratio):
    """One that looks for `state[p]`, which makes it."""
    for p in params:
        optimizer.state[p]
    reset_optimizer_(optimizer, params, prune_ratio=ratio)


def blind_to_nan(optimizer, params, ratio):
    """A threshold that is NaN: nothing is above it."""
    for p in params:
        for value in list(optimizer.state.get(p, {}).values()):
            if value.shape == p.shape and value.isnan().any():
                value.zero_()
    reset_optimizer_(optimizer, params, prune_ratio=ratio)


def of_the_same_shape(optimizer, params, ratio):
    """All state of the parameter's shape is taken for moments: schedule-free's z is a weight."""
    for p in params:
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                flat = value.view(-1)
                flat[flat.abs().argsort()[: int(ratio * (value.numel() - 1)) + 1]] = 0


class Masters(torch.optim.AdamW):
    """DeepSpeed's way: steps copies, and then copies those back."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, lr=lr)
        self.copies = [p.detach().clone() for p in self.param_groups[0]["params"]]

    def step(self, closure=None):
        for p, copied in zip(self.param_groups[0]["params"], self.copies, strict=True):
            p.data.copy_(copied)
        super().step()
        self.copies = [p.detach().clone() for p in self.param_groups[0]["params"]]


# Schedules: of (inner, restarts).


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


# Whole restarts: of (model, optimizer, ratio).


def without_scale(model, optimizer, ratio):
    """relora-pico's, over sites of this library."""
    for _, site in low_rank_sites(model):
        with torch.no_grad():
            site.weight.add_(site.lora_B @ site.lora_A)
            site.lora_B.zero_()
    return restart_(model, optimizer, prune_ratio=ratio)


def redrawn_first(model, optimizer, ratio):
    """The update is dropped before it is merged."""
    for _, site in low_rank_sites(model):
        with torch.no_grad():
            site.lora_B.zero_()
    return restart_(model, optimizer, prune_ratio=ratio)


def unpruned(model, optimizer, ratio):
    """The moments are left as they are."""
    kept = copy.deepcopy(optimizer.state_dict())
    report = restart_(model, optimizer, prune_ratio=ratio)
    optimizer.load_state_dict(kept)
    return report


def of_B_alone(model, optimizer, ratio):
    """The moments of A are left as they are."""
    kept = {
        id(site.lora_A): copy.deepcopy(dict(optimizer.state.get(site.lora_A, {})))
        for _, site in low_rank_sites(model)
    }
    report = restart_(model, optimizer, prune_ratio=ratio)
    for _, site in low_rank_sites(model):
        if kept[id(site.lora_A)]:
            optimizer.state[site.lora_A] = kept[id(site.lora_A)]
    return report


def drawn_from_the_global_generator(model, optimizer, ratio):
    """As every peer draws."""
    report = restart_(model, optimizer, prune_ratio=ratio)
    for _, site in low_rank_sites(model):
        nn.init.kaiming_uniform_(site.lora_A)
    return report
