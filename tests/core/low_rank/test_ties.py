"""Tied weights are refused where a site is made, and before anything writes to them."""

import copy
import functools
import gc
from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import relora_core as relora
from relora_core.low_rank.ties import Owners, share_memory
from tests.reference import randomize_


def names(model):
    return [name for name, _ in relora.low_rank_sites(model)]


def same_parameter(one, other):
    other.weight = one.weight


def same_memory(one, other):
    other.weight.data = one.weight.data


def overlapping(one, other):
    memory = torch.randn(6, 4)
    one.weight.data, other.weight.data = memory[:4], memory[2:]


def buffer(one, other):
    other.register_buffer("copy", one.weight.detach())


def through_numpy(one, other):
    other.weight = nn.Parameter(torch.from_numpy(one.weight.detach().numpy()))


def through_dlpack(one, other):
    other.weight = nn.Parameter(torch.from_dlpack(one.weight.detach()))


def of_one_array(one, other):
    memory = torch.zeros(6, 4).numpy()
    one.weight.data, other.weight.data = (torch.from_numpy(memory[i : i + 4]) for i in (0, 2))


TIES = [
    *(same_parameter, same_memory, overlapping, buffer),
    *(through_numpy, through_dlpack, of_one_array),
]


@pytest.mark.parametrize("tie", TIES)
class TestTies:
    def model(self, tie):
        model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 4)})
        tie(model["body"][0], model["head"])
        return model

    def test_are_refused_within_the_model(self, tie):
        model = self.model(tie)
        with pytest.raises(ValueError, match=r"body.0.weight is tied \(body.0.weight, head."):
            relora.add_low_rank_(model, "body.0", rank=2)
        assert not names(model)

    def test_are_refused_through_a_submodule(self, tie):
        model = self.model(tie)
        with pytest.raises(ValueError, match=r"^0 is tied to (weight|copy) of a Linear"):
            relora.add_low_rank_(model["body"], "0", rank=2)
        assert not names(model)

    def test_are_refused_of_one_tensor(self, tie):
        model = self.model(tie)
        with pytest.raises(ValueError, match=r"weight is tied to (weight|copy) of a Linear"):
            relora.register_low_rank(model["body"][0], rank=2)
        assert not names(model)

    def test_are_looked_for_again_before_a_restart_changes_anything(self, tie):
        model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 4)})
        relora.add_low_rank_(model["body"], "0", rank=2)
        randomize_(model)
        (_, site), *_ = relora.low_rank_sites(model)
        stand_in = nn.Module()
        stand_in.weight = site.weight
        tie(stand_in, model["head"])
        optimizer = torch.optim.AdamW([site.lora_A, site.lora_B])
        before = copy.deepcopy(model.state_dict())
        for whole in (model, model["body"]):
            with pytest.raises(ValueError, match="tied to"):
                relora.restart_(whole, optimizer)
            with pytest.raises(ValueError, match="tied to"):
                relora.merge_(whole)
        with pytest.raises(ValueError, match="tied to"):
            relora.remove_low_rank(model["body"][0])
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key]), key

    def test_are_none_once_the_other_is_gone(self, tie):
        model = self.model(tie)
        body = model["body"]
        del model
        gc.collect()
        relora.add_low_rank_(body, "0", rank=2)
        assert names(body) == ["0"]


def keep_in_a_list(one, other):
    other.kept = [one.weight]


def keep_in_a_dict(one, other):
    other.kept = {"weight": one.weight.detach()}


def keep(one, other):
    other.__dict__["kept"] = one.weight


def keep_deep(one, other):
    other.kept = [{"params": (deque([one.weight]),)}]


def keep_in_a_partial(one, other):
    other.kept = functools.partial(nn.functional.linear, weight=one.weight)


def keep_in_a_closure(one, other):
    weight = one.weight
    other.kept = lambda x: x @ weight.t()


