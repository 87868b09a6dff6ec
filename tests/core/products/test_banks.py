"""Banks of matrices, such as fused experts: each has factors of its own, whatever reads it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import relora_core as relora
from relora_core.products.bilinear import split_equation
from tests.core.banks import FORMS, IN, OUT, Bank, E
from tests.reference import dense_twin, randomize_

T, RANK = 5, 3


grouped = pytest.mark.skipif(
    torch.__version__ < (2, 9), reason="torch 2.8 has grouped products on a GPU only"
)
# What needs the bank, or one matrix of it, whole.
WHOLE = {
    "sum": lambda w, x: w.sum(0),
    "row": lambda w, x: w[1, 2],
    "columns": lambda w, x: w[..., :2],
    "einsum of it alone": lambda w, x: torch.einsum("eoi->eio", w),
    "einsum of its diagonal": lambda w, x: torch.einsum("eii,et->it", w[:, :8], x[..., 0]),
    "outer product": lambda w, x: torch.einsum("eoi,t->eoit", w, x[0, :, 0]),
    "permuted": lambda w, x: w.transpose(0, 1) * 2,
}


def bank_of(form, **options):
    options = {"rank": RANK, "alpha": 6.0, "batch_dims": 1, "name": "bank", **options}
    shape = options.pop("shape", (E, OUT, IN))
    bank = Bank(form, shape, options.pop("dtype", torch.float64))
    relora.register_low_rank(bank, "experts", **options)
    randomize_(bank)
    return bank


@pytest.mark.parametrize("form", [*FORMS, *WHOLE])
def test_computes_with_the_dense_sum_and_so_do_gradients(form):
    bank = bank_of((FORMS | WHOLE)[form])
    twin, dense = dense_twin(bank, "experts")
    site = relora.Site(bank, "experts")
    x = torch.randn(E, T, IN, dtype=torch.float64, requires_grad=True)
    y, expected = bank(x), twin(x)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (site.lora_A, site.lora_B, x), g, allow_unused=True)
    wanted = torch.autograd.grad(expected, (dense.lora_A, dense.lora_B, x), g, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


class Largest(TorchDispatchMode):
    """The entries of the largest tensor in memory of its own."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                fresh = one.untyped_storage()._cdata not in storages
                self.entries = max(self.entries, one.numel() if fresh else 0)
        return out


# An einsum over experts and inputs at once copies the bank in full rank too.
@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"einsum, implicit", "einsum of three"}))
def test_forms_no_tensor_of_the_bank_s_size(form):
    shape = (E, 64, 32)
    bank = bank_of(
        lambda w, x: FORMS[form](w, x) if form != "einsum over outputs" else w[0] @ x[0].T,
        shape=shape,
        dtype=torch.float32,
    )
    x = torch.randn(E, T, 32)

    with Largest() as seen:
        bank(x).square().sum().backward()
    # A gather of three matrices is what its form asks for.
    assert seen.entries <= (3 if form in ("gather", "slice", "mask") else 1) * 64 * 32


@grouped
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_grouped_products_are_those_of_a_loop(dtype, rank, left):
    offsets = torch.tensor([8, 8, 16, 24], dtype=torch.int32)
    parts = [slice(0, 8), slice(8, 8), slice(8, 16), slice(16, 24)]

    def form(w, x):
        if left:
            return torch._grouped_mm(w, x.mT, offs=offsets).mT
        return torch._grouped_mm(x, w.mT, offs=offsets)

    bank = bank_of(form, dtype=dtype, rank=rank)
    twin = bank_of(None, dtype=torch.float64, rank=rank)
    twin.load_state_dict(
        {k: v.double() if "extra" not in k else v for k, v in bank.state_dict().items()}
    )
    site, exact = relora.Site(bank, "experts"), relora.Site(twin, "experts")
    x = torch.randn(24, IN, dtype=dtype)
    w = twin.experts.materialize()
    y = bank(x)
    z = torch.cat([x[part].double() @ w[i].T for i, part in enumerate(parts)])
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5

    def near(one, other):
        return (one.double() - other).norm() <= tolerance * other.norm()

    assert near(y, z)
    g = torch.randn_like(y)
    y.backward(g)
    z.backward(g.double())
    assert near(site.lora_A.grad, exact.lora_A.grad)
    assert near(site.lora_B.grad, exact.lora_B.grad)


