"""The command that runs the trials of a plan that have no record yet, at sizes for a CPU.

python docs/run_study.py --model 1m --plan tune
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from study import tables
from study.picture import draw
from study.plans import PLANS, SCALES, left
from study.records import read, whole
from study.run_trial import run_trial

from reference_trainer.config import DataConfig
from reference_trainer.data.index import read_index, verify_data
from reference_trainer.data.prepare import prepare
from reference_trainer.environment import environment
from reference_trainer.errors import UserError
from reference_trainer.files import fresh_directory, write_whole
from reference_trainer.logging.console import open_terminal
from reference_trainer.main import exit_code

EXAMPLES = """examples:
  python docs/run_study.py --model 1m --plan tune
      tune the learning rate of every arm until its best rate lies between two worse ones; the
      training text is the source of this Python's standard library
  python docs/run_study.py --model 1m --plan arms
      run full rank, LoRA, and LoRA and ReLoRA after a warm start, at their best rates, with three
      seeds each
  python docs/run_study.py --model 1m --plan sweeps --dry-run
      list the trials of this plan
  python docs/run_study.py --model 1m --show
      print tables and draw a figure of the recorded trials

A trial with a record is not run again, and an interrupted trial is resumed.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; the next call resumes a trial that was stopped."""
    given = _parser().parse_args(arguments)
    open_terminal(logging.WARNING if given.quiet else logging.INFO)
    return exit_code(lambda: _run(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare the paper's methods with the trainer's own loop.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="1m", choices=SCALES, help="model shape (default: 1m)")
    add("--plan", default="tune", choices=PLANS, help="plan of trials (default: tune)")
    add("--threads", type=int, default=1, help="number of CPU threads (default: 1)")
    add("--eager", action="store_true", help="do not compile steps; needs no C++ compiler")
    add("--runs", type=Path, default=Path("runs/study"), help="directory of all trials' runs")
    add("--data", type=Path, help="prepared bytes, written if absent (default: RUNS/data)")
    add("--out", type=Path, help="JSON Lines file to append to (default: RUNS/MODEL.jsonl)")
    add("--dry-run", action="store_true", help="list the trials and stop")
    add("--show", action="store_true", help="print tables, draw a figure of recorded trials, stop")
    add("--quiet", action="store_true", help="show only results, warnings and errors")
    return parser


def _run(given: argparse.Namespace) -> None:
    scale, plan = SCALES[given.model], PLANS[given.plan]
    out = given.out or given.runs / f"{given.model}.jsonl"
    if given.threads < 1:
        raise UserError(f"--threads must be 1 or more; got {given.threads}")
    records = read(out)
    if given.show:
        if not records:
            raise UserError(f"{out} must hold a trial to show; got none: run a plan first")
        print(tables.rates(records), end="\n\n")
        print(tables.outcomes(records, tables.by_arm(records), None), end="\n\n")
        print(tables.spectra(records), end="\n\n")
        draw([records], out.with_suffix(".png"))
        print(f"picture: {out.with_suffix('.png')}")
        return
    todo = left(plan(scale, records), records)
    if given.dry_run:
        for t in todo:
            print(f"{t.model}, seed {t.seed}, {t.steps} steps: {t.arm}")
        print(f"{len(todo)} trials of {given.plan} can be planned now and remain to run")
        return
    if not given.eager and shutil.which("c++") is None and shutil.which("g++") is None:
        raise UserError("compiled steps need a C++ compiler; found none: give --eager")
    data = _prepared(given.data or given.runs / "data")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and (text := out.read_text(encoding="utf-8")) != whole(text):
        write_whole(out, whole(text))
    with out.open("a", encoding="utf-8"):
        pass  # an error here comes before the training
    torch.set_num_threads(given.threads)
    checksums = read_index(data).checksums
    while todo:
        record = run_trial(todo[0], data, given.runs, compiled=not given.eager)
        known = {**environment(torch.device("cpu")), "compiled": not given.eager}
        records.append({**record, **known, "data": checksums})
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(records[-1]) + "\n")
        end = record["curve"][-1][1]
        print(f"{record['model']} {record['arm']}, seed {record['seed']}: {end:.4f} held out")
        todo = left(plan(scale, records), records)
    print(f"every trial of {given.plan} is in {out}")


def _prepared(directory: Path) -> Path:
    if directory.exists():
        verify_data(directory)
    else:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with fresh_directory(directory) as made:
            prepare(DataConfig(), made)
    if read_index(directory).vocab_size != 256:
        raise UserError(f"{directory} must hold bytes: prepare it without a tokenizer")
    return directory


if __name__ == "__main__":
    sys.exit(main())
