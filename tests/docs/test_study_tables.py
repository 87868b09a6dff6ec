"""A study's tables agree with its trials."""

import json
import math
import statistics

import pytest
from run_study import main
from study import tables
from study.picture import draw
from study.plans import TUNING_SEED

ENDS = {
    "full rank": (1.0, 1.1, 1.2),
    "LoRA": (1.9, 2.0, 2.1),
    "LoRA + warm start": (1.5, 1.6, 1.55),
    "ReLoRA + warm start": (1.4, 1.45, 1.35),
}
FULL, AFTER = 40.0, 30.0  # operations of a step


def trial(arm, seed, end, lr=1e-3, multiple=1.0):
    """Return a record of 100 steps; the loss falls by a straight line from 3 at step 20."""
    warm = 0.0 if arm == "LoRA" else 0.25
    rank = 0 if arm == "full rank" else 2
    steps = round(100 * warm) * FULL + (100 - round(100 * warm)) * (AFTER if rank else FULL)
    curve = [[s, 3.0 + (end - 3.0) * (s - 20) / 80, 3.0] for s in (20, 60, 100)]
    return {
        **{"event": "trial", "model": "1m", "arm": arm, "seed": seed, "steps": 100, "lr": lr},
        **{"lr_multiple": multiple, "warm_start": warm, "rank": rank, "curve": curve},
        **{"diverged": math.isnan(end), "flops": steps, "device": "a machine", "torch": "2.13"},
        "ranks": {"up": [2, 4], "down": [2, 3]} if rank else {"up": [], "down": []},
        "spectra": {"up": [2.0, 2.0], "down": [4.0, 2.0]},
    }


@pytest.fixture
def records():
    tuned = [("full rank", 1e-3, 1.0, 2.0), ("full rank", 2e-3, 1.0, 1.5)]
    tuned += [("LoRA", 2e-3, 8.0, 1.7), ("LoRA", 2e-3, 4.0, 1.6), ("LoRA", 2e-3, 16.0, math.nan)]
    found = [trial(arm, TUNING_SEED, end, lr, m) for arm, lr, m, end in tuned]
    for seed in range(3):
        found += [trial(arm, seed, ends[seed]) for arm, ends in ENDS.items()]
    return found


