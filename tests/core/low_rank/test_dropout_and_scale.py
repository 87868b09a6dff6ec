"""Dropout on the low-rank path and a trained scale: right, and right across merges."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import relora_core as relora
from tests.core.models import TARGETS, Model
from tests.reference import randomize_, ulp_distance


def layer(**options):
    made = relora.register_low_rank(nn.Linear(7, 5).double(), rank=3, alpha=6.0, **options)
    randomize_(made)
    return made


class TestDropout:
    def test_drops_entries_of_the_low_rank_path_s_input_only(self):
        low_rank = layer(dropout=0.5)
        site = relora.Site(low_rank, "weight")
        x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        torch.manual_seed(3)
        y = low_rank(x)
        torch.manual_seed(3)
        dropped = F.dropout(twin, 0.5)
        update = site.lora_B.detach() @ site.lora_A.detach()
        expected = F.linear(twin, site.weight, low_rank.bias) + 2.0 * F.linear(dropped, update)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad)
        assert (dropped == 0).any()

    def test_does_nothing_in_evaluation(self):
        torch.manual_seed(1)
        with_it = layer(dropout=0.5).eval()
        torch.manual_seed(1)
        without = layer().eval()
        x = torch.randn(4, 7, dtype=torch.float64)
        assert torch.equal(with_it(x), without(x))

    def test_is_zero_on_average(self):
        low_rank = layer(dropout=0.3)
        x = torch.randn(1, 7, dtype=torch.float64)
        mean = low_rank(x.expand(200_000, 7)).mean(0)
        torch.testing.assert_close(mean, low_rank.eval()(x)[0], atol=0.05, rtol=0.0)

    def test_a_merge_while_training_keeps_the_evaluated_function(self):
        low_rank = layer(dropout=0.5)
        x = torch.randn(4, 7, dtype=torch.float64)
        before = copy.deepcopy(low_rank).eval()(x)
        exported = relora.merged_state_dict(low_rank)["weight"]
        relora.merge_(low_rank)
        torch.testing.assert_close(low_rank.eval()(x), before)
        torch.testing.assert_close(relora.Site(low_rank, "weight").weight.detach(), exported)

    def test_recomputes_the_same_mask_under_activation_checkpointing(self):
        low_rank = layer(dropout=0.5)
        site = relora.Site(low_rank, "weight")
        x = torch.randn(4, 7, dtype=torch.float64)
        gradients = []
        for run in (low_rank, lambda x: checkpoint(low_rank, x, use_reentrant=False)):
            torch.manual_seed(5)
            run(x).square().sum().backward()
            gradients.append(site.lora_A.grad)
            low_rank.zero_grad()
        assert torch.equal(*gradients)

    def test_compiles_whole(self):
        low_rank = layer(dropout=0.5)
        compiled = torch.compile(low_rank, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 7, dtype=torch.float64)
        torch.manual_seed(5)
        expected = low_rank(x)
        torch.manual_seed(5)
        torch.testing.assert_close(compiled(x), expected)

    @pytest.mark.parametrize(
        ("make", "shape"),
        [
            (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
            (lambda: nn.Bilinear(5, 5, 4), (3, 5)),
        ],
    )
    def test_is_refused_where_the_weight_is_needed_whole(self, make, shape):
        module = relora.register_low_rank(make(), rank=2, dropout=0.1)
        inputs = [torch.randn(shape)] * (2 if isinstance(module, nn.Bilinear) else 1)
        with pytest.raises(ValueError, match=r"dropout acts on the input of F\.linear"):
            module(*inputs)
        module.eval()(*inputs)

    def test_is_refused_in_an_embedding(self):
        module = relora.register_low_rank(nn.Embedding(9, 4), rank=2, dropout=0.1)
        with pytest.raises(ValueError, match=r"dropout acts on the input of F\.linear"):
            module(torch.tensor([1]))

    @pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
    def test_out_of_range_is_refused(self, dropout):
        with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
            relora.add_low_rank_(Model(), TARGETS, rank=2, dropout=dropout)


class TestTrainableScale:
    def test_its_gradient_is_that_of_the_dense_sum(self):
        low_rank = layer(trainable_scale=True)
        site = relora.Site(low_rank, "weight")
        scale = site.low_rank.lora_scale
        A, B, s = (p.detach().clone().requires_grad_() for p in (site.lora_A, site.lora_B, scale))
        x = torch.randn(4, 7, dtype=torch.float64)
        low_rank(x).square().sum().backward()
        F.linear(x, site.weight + s * B @ A, low_rank.bias).square().sum().backward()
        assert site.scale == 2.0
        for ours, dense in ((scale, s), (site.lora_A, A), (site.lora_B, B)):
            torch.testing.assert_close(ours.grad, dense.grad)

    def test_an_embedding_has_it_too(self):
        module = relora.register_low_rank(nn.Embedding(9, 4), rank=2, trainable_scale=True)
        randomize_(module)
        whole = module.weight.materialize()
        tokens = torch.tensor([[1, 2, 8]])
        torch.testing.assert_close(module(tokens), F.embedding(tokens, whole))
        module(tokens).sum().backward()
        assert relora.Site(module, "weight").low_rank.lora_scale.grad.abs() > 0

    def test_restarts_merge_its_value_and_keep_it_learning(self):
        """The authors' code zeroes it at the first merge, after which nothing has a gradient."""
        model = relora.add_low_rank_(Model(), TARGETS, rank=2, alpha=1.0, trainable_scale=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = relora.ResettableOptimizer(torch.optim.AdamW(trained, lr=1e-2))
        sites = dict(relora.low_rank_sites(model))
        tokens = torch.randint(0, 11, (4, 6))
        for _ in range(3):
            for _ in range(4):
                model(tokens).logsumexp(-1).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            scales = {name: site.scale for name, site in sites.items()}
            moments = [optimizer.state[s.low_rank.lora_scale]["exp_avg"] for s in sites.values()]
            kept = copy.deepcopy(moments)
            assert all(scale != 0.5 for scale in scales.values())
            norms = {n: (s.scale * s.lora_B @ s.lora_A).norm().item() for n, s in sites.items()}
            before = model(tokens)
            report = relora.restart_(model, optimizer)
            assert ulp_distance(model(tokens), before) <= 4
            assert report.update_norms == pytest.approx(norms, rel=1e-4)
            assert {name: site.scale for name, site in sites.items()} == scales
            assert all(map(torch.equal, moments, kept))

    def test_removal_and_export_use_its_value(self):
        low_rank = layer(trainable_scale=True)
        with torch.no_grad():
            relora.Site(low_rank, "weight").low_rank.lora_scale.fill_(-0.5)
        x = torch.randn(4, 7, dtype=torch.float64)
        before = low_rank(x)
        exported = nn.Linear(7, 5).double()
        exported.load_state_dict(relora.merged_state_dict(low_rank))
        torch.testing.assert_close(exported(x), before)
        torch.testing.assert_close(relora.remove_low_rank(low_rank)(x), before)

    def test_begins_at_alpha_over_rank_again_after_to_empty(self):
        with torch.device("meta"):
            model = relora.register_low_rank(
                nn.Linear(7, 5), rank=4, alpha=6.0, trainable_scale=True
            )
        model.to_empty(device="cpu")
        site = relora.Site(model, "weight")
        site.low_rank.reset_parameters()
        assert site.scale == 1.5
