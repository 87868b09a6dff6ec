"""The properties of pruned moments: how much a reset zeroes, an assertion each."""

import torch

from relora_core.optim.reset import ResetReport
from relora_core.testing.properties.resets import ResetFunction, reset_by_relora
from relora_core.testing.subjects import PropertyError
from relora_core.testing.training import (
    OptimizerFactory,
    Trained,
    first_moments_of,
    is_known,
    moments_of,
    moved_without_gradient,
    shared_of,
)


def assert_full_reset_stands_still(
    case: Trained, *, reset: ResetFunction = reset_by_relora
) -> None:
    """Assert that after a full reset a step without gradient moves nothing, wherever p is.

    The Parameters are redrawn before, as a restart does; then all moments are reset (ratio 1), and
    a step follows whose gradients are zero. It tells true zeros from codes that only look like
    them, and an optimizer that steps copies of its own from one that steps the Parameters.

    Args:
        case: the optimizer.
        reset: of (optimizer, params, ratio).

    Raises:
        PropertyError: if an entry moves.

    Examples:
        >>> assert_full_reset_stands_still(Trained(torch.optim.AdamW))
    """
    optimizer, params = case()
    generator = torch.Generator().manual_seed(case.seed + 1)
    with torch.no_grad():
        for p in params:
            p.copy_(torch.randn(p.shape, generator=generator))
    reset(optimizer, params, 1.0)
    shared = shared_of(optimizer, params) if is_known(optimizer, params) else []
    moved = [int(mask.sum()) for mask in moved_without_gradient(optimizer, params)]
    if any(moved):
        raise PropertyError(
            f"after a full reset, a step with zero gradients moved {sum(moved)} of "
            f"{sum(p.numel() for p in params)} entries: moments are left (or copies of the "
            "parameters, which a redraw did not reach; or it decays what has no gradient: then "
            "make it without)"
        )
    if any(bool(statistic.any()) for statistic in shared):
        raise PropertyError("a full reset left statistics that entries of a moment share")


def assert_prune_keeps_its_share(
    case: Trained,
    *,
    ratio: float = 0.5,
    reset: ResetFunction = reset_by_relora,
    by_magnitude: bool = True,
) -> None:
    r"""Assert that a reset zeroes `ratio` of the entries of each moment, and leaves the others.

    Counted by value, to within one entry of $ratio \cdot n$, ties or none; what is not zero has the
    bits that it had. Of a Parameter's first moment the smallest go. Where the optimizer's state is
    not known to this library (`declare_moments`), the entries that a step without gradient moves
    are counted instead.

    Args:
        case: the optimizer.
        ratio: from 0 to 1.
        reset: of (optimizer, params, ratio).
        by_magnitude: whether the smallest must go; False for a reset that chooses otherwise.

    Raises:
        PropertyError: if more or fewer are zeroed, others change, or the report is untrue.

    Examples:
        >>> assert_prune_keeps_its_share(Trained(torch.optim.AdamW), ratio=0.9)
    """
    optimizer, params = case()
    if not is_known(optimizer, params):
        _count_moving(case, ratio, reset)
        return
    before, first = moments_of(optimizer, params), first_moments_of(optimizer, params)
    report = reset(optimizer, params, ratio)
    after = moments_of(optimizer, params)
    leading = list(zip(first, first_moments_of(optimizer, params), strict=False))
    if len(before) != len(after):
        raise PropertyError(
            f"of {len(before)} moments {len(after)} are left: a reset prunes them, and deletes none"
        )
    for old, new in zip(before, after, strict=True):
        count, zeros = old.numel(), int((new == 0).sum())
        most = ratio * count + 1 + int((old == 0).sum())
        if not ratio * count - 1 <= zeros <= most:
            raise PropertyError(
                f"a reset of ratio {ratio:g} left {zeros} of a moment's {count} entries zero"
            )
        if bool(((new != old) & (new != 0)).any()):
            raise PropertyError("a reset changed a moment's entry that it did not zero")
    for old, new in leading if by_magnitude else []:
        gone, kept = old[new == 0].abs(), old[new != 0].abs()
        if gone.numel() and kept.numel() and gone.max() > kept.min():
            raise PropertyError(
                f"a reset zeroed an entry of the first moment of magnitude {gone.max():.3g}, and "
                f"kept one of {kept.min():.3g}"
            )
    if isinstance(report, ResetReport) and before:
        counts = sum(int((new == 0).sum()) for new in after)
        already = sum(int((old == 0).sum()) for old in before)
        if not counts - already <= report.zeroed <= counts:
            raise PropertyError(f"the report says {report.zeroed} zeroed; {counts} are zero")


def assert_any_size_is_pruned(
    factory: OptimizerFactory, *, ratio: float = 0.9, reset: ResetFunction = reset_by_relora
) -> None:
    """Assert `assert_prune_keeps_its_share` for a Parameter of more than 2**24 entries.

    Beyond that `torch.quantile` raises, and a reset that passes over what it cannot rank does
    nothing.

    Args:
        factory: makes the optimizer from a list of Parameters.
        ratio: from 0 to 1.
        reset: of (optimizer, params, ratio).

    Raises:
        PropertyError: if the share is another.

    Examples:
        >>> from functools import partial
        >>> assert_any_size_is_pruned(partial(torch.optim.SGD, momentum=0.9))
    """
    large = ((2**12, 2**12 + 1),)
    case = Trained(factory, shapes=large, steps=1)
    assert_prune_keeps_its_share(case, ratio=ratio, reset=reset, by_magnitude=False)


def _count_moving(case: Trained, ratio: float, reset: ResetFunction) -> None:
    (optimizer, params), (twin, same) = case(), case()
    reset(optimizer, params, ratio)
    moved = moved_without_gradient(optimizer, params)
    usual = moved_without_gradient(twin, same)
    for p, now, before in zip(params, moved, usual, strict=True):
        most, least = p.numel() * (1 - ratio) + 1, int(before.sum()) - p.numel() * ratio - 1
        if not least <= int(now.sum()) <= most:
            raise PropertyError(
                f"after a reset of ratio {ratio:g}, a step with zero gradients moved "
                f"{int(now.sum())} of {p.numel()} entries; without it, {int(before.sum())}"
            )
