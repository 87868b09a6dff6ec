"""Merged copies: forward reads the copy made after the last step, merge or load, and no other."""

import copy
import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap

import relora_core as relora
from relora_core.products.one_path import OnePathLinear
from tests.core.models import TARGETS, Model
from tests.reference import randomize_

TOKENS = torch.arange(10).view(2, 5)


def model_of(seed=0, dtype=torch.bfloat16, **options):
    torch.manual_seed(seed)
    model = relora.add_low_rank_(Model(), TARGETS, **{"rank": 3, "alpha": 6.0, **options})
    randomize_(model)
    relora.keep_merged_(model, dtype=dtype)
    return model


def layer_of(inner=7, out=5, **options):
    layer = nn.Sequential(nn.Linear(inner, out))
    relora.add_low_rank_(layer, "0", **{"rank": 2, "alpha": 3.0, **options})
    randomize_(layer)
    return layer


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


def output(model, *inputs):
    with autocast():
        return model(*(inputs or (TOKENS,)))


def is_fresh(model):
    """Whether every copy is what W, A and B say, to the bit."""
    found = []
    for _, site in relora.low_rank_sites(model):
        V = torch.add(site.weight, site.lora_B @ site.lora_A, alpha=site.scale)
        both = torch.cat((V, site.lora_B), dim=1).bfloat16()
        width = both.shape[1]
        found.append(torch.equal(site.low_rank.merged_copy[:, :width], both))
    return all(found) and len(found) == 6


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def error(one, exact):
    one, exact = one.detach().double(), exact.detach().double()
    return ((one - exact).norm() / exact.norm()).item()


def optimizer_of(model, wrap=lambda inner: inner):
    trained = [p for p in model.parameters() if p.requires_grad]
    return wrap(torch.optim.AdamW(trained, lr=1e-2))


def step_(model, optimizer):
    output(model).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class TestForward:
    @given(st.integers(1, 9), st.integers(2, 9), st.integers(2, 9), st.data())
    def test_is_one_product_with_the_sum_rounded_once(self, tokens, inner, out, data):
        rank = data.draw(st.integers(1, min(inner, out)))
        layer = layer_of(inner, out, rank=rank, alpha=data.draw(st.sampled_from([None, 0.3, 8.0])))
        relora.keep_merged_(layer)
        x = torch.randn(tokens, inner)
        (_, site), *_ = relora.low_rank_sites(layer)
        V = torch.add(site.weight, site.lora_B @ site.lora_A, alpha=site.scale)
        with autocast():
            assert torch.equal(layer(x), F.linear(x, V, layer[0].bias))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_needs_no_autocast_where_all_has_the_dtype_of_the_copy(self, dtype):
        layer = layer_of()
        kept = relora.keep_merged_(layer, dtype=dtype)
        x = torch.randn(4, 7)
        with autocast(dtype):
            expected = layer(x)
        for p in layer.parameters():
            p.data = p.data if p is kept[0] else p.data.to(dtype)
        assert torch.equal(layer(x.to(dtype)), expected)

    def test_materializes_the_copy_for_all_other_functions(self):
        model = layer_of()
        relora.keep_merged_(model)
        weight = model[0].weight
        assert weight.dtype == torch.bfloat16
        assert weight.shape == (5, 7)
        assert torch.equal(weight.t(), model[0].parametrizations.weight[0].merged_copy[:, :7].t())