@pytest.mark.parametrize(
    "tie",
    [keep_in_a_list, keep_in_a_dict, keep, keep_deep, keep_in_a_partial, keep_in_a_closure],
)
def test_a_weight_that_a_module_keeps_aside_is_refused(tie):
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 4)})
    tie(model["body"][0], model["head"])
    with pytest.raises(ValueError, match=r"^body.0 is tied to kept of a Linear"):
        relora.add_low_rank_(model, "body.0", rank=2)
    with pytest.raises(ValueError, match="tied to kept of a Linear"):
        relora.register_low_rank(model["body"][0], rank=2)
    assert not names(model)


@pytest.mark.parametrize("before", [False, True])
def test_lists_of_a_model_s_parameters_are_no_ties(before):
    """As for clipping: nothing in them is used as a weight of its own."""
    model = nn.Sequential(nn.Linear(4, 4))
    if before:
        model.kept, model.named = list(model.parameters()), dict(model.named_parameters())
    relora.add_low_rank_(model, "0", rank=2)
    model.kept = list(model.parameters())
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    assert relora.restart_(model, optimizer).sites == 1
    relora.merge_(model)


class TestFactors:
    def model(self):
        return relora.add_low_rank_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "*", rank=2)

    @pytest.mark.parametrize("which", ["lora_A", "lora_B"])
    @pytest.mark.parametrize("tie", ["object", "memory", "views"])
    def test_that_are_tied_are_refused_at_a_restart(self, which, tie):
        model = self.model()
        one, other = (site.low_rank for _, site in relora.low_rank_sites(model))
        if tie == "object":
            setattr(other, which, getattr(one, which))
        elif tie == "memory":
            getattr(other, which).data = getattr(one, which).data
        else:
            memory = torch.randn(12)
            shape = getattr(one, which).shape
            getattr(one, which).data = memory[:8].view(shape)
            getattr(other, which).data = memory[4:].view(shape)
        optimizer = torch.optim.AdamW({p for p in model.parameters() if p.requires_grad})
        with pytest.raises(ValueError, match=f"{which} of 0 is tied to another tensor"):
            relora.restart_(model, optimizer)
        assert one.restart == other.restart == 0

    def test_of_a_flat_buffer_are_not_tied(self):
        """As engines lay them for one collective."""
        model = self.model()
        trained = [p for p in model.parameters() if p.requires_grad]
        memory = torch.cat([p.detach().flatten() for p in trained])
        for p, part in zip(trained, memory.split([p.numel() for p in trained]), strict=True):
            p.data = part.view(p.shape)
        assert relora.restart_(model, torch.optim.AdamW(trained)).sites == 2


