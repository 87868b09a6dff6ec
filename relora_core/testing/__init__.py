"""Property tests of merges, resets and schedules: of this library's, and of your own.

`check_low_rank`, `check_resettable`, `check_schedule` and `check_restart` run whole batteries; the
assertions and strategies that they are made of are here as well. Needs hypothesis
(`pip install 'relora-toolkit[testing]'`).
"""

from relora_core.testing.algorithm import Algorithm1
from relora_core.testing.curves import (
    constant_times_exponential,
    inverse_time,
    nineteen_twentieths,
    warmup_then_cosine,
)
from relora_core.testing.expressions import Call
from relora_core.testing.history import EVENTS, lived
from relora_core.testing.inputs import example_inputs, given_inputs
from relora_core.testing.jags import (
    Rates,
    assert_hand_changed_rate_is_kept,
    assert_ramps_rise,
    assert_rate_is_told,
    assert_schedule_resumes,
    assert_smooth_outside_ramps,
    assert_zero_at_restarts,
)
from relora_core.testing.leftovers import (
    assert_broken_off_is_found,
    assert_frozen_moments_are_reset,
    assert_no_old_gradient_is_used,
    assert_second_owners_are_safe,
    assert_several_optimizers_are_reset,
)
from relora_core.testing.lifetimes import (
    assert_copies_are_independent,
    assert_export_is_merged,
    assert_removal_cancels,
    assert_saves_and_loads,
)
from relora_core.testing.machine import RestartMachine
from relora_core.testing.merges import (
    assert_gradients_are_dense,
    assert_is_dense,
    assert_merge_adds_update,
    assert_merge_is_idempotent,
    assert_merge_keeps_function,
    assert_merges_add_up,
)
from relora_core.testing.module_battery import check_low_rank
from relora_core.testing.modules import (
    histories,
    layers,
    low_rank_modules,
    with_sites,
    with_split_bases,
)
from relora_core.testing.prunes import (
    assert_any_size_is_pruned,
    assert_full_reset_stands_still,
    assert_prune_keeps_its_share,
)
from relora_core.testing.redraws import (
    assert_learns,
    assert_rank_grows,
    assert_redraw_is_keyed,
)
from relora_core.testing.reset_battery import check_resettable
from relora_core.testing.resets import (
    assert_nan_is_refused,
    assert_next_step_is_bounded,
    assert_reset_before_the_first_step,
    assert_reset_commutes_with_saving,
    assert_reset_leaves_the_rest,
)
from relora_core.testing.restart_battery import check_restart
from relora_core.testing.runner import CI, DEEP, Held
from relora_core.testing.schedule_battery import check_schedule
from relora_core.testing.small_layers import (
    Experts,
    NormalizedLinear,
    Residual,
    SelfAttention,
    SelfBilinear,
    TiedHead,
    TransposedLinear,
)
from relora_core.testing.strategies import (
    calls,
    clocks,
    optimizers,
    ratios,
    schedules,
    shapes,
    trained,
)
from relora_core.testing.subjects import BrokenPromiseError, LowRankSite, find_sites
from relora_core.testing.training import Trained

__all__ = [
    "CI",
    "DEEP",
    "EVENTS",
    "Algorithm1",
    "BrokenPromiseError",
    "Call",
    "Experts",
    "Held",
    "LowRankSite",
    "NormalizedLinear",
    "Rates",
    "Residual",
    "RestartMachine",
    "SelfAttention",
    "SelfBilinear",
    "TiedHead",
    "Trained",
    "TransposedLinear",
    "assert_any_size_is_pruned",
    "assert_broken_off_is_found",
    "assert_copies_are_independent",
    "assert_export_is_merged",
    "assert_frozen_moments_are_reset",
    "assert_full_reset_stands_still",
    "assert_gradients_are_dense",
    "assert_hand_changed_rate_is_kept",
    "assert_is_dense",
    "assert_learns",
    "assert_merge_adds_update",
    "assert_merge_is_idempotent",
    "assert_merge_keeps_function",
    "assert_merges_add_up",
    "assert_nan_is_refused",
    "assert_next_step_is_bounded",
    "assert_no_old_gradient_is_used",
    "assert_prune_keeps_its_share",
    "assert_ramps_rise",
    "assert_rank_grows",
    "assert_rate_is_told",
    "assert_redraw_is_keyed",
    "assert_removal_cancels",
    "assert_reset_before_the_first_step",
    "assert_reset_commutes_with_saving",
    "assert_reset_leaves_the_rest",
    "assert_saves_and_loads",
    "assert_schedule_resumes",
    "assert_second_owners_are_safe",
    "assert_several_optimizers_are_reset",
    "assert_smooth_outside_ramps",
    "assert_zero_at_restarts",
    "calls",
    "check_low_rank",
    "check_resettable",
    "check_restart",
    "check_schedule",
    "clocks",
    "constant_times_exponential",
    "example_inputs",
    "find_sites",
    "given_inputs",
    "histories",
    "inverse_time",
    "layers",
    "lived",
    "low_rank_modules",
    "nineteen_twentieths",
    "optimizers",
    "ratios",
    "schedules",
    "shapes",
    "trained",
    "warmup_then_cosine",
    "with_sites",
    "with_split_bases",
]