class TestGradients:
    def both(self, W, A, B, s):
        return torch.cat((W + s * B @ A, B), dim=1).detach()

    def test_are_those_of_the_sum_the_second_ones_too(self):
        torch.manual_seed(0)
        draw = partial(torch.randn, dtype=torch.float64)
        W, b = draw(5, 4), draw(5)

        def run(x, A, B, bias):
            return OnePathLinear.apply(x, self.both(W, A, B, 0.7), A, B, bias, 0.7)

        inputs = [t.requires_grad_() for t in (draw(3, 4), draw(2, 4), draw(5, 2), b)]
        torch.autograd.gradcheck(run, inputs)
        torch.autograd.gradgradcheck(run, inputs)

    @pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
    def test_are_formed_for_what_asks_for_them(self, frozen):
        torch.manual_seed(0)
        draw = partial(torch.randn, dtype=torch.float64)
        W, x, A, B = draw(5, 4), draw(3, 4), draw(2, 4), draw(5, 2)
        for index, t in enumerate((x, A, B)):
            t.requires_grad_(index not in frozen)
        y = OnePathLinear.apply(x, self.both(W, A, B, 0.7), A, B, None, 0.7)
        g = draw(3, 5)
        asked = [t for t in (x, A, B) if t.requires_grad]
        expected = torch.autograd.grad(F.linear(x, W + 0.7 * B @ A), asked, g)
        torch.testing.assert_close(torch.autograd.grad(y, asked, g), expected)

    def test_are_nearer_to_the_exact_ones_than_those_of_two_paths(self):
        """In bf16, against float64, in the mean over draws."""
        errors = {"copy": 0.0, "two paths": 0.0}
        for seed in range(8):
            torch.manual_seed(seed)
            layers = {"two paths": layer_of(64, 48, rank=8), "exact": None}
            layers["exact"] = copy.deepcopy(layers["two paths"]).double()
            layers["copy"] = copy.deepcopy(layers["two paths"])
            relora.keep_merged_(layers["copy"])
            x, g, found = torch.randn(32, 64), torch.randn(32, 48), {}
            for name, layer in layers.items():
                dtype = torch.float64 if name == "exact" else torch.float32
                t = x.to(dtype).requires_grad_()
                y = layer(t) if name == "exact" else output(layer, t)
                (_, site), *_ = relora.low_rank_sites(layer)
                asked = (t, site.lora_A, site.lora_B)
                found[name] = [y, *torch.autograd.grad(y, asked, g.to(y.dtype))]
            for name in errors:
                for one, exact in zip(found[name], found["exact"], strict=True):
                    errors[name] += error(one, exact)
        assert errors["copy"] < errors["two paths"]

    def test_go_through_function_transforms(self):
        model = model_of()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

        def loss(parameters, tokens):
            with autocast():
                out = functional_call(model, parameters, (tokens.unsqueeze(0),))
            return out.float().square().mean()

        each = vmap(grad(loss), in_dims=(None, 0))(trained, TOKENS)
        for index, tokens in enumerate(TOKENS):
            model.zero_grad()
            loss(trained, tokens).backward()
            for name, p in trained.items():
                assert error(each[name][index], p.grad) < 0.02