def rows(table):
    """Return the cells of every line but the header, by the first one."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {cells[0]: cells[1:] for cells in lines}


def test_rates_are_those_of_the_tuning_seed_in_order_and_the_best_is_bold(records):
    assert rows(tables.rates(records)) == {
        "full rank": ["0.001: 2.0000, 0.002: **1.5000**"],
        "LoRA": ["4 x 0.002: **1.6000**, 8 x 0.002: 1.7000, 16 x 0.002: inf"],
    }


def test_outcomes_are_means_over_the_other_seeds(records):
    found = rows(tables.outcomes(records, ENDS, None))
    assert list(found) == list(ENDS)
    for arm, ends in ENDS.items():
        mean, deviation = statistics.mean(ends), statistics.stdev(ends)
        shown = f"{mean:.4f} ± {deviation:.4f} ({min(ends):.4f} to {max(ends):.4f})"
        assert found[arm][:2] == [shown, "3"]


def test_arms_are_compared_from_the_same_seed(records):
    found = rows(tables.outcomes(records, ENDS, None))
    lora = ENDS["LoRA + warm start"]
    apart = [a - b for a, b in zip(ENDS["ReLoRA + warm start"], lora, strict=True)]
    shown = f"{statistics.mean(apart):+.4f} ± {statistics.stdev(apart):.4f}"
    assert found["ReLoRA + warm start"][2] == shown
    assert found["LoRA + warm start"][2] == "-"
    half = [r for r in records if r["arm"] != "ReLoRA + warm start" or r["seed"] != 0]
    last = f"{statistics.mean(apart[1:]):+.4f} ± {statistics.stdev(apart[1:]):.4f}"
    shuffled = sorted(half, key=lambda r: -r["seed"])
    assert rows(tables.outcomes(shuffled, ENDS, None))["ReLoRA + warm start"][2] == last


def test_what_an_arm_costs_is_a_share_of_all_steps_in_full_rank(records):
    found = rows(tables.outcomes(records, ENDS, 0.9))
    assert [cells[3:5] for cells in found.values()] == [
        ["1.00", "1.00"],
        ["0.75", "0.90"],
        [f"{(25 * 40 + 75 * 30) / 4000:.2f}", f"{(25 + 75 * 0.9) / 100:.2f}"],
        [f"{(25 * 40 + 75 * 30) / 4000:.2f}", f"{(25 + 75 * 0.9) / 100:.2f}"],
    ]


def test_equal_loss_is_that_of_lora_after_a_warm_start_found_between_evaluations(records):
    found = rows(tables.outcomes(records, ENDS, 0.9))
    target = statistics.mean(ENDS["LoRA + warm start"])

    def step(end):  # of the straight line
        return 20 + 80 * (3.0 - target) / (3.0 - end)

    full, relora = (
        statistics.mean(map(step, ENDS[a])) for a in ("full rank", "ReLoRA + warm start")
    )
    assert found["full rank"][5] == f"{full / 100:.2f}, {full / 100:.2f}"
    costs = [(25 + (relora - 25) * ratio) / 100 for ratio in (0.75, 0.9)]
    assert found["ReLoRA + warm start"][5] == ", ".join(f"{cost:.2f}" for cost in costs)
    assert found["LoRA"][5] == "not reached"


def test_ranks_of_the_change_are_medians_over_matrices(records):
    spectra = rows(tables.spectra(records))
    effective = statistics.median([2.0, math.exp(-(2 / 3 * math.log(2 / 3) + math.log(1 / 3) / 3))])
    assert spectra["full rank"] == [
        "2",
        f"{effective:.1f}",
        f"{(2 + 1.25) / 2:.1f}",
        "2 matrices, 3 seeds",
    ]
    assert "LoRA" not in spectra


def test_a_trial_that_diverged_is_counted_and_not_averaged(records, tmp_path):
    broken = [
        {**r, "diverged": True, "curve": r["curve"][:1], "spectra": {}, "flops": 40.0}
        if r["seed"] == 0 and r["arm"] in ("full rank", "ReLoRA + warm start")
        else r
        for r in records
    ]
    found = rows(tables.outcomes(broken, ENDS, 0.9))
    ends = ENDS["ReLoRA + warm start"][1:]
    assert found["ReLoRA + warm start"][0].startswith(f"{statistics.mean(ends):.4f} ± ")
    assert found["ReLoRA + warm start"][0].endswith(", 1 diverged")
    assert found["LoRA"][3] == "0.75"
    assert rows(tables.spectra(broken))["full rank"][3] == "2 matrices, 2 seeds"
    draw([broken], tmp_path / "picture.png")
    all_of_them = [{**r, "diverged": True} if r["arm"] == "LoRA" else r for r in records]
    assert rows(tables.outcomes(all_of_them, ENDS, 0.9))["LoRA"][0] == "diverged"


def test_a_study_of_which_little_is_known_is_shown_too(records):
    for count in range(len(records) + 1):
        some = records[:count]
        for table in (tables.rates(some), tables.outcomes(some, ENDS, None), tables.spectra(some)):
            assert table.count("\n") >= 1


class TestShow:
    def test_it_prints_the_tables_and_draws_the_picture(self, records, tmp_path, capsys):
        file = tmp_path / "trials.jsonl"
        file.write_text("\n".join(map(json.dumps, records)))
        assert main(["--show", "--out", str(file)]) == 0
        out = capsys.readouterr().out
        for table in (tables.rates(records), tables.spectra(records)):
            assert table in out
        assert (tmp_path / "trials.png").read_bytes().startswith(b"\x89PNG")
        assert f"picture: {tmp_path}/trials.png" in out

    def test_a_study_without_trials_is_refused(self, tmp_path, capsys):
        assert main(["--show", "--out", str(tmp_path / "none.jsonl")]) == 2
        assert "must hold a trial to show" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
