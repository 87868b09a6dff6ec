"""ReLoRA's primitives for any trainer: low-rank sites, restarts, resets and the jagged schedule."""

import relora_core.sites.averages  # noqa: F401 - replaces AveragedModel.update_parameters
from relora_core.diagnostics.spectrum import Spectrum
from relora_core.diagnostics.summary import Summary, summary
from relora_core.diagnostics.update_spectra import UpdateSpectra
from relora_core.distributed.consensus import OutOfStepError
from relora_core.files.adapters import load_adapters, save_adapters
from relora_core.files.weights import base_state_dict, merged_state_dict, save_merged
from relora_core.low_rank.parametrization import LowRank
from relora_core.low_rank.register import is_low_rank, register_low_rank, remove_low_rank
from relora_core.optim.optimizer import ResettableOptimizer
from relora_core.optim.pruning import magnitude_prune_, random_prune_
from relora_core.optim.reset import ResetReport, reset_optimizer_
from relora_core.optim.state_layouts import declare_moments
from relora_core.restart import RestartReport, restart_
from relora_core.schedule import JaggedCosine, JaggedLR, Restarts
from relora_core.sites.bases import split_bases_
from relora_core.sites.merged_copies import keep_merged_, refresh_merged_
from relora_core.sites.site import Site, clean_name, low_rank_sites, merge_, reinit_
from relora_core.sites.targets import add_low_rank_

__all__ = [
    "JaggedCosine",
    "JaggedLR",
    "LowRank",
    "OutOfStepError",
    "ResetReport",
    "ResettableOptimizer",
    "RestartReport",
    "Restarts",
    "Site",
    "Spectrum",
    "Summary",
    "UpdateSpectra",
    "add_low_rank_",
    "base_state_dict",
    "clean_name",
    "declare_moments",
    "is_low_rank",
    "keep_merged_",
    "load_adapters",
    "low_rank_sites",
    "magnitude_prune_",
    "merge_",
    "merged_state_dict",
    "random_prune_",
    "refresh_merged_",
    "register_low_rank",
    "reinit_",
    "remove_low_rank",
    "reset_optimizer_",
    "restart_",
    "save_adapters",
    "save_merged",
    "split_bases_",
    "summary",
]
