"""The records of a run: one JSON object per line, and TensorBoard files if asked for."""

import contextlib
import json
import zlib
from pathlib import Path
from typing import Any, Self

from reference_trainer.errors import UserError
from reference_trainer.files import write_whole
from reference_trainer.logging.records import Record

_FIX = "restore the file, or delete this line and all after it"


class Metrics:
    """The writer of `metrics.jsonl`; only the first process writes.

    Each line is a record (`records.py`), with a "crc32" of all fields before it at the end.

    Args:
        directory: the directory of the run.
        writes: whether this process is the one that writes.
        tensorboard: whether to write numbers for TensorBoard too.
        since: the step and phase of the checkpoint that the run continues from; records after it
            are dropped first.
    """

    def __init__(
        self,
        directory: Path,
        *,
        writes: bool,
        tensorboard: bool = False,
        since: tuple[int, str] = (0, ""),
    ) -> None:
        self._file = None
        self._board: Any = None
        if not writes:
            return
        path = directory / "metrics.jsonl"
        kept = [record for record in read(path) if _is_before(record, *since)]
        write_whole(path, "".join(map(_line, kept)))
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            self._board = _summary_writer(directory / "tensorboard", since[0])

    def write(self, record: Record) -> None:
        """Append one record and flush it.

        Raises:
            UserError: if it cannot be written.
        """
        if self._file is None:
            return
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # closing tries to write the buffer again
                file.close()
            raise UserError(
                f"could not write {file.name} (once that is fixed, --resume continues from the "
                f"newest checkpoint): {error.strerror}"
            ) from None
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(f"{record['event']}/{name}", value, record["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read(path: Path) -> list[Record]:
    """Return the records of a `metrics.jsonl`; a last line cut short by a crash is left out.

    Raises:
        UserError: if any other line is not as it was written.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is damaged ({error}): {_FIX}") from None
        crc = record.pop("crc32", None) if isinstance(record, dict) else None
        if crc is None or line != _line(record):
            raise UserError(f"{path}:{number} is damaged (not as a run wrote it): {_FIX}")
        records.append(record)
    return records


def _line(record: Record) -> str:
    crc = zlib.crc32(json.dumps(record).encode())
    return json.dumps({**record, "crc32": f"{crc:08x}"}) + "\n"


def _is_before(record: Record, step: int, phase: str) -> bool:
    # A checkpoint is written after the evaluation and end records of the same step.
    last = ("evaluation", "compiled", "end")
    closing = record["event"] in last and record.get("phase") == phase
    return bool(record["step"] < step or (record["step"] == step and closing))


def _summary_writer(directory: Path, from_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # needs the extra `tensorboard`

    return SummaryWriter(str(directory), purge_step=from_step)
