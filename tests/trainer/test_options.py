"""Options: every field by file and command line; an unknown name's error gives the nearest."""

import argparse
from pathlib import Path

import pytest
import yaml

from reference_trainer import options
from reference_trainer.config import Config
from reference_trainer.errors import UserError
from reference_trainer.phases import phases


def resolve(*arguments, file=None):
    parser = argparse.ArgumentParser()
    options.add_options(parser)
    return options.resolve(file, options.given(parser.parse_args(list(arguments))))


def test_defaults_file_and_command_line_in_rising_order(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 300\noptim: {lr: 3e-4, betas: [0.8, 0.9]}\nrelora: {rank: 8}\n")
    config = resolve("--relora.rank", "4", "--relora.targets", "*.mlp.*", file=file)
    assert (config.steps, config.optim.lr, config.optim.betas) == (300, 3e-4, (0.8, 0.9))
    assert (config.relora.rank, config.relora.targets) == (4, ("*.mlp.*",))
    assert config.seed == Config().seed


def test_a_file_may_leave_a_section_empty_and_name_one_glob_without_a_list(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model:\ndata: {files: a*.txt}\n")
    assert resolve(file=file) == resolve("--data.files", "a*.txt")


def test_every_field_has_an_option_with_help():
    for path, field in options.leaves():
        assert field.metadata["help"], path
        value = options._value(Config(), path)
        shown = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
        if value not in (None, ()):
            assert resolve(f"--{path}", *shown) == Config()


def test_what_is_written_is_read_back(tmp_path):
    config = resolve("--relora.alpha", "32", "--data.files", "a*.txt", "b.jsonl")
    options.write(config, tmp_path / "config.yaml")
    assert options.resolve(tmp_path / "config.yaml", {}) == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["relora"]["alpha"] == 32.0


def test_changed_names_the_fields():
    assert options.changed(Config(), resolve("--relora.rank", "4", "--seed", "1")) == [
        "seed",
        "relora.rank",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("relora: {rnk: 4}", r"unknown option relora.rnk: the nearest is relora.rank"),
        ("stepz: 4", "unknown option stepz: the nearest is steps"),
        ("steps: many", "steps: .*integer.*got 'many'"),
        ("optim: {lr: .nan}", "optim.lr: .*finite"),
        ("optim: 3", "optim: .*got 3"),
        ("relora.rank: 3", "write relora.rank nested, as relora: {rank: ...}"),
        ("modle: {preset: 9m}", "unknown option modle: the nearest is model"),
        ("- a", "must hold a mapping"),
        ("a: [", "cannot read"),
        (
            "relora: {every: 10, warmup: 10}",
            "relora.warmup must be at least 1 and below relora.every",
        ),
        ("relora: {warm_start: 900}", "warm_start must be at most steps"),
        ("name: ../x", "name must be the name of one directory"),
        ("model: {preset: 2b}", "model.preset must be one of"),
        ("data: {held_out: 1.0}", "held_out must be between 0 and 1"),
        ("checkpoint: {keep: 1}", "checkpoint.keep must be 2 or more"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        options.resolve(file, {})
    assert "\n" not in str(caught.value)


def test_the_file_to_begin_from_is_sound():
    config = options.resolve(Path(__file__).parents[2] / "docs/run-130m.yaml", {})
    assert [phase.cycles for phase in phases(config)] == [0, 3]
    assert config.batch.micro_steps(8) == 4


def test_phases_are_without_empty_ones():
    assert [p.name for p in phases(resolve("--relora.warm_start", "0"))] == ["relora"]
    assert [p.name for p in phases(resolve("--relora.warm_start", "360"))] == ["warm-start"]


@pytest.mark.parametrize(
    ("arguments", "processes", "expected"),
    [((8, 8), 1, 1), ((8, 2), 1, 4), ((8, 2), 4, 1), ((6, 8), 3, 1)],
)
def test_micro_steps_cover_the_batch(arguments, processes, expected):
    sequences, micro = map(str, arguments)
    batch = resolve("--batch.sequences", sequences, "--batch.micro", micro).batch
    assert batch.micro_steps(processes) == expected


@pytest.mark.parametrize(("sequences", "micro", "processes"), [(8, 8, 3), (9, 2, 1)])
def test_a_batch_that_does_not_divide_is_refused(sequences, micro, processes):
    batch = resolve("--batch.sequences", str(sequences), "--batch.micro", str(micro)).batch
    with pytest.raises(UserError, match="multiple of"):
        batch.micro_steps(processes)
