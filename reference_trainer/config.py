"""A run's configuration: frozen dataclasses, a field for each option, from YAML and arguments."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from reference_trainer.errors import UserError
from reference_trainer.model import PRESETS, LlamaShape, preset

SIZES = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
STRICT = {"extra": "forbid", "allow_inf_nan": False}  # pydantic's, which reads files


def option(default: Any, help: str) -> Any:
    """Return a dataclass field with a default and the text that --help shows."""
    return dataclasses.field(default=default, metadata={"help": help})


def section(cls: type, help: str) -> Any:
    """Return a dataclass field that holds another dataclass of options."""
    return dataclasses.field(default_factory=cls, metadata={"help": help})


def require(holds: bool, rule: str, **values: object) -> None:
    """Raise UserError with the rule and the values unless it holds."""
    if not holds:
        shown = (str(v) if k == "got" else f"{k}={v}" for k, v in values.items())
        raise UserError(f"{rule}; got {', '.join(shown)}")


Precision = Literal["auto", "fp32", "bf16", "pure-bf16"]
Reduce = Literal["step", "micro-step"]
BaseLayout = Literal["shard", "replicate"]
Checkpointing = Literal["none", "selective", "full"]
CHECKPOINTING: tuple[Checkpointing, ...] = get_args(Checkpointing)


@dataclass(frozen=True)
class ModelConfig:
    """The Llama to train."""

    __pydantic_config__ = STRICT

    preset: str = option("3m", f"shape: one of {', '.join(PRESETS)}")
    hidden_size: int | None = option(None, "width of the residual stream, over the preset's")
    intermediate_size: int | None = option(None, "width of the SwiGLU, over the preset's")
    layers: int | None = option(None, "number of blocks, over the preset's")
    heads: int | None = option(None, "query heads, over the preset's")
    kv_heads: int | None = option(None, "key-value heads (default: as many as query heads)")
    weights: str | None = option(
        None, "directory of a Hugging Face Llama (safetensors) to start from, instead of a shape"
    )

    def __post_init__(self) -> None:
        require(self.preset in PRESETS, f"model.preset is one of {list(PRESETS)}", got=self.preset)
        given = [size for size in SIZES if getattr(self, size) is not None]
        require(
            self.weights is None or not given,
            "model.weights has a shape of its own",
            weights=self.weights,
            **{size: getattr(self, size) for size in given},
        )

    def shape(self, vocab_size: int) -> LlamaShape:
        """Return the preset's shape with what is given over it.

        Raises:
            UserError: if the numbers do not fit together.
        """
        shape = preset(self.preset, vocab_size=vocab_size)
        given = {size: getattr(self, size) for size in SIZES if getattr(self, size) is not None}
        if "heads" in given:
            given.setdefault("kv_heads", given["heads"])
        try:
            return dataclasses.replace(shape, **given)
        except ValueError as error:
            raise UserError(f"model.{error}") from None


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from."""

    __pydantic_config__ = STRICT

    files: tuple[str, ...] = option(
        (), "globs of text, .jsonl or .parquet files (default: this Python's standard library)"
    )
    prepared: str | None = option(None, "a directory written by `prepare`, instead of files")
    tokenizer: str = option("bytes", "'bytes', or the path of a Hugging Face tokenizer.json")
    text_field: str = option("text", "field or column of .jsonl and .parquet that holds the text")
    held_out: float = option(0.02, "fraction of documents kept for evaluation")

    def __post_init__(self) -> None:
        require(0 < self.held_out < 1, "data.held_out lies between 0 and 1", got=self.held_out)
        require(
            not (self.files and self.prepared),
            "data.files and data.prepared exclude each other",
            files=self.files,
            prepared=self.prepared,
        )


