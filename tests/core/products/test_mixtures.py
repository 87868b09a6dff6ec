"""Models of transformers with fused experts, and layers that look at their weight."""

import copy
import tempfile

import pytest
import torch

import relora_core as relora
from tests.reference import randomize_

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mixtral():
    config = transformers.MixtralConfig(
        **SMALL, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **SMALL,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def jetmoe():
    config = transformers.JetMoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.JetMoeForCausalLM(config)


def granite_moe():
    config = transformers.GraniteMoeConfig(
        **SMALL, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.GraniteMoeForCausalLM(config)


FUSED = ["*.self_attn.*_proj", "*.experts.*_proj"]
MODELS = {
    "mixtral": (mixtral, FUSED),
    "qwen3 moe": (qwen3_moe, FUSED),
    "jetmoe": (jetmoe, ["*.input_linear", "*.output_linear", "*.kv_proj"]),
    "granite moe": (granite_moe, FUSED),
}
WAYS = ["eager", "grouped_mm", "batched_mm"]
CASES = [(kind, way) for kind in MODELS for way in (WAYS if kind != "jetmoe" else ["eager"])]
TOKENS = torch.arange(24).view(2, 12)


def of(kind, way, dtype=torch.float32):
    make, targets = MODELS[kind]
    torch.manual_seed(0)
    plain = make().to(dtype).train()
    plain.config.use_cache = False
    if kind != "jetmoe":  # which loops over its experts by itself
        plain.set_experts_implementation(way)
    return plain, targets


@pytest.mark.parametrize(("kind", "way"), CASES)
class TestExperts:
    def test_compute_with_the_dense_sum_and_so_do_gradients(self, kind, way):
        """Against the same model in float64, whose weights are W + s B A."""
        plain, targets = of(kind, way)
        model = relora.add_low_rank_(plain, targets, rank=4, alpha=8, batch_dims=1)
        randomize_(model, std=0.1)
        dense, _ = of(kind, "eager", torch.float64)
        merged = {k: v.double() for k, v in relora.merged_state_dict(model).items()}
        dense.load_state_dict(merged)
        y, expected = model(TOKENS).logits, dense(TOKENS).logits
        assert (y - expected).norm() < 2e-5 * expected.norm()
        g = torch.randn_like(expected)
        y.backward(g.float())
        expected.backward(g)
        weights = dict(dense.named_parameters())
        banks = 0
        for name, site in relora.low_rank_sites(model):
            dW = weights.get(name, weights.get(f"{name}.weight")).grad
            dA = site.scale * (site.lora_B.double().mT @ dW)
            dB = site.scale * (dW @ site.lora_A.double().mT)
            assert (site.lora_A.grad - dA).norm() < 1e-4 * dA.norm(), name
            assert (site.lora_B.grad - dB).norm() < 1e-4 * dB.norm(), name
            banks += site.low_rank.batch_dims
        assert banks == (8 if kind == "jetmoe" else 4)

    def test_train_over_restarts_resume_and_reload(self, kind, way, tmp_path):
        plain, targets = of(kind, way)
        before = plain(TOKENS).logits
        model = relora.add_low_rank_(plain, targets, rank=4, alpha=8, batch_dims=1)
        torch.testing.assert_close(model(TOKENS).logits, before)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

        def step(model, optimizer):
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):
            step(model, optimizer)
        y = model(TOKENS).logits.detach()
        relora.restart_(model, optimizer)
        torch.testing.assert_close(model(TOKENS).logits, y, rtol=1e-4, atol=1e-5)
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        other, _ = of(kind, way)
        relora.add_low_rank_(other, targets, rank=4, alpha=8, batch_dims=1)
        resumed = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
        other.load_state_dict(state[0])
        resumed.load_state_dict(state[1])
        for one, its in ((model, optimizer), (other, resumed)):
            step(one, its)
            relora.restart_(one, its)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)

        step(model, optimizer)  # so that B is not zero
        model.config.save_pretrained(tmp_path)
        relora.save_merged(model, tmp_path)
        loaded = type(plain).from_pretrained(tmp_path)
        if kind != "jetmoe":
            loaded.set_experts_implementation(way)
        model.eval()
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # within PEFT
@pytest.mark.parametrize("kind", ["mixtral", "qwen3 moe"])
def test_peft_reads_adapters_of_fused_experts(kind):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    plain, targets = of(kind, "eager")
    model = relora.add_low_rank_(copy.deepcopy(plain), targets, rank=4, alpha=8, batch_dims=1)
    randomize_(model, std=0.1)
    directory = relora.save_adapters(model, tempfile.mkdtemp())
    read = peft.PeftModel.from_pretrained(copy.deepcopy(plain), directory)
    torch.testing.assert_close(read(TOKENS).logits, model(TOKENS).logits)
    assert (plain(TOKENS).logits - model(TOKENS).logits).abs().max() > 0.01
    other = relora.add_low_rank_(plain, targets, rank=4, alpha=8, batch_dims=1)
    relora.load_adapters(other, directory)
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


def test_the_router_alone_is_not_what_a_glob_over_the_block_means():
    model = mixtral()
    with pytest.warns(UserWarning, match=r"layers.0.mlp.experts.gate_up_proj, .*batch_dims=1"):
        relora.add_low_rank_(model, ["*.mlp.*"], rank=4)
    assert "model.layers.1.mlp.experts.down_proj" in relora.summary(model).left


def test_an_embedding_tied_outside_of_the_backbone_is_refused():
    config = transformers.LlamaConfig(**SMALL, intermediate_size=64, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="embed_tokens is tied to weight of a Linear"):
        relora.add_low_rank_(model.model, ["embed_tokens"], rank=4)
    with pytest.raises(ValueError, match="head is tied to weight of a Embedding"):
        relora.register_low_rank(model.lm_head, rank=4, name="head")


class TestAWeightThatStaysWider:
    """T5 keeps `wo` in fp32 within an fp16 model, and casts for it if its weight is a Tensor."""

    def model(self, directory):
        config = transformers.T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        )
        torch.manual_seed(0)
        transformers.T5ForConditionalGeneration(config).eval().save_pretrained(directory)
        return transformers.T5ForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float16
        ).eval()

    def test_computes_as_the_plain_model(self, tmp_path):
        model = self.model(tmp_path)
        expected = model(input_ids=TOKENS, labels=TOKENS)
        relora.add_low_rank_(model, ["*.DenseReluDense.wo"], rank=4)
        found = model(input_ids=TOKENS, labels=TOKENS)
        assert torch.equal(found.logits, expected.logits)
        found.loss.backward()
        (_, site), *_ = relora.low_rank_sites(model)
        assert site.lora_B.grad.dtype == torch.float32
        assert site.lora_B.grad.any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_takes_a_narrower_input_and_no_wider_one(self, dtype):
        layer = relora.register_low_rank(torch.nn.Linear(4, 3), rank=2)
        x = torch.randn(2, 4).to(dtype)
        assert torch.equal(layer(x), layer(x.float()))
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.double())
