"""Adapters in PEFT's format: read by PEFT as they compute here, and read back bit for bit."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import relora_core as relora
from tests.reference import randomize_

peft = pytest.importorskip("peft", reason="peft is not installed")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.conv = nn.Conv1d(12, 6, 2)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 7)

    def forward(self, tokens):
        x = self.conv(self.embed(tokens).transpose(1, 2)).tanh().transpose(1, 2)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


TARGETS = ["embed", "conv", "layers.*"]
TOKENS = torch.tensor([[1, 6, 2, 0], [3, 3, 5, 4]])


def made(**options):
    torch.manual_seed(1)
    return relora.add_low_rank_(
        Model(), TARGETS, **{"rank": 3, "alpha": 6.0, "rank_pattern": {"conv": 2}, **options}
    )


def learned(**options):
    model = made(**options)
    randomize_(model)
    return model


def plain():
    torch.manual_seed(1)
    return Model()


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class TestPeft:
    def test_reads_ours_and_computes_the_same(self, tmp_path):
        model = learned()
        theirs = peft.PeftModel.from_pretrained(plain(), relora.save_adapters(model, tmp_path))
        torch.testing.assert_close(theirs(TOKENS), model(TOKENS))
        merged = theirs.merge_and_unload().state_dict()
        for name, tensor in relora.merged_state_dict(model).items():
            torch.testing.assert_close(merged[name], tensor)

    def test_is_read_by_ours(self, tmp_path):
        config = peft.LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=["embed", "conv", "layers.0", "layers.1"],
            rank_pattern={"conv": 2},
        )
        theirs = peft.get_peft_model(plain(), config)
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                if "lora_" in name:
                    p.normal_(std=0.3)
        theirs.save_pretrained(tmp_path)
        model = made()
        relora.load_adapters(model, tmp_path)
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS))

    def test_with_a_scale_by_the_root_of_the_rank_is_read_as_that(self, tmp_path):
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["head"], use_rslora=True)
        peft.get_peft_model(plain(), config).save_pretrained(tmp_path)
        relora.load_adapters(relora.add_low_rank_(plain(), "head", rank=4, alpha=12.0), tmp_path)
        with pytest.raises(ValueError, match="has the scale 3 there and 1 in the model"):
            relora.load_adapters(relora.add_low_rank_(plain(), "head", rank=4), tmp_path)

    def test_matches_no_module_that_only_ends_alike(self, tmp_path):
        model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
        relora.add_low_rank_(model, "0", rank=1)
        relora.save_adapters(model, tmp_path)
        other = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
        theirs = peft.PeftModel.from_pretrained(other, tmp_path)
        adapted = {n for n, _ in theirs.named_parameters() if "lora_A" in n}
        assert adapted == {"base_model.model.0.lora_A.default.weight"}


class TestBack:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_bit_for_bit(self, tmp_path, dtype):
        model = learned().to(dtype)
        other = copy.deepcopy(model)
        randomize_(other)
        relora.load_adapters(other, relora.save_adapters(model, tmp_path))
        assert same(state(other), state(model))

    def test_the_next_redraw_is_the_one_that_would_have_come(self, tmp_path):
        model = learned(seed=5)
        relora.reinit_(model)
        randomize_(model)
        relora.save_adapters(model, tmp_path)
        other = made()
        relora.load_adapters(other, tmp_path)
        relora.reinit_(model)
        relora.reinit_(other)
        assert same(state(other), state(model))

    def test_a_trained_scale_goes_along(self, tmp_path):
        model = learned(trainable_scale=True)
        with torch.no_grad():
            for _, site in relora.low_rank_sites(model):
                site.low_rank.lora_scale.mul_(1.5)
        other = made(trainable_scale=True)
        relora.load_adapters(other, relora.save_adapters(model, tmp_path))
        torch.testing.assert_close(other(TOKENS), model(TOKENS))

    def test_saving_changes_nothing_and_replaces_whole_files(self, tmp_path):
        model = learned()
        before = state(model)
        relora.save_adapters(model, tmp_path / "a", base="somewhere")
        relora.save_adapters(model, tmp_path / "a", base="elsewhere")
        assert same(state(model), before)
        names = {path.name for path in (tmp_path / "a").iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors"}
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "elsewhere"


def drop(tensors):
    del tensors["base_model.model.conv.lora_B.weight"]


def add(tensors):
    tensors["base_model.model.head.lora_A.weight"] = torch.zeros(1, 6)


def widen(tensors):
    tensors["base_model.model.layers.1.lora_A.weight"] = torch.zeros(4, 6)


def count(tensors):
    tensors["base_model.model.layers.1.lora_A.weight"] = torch.zeros(3, 6, dtype=torch.int64)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (drop, "lacks .*conv.lora_B.weight"),
            (add, "has .*head.lora_A.weight"),
            (widen, r"layers.1 needs factors of shapes .*\(3, 6\).*got .*\(4, 6\)"),
            (count, "not floating point"),
        ],
    )
    def test_of_tensors_that_do_not_fit_change_nothing(self, tmp_path, change, message):
        relora.save_adapters(learned(), tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        self.refused(tmp_path, message)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"peft_type": "LOHA"}, "no LoRA adapter"),
            ({"lora_alpha": "6"}, "no LoRA adapter"),
            ({"lora_alpha": float("nan")}, "no LoRA adapter"),
            ({"lora_alpha": 7}, "has the scale"),
            ({"use_dora": True}, "use_dora has no meaning"),
            ({"alpha_pattern": 3}, "no adapter's configuration"),
        ],
    )
    def test_of_a_configuration_change_nothing(self, tmp_path, change, message):
        relora.save_adapters(learned(), tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        self.refused(tmp_path, message)

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    @pytest.mark.parametrize("damage", [None, b"", b"{", b"\xff" * 64, b"[" * 100_000])
    def test_of_damaged_files_change_nothing(self, tmp_path, name, damage):
        relora.save_adapters(learned(), tmp_path)
        (tmp_path / name).unlink()
        if damage is not None:
            (tmp_path / name).write_bytes(damage)
        self.refused(tmp_path, f"{name} is no adapter's")

    def refused(self, directory, message):
        model = made()
        before = state(model)
        with pytest.raises(ValueError, match=message):
            relora.load_adapters(model, directory)
        assert same(state(model), before)

    @pytest.mark.parametrize(
        ("make", "tensor_name"),
        [
            (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"),
            (lambda: nn.Conv2d(4, 4, 2, groups=2), "weight"),
            (lambda: nn.Bilinear(2, 2, 3), "weight"),
        ],
    )
    def test_of_what_has_no_place_there_write_nothing(self, tmp_path, make, tensor_name):
        model = relora.register_low_rank(make(), tensor_name, rank=1)
        with pytest.raises(ValueError, match="PEFT's format holds adapters of the weight of"):
            relora.save_adapters(model, tmp_path / "none")
        assert not (tmp_path / "none").exists()
