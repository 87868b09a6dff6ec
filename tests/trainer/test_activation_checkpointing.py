"""Activation checkpointing changes what is kept, and nothing of what is computed."""

from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import relora_core as relora
from reference_trainer.activation_checkpointing import checkpointed
from reference_trainer.config import CHECKPOINTING
from reference_trainer.model.llama import Block, LlamaShape, rotary_table

SHAPE = LlamaShape(64, 172, 1, 4, 2, 100)
ARMS = ["full rank", "two paths", "merged", "merged copies"]


class Products(TorchDispatchMode):
    """Writes down the inner sizes of the products that run."""

    def __init__(self):
        super().__init__()
        self.inner = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        place = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1, "relora::sum_of_products": 2}
        name = func.name().partition(".")[0]
        if name in place:
            self.inner.append(args[place[name]].shape[1])
        if "scaled_dot_product" in name and "backward" not in name:
            self.inner.append("attention")
        return func(*args, **(kwargs or {}))


def block_of(arm: str, mode: str) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    block = Block(SHAPE)
    length = 96 if arm == "merged" else 8  # from some tokens on, it pays in fp32
    if arm != "full rank":
        relora.add_low_rank_(block, ("*_proj",), rank=4)
        for _, site in relora.low_rank_sites(block):
            torch.nn.init.normal_(site.lora_B, std=0.1)
    bases = relora.keep_merged_(block) if arm == "merged copies" else []
    if arm in ("two paths", "merged copies"):
        for p in block.parameters():
            p.data = p.data if any(p is one for one in bases) else p.data.bfloat16()
    dtype = torch.bfloat16 if arm in ("two paths", "merged copies") else torch.float32
    x = torch.randn(2, length, SHAPE.hidden_size, dtype=dtype, requires_grad=True)
    return checkpointed(block, mode, SHAPE), x


def kept(arm: str, mode: str) -> int:
    """Return what the allocator still has given out after a forward, its output left out."""
    block, x = block_of(arm, mode)
    table = rotary_table(x.shape[1], SHAPE, x.device)
    block(x, *table)  # what is made once is made
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        out = block(x, *table)
    events = profiler.profiler.kineto_results.events()
    return sum(e.nbytes() for e in events if e.name() == "[memory]") - out.nbytes


def gradients(block, x, *, compiled):
    table = rotary_table(x.shape[1], SHAPE, x.device)
    run = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
    out = run(x, *table)
    out.backward(torch.ones_like(out))
    found = {relora.clean_name(n): p.grad for n, p in block.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "x": x.grad, **found}


@pytest.mark.parametrize("arm", ARMS)
class TestWhatIsComputed:
    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("mode", ["selective", "full"])
    def test_has_the_same_bits(self, arm, mode, compiled):
        torch.compiler.reset()
        expected = gradients(*block_of(arm, "none"), compiled=compiled)
        found = gradients(*block_of(arm, mode), compiled=compiled)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name

    def test_again_is_no_attention_and_no_product_over_the_width_if_selective(self, arm):
        counted = {}
        for mode in CHECKPOINTING:
            block, x = block_of(arm, mode)
            out = block(x, *rotary_table(x.shape[1], SHAPE, x.device))
            with Products() as products:
                out.backward(torch.ones_like(out))
            counted[mode] = sorted(map(str, products.inner))
        again = list(counted["selective"])
        for product in counted["none"]:
            again.remove(product)
        assert str(SHAPE.hidden_size) not in again
        assert "attention" not in again
        assert len(counted["full"]) > len(counted["selective"])
        assert "attention" in counted["full"]

    def test_is_kept_less(self, arm):
        none, selective, full = (kept(arm, mode) for mode in CHECKPOINTING)
        assert full < selective < none


def test_a_product_in_two_paths_can_be_kept_by_anybody_s_checkpointing():
    """An in-place product could not: what is put back would be what it was added to."""

    def save_products(ctx, operation, *args, **kwargs):
        costly = ("aten::mm", "relora::sum_of_products")
        saved = operation.name().partition(".")[0] in costly
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    expected = gradients(*block_of("two paths", "none"), compiled=False)
    block, x = block_of("two paths", "none")
    contexts = partial(create_selective_checkpoint_contexts, save_products)
    table = rotary_table(x.shape[1], SHAPE, x.device)
    out = checkpoint(block, x, *table, use_reentrant=False, context_fn=contexts)
    out.backward(torch.ones_like(out))
    for name, p in block.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, expected[relora.clean_name(name)]), name
