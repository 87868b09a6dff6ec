"""Weights in fp32, bf16 or halves, in each layout: what is kept, and what a resume gives."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.processes import full
from tests.trainer.runs import EVERY_CHECKPOINT, RUN, records, rewound, spectra_of, state_at, train


@pytest.mark.parametrize("layout", ["shard", "replicate"])
def test_pure_bf16_keeps_what_is_trained_in_16_bits_and_no_more(tiny, layout):
    import relora_core as relora

    chosen = ("--parallel.precision", "pure-bf16", "--parallel.layout", layout)
    train(*tiny, *chosen, *EVERY_CHECKPOINT)
    (file,) = (RUN / "checkpoints/step-00000006").glob("shard-*")
    at_hand_off = {n: t for n, t in load_file(file).items() if not n.endswith(".step")}
    assert {value.dtype for value in at_hand_off.values()} == {torch.bfloat16}
    exported = load_file(RUN / "export/model.safetensors")
    for state, _ in state_at("relora"):
        for name, p in state.parameters.items():
            kept = (p, *(t for t in state.optimizer.state[p].values() if t.ndim))
            assert {t.dtype for t in kept} == {torch.bfloat16}, name
            assert torch.isfinite(p.full_tensor()).all()
        for name, site in relora.low_rank_sites(state.model):
            exact, first = full(site.exact()), at_hand_off[f"model.{name}.weight"].float()
            assert exact.dtype == exported[f"{name}.weight"].dtype == torch.float32
            assert 0 < (exact - first).abs().max() < 0.1  # merges have added to what it was
            assert not torch.equal(exact.bfloat16().float(), exact)
    again = rewound("first-run", 12)
    train("--resume", "--name", again.name)
    for name, tensor in load_file(again / "export/model.safetensors").items():
        assert torch.equal(tensor, exported[name]), name


def test_bases_in_halves_resume_to_the_same_bits(tiny):
    halves = ("--parallel.precision", "bf16", "--parallel.layout", "replicate")
    train(*tiny, *halves, *EVERY_CHECKPOINT, "--name", "whole")
    for step in (6, 12, 16):  # at the hand-off, between restarts and before one
        again = rewound("whole", step)
        train("--resume", "--name", again.name)
        exports = [run / "export/model.safetensors" for run in (again, Path("runs/whole"))]
        assert exports[0].read_bytes() == exports[1].read_bytes()
        assert spectra_of(again) == spectra_of(Path("runs/whole"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layouts", [("shard", "replicate"), ("replicate", "shard")])
def test_a_run_may_go_on_in_another_layout(tiny, precision, layouts):
    """Checkpoints hold W in fp32 whatever the layout, and the layouts compute the same.

    But for ties: one weight in 65,536 lies just between two of 16 bits, and its halves round it
    away from zero, a cast to the even one.
    """
    before, after = layouts
    chosen = ("--parallel.precision", precision, "--parallel.layout", before)
    train(*tiny, *chosen, *EVERY_CHECKPOINT, "--name", "whole")
    again = rewound("whole", 12)
    train("--resume", "--name", again.name, "--parallel.layout", after)
    exported = load_file("runs/whole/export/model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    for name, tensor in load_file(again / "export/model.safetensors").items():
        if precision == "fp32":
            assert torch.equal(tensor, exported[name]), name
        else:
            torch.testing.assert_close(tensor, exported[name], atol=2e-3, rtol=0, msg=name)
    (own,), (whole,) = (records(run, "end") for run in (again, Path("runs/whole")))
    assert own["ranks"] == whole["ranks"]
    within = 1e-3 if precision == "fp32" else 0.1
    for name, values in whole["spectra"].items():
        assert own["spectra"][name] == pytest.approx(values, rel=within, abs=within * values[0])
