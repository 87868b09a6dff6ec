"""Assertions of how much of an optimizer's moments a reset zeroes."""

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
    """Assert that a step with zero gradients moves nothing after a full reset.

    The Parameters are redrawn first, as in a restart. Then all moments are reset (ratio 1), and the
    optimizer takes a step with zero gradients. This detects quantized moments that only look like
    zero, and optimizers that step their own copies of the Parameters.

    Args:
        case: factory of the optimizer.
        reset: function of (optimizer, params, ratio).

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
            f"{sum(p.numel() for p in params)} entries: the reset left some moments, or the "
            "optimizer steps its own copies of the Parameters, or it decays entries without a "
            "gradient (in that case, check it without weight decay)"
        )
    if any(bool(statistic.any()) for statistic in shared):
        raise PropertyError("a full reset left statistics that several entries share")


def assert_prune_keeps_its_share(
    case: Trained,
    *,
    ratio: float = 0.5,
    reset: ResetFunction = reset_by_relora,
    by_magnitude: bool = True,
) -> None:
    r"""Assert that a reset zeroes a share `ratio` of each moment's entries and keeps the others.

    The number of zeros must be within one of $ratio \cdot n$, with or without ties. All other
    entries must keep their bits. In a Parameter's first moment, the smallest entries must be
    zeroed. If this library does not know the optimizer's state (see `declare_moments`), the
    assertion counts the entries that a step with zero gradients moves.

    Args:
        case: factory of the optimizer.
        ratio: prune ratio, from 0 to 1.
        reset: function of (optimizer, params, ratio).
        by_magnitude: whether the smallest entries must be zeroed; False for a reset that chooses
            entries by another rule.

    Raises:
        PropertyError: if the number of zeros is wrong, other entries change, or the report is
            wrong.

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
            f"a reset must keep all {len(before)} moments; got {len(after)}: prune moments instead "
            "of deleting them"
        )
    for old, new in zip(before, after, strict=True):
        count, zeros = old.numel(), int((new == 0).sum())
        most = ratio * count + 1 + int((old == 0).sum())
        if not ratio * count - 1 <= zeros <= most:
            raise PropertyError(
                f"after a reset with ratio {ratio:g}, {zeros} of {count} entries of a moment are 0"
            )
        if bool(((new != old) & (new != 0)).any()):
            raise PropertyError("a reset changed an entry of a moment without zeroing it")
    for old, new in leading if by_magnitude else []:
        gone, kept = old[new == 0].abs(), old[new != 0].abs()
        if gone.numel() and kept.numel() and gone.max() > kept.min():
            raise PropertyError(
                f"a reset zeroed an entry of magnitude {gone.max():.3g} in the first moment and "
                f"kept an entry of magnitude {kept.min():.3g}"
            )
    if isinstance(report, ResetReport) and before:
        counts = sum(int((new == 0).sum()) for new in after)
        already = sum(int((old == 0).sum()) for old in before)
        if not counts - already <= report.zeroed <= counts:
            raise PropertyError(f"the report says {report.zeroed} were zeroed; {counts} are 0")


def assert_any_size_is_pruned(
    factory: OptimizerFactory, *, ratio: float = 0.9, reset: ResetFunction = reset_by_relora
) -> None:
    """Assert that a reset zeroes its share of a Parameter of more than 2**24 entries.

    For such a size `torch.quantile` raises, and a reset that catches this error does nothing.

    Args:
        factory: function that makes the optimizer from a list of Parameters.
        ratio: prune ratio, from 0 to 1.
        reset: function of (optimizer, params, ratio).

    Raises:
        PropertyError: if the share of zeros is wrong.

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
                f"after a reset with ratio {ratio:g}, a step with zero gradients moved "
                f"{int(now.sum())} of {p.numel()} entries; without the reset, {int(before.sum())}"
            )
