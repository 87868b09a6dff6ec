"""Broken resets, of (optimizer, params, ratio), and an optimizer that undoes a sound one.

Each is a bug of public ReLoRA or LoRA code as it stood in 2026, in a few lines.
"""

import torch

from relora_core import reset_optimizer_


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
