"""A run's summary, printed before its first step."""

import math
from collections.abc import Iterator

import torch

from reference_trainer.config import Config
from reference_trainer.data.documents import sources
from reference_trainer.data.index import Index
from reference_trainer.distributed import device_type
from reference_trainer.parallelize import compute_dtype
from reference_trainer.phase_model import keeps_merged
from reference_trainer.phases import Phase
from reference_trainer.preflight import Numbers, Plan

_MOMENTS = 2  # AdamW's, for each trained entry


def summary_of(plan: Plan) -> Iterator[str]:
    """Iterate over lines that say what a run does."""
    config, shape, counted = plan.config, plan.shape, plan.phases
    first = next(iter(counted.values()))
    whole = first.others + first.bases
    known = f"{shape.layers} blocks of width {shape.hidden_size}, {shape.vocab_size:,} tokens"
    yield _line("model", f"{known}: {whole:,} parameters")
    yield _line("data", _data(config, plan.index))
    yield from _batch(config, plan.processes)
    for phase, numbers in counted.items():
        yield _line(phase.name, _phase(phase, numbers))
        yield _line("", _memory(config, numbers, plan.processes))
    for phase, numbers in counted.items():
        if phase.low_rank:
            yield from _restarts(config, phase, numbers)
    yield _line("rate", _rate(config))
    yield from _files(config, list(counted.values()), resume=plan.resume)


def memory(config: Config, numbers: Numbers, processes: int) -> int:
    """Return the bytes of weights, gradients and moments on the process that holds most."""
    shards = processes // config.parallel.replicas
    width = 2 if config.parallel.precision == "pure-bf16" else 4
    device = torch.device(device_type(config.parallel))  # a login node need not have it
    narrow = compute_dtype(config.parallel, device) != torch.float32
    whole = config.parallel.layout == "replicate"
    if keeps_merged(config, device):
        copies = numbers.copies if whole else math.ceil(numbers.copies / shards)
        bases = 4 * math.ceil(numbers.bases / shards) + 2 * copies
    elif whole:
        bases = (2 if narrow else 4) * numbers.bases
    else:
        bases = 4 * math.ceil(numbers.bases / shards)
    return bases + width * (1 + 1 + _MOMENTS) * math.ceil(numbers.trained / shards)


def _data(config: Config, index: Index | None) -> str:
    if index is not None:
        counts = ", ".join(f"{index.tokens(split):,} of {split}" for split in index.shards)
        return f"{config.data_directory}: tokens {counts}"
    files = sources(config.data)
    size = sum(file.stat().st_size for file in files)
    where = "files" if config.data.files else "files of this Python's standard library"
    return (
        f"{len(files):,} {where}, {size / 1e6:,.1f} MB, by {config.data.tokenizer}, "
        f"{config.data.held_out:.0%} of the documents held out"
    )


def _batch(config: Config, processes: int) -> Iterator[str]:
    batch = config.batch
    micro_steps = batch.micro_steps(processes)
    at_once = batch.at_once(processes)
    tokens = batch.sequences * batch.length
    of = f"{batch.sequences:,} sequences of {batch.length:,} tokens a step"
    on = "1 process" if processes == 1 else f"each of {processes:,} processes"
    yield _line("batch", f"{of}; on {on} {micro_steps:,} times {at_once:,} at once")
    yield _line("", f"{config.steps:,} steps are {config.steps * tokens:,} tokens")


def _phase(phase: Phase, numbers: Numbers) -> str:
    steps = f"steps {phase.start:,} to {phase.stop - 1:,}"
    if not phase.low_rank:
        return f"{steps}: all {numbers.trained:,} parameters are trained"
    return (
        f"{steps}: {numbers.factors:,} in the factors of {numbers.sites} matrices and "
        f"{numbers.others:,} others are trained, {numbers.bases:,} are frozen"
    )


def _memory(config: Config, numbers: Numbers, processes: int) -> str:
    size = memory(config, numbers, processes) / 2**30
    return f"{size:.2f} GiB a process for weights, gradients and moments (`estimate`: all of it)"


def _restarts(config: Config, phase: Phase, numbers: Numbers) -> Iterator[str]:
    options = config.relora
    steps = [step for step in range(phase.start, phase.stop) if phase.restarts_at(step)]
    shown = ", ".join(f"{step:,}" for step in steps[:4]) + (", ..." if len(steps) > 4 else "")
    yield _line("restarts", f"{len(steps)}" + (f", before steps {shown}" if steps else ""))
    if not steps:
        return
    yield _line("", f"each merges s·BA of rank {options.rank} into {numbers.sites} matrices,")
    zeroed = f"the {options.prune_ratio:.1%} of their moments that are smallest"
    yield _line("", f"draws A anew, zeroes B and {zeroed},")
    yield _line("", f"and takes the learning rate to 0, and back in {options.warmup} steps")
    yield _line("", f"W - W_0 has a rank of up to {numbers.bound} at the end")


def _rate(config: Config) -> str:
    optim, relora = config.optim, config.relora
    factors = f", of the factors {optim.lr * relora.lr_multiple:g}"
    return (
        f"up to {optim.lr:g}{factors if relora.warm_start < config.steps else ''}; "
        f"{optim.warmup} steps of warm-up, then a cosine to {optim.min_ratio:.0%} of it"
    )


def _files(config: Config, counted: list[Numbers], *, resume: bool) -> Iterator[str]:
    width = 2 if config.parallel.precision == "pure-bf16" else 4
    sizes = [4 * n.bases + width * (1 + _MOMENTS) * n.trained for n in counted]
    shown = ", then ".join(f"{size / 1e6:,.1f}" for size in sizes)
    how = "from its newest complete checkpoint on" if resume else "which is new"
    yield _line("files", f"{config.directory}, {how}:")
    tokens = "" if config.data.prepared else " data/ with the tokens,"
    yield _line("", f"config.yaml, metrics.jsonl, report.html and report.png,{tokens}")
    every, keep = config.checkpoint.every, config.checkpoint.keep
    yield _line("", f"checkpoints/ after every {every:,} steps, of {shown} MB each,")
    yield _line("", f"of which the newest {keep} stay,")
    yield _line("", "export/ with the merged model, as a Hugging Face Llama")


def _line(name: str, text: str) -> str:
    return f"{name:<12}{text}"
