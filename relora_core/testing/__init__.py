"""Property tests of merges, resets and schedules: this library's or your own.

`check_low_rank`, `check_resettable`, `check_schedule` and `check_restart` check all properties of
a subject. Each property is also available as a separate assertion. `strategies` draws the examples,
and `examples` contains the layers and schedules that it draws. This package needs hypothesis
(`pip install 'relora-toolkit[testing]'`).
"""

from relora_core.testing import examples, strategies
from relora_core.testing.checks.modules import check_low_rank
from relora_core.testing.checks.resets import check_resettable
from relora_core.testing.checks.restarts import check_restart
from relora_core.testing.checks.runner import CI, DEEP, Held
from relora_core.testing.checks.schedules import check_schedule
from relora_core.testing.history import lived
from relora_core.testing.inputs import given_inputs
from relora_core.testing.machine import RestartMachine
from relora_core.testing.properties.merges import (
    assert_gradients_are_dense,
    assert_is_dense,
    assert_merge_adds_update,
    assert_merge_is_idempotent,
    assert_merge_keeps_function,
    assert_merges_add_up,
)
from relora_core.testing.properties.prunes import (
    assert_any_size_is_pruned,
    assert_full_reset_stands_still,
    assert_prune_keeps_its_share,
)
from relora_core.testing.properties.redraws import (
    assert_learns,
    assert_rank_grows,
    assert_redraw_is_keyed,
)
from relora_core.testing.properties.resets import (
    assert_nan_is_refused,
    assert_next_step_is_bounded,
    assert_reset_before_the_first_step,
    assert_reset_commutes_with_saving,
    assert_reset_leaves_the_rest,
)
from relora_core.testing.properties.restarts import (
    assert_broken_off_is_found,
    assert_frozen_moments_are_reset,
    assert_no_old_gradient_is_used,
    assert_second_owners_are_safe,
    assert_several_optimizers_are_reset,
)
from relora_core.testing.properties.roundtrips import (
    assert_copies_are_independent,
    assert_export_is_merged,
    assert_removal_cancels,
    assert_saves_and_loads,
)
from relora_core.testing.properties.schedules import (
    Rates,
    assert_hand_changed_rate_is_kept,
    assert_ramps_rise,
    assert_rate_is_told,
    assert_schedule_resumes,
    assert_smooth_outside_ramps,
    assert_zero_at_restarts,
)
from relora_core.testing.subjects import LowRankSite, PropertyError, find_sites
from relora_core.testing.training import Trained

__all__ = [
    "CI",
    "DEEP",
    "Held",
    "LowRankSite",
    "PropertyError",
    "Rates",
    "RestartMachine",
    "Trained",
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
    "check_low_rank",
    "check_resettable",
    "check_restart",
    "check_schedule",
    "examples",
    "find_sites",
    "given_inputs",
    "lived",
    "strategies",
]