@grouped
@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, offs: torch._grouped_mm(x, w, offs, None, torch.bfloat16),
        lambda x, w, offs: torch._grouped_mm(input=x, mat2=w, offs=offs),
        lambda x, w, offs: torch._grouped_mm(x, mat2=w, offs=offs, bias=None),
        lambda x, w, offs: torch._grouped_mm(x, w, offs=offs, out_dtype=torch.bfloat16),
    ],
)
def test_a_grouped_product_takes_its_arguments_in_any_way(call):
    offsets = torch.tensor([8, 8, 16, 24], dtype=torch.int32)
    x = torch.randn(24, IN, dtype=torch.bfloat16)
    bank = bank_of(lambda w, x: call(x, w.mT, offsets), dtype=torch.bfloat16)
    expected = bank_of(lambda w, x: torch._grouped_mm(x, w.mT, offs=offsets), dtype=torch.bfloat16)
    expected.load_state_dict(bank.state_dict())
    assert torch.equal(bank(x), expected(x))


@grouped
def test_a_grouped_product_forms_no_tensor_of_the_bank_s_size():
    offsets = torch.tensor([8, 8, 16, 24], dtype=torch.int32)
    bank = bank_of(
        lambda w, x: torch._grouped_mm(x, w.mT, offs=offsets),
        shape=(E, 64, 32),
        dtype=torch.bfloat16,
    )
    x = torch.randn(24, 32, dtype=torch.bfloat16, requires_grad=True)
    with Largest() as seen:
        bank(x).float().square().sum().backward()
    assert seen.entries <= 64 * 32


@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole(form):
    torch.compiler.reset()
    bank = bank_of(FORMS[form], dtype=torch.float32)
    x = torch.randn(E, T, IN)
    compiled = torch.compile(bank, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), bank(x))


def test_an_expert_layer_costs_no_more_than_four_fifths_of_full_rank():
    """Gate and up in one bank, and down: the layer of experts of 2048 x 1408, rank 128."""
    experts, tokens, width, hidden, rank = 2, 64, 2048, 1408, 128

    def flops(low_rank):
        with torch.device("meta"):
            up, down = nn.Module(), nn.Module()
            up.w = nn.Parameter(torch.empty(experts, 2 * hidden, width))
            down.w = nn.Parameter(torch.empty(experts, width, hidden))
            x = torch.empty(experts, tokens, width, requires_grad=True)
        if low_rank:
            for one in (up, down):
                relora.register_low_rank(one, "w", rank=rank, batch_dims=1)
        with FlopCounterMode(display=False) as counter:
            gate, value = torch.bmm(x, up.w.transpose(1, 2)).chunk(2, -1)
            y = torch.bmm(F.silu(gate) * value, down.w.transpose(1, 2))
            y.sum().backward()
        return counter.get_total_flops()

    assert flops(True) / flops(False) <= 0.80