class TestFreshness:
    @pytest.mark.parametrize("wrap", [lambda inner: inner, relora.ResettableOptimizer])
    def test_holds_after_every_step_and_restart(self, wrap):
        model = model_of()
        optimizer = optimizer_of(model, wrap)
        for step in range(6):
            if step % 2:
                relora.restart_(model, optimizer)
                assert is_fresh(model)
            before = output(model)
            step_(model, optimizer)
            assert is_fresh(model)
            assert not torch.equal(output(model), before)

    def test_holds_after_steps_of_a_part_of_the_factors(self):
        model = model_of()
        sites = [site for _, site in relora.low_rank_sites(model)]
        optimizer = torch.optim.SGD([sites[2].lora_B], lr=0.1)
        output(model).float().sum().backward()
        optimizer.step()
        assert is_fresh(model)

    @pytest.mark.parametrize("act_", [relora.merge_, relora.reinit_])
    def test_holds_after_merges_and_redraws(self, act_):
        model = model_of()
        act_(model)
        assert is_fresh(model)
        for _, site in relora.low_rank_sites(model):
            site.merge_()
            site.redraw_()
            site.set_exact_(torch.zeros(site.weight.shape))
        assert is_fresh(model)

    def test_holds_after_loading(self, tmp_path):
        model, other = model_of(), model_of(seed=1)
        model.load_state_dict(other.state_dict())
        assert is_fresh(model)
        assert torch.equal(output(model), output(other))
        nn.Sequential(model).load_state_dict(nn.Sequential(model_of(seed=2)).state_dict())
        assert is_fresh(model)
        relora.save_adapters(other, tmp_path)
        relora.load_adapters(model, tmp_path)
        assert is_fresh(model)

    def test_is_made_by_hand_or_at_the_next_forward_after_other_writes(self):
        model = model_of()
        for act in (lambda: relora.refresh_merged_(model), lambda: output(model)):
            randomize_(model)
            assert not is_fresh(model)
            act()
            assert is_fresh(model)

    def test_is_not_made_by_a_step_of_another_model(self):
        model, other = model_of(), model_of(seed=1)
        randomize_(model)
        step_(other, optimizer_of(other))
        assert not is_fresh(model)

    def test_holds_within_a_step_that_moves_factors(self):
        """As LBFGS does, which asks for the loss anew at each of its points."""
        losses = {}
        for kept in (True, False):
            torch.manual_seed(0)
            layer = layer_of(6, 4, alpha=None)
            if kept:
                relora.keep_merged_(layer)
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
            optimizer = torch.optim.LBFGS(
                [p for p in layer.parameters() if p.requires_grad], lr=0.1, max_iter=6
            )
            seen = losses.setdefault(kept, [])

            def closure(layer=layer, x=x, optimizer=optimizer, seen=seen):
                optimizer.zero_grad()
                loss = output(layer, x).float().square().mean()
                loss.backward()
                seen.append(loss.item())
                return loss

            optimizer.step(closure)
        assert losses[True] == pytest.approx(losses[False], rel=0.05)
        assert losses[True][-1] < 0.9 * losses[True][0]

    def test_holds_after_conversions_and_loading_of_a_part(self):
        model, other = model_of(), model_of(seed=1)
        model.layers[0].load_state_dict(other.layers[0].state_dict())
        output(model)
        assert is_fresh(model)
        wide = copy.deepcopy(model).double()
        torch.testing.assert_close(wide(TOKENS).float(), model(TOKENS), rtol=1e-5, atol=1e-4)

    def test_holds_of_a_wrapper_that_is_gone(self):
        torch.manual_seed(0)
        model = relora.add_low_rank_(Model(), TARGETS, rank=3)
        relora.keep_merged_(torch.compile(model, backend="eager"))
        step_(model, optimizer_of(model))
        assert is_fresh(model)

    def test_leaves_the_copies_that_others_still_need(self):
        """A step of one part comes between forward and backward of another."""
        first, second = layer_of(6, 5), layer_of(5, 4)
        model = nn.ModuleList([first, second])
        relora.keep_merged_(model)
        steps = [
            torch.optim.SGD([p for p in part.parameters() if p.requires_grad], lr=0.1)
            for part in model
        ]
        hidden = output(first, torch.randn(3, 6))
        output(second, hidden.detach()).float().sum().backward()
        steps[1].step()
        output(second, hidden).float().sum().backward()
        steps[0].step()
        for part in model:
            (_, site), *_ = relora.low_rank_sites(part)
            V = torch.add(site.weight, site.lora_B @ site.lora_A, alpha=site.scale).bfloat16()
            assert torch.equal(site.low_rank.merged_copy[:, : V.shape[1]], V)

    def test_costs_nothing_once_the_model_is_gone(self):
        from relora_core.sites import merged_copies

        gc.collect()
        count = len(merged_copies._owners)
        model = model_of()
        assert len(merged_copies._owners) == count + 6
        del model
        gc.collect()
        assert len(merged_copies._owners) == count


def part_then_whole(model):
    relora.keep_merged_(model[0])
    relora.keep_merged_(model)


def parts_in_a_list_that_is_gone(model):
    relora.keep_merged_(nn.ModuleList([model[0], model[1]]))


