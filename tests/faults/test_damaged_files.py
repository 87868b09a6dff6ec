"""Every file that is read, damaged in every way: one clear error, or a file that is still valid.

What has a checksum (checkpoints, tokens, their index, each line of the log) admits
no change of meaning. What is the user's own (text, a tokenizer, a configuration, a published model)
has none: there a change that leaves it well-formed is another file, which is used as it is.
"""

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from reference_trainer import options
from reference_trainer.checkpoint.find import complete_checkpoints
from reference_trainer.config import DataConfig
from reference_trainer.data.prepare import prepare
from reference_trainer.errors import UserError
from reference_trainer.run_directory import is_fixed
from tests.faults.damages import CANARY, DAMAGES, REMOVALS, damage_
from tests.faults.victims import NO_FAULT, attempt, command, output
from tests.trainer.published import publish, tiny_arguments
from tests.trainer.runs import EVERY_CHECKPOINT, TINY, lines_of

NOT_FINITE = "1 steps in a row, to step 0, had a non-finite loss or gradient"
MEMORY = 2**32  # bytes that a process may allocate


@dataclass(frozen=True)
class Target:
    """A file, what reads it, and when a change to it is none.

    Args:
        file: a glob in the run's directory's parent.
        command: of the trainer.
        same: whether the damaged bytes are as good as the sound ones.
    """

    file: str
    command: list[str]
    same: Callable[[bytes, bytes], bool]


def never(sound: bytes, damaged: bytes) -> bool:
    return False


def same_json(sound: bytes, damaged: bytes) -> bool:
    try:
        return json.loads(sound) == json.loads(damaged)
    except (ValueError, RecursionError):
        return False


def any_json(sound: bytes, damaged: bytes) -> bool:
    try:
        return isinstance(json.loads(damaged), dict)
    except (ValueError, RecursionError):
        return False


def any_lines(sound: bytes, damaged: bytes) -> bool:
    try:
        found = [json.loads(line) for line in damaged.decode().split("\n") if line.strip()]
    except (ValueError, RecursionError):
        return False
    return all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in found)


def shorter(sound: bytes, damaged: bytes) -> bool:
    """Whether a log lacks nothing but its end, as after a crash."""
    return sound.startswith(damaged.rpartition(b"\n")[0])


def any_options(sound: bytes, damaged: bytes) -> bool:
    try:
        return isinstance(yaml.safe_load(damaged), dict | None)
    except (yaml.YAMLError, UnicodeDecodeError):
        return False


def anything(sound: bytes, damaged: bytes) -> bool:
    return True


def same_options(sound: bytes, damaged: bytes) -> bool:
    """Whether no option differs that may not change in a run."""
    one, other = (_fixed(content) for content in (sound, damaged))
    return one == other


def _fixed(content: bytes) -> object:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        try:
            values = options.values(options.resolve(Path(file.name), {"name": "judged"}))
        except UserError:
            return None
    return {path: value for path, value in values.items() if is_fixed(path)}


def same_tensors_but_values(sound: bytes, damaged: bytes) -> bool:
    one, other = (_header(content) for content in (sound, damaged))
    return one is not None and one == other and len(sound) == len(damaged)


def _header(content: bytes) -> object:
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return None
    header.pop("__metadata__", None)
    return length, header