class TestLife:
    def model(self):
        torch.manual_seed(1)
        inner = Bank(FORMS["bmm"], dtype=torch.float32)
        model = nn.Sequential(inner, nn.Linear(OUT, 4))
        return relora.add_low_rank_(model, ["*.experts", "1"], rank=RANK, alpha=6.0, batch_dims=1)

    def optimizer(self, model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def train(self, model, optimizer, steps=3):
        for step in range(steps):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(E, T, IN)).square().mean().backward()
            optimizer.step()

    def test_each_matrix_has_factors_and_a_draw_of_its_own(self):
        _, site = next(relora.low_rank_sites(self.model()))
        assert (site.lora_A.shape, site.lora_B.shape) == ((E, RANK, IN), (E, OUT, RANK))
        assert (site.rank, site.low_rank.batch_dims) == (RANK, 1)
        assert len({tuple(A.flatten().tolist()) for A in site.lora_A}) == E
        assert site.lora_A.abs().max() <= IN**-0.5

    def test_the_change_of_each_matrix_has_the_rank_that_was_asked_for(self):
        model = self.model()
        _, site = next(relora.low_rank_sites(model))
        before = site.weight.detach().clone()
        optimizer = self.optimizer(model)
        for cycle in (1, 2):
            self.train(model, optimizer)
            relora.restart_(model, optimizer)
            change = (site.weight.detach() - before).double()
            ranks = [torch.linalg.matrix_rank(one, rtol=1e-4).item() for one in change]
            assert ranks == [cycle * RANK] * E

    def test_a_restart_keeps_the_function_and_prunes_what_it_says(self):
        model = self.model()
        optimizer = self.optimizer(model)
        self.train(model, optimizer)
        x = torch.randn(E, T, IN)
        before = model(x).detach()
        report = relora.restart_(model, optimizer, prune_ratio=0.9)
        torch.testing.assert_close(model(x), before)
        _, site = next(relora.low_rank_sites(model))
        assert not site.lora_B.any()
        for p in (site.lora_A, site.lora_B):
            kept = (optimizer.state[p]["exp_avg"] != 0).sum().item()
            assert kept == p.numel() - int(0.9 * (p.numel() - 1)) - 1
        assert report.update_norms["0.experts"] > 0

    def test_it_resumes_to_the_same_bytes(self):
        straight, other = self.model(), self.model()
        optimizer = self.optimizer(straight)
        self.train(straight, optimizer)
        relora.restart_(straight, optimizer)
        self.train(straight, optimizer)
        saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
        resumed = self.optimizer(other)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        for model, one in ((straight, optimizer), (other, resumed)):
            relora.restart_(model, one)
            self.train(model, one)
        for (name, p), q in zip(straight.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q), name

    def test_an_export_loads_into_the_plain_model(self):
        model = self.model()
        self.train(model, self.optimizer(model))
        plain = nn.Sequential(Bank(FORMS["bmm"], dtype=torch.float32), nn.Linear(OUT, 4))
        plain.load_state_dict(relora.merged_state_dict(model))
        x = torch.randn(E, T, IN)
        torch.testing.assert_close(plain(x), model(x))

    def test_register_and_remove_cancel(self):
        bank = Bank(FORMS["bmm"])
        weight = bank.experts
        relora.register_low_rank(bank, "experts", rank=2, batch_dims=1)
        assert relora.remove_low_rank(bank, "experts").experts is weight

    @pytest.mark.parametrize("names", [("up", "down"), ("down", "up")])
    def test_adapters_come_back_whatever_order_sites_were_made_in(self, tmp_path, names):
        def model():
            inner = nn.Module()
            inner.up, inner.down = (
                nn.Parameter(torch.zeros(3, 6, 4)),
                nn.Parameter(torch.zeros(3, 4, 6)),
            )
            for name in names:
                path = f"inner.{name}"
                relora.register_low_rank(inner, name, rank=2, batch_dims=1, name=path)
            return nn.ModuleDict({"inner": inner})

        one, other = model(), model()
        randomize_(one)
        relora.load_adapters(other, relora.save_adapters(one, tmp_path))
        for (_, a), (_, b) in zip(
            relora.low_rank_sites(one), relora.low_rank_sites(other), strict=True
        ):
            assert torch.equal(a.lora_A, b.lora_A)
            assert torch.equal(a.lora_B, b.lora_B)

    def test_split_bases_keep_what_merges_add(self):
        model = self.model()
        relora.split_bases_(model)
        optimizer = self.optimizer(model)
        x = torch.randn(E, T, IN)
        for p in model.parameters():
            p.data = p.data.bfloat16() if p.requires_grad else p.data
        _, site = next(relora.low_rank_sites(model))
        exact = site.exact().clone()
        nn.init.normal_(site.lora_B, std=1e-4)
        update = site.scale * (site.lora_B.float() @ site.lora_A.float())
        with pytest.warns(UserWarning, match="1 of 2 low-rank sites"):
            relora.restart_(model, optimizer)
        torch.testing.assert_close(site.exact(), exact + update, rtol=0, atol=1e-7)
        assert model(x.bfloat16()).dtype == torch.bfloat16