@pytest.mark.parametrize("keep", [part_then_whole, parts_in_a_list_that_is_gone])
class TestWhateverWasGiven:
    """Eager forwards would see it by themselves; compiled ones rely on what changes the factors."""

    def model(self, keep):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        relora.add_low_rank_(model, "*", rank=2)
        randomize_(model)
        keep(model)
        return model

    def is_fresh(self, model):
        for _, site in relora.low_rank_sites(model):
            V = torch.add(site.weight, site.lora_B @ site.lora_A, alpha=site.scale)
            if not torch.equal(site.low_rank.merged_copy[:, :6], V.bfloat16()):
                return False
        return True

    def test_every_copy_follows_a_step(self, keep):
        model = self.model(keep)
        optimizer = optimizer_of(model)
        output(model, torch.ones(2, 6)).float().sum().backward()
        optimizer.step()
        assert self.is_fresh(model)

    @pytest.mark.parametrize("whole", [False, True])
    def test_every_copy_follows_a_loading(self, keep, whole):
        model = self.model(keep)
        loads = nn.ModuleDict({"model": model}) if whole else model
        loads.load_state_dict(
            {k: 2 * v for k, v in loads.state_dict().items() if "extra" not in k}, strict=False
        )
        assert self.is_fresh(model)

    def test_a_deep_copy_can_keep_its_own(self, keep):
        twin = copy.deepcopy(self.model(keep))
        relora.keep_merged_(twin)
        assert all(site.low_rank.followed for _, site in relora.low_rank_sites(twin))
        optimizer = optimizer_of(twin)
        output(twin, torch.ones(2, 6)).float().sum().backward()
        optimizer.step()
        assert self.is_fresh(twin)
        with pytest.raises(ValueError, match="keep a merged copy already"):
            relora.keep_merged_(twin)

    def test_converted_to_its_own_width_a_model_does_without(self, keep):
        model = self.model(keep).bfloat16()
        plain = self.model(lambda model: None).bfloat16()
        x = torch.ones(2, 6, dtype=torch.bfloat16)
        assert torch.equal(model(x), plain(x))


class TestWithout:
    """Where the copy does not apply, forward is that of two paths."""

    def same_as_two_paths(self, model, run):
        plain = copy.deepcopy(model)
        for _, site in relora.low_rank_sites(plain):
            site.low_rank.merged_copy = None
        torch.testing.assert_close(run(model), run(plain))

    def test_in_another_dtype(self):
        self.same_as_two_paths(model_of(), lambda model: model(TOKENS))

    def test_over_a_trained_base(self):
        model = model_of()
        model.requires_grad_(True)
        output(model).float().sum().backward()
        assert all(site.weight.grad is not None for _, site in relora.low_rank_sites(model))

    def test_with_dropout_that_is_set_later(self):
        model = model_of()
        for _, site in relora.low_rank_sites(model):
            site.low_rank.dropout = 0.5
        torch.manual_seed(0)
        one = output(model)
        assert not torch.equal(one, output(model))

    def test_called_with_other_factors(self):
        model = model_of()
        doubled = {n: p.detach() * 2 if "lora_B" in n else p for n, p in model.named_parameters()}
        with autocast():
            called = functional_call(model, doubled, (TOKENS,))
        with torch.no_grad():
            for _, site in relora.low_rank_sites(model):
                site.lora_B.mul_(2)
        assert error(called, output(model)) < 0.02

    def test_of_an_input_of_another_width_there_is_an_error(self):
        layer = layer_of(7, 5)
        relora.keep_merged_(layer)
        for width in (6, 8, 9):
            with pytest.raises(RuntimeError):
                output(layer, torch.randn(2, width))


class TestRestart:
    @given(st.integers(1, 3), st.sampled_from([None, 0.3, 8.0]))
    def test_keeps_the_function_to_the_bit(self, rank, alpha):
        model = model_of(rank=rank, alpha=alpha)
        before = output(model)
        relora.restart_(model, optimizer_of(model))
        assert all(not site.lora_B.any() for _, site in relora.low_rank_sites(model))
        assert torch.equal(output(model), before)

    def test_merges_what_it_merges_without_copies(self):
        model = model_of()
        plain = copy.deepcopy(model)
        for one in (model, plain):
            relora.restart_(one, optimizer_of(one))
        assert same(relora.merged_state_dict(model), relora.merged_state_dict(plain))


