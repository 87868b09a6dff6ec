"""The command `bench step`: a training step of a linear layer, a block or a model, by arm."""

import argparse
from typing import Any

from reference_trainer.bench import options, results
from reference_trainer.bench.arms import ARMS, COMPILED, parse_arms, usual
from reference_trainer.bench.measure import count, measure
from reference_trainer.bench.workloads import DTYPES, subjects
from reference_trainer.config import CHECKPOINTING, ParallelConfig
from reference_trainer.distributed import open_world
from reference_trainer.errors import UserError

EXAMPLES = f"""arms: {", ".join(ARMS)}; append {COMPILED} to compile one

examples:
  python -m reference_trainer bench step --level block --model 1.3b --dtype bf16
      time one block at 4096 tokens: full rank, a plain parametrization, two paths, ours, PEFT
  python -m reference_trainer bench step --level linear --model 60m --arms full two-paths merged
      time the forms of a linear layer, for each matrix shape in the model
  python -m reference_trainer bench step --level model --model 1.3b --dtype mixed --tokens 16384 \\
      --arms full-compiled ours ours-compiled
      time the model as the trainer runs it; ratios are to the first arm
  python -m reference_trainer bench step --level model --model 1.3b --count
      count floating-point operations only, which takes a second and no memory for the weights
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    levels = ("linear", "block", "model")
    add("--level", default="block", choices=levels, help="workload (default: block)")
    options.add_model(parser)
    names = usual()
    add(
        "--arms",
        nargs="+",
        default=names,
        help=f"arms to compare, the baseline first (default: {' '.join(names)})",
    )
    dtypes = "bf16: also weights; mixed: fp32 weights, bf16 computation (default: fp32)"
    add("--dtype", default="fp32", choices=DTYPES, help=dtypes)
    options.add_batch(parser)
    options.add_rank(parser)
    add(
        "--checkpoint-activations",
        default="none",
        choices=CHECKPOINTING,
        help="parallel.checkpoint_activations (level model; default: none)",
    )
    layouts = "parallel.layout of ours; --dtype mixed follows the trainer (level model)"
    add("--layout", default="shard", choices=("shard", "replicate"), help=layouts)
    add("--count", action="store_true", help="count operations on meta tensors and stop")
    options.add_timing(parser)
    options.add_files(parser, "LEVEL-MODEL-DTYPE")


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if an option is invalid; nothing is written in that case.
    """
    options.refuse_several()
    shape, arms = options.shape_of(arguments), parse_arms(arguments.arms)
    for name, usual_one in (("checkpoint_activations", "none"), ("layout", "shard")):
        if arguments.level != "model" and getattr(arguments, name) != usual_one:
            option = name.replace("_", "-")
            raise UserError(f"--{option} needs --level model; got --level {arguments.level}")
    default = f"{arguments.level}-{arguments.model}-{arguments.dtype}"
    out = None if arguments.count else options.output_of(arguments, default)
    chosen = subjects(
        arguments.level,
        shape,
        dtype=arguments.dtype,
        sequences=arguments.tokens // arguments.length,
        length=arguments.length,
    )
    batch = ("tokens", "length", "checkpoint_activations", "layout")
    keys = ("model", "vocab", "seed", "dtype", "rank", *batch)
    with open_world(ParallelConfig(device=arguments.device)) as world:
        first = options.head(arguments, arguments.level, world.device, *keys)
        records: list[dict[str, Any]] = [first | {"layers": shape.layers}]
        for subject in chosen:
            if out is None:
                records += count(subject, arms, rank=arguments.rank)
                continue
            records += measure(
                subject,
                arms,
                world,
                rank=arguments.rank,
                repeats=arguments.repeats,
                seed=arguments.seed,
                recompute=arguments.checkpoint_activations,
                layout=arguments.layout,
            )
    if out is None:
        return [results.table(records)]
    return options.written(records, out, arguments.picture)
