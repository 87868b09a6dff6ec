"""Data: any source, an order that is a pure function of seed and step, clear refusals."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.config import DataConfig
from reference_trainer.data.batches import Batches, shuffled
from reference_trainer.data.feed import Feed
from reference_trainer.data.index import read_index, shard_path
from reference_trainer.data.prepare import prepare
from reference_trainer.data.tokenizer import Bytes
from reference_trainer.data.windows import Windows, open_windows
from reference_trainer.errors import UserError

TEXTS = [f"document {n}: " + "abc " * (n % 7 + 1) for n in range(60)]


def write_text(directory):
    for n, text in enumerate(TEXTS):
        (directory / f"{n}.txt").write_text(text)
    return "*.txt"


def write_jsonl(directory):
    lines = "\n\n".join(json.dumps({"text": text, "id": n}) for n, text in enumerate(TEXTS))
    (directory / "all.jsonl").write_text(lines)
    return "*.jsonl"


def write_parquet(directory):
    pq.write_table(pa.table({"text": TEXTS, "id": range(60)}), directory / "all.parquet")
    return "*.parquet"


def read_documents(directory, split):
    index = read_index(directory)
    ids = np.concatenate(
        [
            np.fromfile(shard_path(directory, split, n), dtype=index.dtype)
            for n in range(len(index.shards[split]))
        ]
    )
    return bytes(ids.astype(np.uint8).tolist()).decode().split("\0")[:-1]


@pytest.mark.parametrize("write", [write_text, write_jsonl, write_parquet])
def test_every_document_lands_once_in_one_split(tmp_path, write):
    pattern = str(tmp_path / write(tmp_path))
    prepare(DataConfig(files=(pattern,), held_out=0.2), tmp_path / "out")
    train, held_out = (read_documents(tmp_path / "out", s) for s in ("train", "held_out"))
    assert sorted(train + held_out) == sorted(TEXTS)
    assert len(held_out) >= 3


def test_the_split_depends_on_the_text_alone(tmp_path):
    for name, write in (("a", write_text), ("b", write_parquet)):
        (tmp_path / name).mkdir()
        pattern = str(tmp_path / name / write(tmp_path / name))
        prepare(DataConfig(files=(pattern,), held_out=0.2), tmp_path / name / "out")
    one, other = (set(read_documents(tmp_path / n / "out", "held_out")) for n in "ab")
    assert one == other


def test_one_large_text_is_cut_at_line_ends_and_loses_nothing(tmp_path):
    text = "\n".join(f"line {n} é" for n in range(9000)) + "\r\nend"
    (tmp_path / "a.txt").write_text(text, newline="")
    config = DataConfig(files=(str(tmp_path / "a.txt"),), held_out=1e-9)
    prepare(config, tmp_path / "out")
    pieces = [read_documents(tmp_path / "out", split) for split in ("train", "held_out")]
    assert len(pieces[1]) == 1  # the least hash is held out, however small the fraction
    assert all(len(piece) < 2**14 + 40 for split in pieces for piece in split)
    assert sorted("".join(pieces[0] + pieces[1])) == sorted(text)
    assert all(piece.endswith("\n") or piece.endswith("end") for s in pieces for piece in s)


def test_copies_of_a_document_lie_on_one_side(tmp_path):
    lines = "\n".join(json.dumps({"text": text}) for text in [*TEXTS, *TEXTS])
    (tmp_path / "a.jsonl").write_text(lines)
    prepare(DataConfig(files=(str(tmp_path / "a.jsonl"),), held_out=1e-9), tmp_path / "out")
    train, held_out = (read_documents(tmp_path / "out", s) for s in ("train", "held_out"))
    assert len(held_out) == 2
    assert held_out[0] == held_out[1]
    assert not set(train) & set(held_out)


def test_a_tokenizer_file_is_used_and_its_end_closes_documents(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"])
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(4)  # as many published files do: nothing may be cut
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    pattern = str(tmp_path / write_jsonl(tmp_path))
    config = DataConfig(files=(pattern,), tokenizer=str(tmp_path / "tokenizer.json"), held_out=0.2)
    index = prepare(config, tmp_path / "out")
    assert index.end == tokenizer.token_to_id("</s>")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    kept = index.tokens("train") + index.tokens("held_out")
    assert kept == sum(len(tokenizer.encode(text).ids) + 1 for text in TEXTS)
    ids = np.fromfile(shard_path(tmp_path / "out", "train", 0), dtype=index.dtype)
    assert int((ids == index.end).sum()) == index.documents["train"]
    first = ids[: list(ids).index(index.end)]
    assert tokenizer.decode(first.tolist()) in {
        " ".join(t.replace(":", " :").split()) for t in TEXTS
    }


@given(st.text(max_size=50))
def test_bytes_round_trip_and_never_hold_an_end_inside(text):
    (ids,) = Bytes().encode([text])
    assert ids[-1] == 0
    assert 0 not in ids[:-1]
    assert bytes(ids[:-1].tolist()) == text.replace("\0", " ").encode("utf-8", errors="replace")


def test_a_literal_name_with_brackets_is_found(tmp_path):
    for n, text in enumerate(TEXTS):
        (tmp_path / f"a[{n}].txt").write_text(text)
    files = tuple(str(tmp_path / f"a[{n}].txt") for n in range(3))
    prepare(DataConfig(files=files), tmp_path)
    assert sum(read_index(tmp_path).documents.values()) == 3


class TestOrder:
    @given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 5))
    def test_an_epoch_is_a_permutation(self, size, seed, epoch):
        places = np.arange(size, dtype=np.uint64)
        order = shuffled(places, np.full(size, epoch, np.uint64), size, seed)
        assert sorted(order.tolist()) == list(range(size))

    def test_epochs_and_seeds_differ_and_look_random(self):
        places = np.arange(1000, dtype=np.uint64)
        zero, one = np.zeros(1000, np.uint64), np.ones(1000, np.uint64)
        orders = [shuffled(places, e, 1000, s) for e, s in ((zero, 0), (one, 0), (zero, 1))]
        for i, order in enumerate(orders):
            assert abs(np.corrcoef(order, places.astype(float))[0, 1]) < 0.15
            assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.15
            assert all((order == other).mean() < 0.02 for other in orders[:i])

    def windows(self, tokens=101, length=4):
        half = tokens // 2
        ids = np.arange(tokens, dtype=np.uint16)
        return Windows((ids[:half], ids[half:]), length)

    def test_windows_are_contiguous_and_share_only_their_border(self):
        windows = self.windows()
        rows = windows.read(np.arange(len(windows), dtype=np.uint64))
        assert rows.shape == (len(windows), 5)
        assert torch.equal(rows, rows[:, :1] + torch.arange(5))
        inputs = rows[:, :-1].flatten().tolist()
        assert len(inputs) == len(set(inputs))

    @given(st.integers(1, 9), st.integers(0, 30))
    def test_a_batch_is_a_function_of_seed_and_step(self, sequences, step):
        one, other = (Batches(self.windows(), sequences, seed=3) for _ in range(2))
        one.at(step + 5)
        assert torch.equal(one.at(step), other.at(step))

    @given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 30))
    def test_the_parts_of_all_processes_are_the_batch(self, micro_steps, processes, n, step):
        batches = Batches(self.windows(), micro_steps * processes * n, seed=3)
        parts = [
            batches.part(step, rank=rank, processes=processes, micro_steps=micro_steps)
            for rank in range(processes)
        ]
        assert all(part.shape == (micro_steps, n, 5) for part in parts)
        whole = torch.stack(parts, dim=1)  # of each micro-step, process by process
        assert torch.equal(whole.flatten(0, 2), batches.at(step))

    @pytest.mark.parametrize("steps", [[0, 1, 2, 3], [5, 6], [3, 9, 4, 4]])
    def test_what_is_read_ahead_is_what_is_asked_for(self, steps):
        batches = Batches(self.windows(), 4, seed=3)
        world = SimpleNamespace(rank=1, size=2, device=torch.device("cpu"))
        with Feed(batches, world, 2) as feed:
            for step in steps:
                expected = batches.part(step, rank=1, processes=2, micro_steps=2)
                assert torch.equal(feed.at(step), expected)

    def test_a_reader_that_fails_says_so_where_it_is_asked(self):
        class Broken(Batches):
            def part(self, step, **others):
                if step == 1:
                    raise OSError("the disk is gone")
                return super().part(step, **others)

        world = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))
        with Feed(Broken(self.windows(), 4, seed=3), world, 1) as feed:
            feed.at(0)
            with pytest.raises(OSError, match="the disk is gone"):
                feed.at(1)

    def test_an_epoch_sees_every_window_once(self):
        windows = self.windows()
        batches = Batches(windows, 1, seed=3)
        rows = torch.cat([batches.at(step) for step in range(2 * len(windows))])
        firsts = rows[:, 0].tolist()
        assert sorted(firsts[: len(windows)]) == sorted(firsts[len(windows) :])
        assert len(set(firsts)) == len(windows)


def _write(name, content):
    def write(directory):
        path = directory / name
        path.write_bytes(content)
        return {"files": (str(path),)}

    return write


def _missing_column(directory):
    pq.write_table(pa.table({"body": TEXTS}), directory / "a.parquet")
    return {"files": (str(directory / "a.parquet"),)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: {"files": (str(d / "none*.txt"),)}, "no file matches"),
        (_write("a.txt", b""), "all 1 files are empty"),
        (_write("a.txt", "UTF-16".encode("utf-16-le") * 99), "holds a NUL"),
        (_write("a.jsonl", b'{"text": "\xff"}\n'), "a.jsonl:1 is not JSON in UTF-8"),
        (_write("a.JSONL", b"["), "a.JSONL:1 is not JSON"),
        (lambda d: {"files": (str(d),)}, "is a directory"),
        (_write("a.jsonl", b'{"text": "a"}\n{"text": '), "a.jsonl:2 is not JSON"),
        (_write("a.jsonl", b'{"body": "a"}\n'), "a.jsonl:1 has no text under 'text'"),
        (_write("a.parquet", b"not parquet"), "is not a Parquet file"),
        (_missing_column, r"no column 'text'; it has \['body'\]"),
        (
            _write("a.txt", b"one document"),
            "there must be a document to train on .*got 1 in 1 files",
        ),
        (lambda d: {"tokenizer": str(d / "no.json")}, "the path of a tokenizer.json"),
    ],
)
def test_unusable_input_is_refused(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        prepare(DataConfig(**make(tmp_path)), tmp_path / "out")


def test_damaged_shards_are_refused(tmp_path):
    pattern = str(tmp_path / write_jsonl(tmp_path))
    index = prepare(DataConfig(files=(pattern,), held_out=0.2), tmp_path / "out")
    with pytest.raises(UserError, match="less than one window"):
        open_windows(tmp_path / "out", index, "held_out", 10_000)
    shard = shard_path(tmp_path / "out", "train", 0)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="run `prepare` again"):
        read_index(tmp_path / "out")
    (tmp_path / "out" / "index.json").write_text('{"vocab_size": "a"}')
    with pytest.raises(UserError, match="is damaged"):
        read_index(tmp_path / "out")
    (tmp_path / "out" / "index.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_index(tmp_path / "out")
    with pytest.raises(UserError, match=r"no index\.json"):
        read_index(tmp_path)
