"""The kernels that are listed are those that a GPU launches, with the bytes that it moves."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import relora_core as relora
from reference_trainer.bench.ceilings import CEILINGS, Ceilings
from reference_trainer.bench.kernels import Kernel
from reference_trainer.bench.launched import Launched
from reference_trainer.bench.layouts import (
    BF16,
    FULL,
    REPLICATE,
    SHARD,
    Step,
    laid_out,
    pretended,
    world_of,
)
from reference_trainer.bench.whole_step import (
    around_blocks,
    block_kernels,
    linear_kernels,
    loss_kernels,
    step_kernels,
)
from reference_trainer.main import main
from reference_trainer.model.llama import LlamaShape, preset
from tests.trainer.runs import lines_of

SHAPE = LlamaShape(64, 90, 2, 4, 4, 50)
RANK, LENGTH, MICRO = 8, 16, 3
TOKENS = LENGTH * MICRO


def step(layout, shape=SHAPE):
    return Step(layout, shape, RANK, LENGTH, MICRO)


def kinds(kernels):
    found = Counter()
    for kernel in kernels:
        found[kernel.name.split()[0]] += kernel.times
    return found


class TestLinear:
    """Against a count by hand, in entries of 2 bytes; T tokens, m outputs, n inputs, r rank."""

    @given(st.integers(16, 60), st.integers(16, 60))
    def test_of_full_rank_is_three_products(self, m, n):
        T = TOKENS
        found = linear_kernels("full", step(FULL), (m, n))
        assert sorted(k.moved for k in found) == sorted(
            2 * entries for entries in (T * n + m * n + T * m,) * 3
        )
        assert sum(k.flops for k in found) == 6 * T * m * n

    @given(st.integers(16, 60), st.integers(16, 60))
    def test_over_a_merged_copy_reads_the_output_s_gradient_twice_and_the_input_thrice(self, m, n):
        T, r = TOKENS, RANK
        found = linear_kernels("ours", step(SHARD), (m, n))
        products = [
            (T * n + m * n + T * m, T * m * n),  # y = x Vᵀ
            (T * m + m * (n + r) + T * (n + r), T * m * (n + r)),  # [dx | h] = g [V | B]
            (T * r + T * n + r * n, T * r * n),  # dA = hᵀ x
            (T * n + r * n + T * r, T * r * n),  # u = x Aᵀ
            (T * m + T * r + m * r, T * r * m),  # dB = gᵀ u
        ]
        assert sorted((k.moved, k.flops) for k in found) == sorted(
            (2 * entries, 2 * operations) for entries, operations in products
        )

    @given(st.integers(16, 60), st.integers(16, 60))
    def test_in_two_paths_reads_the_thin_product_as_an_addend(self, m, n):
        T, r = TOKENS, RANK
        found = linear_kernels("two-paths", step(SHARD), (m, n))
        thin = [(T * n + r * n + T * r), (T * r + m * r + T * m)]  # u = x Aᵀ, u Bᵀ
        thin += [(T * m + m * r + T * r), (T * r + r * n + T * n)]  # h = g B, h A
        thin += [(T * r + T * n + r * n), (T * m + T * r + m * r)]  # dA, dB
        full = [(T * n + m * n + 2 * T * m), (T * m + m * n + 2 * T * n)]  # y, dx
        assert sorted(k.moved for k in found) == sorted(2 * entries for entries in thin + full)

    def test_scaled_by_one_multiplies_nothing_by_it_and_copies_no_addend(self):
        for arm in ("ours", "two-paths"):
            assert set(kinds(linear_kernels(arm, step(SHARD), (64, 90)))) == {"product"}

    def test_as_peft_has_it_copies_and_adds(self):
        pytest.importorskip("peft")
        found = kinds(linear_kernels("peft", step(SHARD), (64, 90)))
        assert found["product"] == 3 * 3 - 1  # W has no gradient
        assert found["fused"] > 0


class TestBlock:
    def test_of_full_rank_is_what_inductor_generates(self):
        """Its generated code for an H100 has 7 products and 6 other kernels, then 14 and 9."""
        found = kinds(block_kernels("full", step(FULL)))
        assert found["product"] == 7 + 14
        assert found["fused"] == 6 + 9
        assert found["attention"] == 2

    @pytest.mark.parametrize(("layout", "products"), [(SHARD, 5), (REPLICATE, 5), (BF16, 8)])
    def test_of_ours_has_more_products_and_nothing_else(self, layout, products):
        found = kinds(block_kernels("ours", step(layout)))
        assert found == {"product": 7 * products, "fused": 6 + 9, "attention": 2}

    def test_passes_over_activations_are_no_more_than_those_of_grouped_two_paths(self):
        """Of the update's own products; two paths write and read the output once more, and dx."""
        shape = preset("1.3b", vocab_size=32_000)
        tokens = MICRO * LENGTH
        thin = [
            k
            for k in block_kernels("ours", step(SHARD, shape))
            if k.name.startswith("product") and f" {RANK}" in k.name.split("product", 1)[1]
        ]
        passes = {"x": 0, "g": 0}
        for kernel in thin:
            rows, inner, columns = map(int, kernel.name.removeprefix("product ").split(" x "))
            if (rows, columns) == (tokens, RANK):
                passes["x"] += 1  # u = x Aᵀ
            elif rows == RANK:
                passes["x"] += 1  # dA = hᵀ x
            elif columns == RANK:
                passes["g"] += 1  # dB = gᵀ u
            assert inner in (tokens, 2048, 5461)
        assert passes == {"x": 2 * 7, "g": 7}


