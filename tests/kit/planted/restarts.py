"""Broken restarts, of (model, optimizer, ratio).

Each is a bug of public ReLoRA or LoRA code as it stood in 2026, in a few lines.
"""

import copy

import torch
from torch import nn

from relora_core import low_rank_sites, reset_optimizer_, restart_


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


def with_old_gradients(model, optimizer, ratio):
    """A hook in each micro-batch of a step: what has accumulated is used by the step."""
    kept = {p: p.grad for p in model.parameters() if p.grad is not None}
    for p in kept:
        p.grad = None
    report = restart_(model, optimizer, prune_ratio=ratio)
    for p, grad in kept.items():
        p.grad = grad
    return report


def of_trained_factors_alone(model, optimizer, ratio):
    """The moments of a factor that is frozen for now stay."""
    kept = {p: copy.deepcopy(s) for p, s in optimizer.state.items() if not p.requires_grad}
    report = restart_(model, optimizer, prune_ratio=ratio)
    for p, state in kept.items():
        optimizer.state[p] = state
    return report


def by_hand(model, optimizer, ratio):
    """The three lines of a tutorial: W is added to before B is zeroed, whoever else has W."""
    factors = []
    for _, site in low_rank_sites(model):
        with torch.no_grad():
            site.weight.add_(site.lora_B @ site.lora_A, alpha=site.scale)
            site.lora_B.zero_()
        site.redraw_()
        factors += [site.lora_A, site.lora_B]
    return reset_optimizer_(optimizer, factors, prune_ratio=ratio)


def of_the_first(model, optimizer, ratio):
    """Of several optimizers only one is looked at."""
    several = optimizer if isinstance(optimizer, list) else [optimizer]
    kept = [copy.deepcopy(one.state_dict()) for one in several]
    report = restart_(model, optimizer, prune_ratio=ratio)
    for one, state in zip(several[1:], kept[1:], strict=True):
        one.load_state_dict(state)
    return report
