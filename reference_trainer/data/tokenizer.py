"""Tokenizers, from text to token ids: UTF-8 bytes, or a Hugging Face `tokenizers` file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from reference_trainer.errors import UserError

_END_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")


class Tokenizer(Protocol):
    """A tokenizer: it turns documents into ids, and closes each document with `end`."""

    vocab_size: int
    end: int

    def encode(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return each document's ids, `end` included."""
        ...


class Bytes:
    """One token per byte of UTF-8; the byte 0, which text does not use, ends a document.

    Examples:
        >>> Bytes().encode(["ab"])[0].tolist()
        [97, 98, 0]
    """

    vocab_size = 256
    end = 0

    def encode(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return each document's bytes and a closing 0; a 0 inside becomes a space."""
        texts = (text.encode("utf-8", errors="replace").replace(b"\0", b" ") for text in documents)
        return [np.frombuffer(text + b"\0", dtype=np.uint8).astype(np.uint32) for text in texts]


def bytes_as_file() -> str:
    """Return the `tokenizer.json` of `Bytes`, for other programs that read the export.

    Examples:
        >>> HuggingFaceTokenizer.from_str(bytes_as_file()).encode("aé").ids
        [97, 195, 169]
    """
    # ByteLevel represents each byte by a printable character, in GPT-2's order.
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in seen)
    letters = {byte: chr(byte) for byte in seen}
    letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    tokenizer = HuggingFaceTokenizer(BPE({letters[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    return str(tokenizer.to_str(pretty=True))


class FromFile:
    """The tokenizer of a `tokenizer.json`; its end-of-text token ends a document."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(
                f"data.tokenizer must be 'bytes' or the path of a tokenizer.json; got {path}"
            )
        try:
            self._tokenizer = HuggingFaceTokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise UserError(f"{path} is not a tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()  # a published file may ask for it, which would lose text
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1  # ids may have gaps
        ends = (self._tokenizer.token_to_id(name) for name in _END_NAMES)
        end = next((token for token in ends if token is not None), None)
        if end is None:
            raise UserError(
                f"{path} has no end-of-text token; one of {', '.join(_END_NAMES)} is needed"
            )
        self.end = end

    def encode(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return each document's ids and `end`."""
        encodings = self._tokenizer.encode_batch(list(documents), add_special_tokens=False)
        return [np.array([*one.ids, self.end], dtype=np.uint32) for one in encodings]


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names."""
    return Bytes() if name == "bytes" else FromFile(Path(name))
