"""Ways to damage a file, each drawn from a generator."""

import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path

CANARY = "canary"


class _Payload:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (CANARY, "w")


def _truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _flipped_early(content: bytes, draw: random.Random) -> bytes:
    """Damage the beginning, where headers lie."""
    changed = bytearray(content)
    changed[draw.randrange(min(256, len(content)))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _overwritten(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + draw.randbytes(16) + content[start + 16 :]


def _zeroed(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    end = min(len(content), start + 64)
    return content[:start] + bytes(end - start) + content[end:]


def _appended(content: bytes, draw: random.Random) -> bytes:
    return content + draw.randbytes(draw.randint(1, 64))


def _a_huge_number(content: bytes, draw: random.Random) -> bytes:
    found = list(re.finditer(rb"\d+", content[:65536]))
    if not found:
        return content + b"9" * 30
    where = draw.choice(found)
    return content[: where.start()] + b"9" * draw.choice([18, 30, 6000]) + content[where.end() :]


def _a_name_elsewhere(content: bytes, draw: random.Random) -> bytes:
    found = list(re.finditer(rb'"[^"]*"', content[:65536])) or list(
        re.finditer(rb"\S+", content[:65536])
    )
    if not found:
        return b'"../../../../etc/passwd"'
    where = draw.choice(found)
    return content[: where.start()] + b'"../../../../etc/passwd"' + content[where.end() :]


def _another_version(content: bytes, draw: random.Random) -> bytes:
    return re.sub(rb'"format": ?\d+', b'"format": 99', content)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": _truncated,
    "a bit flipped": _flipped,
    "a bit flipped early": _flipped_early,
    "overwritten": _overwritten,
    "zeroed": _zeroed,
    "appended to": _appended,
    "a huge number": _a_huge_number,
    "a name elsewhere": _a_name_elsewhere,
    "another version": _another_version,
    "emptied": lambda content, draw: b"",
    "noise": lambda content, draw: draw.randbytes(len(content)),
    "a huge header": lambda content, draw: (2**60).to_bytes(8, "little") + content[8:],
    "nested": lambda content, draw: b"[" * 100_000,
    "a pickle": lambda content, draw: pickle.dumps(_Payload()),
    "a bomb": lambda content, draw: _BOMB,
}
# Ten anchors, each ten times the one before: ten billion entries, if somebody writes them out.
_BOMB = (
    b"".join(
        b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1) if i else b"x"] * 10))
        for i in range(10)
    )
    + b"data:\n  files: *a9\nname: *a9\n"
)
REMOVALS = ("absent", "a directory")


def damage_(file: Path, kind: str, draw: random.Random) -> None:
    """Damage `file` in one of `DAMAGES` or `REMOVALS`."""
    if kind in REMOVALS:
        file.unlink()
        if kind == "a directory":
            file.mkdir()
        return
    content = file.read_bytes()
    damaged = DAMAGES[kind](content, draw)
    file.write_bytes(damaged if damaged != content else _flipped(content, draw))
