"""A tiny run: a package of Python's as text, a model that trains in seconds."""

import email
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from reference_trainer import options
from reference_trainer.checkpoint.find import complete_checkpoints, newest_sound
from reference_trainer.checkpoint.format import read_position
from reference_trainer.distributed import open_world
from reference_trainer.files import replaced
from reference_trainer.main import main
from reference_trainer.phases import phases
from reference_trainer.report import command, page
from reference_trainer.report.recorded import Recorded
from reference_trainer.train_state import build_state, fill_

WARNINGS = "error,ignore:TypedStorage is deprecated"  # DCP's own, in torch 2.8


SOURCES = str(Path(email.__file__).parent / "*.py")


TINY = [
    *("--data.files", SOURCES, "--data.held_out", "0.2"),
    *("--model.preset", "9m", "--model.hidden_size", "32", "--model.intermediate_size", "48"),
    *("--model.layers", "2", "--model.heads", "4", "--model.kv_heads", "2"),
    *("--batch.sequences", "4", "--batch.length", "32", "--batch.micro", "2"),
    *("--steps", "20", "--optim.warmup", "2"),
    *("--relora.warm_start", "6", "--relora.rank", "4", "--relora.every", "5"),
    *("--relora.warmup", "2", "--log.every", "1", "--log.evaluate_every", "7"),
    *("--log.evaluate_sequences", "5", "--checkpoint.every", "4"),
]


def leave_undrawn(put: Callable[[object, str, object], None]) -> None:
    """Leave the page and the picture of a run empty: to draw them takes longer than it trains."""
    put(page, "_figure", lambda runs: "")
    put(command, "draw", _written_empty)


def _written_empty(run: Recorded, picture: Path) -> None:
    with replaced(picture) as partial:
        partial.write_bytes(b"")


def records(directory: Path, event: str) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == event]


def losses(directory: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(directory, "step")}


RUN = Path("runs/first-run")


def train(*arguments):
    assert main(["train", *arguments]) == 0


def start(arguments, *, processes=None, cwd=None):
    """Start a run as a user would; every process has two threads less to fight over."""
    launcher = ["-m", "reference_trainer"]
    if processes:
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launcher = [*run, *launcher]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": WARNINGS}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    if processes:
        del environment["PYTHONWARNINGS"]  # the launcher itself warns
    return subprocess.Popen(
        [sys.executable, *launcher, "train", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rewound(name, step):
    """Return a copy of a run, as it was after its checkpoint at `step`."""
    shutil.copytree(f"runs/{name}", f"runs/{name}-{step}")
    for later in complete_checkpoints(Path(f"runs/{name}-{step}/checkpoints")):
        if later.name > f"step-{step:08d}":
            shutil.rmtree(later)
    return Path(f"runs/{name}-{step}")


EVERY_CHECKPOINT = ("--checkpoint.keep", "9")


def lines_of(text):
    """Return the lines of standard error; gloo of torch 2.8 writes there that it has connected."""
    return [line for line in text.splitlines() if not line.startswith("[Gloo]")]


def trained(run: Path) -> dict[str, bytes]:
    """Return the bytes of everything that a run's training has decided, tensor by tensor.

    (The library writes the header of a safetensors file in an order that is never the same.)
    """
    last = complete_checkpoints(run / "checkpoints")[-1]
    bytes_of = {"state.json": (last / "state.json").read_bytes()}
    for file in (run / "export/model.safetensors", *sorted(last.glob("*.safetensors"))):
        for name, tensor in load_file(file).items():
            bytes_of[f"{file.relative_to(run)}: {name}"] = tensor.numpy().tobytes()
    return bytes_of


def spectra_of(run):
    """Return what is known of the updates at every restart and at the end."""
    known = ("ranks", "effective_ranks", "stable_ranks", "spectra")
    found = [*records(run, "restart"), *records(run, "end")]
    return [{name: record[name] for name in known if name in record} for record in found]


def state_at(phase_name):
    config = options.resolve(RUN / "config.yaml", {})
    with open_world(config.parallel) as world:
        phase = next(p for p in phases(config) if p.name == phase_name)
        state = build_state(config, phase, config.model.shape(256), world)
        newest, _ = newest_sound(config.checkpoints)
        assert fill_(state, config, newest, world) == read_position(newest).step
        yield state, config
