"""The contents of one parameter's optimizer state, for each optimizer class."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.optim import Optimizer

_STEP = {"step": 0.0}


@dataclass(frozen=True)
class StateLayout:
    """The keys of `optimizer.state[p]`, by what a reset does to them.

    Args:
        moments: running averages, each of the parameter's shape. The first is the leading one: its
            magnitudes choose a joint mask.
        others: keys that a reset leaves alone.
        clock: step counts, each with its initial value.
        shared: statistics that many entries share, of another shape than the parameter's. Only a
            full reset zeroes them.
        copies: copies of the parameter that later steps start from. A reset sets them to the
            parameter.
        codes: for each moment that may be kept in 8 bits, the keys of its table and of its block
            scales.
    """

    moments: tuple[str, ...]
    others: tuple[str, ...] = ()
    clock: Mapping[str, float] = field(default_factory=lambda: _STEP)
    shared: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    codes: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """All keys that are known."""
        of_codes = {key for keys in self.codes.values() for key in keys}
        known = (self.moments, self.others, self.clock, self.shared, self.copies)
        return of_codes.union(*known)


_ADAM = StateLayout(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
_MOMENTUM = StateLayout(("momentum_buffer",), clock={})
TORCH: dict[type[Optimizer], StateLayout] = {
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.SparseAdam: _ADAM,
    torch.optim.RAdam: _ADAM,
    torch.optim.NAdam: StateLayout(("exp_avg", "exp_avg_sq"), clock={**_STEP, "mu_product": 1.0}),
    torch.optim.Adamax: StateLayout(("exp_avg", "exp_inf")),
    torch.optim.SGD: _MOMENTUM,
    torch.optim.RMSprop: StateLayout(("momentum_buffer", "grad_avg", "square_avg")),
    torch.optim.Adagrad: StateLayout(("sum",)),
    torch.optim.Adadelta: StateLayout(("acc_delta", "square_avg")),
    torch.optim.Adafactor: StateLayout(("variance",), shared=("row_var", "col_var")),
}
if hasattr(torch.optim, "Muon"):  # torch 2.9 and later
    TORCH[torch.optim.Muon] = _MOMENTUM

# Other libraries' classes are known by name, so that none is imported.
_SCHEDULE_FREE_ADAM = StateLayout(("exp_avg_sq",), clock={}, copies=("z",))
_SCHEDULE_FREE_SGD = StateLayout((), clock={}, copies=("z",))
FOREIGN = {
    "bitsandbytes.optim.optimizer.Optimizer1State": StateLayout(
        ("state1",), others=("unorm_vec",), codes={"state1": ("qmap1", "absmax1")}
    ),
    "bitsandbytes.optim.optimizer.Optimizer2State": StateLayout(
        ("state1", "state2"),
        others=("unorm_vec",),
        codes={"state1": ("qmap1", "absmax1"), "state2": ("qmap2", "absmax2")},
    ),
    "torchao.optim.adam._AdamBase": _ADAM,
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": _SCHEDULE_FREE_ADAM,
    "schedulefree.radam_schedulefree.RAdamScheduleFree": _SCHEDULE_FREE_ADAM,
    "schedulefree.sgd_schedulefree.SGDScheduleFree": _SCHEDULE_FREE_SGD,
    "transformers.optimization.Adafactor": StateLayout(
        ("exp_avg", "exp_avg_sq"), others=("RMS",), shared=("exp_avg_sq_row", "exp_avg_sq_col")
    ),
}

# Wrappers that keep copies in the inner optimizer's state, with the keys of those copies.
_WRAPPERS = {
    "schedulefree.wrap_schedulefree.ScheduleFreeWrapper": ("z",),
    "schedulefree.wrap_schedulefree_reference.ScheduleFreeWrapperReference": ("x", "y", "z"),
}

REFUSED = {
    "torch.optim.asgd.ASGD": "its `ax` is an average of the parameter, which a redraw makes "
    "meaningless",
    "torch.optim.rprop.Rprop": "its `step_size` is a step length for each entry, not an average",
    "torch.optim.lbfgs.LBFGS": "its history belongs to all parameters together",
    "bitsandbytes.optim.ademamix.AdEMAMix": "its `state1` stacks two averages",
    "torchao.optim.cpu_offload.CPUOffloadOptimizer": "it steps copies of the parameters in host "
    "memory, which a redraw does not reach",
}

_declared: dict[type[Optimizer], StateLayout] = {}


def declare_moments(
    optimizer_class: type[Optimizer],
    moments: Iterable[str],
    *,
    others: Iterable[str] = (),
    clock: Mapping[str, float] | None = None,
    copies: Iterable[str] = (),
) -> None:
    """Declare what the state of an optimizer class consists of, so that it can be reset.

    Shape alone does not identify a moment: a reset of all state of the parameter's shape would wipe
    averages of the weights, Rprop's step sizes and the uint8 codes of 8-bit optimizers, whose code
    0 is not zero.

    Args:
        optimizer_class: the class to declare, along with its subclasses that have the same state.
        moments: keys of `optimizer.state[p]` that are running averages of the gradient or of its
            powers, of the parameter's shape. The first one's magnitudes choose a joint mask.
        others: keys of `optimizer.state[p]` that a reset leaves alone.
        clock: keys of the parameter's step counts, each with its initial value; `{"step": 0}` if
            None. `reset_step` sets them to it.
        copies: keys of copies of the parameter that later steps start from, such as one in higher
            precision. A reset sets them to the parameter, which a restart has redrawn.

    Raises:
        TypeError: if `optimizer_class` is not a subclass of `torch.optim.Optimizer`.
        ValueError: if `moments`, `copies` and `others` are all empty.

    Examples:
        >>> class Signum(torch.optim.SGD):
        ...     pass
        >>> declare_moments(Signum, ["momentum_buffer"], clock={})
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"optimizer_class must be an Optimizer subclass; got {optimizer_class!r}")
    begins = _STEP if clock is None else dict(clock)
    layout = StateLayout(tuple(moments), tuple(others), begins, copies=tuple(copies))
    if not (layout.moments or layout.copies or layout.others):
        raise ValueError("moments must name a key of the optimizer's state or more; got none")
    _declared[optimizer_class] = layout