@pytest.mark.parametrize(
    "copied",
    [
        lambda model, x: torch.jit.trace(model, x),
        lambda model, x: torch.export.export(model, (x,)).module(),
    ],
    ids=["trace", "export"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
def test_a_trace_that_computes_with_the_factors_is_no_tie(copied):
    model = relora.add_low_rank_(nn.Sequential(nn.Linear(4, 4)), "0", rank=2)
    randomize_(model)
    x = torch.randn(3, 4)
    kept = copied(model, x)
    before = model(x)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    relora.restart_(model, optimizer)
    torch.testing.assert_close(kept(x), before)
    relora.merge_(model)


def of_an_ancestor(model, site):
    model.mine = site.weight


def of_an_ancestor_by_memory(model, site):
    model.mine = nn.Parameter(torch.zeros(4, 4))
    model.mine.data = site.weight.data


def buffer_of_an_ancestor(model, site):
    model.register_buffer("mine", site.weight.data.t())


@pytest.mark.parametrize("tie", [of_an_ancestor, of_an_ancestor_by_memory, buffer_of_an_ancestor])
def test_a_module_around_the_site_is_an_owner_like_others(tie):
    model = relora.add_low_rank_(nn.Sequential(nn.Linear(4, 4)), "0", rank=2)
    (_, site), *_ = relora.low_rank_sites(model)
    optimizer = torch.optim.AdamW([site.lora_A, site.lora_B])
    tie(model, site)
    with pytest.raises(ValueError, match=r"0.weight is tied to mine of a Sequential"):
        relora.restart_(model, optimizer)


def test_two_sites_of_one_weight_are_told_so():
    model = relora.add_low_rank_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "*", rank=2)
    state = model.state_dict()
    state["1.parametrizations.weight.original"] = state["0.parametrizations.weight.original"]
    model.load_state_dict(state, assign=True)
    with pytest.raises(ValueError, match="two low-rank sites share one W"):
        relora.merged_state_dict(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="tied to the W of another low-rank site"):
        relora.restart_(model, optimizer)


def test_columns_of_one_matrix_are_not_tied():
    """As GPT-2's q, k and v in one projection."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    memory = torch.randn(4, 12)
    for layer, part in zip(model, memory.split(4, dim=1), strict=True):
        layer.weight.data = part.t()
    relora.add_low_rank_(model, "*", rank=2)
    randomize_(model)
    x = torch.randn(3, 4)
    before = model(x)
    relora.merge_(model)
    torch.testing.assert_close(model(x), before)
    model[0].parametrizations.weight.original.data = memory[:, 1:5].t()
    with pytest.raises(ValueError, match="tied"):
        relora.merge_(model)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_somewhere_is_no_tie():
    other = nn.Module()
    other.register_buffer("ragged", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    layer = nn.Linear(4, 4)
    kept = [layer.weight]  # so that modules are looked at
    assert relora.is_low_rank(relora.register_low_rank(layer, rank=2))
    assert kept[0] is layer.parametrizations.weight.original


@given(data=st.data())
def test_memory_is_shared_if_an_entry_is(data):
    memory = torch.zeros(64)
    views = []
    for _ in range(2):
        size = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        step = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
        views.append(memory.as_strided(size, step, data.draw(st.integers(0, 10))))
    one, other = views
    one.fill_(1)
    assert share_memory(one, other) == bool(other.any())


def test_a_trace_of_the_plain_weight_is_a_tie():
    layer = nn.Linear(4, 4)
    kept = torch.export.export(layer, (torch.randn(3, 4),)).module()
    with pytest.raises(ValueError, match="is tied to weight of a "):
        relora.register_low_rank(layer, rank=2)
    del kept


def test_recurrent_layers_list_their_weights_anew_and_are_no_ties():
    layer = relora.register_low_rank(nn.LSTM(4, 4), "weight_ih_l0", rank=2)
    x = torch.randn(3, 2, 4)
    before = layer(x)[0]
    nn.init.normal_(layer.parametrizations["weight_ih_l0"][0].lora_B)
    assert not torch.equal(layer(x)[0], before)


def test_layers_without_memory_are_tied_by_their_storage():
    model = nn.Sequential(*(nn.Linear(64, 64, device="meta") for _ in range(40)))
    relora.add_low_rank_(model, "*", rank=2)
    assert len(names(model)) == 40
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta"))
    same_memory(*model)
    with pytest.raises(ValueError, match=r"0.weight is tied \(0.weight, 1.weight\)"):
        relora.add_low_rank_(model, "0", rank=2)


def slow_owners(owned, tensor):
    """The obvious twin of `Owners`: every tensor against every other."""
    return [owner for owner, other in owned if share_memory(other, tensor)]


@given(
    spans=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=12),
    asked=st.tuples(st.integers(0, 30), st.integers(1, 12)),
)
def test_owners_are_those_whose_spans_overlap(spans, asked):
    memory = torch.zeros(42)
    owned = [((None, str(i)), memory[a : a + n]) for i, (a, n) in enumerate(spans)]
    tensor = memory[asked[0] : asked[0] + asked[1]]
    assert sorted(Owners(owned).of(tensor)) == sorted(slow_owners(owned, tensor))


def test_views_of_one_memory_that_do_not_overlap_are_not_tied():
    memory = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.data, model[1].weight.data = memory[:4], memory[4:]
    relora.add_low_rank_(model, "*", rank=2)
    relora.merge_(model)
    assert names(model) == ["0", "1"]