class TestState:
    def test_is_what_it_is_without_copies(self):
        model = model_of()
        plain = copy.deepcopy(model)
        assert same(
            {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)},
            {n: t for n, t in plain.state_dict().items() if isinstance(t, torch.Tensor)},
        )
        assert same(relora.merged_state_dict(model), relora.merged_state_dict(plain))

    def test_of_a_deep_copy_is_its_own(self):
        model = model_of()
        copied = copy.deepcopy(model)
        assert torch.equal(output(copied), output(model))
        before = output(model)
        step_(copied, optimizer_of(copied))
        assert not torch.equal(output(copied), before)
        assert is_fresh(copied)
        assert is_fresh(model)
        assert torch.equal(output(model), before)

    def test_of_an_averaged_model_is_that_of_its_own_factors(self):
        model = model_of()
        averaged = torch.optim.swa_utils.AveragedModel(model)
        averaged.update_parameters(model)
        step_(model, optimizer_of(model))
        averaged.update_parameters(model)
        output(averaged)
        assert is_fresh(averaged.module)

    def test_is_plain_again_once_sites_are_removed(self):
        model = model_of()
        for module in list(model.modules()):
            if relora.is_low_rank(module):
                relora.remove_low_rank(module)
        assert list(values(model)) == list(values(Model()))
        step_(model, optimizer_of(model))
        model.load_state_dict(model.state_dict())

    def test_takes_sites_that_come_later(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        relora.add_low_rank_(model, "0", rank=2)
        relora.keep_merged_(model)
        relora.add_low_rank_(model, "1", rank=2)
        assert len(relora.keep_merged_(model)) == 2

    # Dynamo looks at .grad of what is no leaf, and torch warns of it.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
    def test_has_one_graph_for_all_blocks(self):
        torch.compiler.reset()
        model = model_of()
        counter = CompileCounterWithBackend("aot_eager")
        x = torch.randn(2, 3, 8, requires_grad=True)
        for block in model.layers:
            block.compile(backend=counter, fullgraph=True)
        with autocast():
            for block in model.layers:
                block(x).float().sum().backward()
        assert counter.frame_count == 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "error", "match"),
        [
            (lambda: nn.Sequential(nn.Linear(4, 4)), ValueError, "no low-rank site"),
            (lambda: model_of(), ValueError, "all 6 linear sites keep a merged copy already"),
            (lambda: layer_of(dropout=0.1), ValueError, "0 has dropout"),
            (lambda: layer_of(trainable_scale=True), ValueError, "0 has a trained scale"),
            (lambda: layer_of().bfloat16(), ValueError, "0: W must be wider than torch.bfloat16"),
        ],
    )
    def test_change_nothing(self, make, error, match):
        model = make()
        before = values(model)
        with pytest.raises(error, match=match):
            relora.keep_merged_(model)
        assert same(values(model), before)

    def test_of_a_trained_base(self):
        layer = layer_of()
        layer[0].parametrizations.weight.original.requires_grad_()
        with pytest.raises(ValueError, match="0: W must be frozen"):
            relora.keep_merged_(layer)

    def test_of_sites_that_are_no_linears(self):
        model = relora.add_low_rank_(nn.Sequential(nn.Embedding(5, 4)), "0", rank=2)
        with pytest.raises(ValueError, match=r"no low-rank nn\.Linear"):
            relora.keep_merged_(model)

    def test_of_other_dtypes(self):
        with pytest.raises(TypeError, match=r"must be torch.bfloat16 or torch.float16; got torch"):
            relora.keep_merged_(layer_of(), dtype=torch.float32)

    def test_of_a_split_of_what_has_a_copy(self):
        with pytest.raises(ValueError, match="keeps a merged copy"):
            relora.split_bases_(model_of())