class TestRefusals:
    def test_a_bank_is_none_until_it_is_said_to_be_one(self):
        bank = Bank(FORMS["bmm"])
        with pytest.raises(ValueError, match=r"Bank.experts has shape \(4, 16, 8\).*batch_dims=1"):
            relora.register_low_rank(bank, "experts", rank=2)
        assert not relora.is_low_rank(bank)
        model = nn.Sequential(bank)
        with pytest.raises(ValueError, match=r"0.experts: Bank.experts has shape"):
            relora.add_low_rank_(model, ["*.experts"], rank=2)
        assert not relora.is_low_rank(bank)

    def test_convolutions_and_what_reads_them_as_one_keep_their_form(self):
        for module in (nn.Conv2d(4, 6, 3), nn.ConvTranspose1d(4, 6, 3), nn.Bilinear(3, 4, 5)):
            relora.register_low_rank(module, rank=2)
            assert module.parametrizations.weight[0].lora_A.ndim == 2

    def test_it_may_be_said_to_be_one_matrix(self):
        bank = Bank(WHOLE["sum"])
        relora.register_low_rank(bank, "experts", rank=2, batch_dims=0)
        assert bank.parametrizations.experts[0].lora_A.shape == (2, OUT * IN)

    def test_it_has_no_one_spectrum(self):
        model = nn.Sequential(bank_of(FORMS["bmm"]))
        with pytest.raises(ValueError, match=r"0\.experts is a bank"):
            relora.UpdateSpectra(model, "*")

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"batch_dims": 2}, ValueError, "leave two dimensions or more of the weight's 3"),
            ({"batch_dims": -1}, ValueError, "leave two dimensions or more"),
            ({"batch_dims": True}, TypeError, "batch_dims must be an int"),
            ({"batch_dims": 1, "rank": 9}, ValueError, r"= 8 for a weight of 16 x 8; got 9"),
            ({"batch_dims": 1, "dropout": 0.1}, ValueError, "a bank must be without dropout"),
        ],
    )
    def test_bad_options_change_nothing(self, options, error, message):
        bank = Bank(FORMS["bmm"])
        with pytest.raises(error, match=message):
            relora.register_low_rank(bank, "experts", **{"rank": 2, **options})
        assert not relora.is_low_rank(bank)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_einsum_in_two_paths_is_the_einsum(data):
    """Whatever letters the operands have."""
    letters = st.sampled_from("abcde")
    own = "".join(data.draw(st.lists(letters, min_size=2, max_size=3, unique=True)))
    other = "".join(data.draw(st.lists(letters, min_size=1, max_size=4, unique=True)))
    out = data.draw(st.permutations(sorted(set(own + other))))
    output = "".join(out[: data.draw(st.integers(0, len(out)))])
    first = data.draw(st.booleans())
    equation = ",".join((own, other) if first else (other, own)) + "->" + output
    sizes = dict(zip("abcde", (2, 3, 4, 2, 3), strict=True))
    module = nn.Module()
    shape = [sizes[c] for c in own]
    module.w = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    relora.register_low_rank(module, "w", rank=2, batch_dims=len(own) - 2)
    randomize_(module)
    x = torch.randn([sizes[c] for c in other], dtype=torch.float64)
    whole = module.w.materialize()
    found = torch.einsum(equation, *((module.w, x) if first else (x, module.w)))
    expected = torch.einsum(equation, *((whole, x) if first else (x, whole)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("equation", "operands", "place", "expected"),
    [
        ("eti,eoi->eto", 2, 1, ("eti,eri,eor->eto", True)),
        ("eoi,eto->eti", 2, 0, ("eto,eor,eri->eti", False)),
        ("rti,roi->rto", 2, 1, ("rti,rai,roa->rto", True)),
        ("...i,oi->...o", 2, 1, None),
        ("eoi->eio", 1, 0, None),
        ("eoi,t->eoit", 2, 0, None),
        ("eii,t->et", 2, 0, None),
    ],
)
def test_an_equation_takes_the_factors_one_after_the_other(equation, operands, place, expected):
    assert split_equation(equation, [None] * operands, place) == expected
