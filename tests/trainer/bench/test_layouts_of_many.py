"""`bench traffic` and `bench memory`, and the model of clusters built from what they count."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.bench.ceilings import CEILINGS
from reference_trainer.bench.commands import traffic
from reference_trainer.bench.communication import sent_in_micro_step, sent_in_step
from reference_trainer.bench.computation import computation, of_micro_steps
from reference_trainer.bench.layouts import (
    FULL,
    REPLICATE,
    SHARD,
    Step,
    laid_out,
    layouts,
    pretended,
    world_of,
)
from reference_trainer.bench.memory import state_bytes
from reference_trainer.bench.projection import CLUSTERS, communication_seconds, seconds_of
from reference_trainer.bench.results import total
from reference_trainer.bench.tracker import track_peak
from reference_trainer.bench.whole_step import step_kernels
from reference_trainer.config import CHECKPOINTING
from reference_trainer.main import main
from reference_trainer.model.llama import LlamaShape
from tests.trainer.runs import lines_of

SHAPE = LlamaShape(64, 96, 4, 4, 4, 80)
SIZES = {"rank": 8, "length": 16, "sequences": 2}


def step(layout, **options):
    return Step(layout, SHAPE, **{**SIZES, **options})


SMALL = ["--layers", "1", "--vocab", "64", "--model", "9m", "--tokens", "32", "--length", "16"]
SMALL += ["--rank", "8"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class TestCommand:
    @pytest.mark.parametrize("number", [2, pytest.param(None, marks=pytest.mark.slow)])
    def test_counts_every_layout(self, tmp_path, capsys, monkeypatch, number):
        monkeypatch.setattr(traffic, "layouts", lambda *sizes: layouts(*sizes)[:number])
        assert main(["bench", "traffic", "--processes", "4", "--node", "2", *SMALL]) == 0
        file = tmp_path / "runs/bench/traffic-9m.jsonl"
        first, *records = map(json.loads, file.read_text().splitlines())
        assert first["level"] == "traffic"
        assert [r["arm"] for r in records] == [layout.name for layout in layouts(4, 2)][:number]
        sent = {r["arm"]: total(r["step"]) for r in records}
        assert number or sent["replicate"] < sent["shard"]
        table = capsys.readouterr().out
        assert "each of 4 processes sends" in table
        assert f"| {records[-1]['arm']} |" in table
        assert main(["bench", "show", str(file)]) == 0
        assert capsys.readouterr().out.strip() in table

    @pytest.mark.slow
    def test_tracks_every_layout(self, tmp_path, capsys):
        assert main(["bench", "memory", "--processes", "4", *SMALL]) == 0
        file = tmp_path / "runs/bench/memory-9m.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()][1:]
        assert [(r["arm"], r["recompute"]) for r in records] == [
            (layout.name, mode) for layout in layouts(4, 8) for mode in CHECKPOINTING
        ]
        shown = capsys.readouterr().out
        assert "GiB on each of 4" in shown
        assert "computed again, selective" in shown
        for layout in layouts(4, 8):
            none, selective, full = (r["flops"] for r in records if r["arm"] == layout.name)
            assert none <= selective < full

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["traffic", "--tokens", "7"], "--tokens must be a multiple of --length"),
            (["memory", "--rank", "999"], "--rank must be at most 128"),
            (["traffic", "--processes", "1"], "bench traffic needs 2 processes or more; got 1"),
            (["memory", "--processes", "1"], "bench memory needs 2 processes or more; got 1"),
            (
                ["traffic", "--processes", "6", "--node", "4"],
                "the number of processes must be a multiple of --node 4; got 6",
            ),
        ],
    )
    def test_refuses_and_writes_nothing(self, tmp_path, capsys, given, message):
        assert main(["bench", given[0], *SMALL, *given[1:]]) == 2
        (error,) = lines_of(capsys.readouterr().err)
        assert message in error
        assert not list(tmp_path.iterdir())


class TestPeak:
    @pytest.mark.parametrize("layout", layouts(4, 2), ids=lambda layout: layout.name)
    def test_state_is_that_of_real_tensors(self, layout):
        found = track_peak(step(layout), processes=4)
        with pretended(4):
            state = laid_out(step(layout), world_of(layout))
            for p in state.parameters.values():
                p.grad = p.detach().clone()
            state.optimizer.step()
            expected = state_bytes(state.model, state.optimizer)
        assert found["weights"] + found["optimizer"] == expected

    @pytest.mark.parametrize(("layout", "gathers"), [(SHARD, 1), (REPLICATE, 2)])
    def test_copies_of_all_sites_are_gathered_together(self, layout, gathers):
        """A, and where copies are whole these, in eight runs however many sites there are."""
        calls = []
        for merged in (False, True):
            with pretended(4):
                sent = sent_in_step(step(dataclasses.replace(layout, merged=merged)))
            calls.append(sum(s.calls for s in sent if s.collective == "all-gather"))
        assert calls[1] - calls[0] == 8 * gathers

    def test_recomputing_needs_less(self):
        for layout in layouts(4, 8):
            kept, products, inputs = (
                track_peak(step(layout, recompute=mode, sequences=8), processes=4)["total"]
                for mode in CHECKPOINTING
            )
            assert inputs < products < kept


def sent(collective="all-gather", processes=8, stride=1, calls=1, bytes=0):
    keys = ("collective", "processes", "stride", "calls", "bytes")
    return dict(zip(keys, (collective, processes, stride, calls, bytes), strict=True))


class TestProjection:
    @given(st.sampled_from(CLUSTERS), st.integers(1, 10**12), st.integers(0, 1000))
    def test_bytes_and_calls_add_up(self, cluster, bytes, calls):
        for processes, stride in ((8, 1), (64, 1), (16, 8)):
            where = {"processes": processes, "stride": stride}
            both = seconds_of(sent(bytes=bytes, calls=calls, **where), cluster)
            apart = seconds_of(sent(bytes=bytes, calls=0, **where), cluster)
            apart += seconds_of(sent(bytes=0, calls=calls, **where), cluster)
            assert both == pytest.approx(apart)

    @pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda cluster: cluster.name)
    def test_links_are_used_as_said(self, cluster):
        gigabyte = 10**9
        within = seconds_of(sent(calls=0, bytes=gigabyte), cluster)
        assert within == pytest.approx(gigabyte / cluster.inside)
        across = seconds_of(sent(processes=64, calls=0, bytes=gigabyte), cluster)
        assert across == pytest.approx(gigabyte / min(cluster.inside, cluster.outside))
        # One GPU of each node: it has an eighth of what the node sends.
        strided = seconds_of(sent(processes=8, stride=8, calls=0, bytes=gigabyte), cluster)
        assert strided == pytest.approx(8 * gigabyte / cluster.outside)

    def test_a_ring_hops_once_past_every_process_and_a_tree_by_its_depth(self):
        cluster = dataclasses.replace(CLUSTERS[0], near=1.0, far=100.0)
        assert seconds_of(sent(processes=8), cluster) == 7
        assert seconds_of(sent(processes=64), cluster) == (63 - 8) + 8 * 100
        assert seconds_of(sent("all-reduce", processes=64), cluster) == 2 * (3 + 3 * 100)

    def test_gathers_come_with_every_micro_batch_and_reductions_once(self):
        cluster = CLUSTERS[0]
        gather, reduce = sent(bytes=10**9), sent("reduce-scatter", bytes=10**9)
        found = communication_seconds([gather, reduce], [gather], cluster, micro_steps=8)
        each = seconds_of(gather, cluster)
        assert found == pytest.approx(8 * each + seconds_of(reduce, cluster))

    @pytest.mark.parametrize("layout", layouts(4, 8), ids=lambda layout: layout.name)
    def test_a_micro_step_sends_no_gradient_unless_told(self, layout):
        for reduce in ("step", "micro-step"):
            with pretended(4):
                found = sent_in_micro_step(step(layout, reduce=reduce))
            kinds = {one.collective for one in found}
            assert ("all-gather" in kinds) is (layout.shards != 1)
            reductions = kinds & {"reduce-scatter", "all-reduce"}
            assert bool(reductions) is (reduce == "micro-step")

    @pytest.mark.parametrize("layout", [FULL, SHARD], ids=lambda layout: layout.name)
    def test_computation_is_that_of_all_kernels(self, layout):
        deep = Step(layout, dataclasses.replace(SHAPE, layers=6), **SIZES)
        gpus = {"h100": CEILINGS["h100"]}
        taken = computation(deep, processes=4, gpus=gpus)["h100"]
        arm = "ours" if layout.low_rank else "full"
        for micro_steps in (1, 2, 5):
            parts = step_kernels(arm, deep, processes=4, micro_steps=micro_steps)
            expected = sum(CEILINGS["h100"].seconds(k) for part in parts for k in part.kernels)
            assert of_micro_steps(taken, micro_steps) == pytest.approx(expected)
