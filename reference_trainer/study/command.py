"""The command `study`: the trials of a plan that are not on file yet, one after the other."""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from reference_trainer.config import DataConfig
from reference_trainer.environment import environment
from reference_trainer.errors import UserError, one_line
from reference_trainer.files import fresh_directory, write_whole
from reference_trainer.prepare import prepare, read_index, verify_data
from reference_trainer.study import tables
from reference_trainer.study.picture import draw
from reference_trainer.study.plans import PLANS, SCALES, left
from reference_trainer.study.train import run_trial

EXAMPLES = """examples:
  python -m reference_trainer study --model 1m --plan tune
      learning rates for every arm of the paper, on this Python's standard library, until each
      one's best lies between two that are worse
  python -m reference_trainer study --model 1m --plan arms
      full rank, LoRA, LoRA and ReLoRA after a warm start, at their best rates, from three seeds
  python -m reference_trainer study --model 1m --plan sweeps --dry-run
      which trials that would be
  python -m reference_trainer study --model 1m --show
      tables and a picture of the trials that are on file

A trial that is in the file already is not run again: interrupt it whenever you like.
"""
_BEGINNING = '{"event": "trial"'  # of every line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--model", default="1m", choices=SCALES, help="model shape (default: 1m)")
    add("--plan", default="tune", choices=PLANS, help="plan of trials (default: tune)")
    add("--threads", type=int, default=1, help="threads of the computation (default: 1)")
    add("--eager", action="store_true", help="do not compile (where there is no C++ compiler)")
    add(
        "--data",
        type=Path,
        default=Path("runs/study/data"),
        help="prepared bytes, written if absent",
    )
    add("--out", type=Path, help="JSON lines to add to (default: runs/study/MODEL.jsonl)")
    add("--dry-run", action="store_true", help="list the trials and stop")
    add("--show", action="store_true", help="print and draw the recorded trials and stop")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Run the command; iterate over what it prints.

    Raises:
        UserError: if something given is wrong.
    """
    scale, plan = SCALES[arguments.model], PLANS[arguments.plan]
    out = arguments.out or Path(f"runs/study/{arguments.model}.jsonl")
    if arguments.threads < 1:
        raise UserError(f"--threads must be 1 or more; got {arguments.threads}")
    records = read(out)
    if arguments.show:
        yield from _shown(records, out)
        return
    todo = left(plan(scale, records), records)
    if arguments.dry_run:
        yield from (f"{t.model}, seed {t.seed}, {t.steps} steps: {t.arm}" for t in todo)
        yield f"trials of {arguments.plan} that can be planned now: {len(todo)} of them to run"
        return
    if not arguments.eager and shutil.which("c++") is None and shutil.which("g++") is None:
        raise UserError("no C++ compiler is found to compile steps with: give --eager")
    data = _prepared(arguments.data)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and (text := out.read_text(encoding="utf-8")) != _whole(text):
        write_whole(out, _whole(text))
    torch.set_num_threads(arguments.threads)
    checksums = read_index(data).checksums
    while todo:
        record = run_trial(todo[0], data, compiled=not arguments.eager)
        known = {**environment(torch.device("cpu")), "compiled": not arguments.eager}
        records.append({**record, **known, "data": checksums})
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(records[-1]) + "\n")
        end = record["curve"][-1][1]
        yield f"{record['model']} {record['arm']}, seed {record['seed']}: {end:.4f} held out"
        todo = left(plan(scale, records), records)
    yield f"every trial of {arguments.plan} is in {out}"


def _shown(records: list[dict[str, Any]], out: Path) -> Iterator[str]:
    if not records:
        raise UserError(f"{out} holds no trial to show: run a plan first")
    yield tables.rates(records) + "\n"
    yield tables.outcomes(records, tables.by_arm(records), None) + "\n"
    yield tables.spectra(records) + "\n"
    picture = out.with_suffix(".png")
    draw([records], picture)
    yield f"picture: {picture}"


def read(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file; none if it is absent. One that was cut short is left out.

    Raises:
        UserError: if it holds anything else.
    """
    if not file.exists():
        return []
    try:
        text = file.read_text(encoding="utf-8")
        records = [json.loads(line) for line in _whole(text).splitlines()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from None
    if any(not isinstance(r, dict) or r.get("event") != "trial" for r in records):
        raise UserError(f"{file} must hold trials only: give --out another name")
    return records


def _whole(text: str) -> str:
    """Return lines that another can follow: without a last one that is part of a trial."""
    before, end, last = text.rpartition("\n")
    cut = _BEGINNING.startswith(last[: len(_BEGINNING)]) and not last.endswith("}")
    return before + end if cut else f"{text}\n"


def _prepared(directory: Path) -> Path:
    if directory.exists():
        verify_data(directory)
    else:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with fresh_directory(directory) as made:
            prepare(DataConfig(), made)
    if read_index(directory).vocab_size != 256:
        raise UserError(f"{directory} is not of bytes: prepare it without a tokenizer")
    return directory