class TestStep:
    def test_adds_up_blocks_and_what_is_around_them(self):
        found = step_kernels("ours", step(SHARD), processes=1, micro_steps=2)
        blocks, around, update = (kinds(part.kernels) for part in found)
        one = kinds(block_kernels("ours", step(SHARD)))
        assert blocks == {name: 2 * 2 * count for name, count in one.items()}
        assert around["product"] == 2 * 3  # the head's, in each micro-step
        assert around["fused"] == 2 * sum(kinds(loss_kernels(step(SHARD))).values())
        assert update["AdamW"] == 3  # of adapters, matrices and norms
        assert update["product"] == 2 * 7  # s B A, for the merged copies

    @pytest.mark.parametrize("layout", [FULL, SHARD, BF16])
    def test_casts_what_fsdp_gathers_once_a_micro_step(self, layout):
        """The second gathering, in backward, casts again: 2 of each parameter that is trained."""
        once, twice = (
            sum(
                k.moved * k.times
                for k in around_blocks(step(layout), processes=1, micro_steps=n)[0].kernels
            )
            for n in (1, 2)
        )
        assert 1.5 * once < twice <= 2.5 * once

    def test_merged_copies_are_written_where_they_lie(self):
        """W is read once and V written once, by the addition; what is copied are the factors."""
        with pretended(1):
            memory = FakeTensorMode(allow_non_fake_inputs=True)
            state = laid_out(step(SHARD), world_of(SHARD), memory=memory)
            with memory, Launched() as launched:
                relora.refresh_merged_(state.model)
            sites = [site for _, site in relora.low_rank_sites(state.model)]
            W, A, B = (
                sum(getattr(site, name).numel() for site in sites)
                for name in ("weight", "lora_A", "lora_B")
            )
        moved = Counter()
        for kernel in launched.kernels:
            moved[kernel.name] += kernel.times * kernel.moved
        assert moved["add"] == (4 + 4 + 2) * W  # reads W and s B A, writes V
        assert moved["copy_"] == (4 + 4) * A + (4 + 2) * B

    def test_the_loss_reads_and_writes_the_logits_once(self):
        shape = preset("1.3b", vocab_size=32_000)
        size = 2 * TOKENS * 32_000
        found = loss_kernels(step(SHARD, shape))
        assert sum(k.read * k.times for k in found) == pytest.approx(size, rel=0.01)
        assert sum(k.written * k.times for k in found) == pytest.approx(size, rel=0.01)