@dataclass(frozen=True)
class BatchConfig:
    """How much one optimizer step sees."""

    __pydantic_config__ = STRICT

    sequences: int = option(8, "sequences a step, over all processes")
    length: int = option(128, "tokens a sequence")
    micro: int = option(8, "sequences a process computes at once; the rest is accumulated")

    def __post_init__(self) -> None:
        for name in ("sequences", "length", "micro"):
            require(getattr(self, name) >= 1, f"batch.{name} >= 1", got=getattr(self, name))

    def micro_steps(self, world_size: int) -> int:
        """Return how many micro-batches each process accumulates in a step."""
        require(
            self.sequences % world_size == 0,
            "batch.sequences must be a multiple of the number of processes",
            sequences=self.sequences,
            processes=world_size,
        )
        mine = self.sequences // world_size
        if mine <= self.micro:
            return 1
        require(
            mine % self.micro == 0,
            "each process's sequences must be a multiple of batch.micro",
            sequences_a_process=mine,
            micro=self.micro,
        )
        return mine // self.micro

    def at_once(self, world_size: int) -> int:
        """Return how many sequences each process computes at once."""
        return self.sequences // world_size // self.micro_steps(world_size)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the cosine envelope of its learning rate."""

    __pydantic_config__ = STRICT

    lr: float = option(2e-3, "peak learning rate of everything but the adapters")
    warmup: int = option(20, "steps from 0 to the envelope, at the start of each phase")
    min_ratio: float = option(0.1, "end of the cosine, as a fraction of the peak")
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW's decay rates")
    eps: float = option(1e-8, "AdamW's epsilon")
    weight_decay: float = option(0.0, "AdamW's decay of matrices (norms are never decayed)")
    clip: float = option(1.0, "largest gradient norm")
    most_skips: int = option(
        10, "steps in a row without a finite loss and gradient, each skipped, that end the run"
    )

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr is positive", got=self.lr)
        require(self.warmup >= 0, "optim.warmup is 0 steps or more", got=self.warmup)
        require(0 <= self.min_ratio <= 1, "optim.min_ratio is in [0, 1]", got=self.min_ratio)
        require(all(0 <= b < 1 for b in self.betas), "optim.betas are in [0, 1)", got=self.betas)
        require(self.eps > 0, "optim.eps is positive", got=self.eps)
        require(self.weight_decay >= 0, "optim.weight_decay >= 0", got=self.weight_decay)
        require(self.clip > 0, "optim.clip is positive", got=self.clip)
        require(self.most_skips >= 1, "optim.most_skips is at least 1", got=self.most_skips)


