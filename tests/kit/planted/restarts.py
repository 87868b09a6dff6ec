"""Broken restarts, of (model, optimizer, ratio).

Each is a bug of public ReLoRA or LoRA code as it stood in 2026, in a few lines.
"""

import copy

import torch
from torch import nn

from relora_core import low_rank_sites, restart_


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
