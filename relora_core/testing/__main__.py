"""The command `python -m relora_core.testing`: all checks of this library, on this machine."""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import hypothesis
import torch

from relora_core.testing.checks.runner import CI, DEEP
from relora_core.testing.self_check import CHECKS
from relora_core.testing.subjects import PropertyError

_EXAMPLES = """examples:
  python -m relora_core.testing
      run every check as CI does, in seconds
  python -m relora_core.testing --examples 2100 --out properties.jsonl
      draw 2100 new examples for each property, over 100,000 in total; takes about half an hour
  python -m relora_core.testing --only JaggedCosine --examples 1000
      run one check
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, print the results, and return 0, or 1 if a property does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m relora_core.testing",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--examples",
        type=int,
        help=f"number of new examples per property (default: {CI.max_examples} fixed examples)",
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--out", type=Path, help="JSON Lines file to write; it must not exist yet")
    given = parser.parse_args(arguments)
    if given.examples is not None and given.examples < 1:
        parser.error(f"--examples must be at least 1; got {given.examples}")
    if given.out is not None and given.out.exists():
        parser.error(f"{given.out} exists already: give --out another name")
    profile = CI
    if given.examples is not None:
        profile = hypothesis.settings(DEEP, max_examples=given.examples)
    records: list[dict[str, object]] = [_environment()]
    total = 0
    for name in given.only:
        sys.stderr.write(f"{name} ...\n")
        begun = time.monotonic()
        try:
            held = CHECKS[name](profile)
        except PropertyError as error:
            sys.stdout.write(f"{error}\n")
            return 1
        seconds = round(time.monotonic() - begun, 1)
        for one in held:
            records.append({"battery": name, "promise": one.property, "examples": one.examples})
            sys.stdout.write(f"{one.examples:>8}  {name}: {one.property}\n")
            total += one.examples
        records.append({"battery": name, "seconds": seconds})
    records.append({"examples": total, "broken": 0})
    sys.stdout.write(f"{total:>8}  examples, no property broken\n")
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    return 0


def _environment() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hypothesis": hypothesis.__version__,
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    sys.exit(main())