RESUME = ["train", "--resume"]
START = ["train", *tiny_arguments(), "--name", "new", "--steps", "3", "--relora.warm_start", "0"]
PLAIN = [f"plain-{number}.txt" for number in range(3)]
PREPARE = ["prepare", "out", "--data.held_out", "0.5", "--data.files"]
CHECKPOINT = "runs/first-run/checkpoints/step-*"
TARGETS = {
    "a checkpoint's tensors": Target(f"{CHECKPOINT}/shard-*.safetensors", RESUME, never),
    "a checkpoint's state": Target(f"{CHECKPOINT}/state.json", RESUME, never),
    "a checkpoint's manifest": Target(f"{CHECKPOINT}/manifest.json", RESUME, same_json),
    "a run's options": Target("runs/first-run/config.yaml", RESUME, same_options),
    "a run's tokens": Target("runs/first-run/data/train-00000.bin", RESUME, never),
    "a run's index": Target("runs/first-run/data/index.json", RESUME, same_json),
    "a run's log": Target("runs/first-run/metrics.jsonl", RESUME, shorter),
    "a log to draw": Target("runs/first-run/metrics.jsonl", ["report", "runs/first-run"], shorter),
    "prepared tokens": Target(
        "tokens/held_out-00000.bin", [*START, "--data.prepared", "tokens", "--data.files"], never
    ),
    "a prepared index": Target(
        "tokens/index.json", [*START, "--data.prepared", "tokens", "--data.files"], same_json
    ),
    "a prepared tokenizer": Target(
        "words/tokenizer.json", [*START, "--data.prepared", "words", "--data.files"], never
    ),
    "a published shape": Target(
        "published/config.json", [*START, "--model.weights", "published"], any_json
    ),
    "published weights": Target(
        "published/model.safetensors",
        [*START, "--model.weights", "published", "--optim.most_skips", "1"],
        same_tensors_but_values,
    ),
    "a tokenizer": Target(
        "words/tokenizer.json",
        [*PREPARE, *PLAIN, "--data.tokenizer", "words/tokenizer.json"],
        any_json,
    ),
    "lines": Target("lines.jsonl", [*PREPARE, "lines.jsonl"], any_lines),
    "rows": Target("rows.parquet", [*PREPARE, "rows.parquet"], anything),
    "text": Target("plain-0.txt", [*PREPARE, *PLAIN], anything),
    "options": Target("run.yaml", [*PREPARE, *PLAIN, "--config", "run.yaml"], any_options),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Return a directory with one of everything, as it should be."""
    directory = tmp_path_factory.mktemp("sound")
    codes = attempt([*TINY, *EVERY_CHECKPOINT], directory, 1, NO_FAULT)
    assert codes == [0], output(directory)
    run = directory / "runs/first-run"
    for step in complete_checkpoints(run / "checkpoints"):
        if step.name != "step-00000016":
            shutil.rmtree(step)
    publish(directory / "published", "plain")
    texts = [f"{index} " + "some words and others " * 40 for index in range(40)]
    for index, name in enumerate(PLAIN):
        (directory / name).write_text("\n".join(texts[index::3]))
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (directory / "lines.jsonl").write_text(lines)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), directory / "rows.parquet")
    (directory / "run.yaml").write_text((run / "config.yaml").read_text())
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "</s>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=99, special_tokens=special))
    (directory / "words").mkdir()
    tokenizer.save(str(directory / "words.json"))
    by_words = DataConfig(
        files=(str(directory / "lines.jsonl"),), tokenizer=str(directory / "words.json")
    )
    prepare(replace(by_words, held_out=0.2), directory / "words")
    prepare(replace(by_words, held_out=0.2, tokenizer="bytes"), directory / "tokens")
    for said in directory.glob("said*"):
        said.unlink()
    return directory


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_sound_is_used(sound, tmp_path, name):
    shutil.copytree(sound, tmp_path / "copy")
    code, said = command(TARGETS[name].command, tmp_path / "copy", memory=MEMORY)
    assert code == 0, said


@pytest.mark.parametrize("cases", [57, pytest.param(570, marks=pytest.mark.slow)])
def test_damage_is_refused_in_one_line_or_is_none(sound, tmp_path, cases):
    found: Counter[str] = Counter()
    wrong: list[str] = []
    kinds = [*DAMAGES, *REMOVALS]
    draw = random.Random(cases)
    for case in range(cases):
        target = list(TARGETS.values())[case % len(TARGETS)]
        kind = kinds[case // len(TARGETS) % len(kinds)] if cases > 300 else draw.choice(kinds)
        try:
            found[outcome(sound, tmp_path / str(case), target, kind, draw)] += 1
        except AssertionError as error:
            wrong.append(str(error))
    print(f"{cases} damaged files: {dict(found)}, {len(wrong)} wrong")
    assert not wrong, "\n\n".join(wrong)


def outcome(sound: Path, directory: Path, target: Target, kind: str, draw: random.Random) -> str:
    """Damage a copy, run the command, and judge what comes of it."""
    shutil.copytree(sound, directory)
    (file,) = directory.glob(target.file)
    before = file.read_bytes()
    damage_(file, kind, draw)
    after = file.read_bytes() if file.is_file() else b""
    paths = set(directory.rglob("*"))
    code, said = command(target.command, directory, memory=MEMORY)
    told = f"{target} {kind}: exit code {code}\n{said}"
    made = {p for p in set(directory.rglob("*")) - paths if p.name != "said"}
    assert not (directory / CANARY).exists(), told
    if code == 2 and target is TARGETS["published weights"] and NOT_FINITE in said:
        return "stopped by the first step"  # a finite weight, but huge
    if code == 2:
        errors = [line for line in lines_of(said) if not line.startswith("warning: ")]
        assert len(errors) == 1, told
        assert errors[0].startswith("error: "), told
        assert len(errors[0]) < 1000, told
        names = [file.name, file.parent.name]
        if file.suffix == ".yaml":  # or the option that is wrong in it
            names += [path for path, _ in options.leaves()]
        assert any(name in errors[0] for name in names), told
        assert not made, told
        shutil.rmtree(directory)
        return "refused"
    assert code == 0, told
    incomplete = kind == "absent" and "manifest" in target.file
    if incomplete:
        assert "is incomplete: starting again" in said, told
        return "begun again, with a warning"
    if kind == "absent" and target.file.endswith("metrics.jsonl"):
        return "a new log"
    assert kind not in REMOVALS, told
    assert target.same(before, after), told
    shutil.rmtree(directory)
    return "no damage"
