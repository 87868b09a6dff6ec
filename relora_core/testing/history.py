"""Histories: events that a model goes through before a property is checked."""

import copy
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from torch import nn

from relora_core.testing.inputs import Inputs, given_inputs, loss_of
from relora_core.testing.subjects import Sites, fill_B_, find_sites

Event = Literal["fill", "step", "merge", "redraw", "forward", "save", "copy", "move"]
EVENTS: tuple[Event, ...] = get_args(Event)


def lived(
    make: Callable[[], nn.Module],
    events: Iterable[Event],
    *,
    seed: int = 0,
    inputs: Inputs | None = None,
    sites: Sites = find_sites,
) -> nn.Module:
    """Return a model that has gone through `events` in order.

    - "fill": every B becomes random, with a norm that is not negligible next to W's.
    - "step": all trained parameters take a small gradient step.
    - "merge", "redraw": every site is merged or redrawn.
    - "forward": the model runs once in `eval` mode.
    - "save": a new model loads the state dict and replaces the old one.
    - "copy": a deep copy replaces the model.
    - "move": the model moves to float64 and back.

    Args:
        make: function that returns a new model.
        events: names of events, from the list above.
        seed: seed of the model's initialization and of the events' random numbers.
        inputs: function that returns the inputs of one call of the model; None for random inputs
            that fit the first layer.
        sites: function that finds the sites of your own layers.

    Raises:
        ValueError: if an event is not in the list above.

    Examples:
        >>> from relora_core import register_low_rank
        >>> make = lambda: register_low_rank(nn.Linear(3, 2), rank=1)
        >>> lived(make, ["fill", "merge", "redraw"]).parametrizations.weight[0].restart
        1
    """
    events = list(events)
    for event in events:
        if event not in EVENTS:
            raise ValueError(f"an event must be one of {', '.join(EVENTS)}; got {event!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for number, event in enumerate(events):
            model = _after(model, event, make, 10 * seed + number, inputs, sites)
    return model


def _after(
    model: nn.Module,
    event: Event,
    make: Callable[[], nn.Module],
    seed: int,
    inputs: Inputs | None,
    sites: Sites,
) -> nn.Module:
    if event == "save":
        torch.manual_seed(seed + 1000)
        other = make()
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        return other
    if event == "copy":
        return copy.deepcopy(model)
    if event == "move":
        _move_(model)
    elif event == "forward":
        modes = [(module, module.training) for module in model.modules()]
        with torch.no_grad():
            model.eval()(*given_inputs(model, inputs, seed=seed))
        for module, training in modes:
            module.training = training
    elif event == "step":
        trained = [p for p in model.parameters() if p.requires_grad]
        loss = loss_of(model(*given_inputs(model, inputs, seed=seed)), seed)
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for p, g in zip(trained, gradients, strict=True):
            if g is not None and g.any():
                with torch.no_grad():
                    p.sub_((0.1 * g / g.norm()).to(p.dtype))
    else:
        for site in sites(model).values():
            if event == "merge":
                site.merge_()
            elif event == "redraw":
                site.redraw_()
            else:
                fill_B_(site, seed)
    return model


def _move_(model: nn.Module) -> None:
    """Move float tensors to float64 and back; skip models with split bases or mixed dtypes."""
    if any(getattr(m, "low_bits", None) is not None for m in model.modules()):
        return
    tensors = [value for value in model.state_dict().values() if isinstance(value, torch.Tensor)]
    floats = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if len(floats) == 1:
        model.double().to(floats.pop())
