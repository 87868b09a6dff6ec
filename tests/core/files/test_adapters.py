"""Adapters in PEFT's format: read by PEFT as they compute here, and read back bit for bit."""

import copy
import json
import math

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

    def test_tells_modules_apart_whose_names_end_alike(self, tmp_path):
        def learned_chain():
            torch.manual_seed(2)
            options = {"rank": 3, "rank_pattern": {"proj": 2}, "trainable_scale": True}
            return relora.add_low_rank_(Chain(), "*proj", **options)

        model = learned_chain()
        randomize_(model)
        with torch.no_grad():
            for scale, (_, site) in zip((1.5, 5.0), relora.low_rank_sites(model), strict=True):
                site.low_rank.lora_scale.fill_(scale)
        relora.save_adapters(model, tmp_path, base=tmp_path)
        x = torch.randn(3, 4)
        torch.manual_seed(2)
        theirs = peft.PeftModel.from_pretrained(Chain(), tmp_path)
        torch.testing.assert_close(theirs(x), model(x))
        other = learned_chain()
        relora.load_adapters(other, tmp_path)
        assert same(state(other), state(model))


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.ModuleDict({"proj": nn.Linear(4, 4)})
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        return self.proj(self.enc.proj(x).tanh())


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
        model = learned(trainable_scale=True).double()
        with torch.no_grad():
            for _, site in relora.low_rank_sites(model):
                site.low_rank.lora_scale.mul_(math.pi)
        other = made(trainable_scale=True).double()
        relora.load_adapters(other, relora.save_adapters(model, tmp_path))
        assert same(state(other), state(model))

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


def spoil(tensors):
    tensors["base_model.model.layers.1.lora_A.weight"][0, 0] = math.nan


def enlarge(tensors):
    name = "base_model.model.layers.1.lora_A.weight"
    tensors[name] = tensors[name].double() * 1e300


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (drop, "lacks .*conv.lora_B.weight"),
            (add, "has .*head.lora_A.weight"),
            (widen, r"factors of layers.1 must have shapes .*\(3, 6\).*got .*\(4, 6\)"),
            (count, "must be finite and floating point"),
            (spoil, "must be finite and floating point"),
            (enlarge, "has values that torch.float32 cannot hold"),
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
            ({"peft_type": "LOHA"}, "peft_type is 'LOHA', not LORA"),
            ({"lora_alpha": "6"}, "an alpha must be a number; got '6'"),
            ({"lora_alpha": True}, "an alpha must be a number; got True"),
            ({"lora_alpha": math.nan}, "an alpha must be finite"),
            ({"lora_alpha": 10**400}, "OverflowError"),
            ({"lora_alpha": 7}, "has the scale"),
            ({"use_dora": True}, "with use_dora the adapter is not"),
            ({"init_lora_weights": "pissa"}, "with init_lora_weights the adapter is not"),
            ({"alpha_pattern": 3}, "must be a LoRA adapter's configuration"),
            ({"alpha_pattern": {"(": 1}}, "must be a LoRA adapter's configuration"),
        ],
    )
    def test_of_a_configuration_change_nothing(self, tmp_path, change, message):
        relora.save_adapters(learned(), tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        self.refused(tmp_path, message)

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    @pytest.mark.parametrize(
        "damage",
        [None, b"", b"{", b"null", b"[]", b"\xff" * 64, b"[" * 100_000],
        ids=["absent", "empty", "cut", "null", "a list", "noise", "deep"],
    )
    def test_of_damaged_files_change_nothing(self, tmp_path, name, damage):
        relora.save_adapters(learned(), tmp_path)
        (tmp_path / name).unlink()
        if damage is not None:
            (tmp_path / name).write_bytes(damage)
        self.refused(tmp_path, f"{name} must (be a LoRA|hold the tensors of an) adapter")

    @pytest.mark.parametrize(
        "key",
        [
            {"seed": -1, "restart": 0, "scale": 2.0},
            {"seed": 10**30, "restart": 0, "scale": 2.0},
            {"seed": 0, "restart": 1.5, "scale": 2.0},
            {"seed": 0, "restart": math.inf, "scale": 2.0},
            {"seed": 0, "restart": 0, "scale": math.nan},
            {"seed": 0},
            3,
        ],
    )
    def test_of_damaged_keys_change_nothing(self, tmp_path, key):
        relora.save_adapters(learned(), tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        save_file(load_file(file), file, metadata={"relora": json.dumps({"embed": key})})
        self.refused(tmp_path, "is damaged")

    @pytest.mark.parametrize("which", ["lora_A", "lora_B", "lora_scale"])
    def test_of_what_is_not_finite_write_nothing(self, tmp_path, which):
        model = learned(trainable_scale=True)
        with torch.no_grad():
            getattr(dict(relora.low_rank_sites(model))["conv"].low_rank, which).fill_(math.inf)
        with pytest.raises(ValueError, match="conv: a factor or the scale is not finite"):
            relora.save_adapters(model, tmp_path / "none")
        assert not (tmp_path / "none").exists()

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
            (lambda: nn.MultiheadAttention(4, 2).out_proj, "weight"),
            (lambda: nn.Conv2d(4, 4, 2, groups=2), "weight"),
            (lambda: nn.Conv2d(4, 4, 2, dilation=2), "weight"),
            (lambda: nn.Conv2d(4, 4, 2, padding=1, padding_mode="circular"), "weight"),
            (lambda: nn.Bilinear(2, 2, 3), "weight"),
            (None, "weight"),
        ],
    )
    def test_of_what_has_no_place_there_write_nothing(self, tmp_path, make, tensor_name):
        if make is None:
            model = relora.register_low_rank(nn.Linear(3, 2), rank=1)  # no name within a model
        else:
            model = nn.Sequential(relora.register_low_rank(make(), tensor_name, rank=1))
        with pytest.raises(ValueError, match="a site in PEFT's format must be the weight of"):
            relora.save_adapters(model, tmp_path / "none")
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_that_cannot_be_put_in_place_leaves_nothing_beside_it(tmp_path, file):
    (tmp_path / file / "taken").mkdir(parents=True)
    with pytest.raises(ValueError, match="must be a regular file"):
        relora.save_adapters(learned(), tmp_path)
    assert not list(tmp_path.glob("*.partial"))