class TestEager:
    def kernels(self, run):
        with FakeTensorMode(), Launched() as launched:
            run()
        return launched.kernels

    def test_views_and_new_memory_launch_nothing(self):
        assert not self.kernels(lambda: torch.empty(4, 6).t()[1:].view(5, 2, 2).detach())

    def test_a_copy_reads_and_writes_what_there_is_of_it(self):
        (kernel,) = self.kernels(lambda: torch.empty(4, 1).expand(4, 8).clone())
        assert (kernel.read, kernel.written) == (4 * 4, 4 * 4 * 8)

    def test_an_in_place_operation_reads_what_it_writes_and_a_fill_does_not(self):
        (add,) = self.kernels(lambda: torch.empty(4, 6).add_(torch.empty(4, 6)))
        (fill,) = self.kernels(lambda: torch.empty(4, 6).fill_(1.0))
        assert (add.read, add.written, fill.read, fill.written) == (192, 96, 0, 96)

    def test_a_sum_with_a_product_copies_its_addend_unless_in_place(self):
        made = self.kernels(lambda: torch.addmm(*map(torch.empty, [(4, 6), (4, 3), (3, 6)])))
        assert [k.name.split()[0] for k in made] == ["copy", "product"]
        (there,) = self.kernels(
            lambda: torch.empty(4, 6).addmm_(torch.empty(4, 3), torch.empty(3, 6))
        )
        assert there.read == made[1].read == 4 * (4 * 3 + 3 * 6 + 4 * 6)


class TestCeilings:
    def test_the_longer_of_arithmetic_and_memory_counts(self):
        ceilings = Ceilings(narrow=10.0, wide=1.0, bandwidth=2.0)
        bf16 = Kernel("product", 40, 1, 1, torch.bfloat16, times=3)
        assert (ceilings.seconds(bf16), ceilings.bound(bf16)) == (12.0, "arithmetic")
        assert ceilings.seconds(Kernel("product", 40, 1, 1, torch.float32)) == 40.0
        copy = Kernel("copy", 0, 6, 6)
        assert (ceilings.seconds(copy), ceilings.bound(copy)) == (6.0, "memory")

    def test_are_no_higher_than_what_gpus_could_do(self):
        for one in CEILINGS.values():
            assert 5e13 < one.narrow < 1e15
            assert one.wide < one.narrow
            assert 5e11 < one.bandwidth < 5e12


SMALL = ["bench", "roofline", "--model", "9m", "--layers", "1", "--vocab", "50", "--rank", "4"]
SMALL += ["--micro", "2", "--length", "16", "--arms", "ours"]


class TestCommand:
    def test_lists_every_kernel_and_their_sums(self, tmp_path, capsys):
        file = tmp_path / "roofline.jsonl"
        assert main([*SMALL, "--json", str(file)]) == 0
        first, *records = map(json.loads, file.read_text().splitlines())
        assert (first["gpu"], first["layout"], first["level"]) == ("h100", "shard", "roofline")
        arms = [record for record in records if record["event"] == "arm"]
        assert {(a["level"], a["arm"]) for a in arms} == {
            (level, arm) for level in ("linear", "block", "step") for arm in ("full", "ours")
        }
        for arm in arms:
            kernels = [
                r
                for r in records
                if r["event"] == "kernel"
                and (r["subject"], r["arm"]) == (arm["subject"], arm["arm"])
            ]
            assert arm["seconds"] == pytest.approx(sum(k["seconds"] for k in kernels))
            assert arm["seconds"] == pytest.approx(sum(arm["parts"].values()))
            assert arm["kernels"] == sum(k["times"] for k in kernels)
            assert arm["bytes"] == sum(k["times"] * (k["read"] + k["written"]) for k in kernels)
            assert arm["flops"] == sum(k["times"] * k["flops"] for k in kernels)
            assert (arm["ratio"] == 1) is (arm["arm"] == "full")
        said = capsys.readouterr().out
        assert "**whole step**" in said
        assert "| ours |" in said

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--gpu", "tpu"], "invalid choice: 'tpu'"),
            (["--arms", "lora"], "--arms must be among"),
            (["--rank", "129"], "--rank must be at most 128"),
            (["--micro", "0"], "must be at least 1; got 0"),
            (
                ["--layout", "replicate-bf16", "--precision", "fp32"],
                "--precision must be a bf16 one for --layout replicate-bf16",
            ),
            (["--json", __file__], "exists already: give --json another name"),
        ],
    )
    def test_refuses_what_is_wrong(self, given, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main([*SMALL, *given]) == 2
        (error,) = lines_of(capsys.readouterr().err)
        assert message in error
        assert not list(tmp_path.iterdir())
