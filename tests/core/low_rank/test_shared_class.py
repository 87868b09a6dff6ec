"""All sites of a class share one class: one graph for all blocks, and no block changes another."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import relora_core as relora
from tests.core.models import Block
from tests.reference import randomize_

# Dynamo looks at .grad of what is no leaf, and torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

BLOCKS = 24


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Deep(nn.Module):
    def __init__(self, blocks=BLOCKS):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x, recompute=False):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return x


def low_rank(model):
    return relora.add_low_rank_(model, ["*.self_attn.*", "*.mlp.*"], rank=3)


class Counter(CompileCounterWithBackend):
    """Counts graphs, and calls of them while gradients are on."""

    def __init__(self):
        super().__init__("aot_eager")
        self.calls = 0

    def __call__(self, graph, inputs):
        compiled = super().__call__(graph, inputs)

        def run(*arguments):
            self.calls += torch.is_grad_enabled()
            return compiled(*arguments)

        return run


def compiled(model):
    counter = Counter()
    for layer in model.layers:
        layer.compile(backend=counter, fullgraph=True)
    return counter


class TestOneGraph:
    @pytest.mark.parametrize("recompute", [False, True])
    def test_serves_all_blocks_after_an_evaluation_and_over_restarts(self, recompute):
        model, x = low_rank(Deep()), torch.randn(2, 8, requires_grad=True)
        randomize_(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        counter = compiled(model)
        with torch.no_grad():
            model(x.detach())
        assert counter.frame_count == 1
        graphs = []
        for step in range(4):
            if step:
                relora.restart_(model, optimizer)
            before = counter.calls
            model(x, recompute).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            graphs.append(counter.frame_count)
            assert counter.calls - before == BLOCKS * (1 + recompute)
        assert graphs == [2, 2, 2, 2]

    def test_serves_blocks_whose_sites_were_loaded(self):
        model, x = low_rank(Deep(12)), torch.randn(2, 8, requires_grad=True)
        counter = compiled(model)
        model(x).sum().backward()
        other = low_rank(Deep(12))
        randomize_(other)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-3)
        assert counter.frame_count == 1


class TestOneClass:
    def test_is_that_of_all_sites_of_a_class_and_names_the_class_before(self):
        model = low_rank(Deep(2))
        kinds = {type(site.module) for _, site in relora.low_rank_sites(model)}
        assert len(kinds) == 1
        (kind,) = kinds
        assert kind.__bases__ == (nn.Linear,)
        assert kind.__name__ == "ParametrizedLinear"
        assert parametrize.type_before_parametrizations(model.layers[0].mlp["up"]) is nn.Linear

    def test_serves_classes_that_have_a_metaclass(self):
        class Meta(type):
            pass

        class Odd(nn.Linear, metaclass=Meta):
            pass

        layers = [relora.register_low_rank(Odd(6, 4), rank=2) for _ in range(2)]
        assert type(layers[0]) is type(layers[1])
        assert isinstance(type(layers[0]), Meta)
        assert type(relora.remove_low_rank(layers[0])) is Odd
        assert relora.is_low_rank(layers[1])

    def test_of_other_tensors_is_another(self):
        one, other = (nn.MultiheadAttention(8, 2, kdim=4, vdim=4) for _ in range(2))
        relora.register_low_rank(one, "q_proj_weight", rank=2)
        for name in ("v_proj_weight", "q_proj_weight"):
            relora.register_low_rank(other, name, rank=2)
        assert type(one) is not type(other)
        relora.remove_low_rank(other, "v_proj_weight")
        assert type(one) is type(other)
        relora.remove_low_rank(other, "q_proj_weight")
        assert type(other) is nn.MultiheadAttention
        assert one.q_proj_weight.shape == (8, 8)


def pair():
    layers = [relora.register_low_rank(nn.Linear(6, 4), rank=2, name=str(i)) for i in (0, 1)]
    for layer in layers:
        randomize_(layer)
    return *layers, torch.randn(3, 6)


class TestAnotherBlock:
    """What is done to one of a class leaves the other as it is."""

    def test_stays_when_one_is_removed(self):
        one, other, x = pair()
        before = other(x)
        relora.remove_low_rank(one)
        assert type(one) is nn.Linear
        assert torch.equal(other(x), before)
        relora.register_low_rank(one, rank=2)
        assert type(one) is type(other)

    def test_stays_when_one_is_parametrized_further(self):
        one, other, x = pair()
        before = other(x)
        torch.nn.utils.parametrizations.weight_norm(one, "bias", dim=None)
        assert torch.equal(other(x), before)
        assert isinstance(other.bias, nn.Parameter)
        parametrize.remove_parametrizations(one, "bias")
        relora.remove_low_rank(one)
        assert torch.equal(other(x), before)
        assert type(one) is nn.Linear

    def test_stays_when_torch_is_to_remove_one(self):
        one, other, x = pair()
        before = [layer(x) for layer in (one, other)]
        with pytest.raises(AttributeError, match=r"call relora_core.remove_low_rank"):
            parametrize.remove_parametrizations(one, "weight", leave_parametrized=False)
        assert all(torch.equal(b, layer(x)) for b, layer in zip(before, (one, other), strict=True))

    def test_stays_when_an_attribute_of_one_is_deleted(self):
        one, other, x = pair()
        before = other(x)
        one.note = 1
        kind = type(one)
        del one.note
        assert not hasattr(one, "note")
        assert type(one) is kind
        one.bias = None
        assert torch.equal(other(x), before)

    def test_stays_when_one_has_a_class_upon_the_shared_one(self):
        """As `fully_shard` gives to what it shards."""
        one, other, x = pair()
        before = other(x)
        one.__class__ = type("FSDPLinear", (type(one),), {})
        one.note = 1
        del one.note
        del one.bias
        assert not hasattr(one, "bias")
        assert torch.equal(other(x), before)

    def test_stays_when_the_copy_of_one_is_removed(self):
        one, other, x = pair()
        before = one(x)
        copied = copy.deepcopy(one)
        assert type(copied) is type(one)
        relora.remove_low_rank(copied)
        assert torch.equal(one(x), before)
        assert isinstance(other.weight, type(one.weight))


def test_pickling_is_refused_as_torch_refuses_it():
    one, *_ = pair()
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(one)
