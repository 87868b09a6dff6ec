"""An export includes every site, whatever a wrapper calls it, or refuses if it cannot."""

import os
import re
from collections import OrderedDict

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import relora_core as relora
from relora_core.files import whole as files
from tests.reference import randomize_


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))


def low_rank():
    model = relora.add_low_rank_(net(), "0", rank=2)
    randomize_(model)
    return model


class Delegating(nn.Module):
    """Answers for the model inside of it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def state_dict(self, *args, **kwargs):
        return self.inner.state_dict(*args, **kwargs)


class Prefixing(Delegating):
    def state_dict(self, *args, **kwargs):
        inner = self.inner.state_dict(*args, **kwargs)
        return OrderedDict((f"net.{key}", tensor) for key, tensor in inner.items())


class Copying(Delegating):
    def state_dict(self, *args, **kwargs):
        return {key: t.clone() for key, t in self.inner.state_dict(*args, **kwargs).items()}


class Renaming(Delegating):
    def state_dict(self, *args, **kwargs):
        inner = self.inner.state_dict(*args, **kwargs)
        return {key.replace(".", "_"): tensor for key, tensor in inner.items()}


class Dropping(Delegating):
    """As a filter for what is trained does."""

    def state_dict(self, *args, **kwargs):
        inner = self.inner.state_dict(*args, **kwargs)
        return {key: tensor for key, tensor in inner.items() if "original" not in key}


def of_fabric(inner):
    lightning = pytest.importorskip("lightning.fabric", reason="lightning is not installed")
    return lightning.Fabric(accelerator="cpu", devices=1).setup_module(inner)


@pytest.mark.parametrize("wrap", [Delegating, of_fabric, torch.compile])
def test_a_wrapper_that_delegates_is_the_model(wrap, tmp_path):
    model = low_rank()
    expected = relora.merged_state_dict(model)
    found = load_file(relora.save_merged(wrap(model), tmp_path))
    assert found.keys() == expected.keys() == net().state_dict().keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor)


def test_a_wrapper_that_puts_names_before_keeps_them():
    found = relora.merged_state_dict(Prefixing(low_rank()))
    assert found.keys() == {f"net.{key}" for key in net().state_dict()}


def test_a_module_around_it_has_its_names_before():
    model = nn.ModuleDict({"inner": low_rank()})
    nn.ModuleDict({"inner": net()}).load_state_dict(relora.merged_state_dict(model))


@pytest.mark.parametrize("wrap", [Copying, Renaming, Dropping])
@pytest.mark.parametrize("export", [relora.merged_state_dict, relora.base_state_dict])
def test_a_site_that_is_not_met_is_named_and_nothing_is_written(wrap, export, tmp_path):
    model = wrap(low_rank())
    with pytest.raises(ValueError, match=r"state dict of .* lacks the W of 1 low-rank sites .*0"):
        export(model)
    with pytest.raises(ValueError, match="lacks the W"):
        relora.save_merged(model, tmp_path)
    assert not list(tmp_path.iterdir())


class TestFiles:
    def test_of_a_link_the_file_behind_it_is_replaced(self, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        target = tmp_path / "elsewhere" / "weights"
        target.write_text("old")
        link = tmp_path / "model.safetensors"
        link.symlink_to(target)
        relora.save_merged(low_rank(), tmp_path)
        assert link.is_symlink()
        assert load_file(target).keys() == net().state_dict().keys()

    def test_a_pipe_is_refused_and_stays(self, tmp_path):
        file = tmp_path / "model.safetensors"
        os.mkfifo(file)
        with pytest.raises(ValueError, match="must be a regular file"):
            relora.save_merged(low_rank(), tmp_path)
        assert file.is_fifo()
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]

    def test_two_writers_have_a_partial_file_each(self, tmp_path):
        file = tmp_path / "a"
        with files.replaced(file) as one, files.replaced(file) as other:
            assert one != other
            one.write_text("one")
            other.write_text("other")
        assert file.read_text() == "one"
        assert list(tmp_path.iterdir()) == [file]

    def test_what_lies_at_the_partial_s_name_is_not_followed(self, tmp_path, monkeypatch):
        victim = tmp_path / "victim"
        victim.write_text("kept")
        monkeypatch.setattr(files.secrets, "token_hex", lambda _: "aa")
        (tmp_path / "a.aa.partial").symlink_to(victim)
        with pytest.raises(FileExistsError), files.replaced(tmp_path / "a"):
            pass
        assert victim.read_text() == "kept"

    def test_safetensors_own_error_is_one_line_of_the_operating_system_s(
        self, tmp_path, monkeypatch
    ):
        def full(*args, **kwargs):
            raise SafetensorError("No space left on device")

        monkeypatch.setattr(files, "save_file", full)
        for save in (relora.save_merged, relora.save_adapters):
            with pytest.raises(OSError, match="cannot be written: No space left") as caught:
                save(low_rank(), tmp_path)
            assert "\n" not in str(caught.value)
            assert not list(tmp_path.glob("*.partial"))


class TestAdapterPatterns:
    def with_pattern(self, directory, pattern):
        model = low_rank()
        relora.save_adapters(model, directory)
        config = directory / "adapter_config.json"
        alpha = '"alpha_pattern": {}'
        assert alpha in config.read_text()
        quoted = pattern.replace("\\", "\\\\")
        config.write_text(config.read_text().replace(alpha, f'"alpha_pattern": {{"{quoted}": 2}}'))
        return model

    @pytest.mark.parametrize(
        "pattern",
        [
            "(a+)+$",
            "(a|a)*b",
            "(.*)*x",
            ".*.*.*.*x",
            "(0|0)(0|0)(0|0)(0|0)(0|0)(0|0)(0|0)(0|0)(0|0)x",
            "a{1,9999}",
            r"(?:a|b)+",
            "a?" * 30 + "a" * 30,
            "a" * 2000,
        ],
    )
    def test_that_could_run_for_ever_are_refused(self, tmp_path, pattern):
        model = self.with_pattern(tmp_path, pattern)
        with pytest.raises(ValueError, match="a pattern must have at most two"):
            relora.load_adapters(model, tmp_path)

    @pytest.mark.parametrize(
        "pattern", ["0", "^0", r"layers\.[0-9]+\.q_proj|^0", ".*0", r"\d+", "(q|k|v)_proj|0"]
    )
    def test_that_are_written_are_read(self, tmp_path, pattern):
        model = self.with_pattern(tmp_path, pattern)
        relora.load_adapters(model, tmp_path)

    def test_pipes_are_refused_without_waiting(self, tmp_path):
        model = low_rank()
        relora.save_adapters(model, tmp_path)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            kept = (tmp_path / name).read_bytes()
            (tmp_path / name).unlink()
            os.mkfifo(tmp_path / name)
            with pytest.raises(ValueError, match=re.escape(name)):
                relora.load_adapters(model, tmp_path)
            (tmp_path / name).unlink()
            (tmp_path / name).write_bytes(kept)
        relora.load_adapters(model, tmp_path)
