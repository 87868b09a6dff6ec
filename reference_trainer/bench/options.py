"""The options that benchmarks share, and their checks."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from reference_trainer.bench import results
from reference_trainer.bench.picture import draw
from reference_trainer.distributed import world_size
from reference_trainer.environment import environment
from reference_trainer.errors import UserError
from reference_trainer.model.llama import PRESETS, LlamaShape, preset


def positive(text: str) -> int:
    """Return the number given as an option, which must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model's shape."""
    add = parser.add_argument
    add("--model", default="1.3b", choices=PRESETS, help="model shape (default: 1.3b)")
    add("--layers", type=positive, help="number of blocks (default: the shape's)")
    add("--vocab", type=positive, default=32_000, help="vocabulary size (default: 32000)")


def add_batch(parser: argparse.ArgumentParser) -> None:
    """Add the options of a batch."""
    add = parser.add_argument
    add("--tokens", type=positive, default=4096, help="tokens in the batch (default: 4096)")
    add("--length", type=positive, default=1024, help="tokens in a sequence (default: 1024)")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add the options of pretended processes."""
    add = parser.add_argument
    add("--processes", type=positive, default=8, help="number of processes (default: 8)")
    add("--node", type=positive, default=8, help="number of processes on a node (default: 8)")


def add_rank(parser: argparse.ArgumentParser) -> None:
    """Add the option of the sites' rank."""
    parser.add_argument(
        "--rank", type=positive, default=128, help="rank of the sites (default: 128)"
    )


def add_timing(parser: argparse.ArgumentParser) -> None:
    """Add the options of timing."""
    add = parser.add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device (default: auto)")
    few = f"number of timed rounds (default: {results.FEWEST}; fewer give no ratios)"
    add("--repeats", type=positive, default=results.FEWEST, help=few)
    add("--seed", type=int, default=0, help="seed of the weights and inputs (default: 0)")


def add_files(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options for the files to write."""
    add = parser.add_argument
    add("--out", type=Path, help=f"JSON Lines file to write (default: runs/bench/{default}.jsonl)")
    add("--picture", type=Path, help="PNG file to write (default: next to --out)")


def shape_of(arguments: argparse.Namespace) -> LlamaShape:
    """Return the shape that `add_model` and `add_rank` describe.

    Raises:
        UserError: if the rank exceeds the model's width, or the tokens are no multiple of the
            length.
    """
    shape = preset(arguments.model, vocab_size=arguments.vocab)
    if arguments.layers:
        shape = dataclasses.replace(shape, layers=arguments.layers)
    largest, rank = min(shape.hidden_size, shape.intermediate_size), getattr(arguments, "rank", 1)
    if rank > largest:
        raise UserError(f"--rank must be at most {largest}, the model's width; got {rank}")
    tokens, length = getattr(arguments, "tokens", 0), getattr(arguments, "length", 1)
    if tokens % length:
        raise UserError(
            f"--tokens must be a multiple of --length; got tokens={tokens}, length={length}"
        )
    return shape


def output_of(arguments: argparse.Namespace, default: str) -> Path:
    """Return the file to write.

    Raises:
        UserError: if the file exists already.
    """
    out: Path = arguments.out or Path(f"runs/bench/{default}.jsonl")
    if out.exists():
        raise UserError(f"{out} exists already: give --out another name")
    return out


def refuse_several() -> None:
    """Raise UserError if a launcher has started several processes."""
    if world_size() > 1:
        raise UserError("this benchmark must run as one process: start it without torchrun")


def head(
    arguments: argparse.Namespace, level: str, device: torch.device, *keys: str
) -> dict[str, Any]:
    """Return a measurement's first record: the level, the environment and the options."""
    first: dict[str, Any] = {"event": "bench", **environment(device), "level": level}
    return first | {key: getattr(arguments, key) for key in keys}


def written(records: list[dict[str, Any]], out: Path, picture: Path | None) -> list[str]:
    """Write a measurement and return the lines to print."""
    out.parent.mkdir(parents=True, exist_ok=True)
    results.write(records, out)
    return [*shown([records], picture or out.with_suffix(".png")), f"measurement: {out}"]


def shown(measurements: list[list[dict[str, Any]]], picture: Path | None) -> list[str]:
    """Return the tables of measurements; draw their picture if there are ratios."""
    lines = [results.table(records) + "\n" for records in measurements]
    enough = all(results.enough(records) for records in measurements)
    if picture and enough:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(measurements, picture)
        lines.append(f"picture: {picture}")
    elif picture:
        lines.append(f"no picture was drawn: it needs {results.FEWEST} repeats")
    return lines