@dataclass(frozen=True)
class ReLoRAConfig:
    """The low-rank phase."""

    __pydantic_config__ = STRICT

    warm_start: int = option(120, "full-rank steps before it; equal to `steps`: no low-rank phase")
    rank: int = option(16, "r of every B A")
    alpha: float | None = option(None, "scale is alpha / rank (default: rank, so scale 1)")
    targets: tuple[str, ...] = option(
        ("*.self_attn.*", "*.mlp.*"), "globs of the modules whose weights become low-rank"
    )
    every: int = option(48, "steps between restarts")
    warmup: int = option(10, "steps from learning rate 0 to the envelope after a restart")
    prune_ratio: float = option(0.99, "fraction of the adapters' moments zeroed at a restart")
    masks: Literal["joint", "independent"] = option(
        "joint", "'joint': prune both moments where m is small; 'independent': as the paper's code"
    )
    lr_multiple: float = option(4.0, "the adapters' learning rate, times optim.lr")
    base: Literal["keep", "bf16"] = option(
        "keep",
        "'keep': frozen weights in fp32 and, where the computation is in 16 bits, a 16-bit copy of "
        "W + s·BA (fastest); 'bf16': W in bf16, what that lacks in host memory (least memory)",
    )

    def __post_init__(self) -> None:
        require(self.warm_start >= 0, "relora.warm_start is 0 or more", got=self.warm_start)
        require(self.rank >= 1, "relora.rank is at least 1", got=self.rank)
        require(self.alpha is None or self.alpha > 0, "relora.alpha is positive", got=self.alpha)
        require(len(self.targets) > 0, "relora.targets names a glob", got=self.targets)
        require(self.lr_multiple > 0, "relora.lr_multiple is positive", got=self.lr_multiple)
        require(0 <= self.prune_ratio <= 1, "relora.prune_ratio is in [0, 1]", got=self.prune_ratio)
        require(
            1 <= self.warmup < self.every,
            "relora.every must be longer than relora.warmup, and that at least 1 step",
            every=self.every,
            warmup=self.warmup,
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid over processes and memory."""

    __pydantic_config__ = STRICT

    device: Literal["auto", "cpu", "cuda"] = option("auto", "'auto': cuda where there is one")
    precision: Precision = option(
        "auto",
        "of the computation ('auto': bf16 on cuda); weights are kept in fp32, but 'pure-bf16' "
        "keeps those that are trained, and their moments, in bf16 (half the memory; small steps "
        "are rounded away)",
    )
    compile: bool | None = option(None, "compile blocks and loss (default: on cuda)")
    checkpoint_activations: Checkpointing = option(
        "none",
        "of each block, for its backward: 'none': keep all; 'selective': keep what costly products "
        "gave, compute the rest again; 'full': keep the input, compute all again",
    )
    layout: BaseLayout = option(
        "shard",
        "of the low-rank phase's frozen weights: 'shard' them as the rest (least memory), or keep "
        "what is computed with whole on every process ('replicate'), gathered once a step at most",
    )
    reduce: Reduce = option(
        "step",
        "'step': reduce gradients once a step, each process keeping whole ones until then; "
        "'micro-step': after every micro-step, keeping shards (less memory, more sent)",
    )
    replicas: int = option(
        1, "copies of what is sharded, each over processes / replicas of them (HSDP)"
    )
    timeout: float = option(10, "minutes to wait for a process that hangs before giving up")

    def __post_init__(self) -> None:
        require(self.replicas >= 1, "parallel.replicas is at least 1", got=self.replicas)
        require(0 < self.timeout <= 1440, "parallel.timeout is in (0, 1440]", got=self.timeout)

    def mesh(self, world_size: int) -> tuple[int, ...]:
        """Return the sizes of the mesh of all processes: (shards,) or (replicas, shards).

        Raises:
            UserError: if the processes cannot be divided so.
        """
        require(
            world_size % self.replicas == 0,
            "the number of processes must be a multiple of parallel.replicas",
            processes=world_size,
            replicas=self.replicas,
        )
        shards = world_size // self.replicas
        return (shards,) if self.replicas == 1 else (self.replicas, shards)


@dataclass(frozen=True)
class LogConfig:
    """What is written down while training."""

    __pydantic_config__ = STRICT

    every: int = option(5, "steps between lines of metrics.jsonl")
    evaluate_every: int = option(60, "steps between evaluations on held-out tokens")
    evaluate_sequences: int = option(32, "sequences an evaluation sees")
    rank_sites: int = option(7, "matrices whose accumulated rank is measured at restarts; 0: none")
    tensorboard: bool = option(False, "write TensorBoard files too (extra: tensorboard)")

    def __post_init__(self) -> None:
        for name in ("every", "evaluate_every", "evaluate_sequences"):
            require(getattr(self, name) >= 1, f"log.{name} >= 1", got=getattr(self, name))
        require(self.rank_sites >= 0, "log.rank_sites is 0 or more", got=self.rank_sites)


@dataclass(frozen=True)
class CheckpointConfig:
    """What survives a crash."""

    __pydantic_config__ = STRICT

    every: int = option(100, "steps between checkpoints")
    keep: int = option(2, "how many of the newest to keep")
    keep_every: int | None = option(None, "steps: a checkpoint at a multiple of it stays for good")
    stop_after: float | None = option(
        None, "minutes after which to save and stop, with exit code 75 (SIGTERM does the same)"
    )

    def __post_init__(self) -> None:
        require(self.every >= 1, "checkpoint.every is at least 1", got=self.every)
        require(self.keep >= 2, "checkpoint.keep is at least 2", got=self.keep)
        positive = self.stop_after is None or self.stop_after > 0
        require(positive, "checkpoint.stop_after is positive", got=self.stop_after)
        require(
            self.keep_every is None or (self.keep_every > 0 and self.keep_every % self.every == 0),
            "checkpoint.keep_every must be a multiple of checkpoint.every",
            keep_every=self.keep_every,
            every=self.every,
        )


@dataclass(frozen=True)
class Config:
    """One run."""

    __pydantic_config__ = STRICT

    name: str = option("first-run", "of the run")
    runs: str = option("runs", "directory of all runs; this one is RUNS/NAME")
    steps: int = option(360, "optimizer steps in all")
    seed: int = option(0, "of weights, adapters and data order")
    model: ModelConfig = section(ModelConfig, "the Llama to train")
    data: DataConfig = section(DataConfig, "where the text comes from")
    batch: BatchConfig = section(BatchConfig, "how much one step sees")
    optim: OptimConfig = section(OptimConfig, "AdamW and its schedule")
    relora: ReLoRAConfig = section(ReLoRAConfig, "the low-rank phase")
    parallel: ParallelConfig = section(ParallelConfig, "processes, precision and memory")
    log: LogConfig = section(LogConfig, "what is written down")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "what survives a crash")

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps is at least 1", got=self.steps)
        require(0 <= self.seed < 2**63, "seed is between 0 and 2**63 - 1", got=self.seed)
        require(
            bool(self.name) and Path(self.name).name == self.name and self.name != "..",
            "name is one directory's name",
            got=repr(self.name),
        )
        require(
            self.relora.warm_start <= self.steps,
            "relora.warm_start is at most steps",
            warm_start=self.relora.warm_start,
            steps=self.steps,
        )
        require(
            self.relora.base == "keep" or self.parallel.layout == "replicate",
            "relora.base=bf16 needs parallel.layout=replicate, as only a whole weight is split",
            layout=self.parallel.layout,
        )
        require(
            self.relora.base == "keep" or self.parallel.precision != "fp32",
            "relora.base=bf16 needs a computation in bf16",
            precision=self.parallel.precision,
        )

    @property
    def directory(self) -> Path:
        """Where the run lives."""
        return Path(self.runs) / self.name

    @property
    def data_directory(self) -> Path:
        """Where the run's tokens lie."""
        return Path(self.data.prepared) if self.data.prepared else self.directory / "data"

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints lie."""
        return self.directory / "checkpoints"