def refuse_unfit(optimizer: Optimizer) -> None:
    """Raise ValueError, with the reason, if optimizers of this class cannot be reset."""
    for cls in type(optimizer).__mro__:
        if cls in _declared or cls in TORCH:
            return
        if _name(cls) in REFUSED:
            name = type(optimizer).__name__
            raise ValueError(f"{name} cannot be reset: {REFUSED[_name(cls)]}")


def copies_beside(optimizer_class: type[Optimizer]) -> tuple[str, ...]:
    """Return the keys under which a wrapper keeps copies in the inner optimizer's state."""
    return _WRAPPERS.get(_name(optimizer_class), ())


def copies_of_wrappers() -> set[str]:
    """Return the keys under which any known wrapper keeps copies."""
    return {key for keys in _WRAPPERS.values() for key in keys}


def layout_of(
    optimizer: Optimizer, state: Mapping[str, object], beside: Iterable[str] = ()
) -> StateLayout:
    """Return the StateLayout of an optimizer's class, checked against one parameter's `state`.

    Args:
        optimizer: the optimizer that holds the state.
        state: the state of one parameter.
        beside: the keys of copies that wrappers of the optimizer keep in that state.

    Raises:
        ValueError: if the class is not known, or the state has keys that its StateLayout lacks.
    """
    name = type(optimizer).__name__
    fix = (
        f"relora_core.declare_moments({name}, [<moments>], copies=[<copies of the parameters that "
        "later steps read>], others=[<the rest>])"
    )
    layout = known_layout(type(optimizer))
    if layout is None:
        raise ValueError(
            f"it is not known which of {name}'s states {sorted(state)} are moments: declare them "
            f"with {fix}"
        )
    layout = replace(layout, copies=(*layout.copies, *beside))
    unknown = set(state) - layout.keys
    if unknown:
        raise ValueError(
            f"{name} keeps states {sorted(unknown)} that its declaration lacks: declare them with "
            f"{fix}"
        )
    return layout


def known_layout(optimizer_class: type[Optimizer]) -> StateLayout | None:
    """Return the StateLayout of an optimizer class, or of the nearest parent that has one."""
    for cls in optimizer_class.__mro__:
        layout = _declared.get(cls) or TORCH.get(cls) or FOREIGN.get(_name(cls))
        if layout is not None:
            return layout
    return None


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
