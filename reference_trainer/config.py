"""A run's configuration: frozen dataclasses, a field for each option, from YAML and arguments."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from reference_trainer.errors import UserError
from reference_trainer.fields import STRICT, option, require, require_bounds, section
from reference_trainer.model.llama import PRESETS, LlamaShape, preset

SIZES = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
Precision = Literal["auto", "fp32", "bf16", "pure-bf16"]
Reduce = Literal["step", "micro-step"]
BaseLayout = Literal["shard", "replicate"]
Checkpointing = Literal["none", "selective", "full"]
CHECKPOINTING: tuple[Checkpointing, ...] = get_args(Checkpointing)


@dataclass(frozen=True)
class ModelConfig:
    """The Llama to train."""

    __pydantic_config__ = STRICT

    preset: str = option("3m", f"model shape: one of {', '.join(PRESETS)}")
    hidden_size: int | None = option(None, "width of the residual stream (default: the preset's)")
    intermediate_size: int | None = option(None, "width of the SwiGLU (default: the preset's)")
    layers: int | None = option(None, "number of blocks (default: the preset's)")
    heads: int | None = option(None, "number of query heads (default: the preset's)")
    kv_heads: int | None = option(
        None, "number of key-value heads (default: as many as query heads)"
    )
    weights: str | None = option(
        None, "directory of a Hugging Face Llama (safetensors) to start from, in place of a shape"
    )

    def __post_init__(self) -> None:
        require(
            self.preset in PRESETS, f"model.preset must be one of {list(PRESETS)}", got=self.preset
        )
        given = [size for size in SIZES if getattr(self, size) is not None]
        require(
            self.weights is None or not given,
            "model sizes must not be given with model.weights, which has its own",
            weights=self.weights,
            **{size: getattr(self, size) for size in given},
        )

    def shape(self, vocab_size: int) -> LlamaShape:
        """Return the preset's shape, with the given sizes in place of its own.

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
    """The text to train on."""

    __pydantic_config__ = STRICT

    files: tuple[str, ...] = option(
        (), "globs of text, .jsonl or .parquet files (default: this Python's standard library)"
    )
    prepared: str | None = option(None, "directory written by `prepare`, in place of data.files")
    tokenizer: str = option("bytes", "'bytes', or the path of a Hugging Face tokenizer.json")
    text_field: str = option("text", "field of .jsonl, or column of .parquet, that holds the text")
    held_out: float = option(
        0.02, "fraction of the documents that is held out for evaluation", above=0, below=1
    )

    def __post_init__(self) -> None:
        require_bounds(self, "data.")
        require(
            not (self.files and self.prepared),
            "only one of data.files and data.prepared must be given",
            files=self.files,
            prepared=self.prepared,
        )


@dataclass(frozen=True)
class BatchConfig:
    """The batch of an optimizer step."""

    __pydantic_config__ = STRICT

    sequences: int = option(8, "sequences in an optimizer step, over all processes", at_least=1)
    length: int = option(128, "tokens in a sequence", at_least=1)
    micro: int = option(
        8,
        "sequences that a process computes at once; gradients of more are accumulated",
        at_least=1,
    )

    def __post_init__(self) -> None:
        require_bounds(self, "batch.")

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

    lr: float = option(2e-3, "peak learning rate (for adapters, times relora.lr_multiple)", above=0)
    warmup: int = option(20, "steps of linear warm-up at the start of each phase", at_least=0)
    min_ratio: float = option(
        0.1,
        "learning rate at the end of the cosine, as a fraction of the peak",
        at_least=0,
        at_most=1,
    )
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW's decay rates", at_least=0, below=1)
    eps: float = option(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = option(0.0, "AdamW's weight decay, for matrices only", at_least=0)
    clip: float = option(1.0, "gradient norm above which gradients are scaled down", above=0)
    most_skips: int = option(
        10,
        "number of steps in a row skipped for a non-finite loss or gradient that ends the run",
        at_least=1,
    )

    def __post_init__(self) -> None:
        require_bounds(self, "optim.")


@dataclass(frozen=True)
class ReLoRAConfig:
    """The low-rank phase."""

    __pydantic_config__ = STRICT

    warm_start: int = option(
        120,
        "steps at full rank before the low-rank phase (if equal to `steps`, there is none)",
        at_least=0,
    )
    rank: int = option(16, "rank r of each update B A", at_least=1)
    alpha: float | None = option(
        None, "numerator of the scale s = alpha / rank (default: rank, so that s is 1)", above=0
    )
    targets: tuple[str, ...] = option(
        ("*.self_attn.*", "*.mlp.*"), "globs of the modules whose weights become low-rank sites"
    )
    every: int = option(48, "steps between restarts")
    warmup: int = option(10, "steps from a learning rate of 0, at a restart, back to the cosine")
    prune_ratio: float = option(
        0.99, "fraction of the adapters' moments that a restart zeroes", at_least=0, at_most=1
    )
    masks: Literal["joint", "independent"] = option(
        "joint",
        "'joint': prune both moments where m is small; 'independent': prune each by its own "
        "magnitudes, as in the paper's code",
    )
    lr_multiple: float = option(
        4.0, "the adapters' learning rate, as a multiple of optim.lr", above=0
    )
    base: Literal["keep", "bf16"] = option(
        "keep",
        "'keep': frozen weights in fp32 and, if the computation is in 16 bits, a 16-bit copy of "
        "W + s·BA (fastest); 'bf16': W in bf16 and its low bits in host memory (least memory)",
    )

    def __post_init__(self) -> None:
        require_bounds(self, "relora.")
        require(len(self.targets) > 0, "relora.targets must have a glob or more", got=self.targets)
        require(
            1 <= self.warmup < self.every,
            "relora.warmup must be at least 1 and below relora.every",
            every=self.every,
            warmup=self.warmup,
        )


@dataclass(frozen=True)
class ParallelConfig:
    """The layout of the model over processes and memory."""

    __pydantic_config__ = STRICT

    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "device to compute on ('auto': cuda where there is one)"
    )
    precision: Precision = option(
        "auto",
        "precision of the computation ('auto': bf16 on cuda, else fp32). Weights are kept in fp32; "
        "'pure-bf16' keeps trained weights and their moments in bf16: half the memory, but small "
        "steps are rounded away",
    )
    compile: bool | None = option(None, "compile the blocks and the loss (default: on cuda)")
    checkpoint_activations: Checkpointing = option(
        "none",
        "activation checkpointing, by what each block keeps for its backward: 'none': everything; "
        "'selective': the outputs of costly products; 'full': only its input",
    )
    layout: BaseLayout = option(
        "shard",
        "layout of frozen weights: 'shard' them over the processes (least memory), or 'replicate' "
        "them, so that they are gathered at most once a step (least traffic)",
    )
    reduce: Reduce = option(
        "step",
        "when gradients are reduced: once a 'step', with whole gradients on each process until "
        "then, or in each 'micro-step', with sharded ones (less memory, more traffic)",
    )
    replicas: int = option(
        1, "number of replicas, each sharded over processes / replicas (HSDP)", at_least=1
    )
    timeout: float = option(
        10, "minutes to wait for a process that does not answer", above=0, at_most=1440
    )

    def __post_init__(self) -> None:
        require_bounds(self, "parallel.")

    def mesh(self, world_size: int) -> tuple[int, ...]:
        """Return the sizes of the mesh of all processes: (shards,) or (replicas, shards).

        Raises:
            UserError: if the number of processes is not a multiple of `replicas`.
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
    """Records and evaluations while training."""

    __pydantic_config__ = STRICT

    every: int = option(5, "steps between records in metrics.jsonl", at_least=1)
    evaluate_every: int = option(60, "steps between evaluations on held-out tokens", at_least=1)
    evaluate_sequences: int = option(
        32, "number of held-out sequences in an evaluation", at_least=1
    )
    rank_sites: int = option(
        7, "number of matrices whose accumulated rank is measured at restarts", at_least=0
    )
    tensorboard: bool = option(False, "write TensorBoard files too (needs the extra `tensorboard`)")

    def __post_init__(self) -> None:
        require_bounds(self, "log.")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    __pydantic_config__ = STRICT

    every: int = option(100, "steps between checkpoints", at_least=1)
    keep: int = option(2, "number of newest checkpoints to keep", at_least=2)
    keep_every: int | None = option(None, "steps between checkpoints that are kept for good")
    stop_after: float | None = option(
        None,
        "minutes after which the run saves and stops, with exit code 75 (as on SIGTERM)",
        above=0,
    )

    def __post_init__(self) -> None:
        require_bounds(self, "checkpoint.")
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

    name: str = option("first-run", "run name")
    runs: str = option("runs", "directory of all runs; this run is RUNS/NAME")
    steps: int = option(360, "number of optimizer steps", at_least=1)
    seed: int = option(0, "seed of weights, adapters and data order")
    model: ModelConfig = section(ModelConfig, "the Llama to train")
    data: DataConfig = section(DataConfig, "text to train on")
    batch: BatchConfig = section(BatchConfig, "batch of an optimizer step")
    optim: OptimConfig = section(OptimConfig, "AdamW and its schedule")
    relora: ReLoRAConfig = section(ReLoRAConfig, "the low-rank phase")
    parallel: ParallelConfig = section(ParallelConfig, "processes, precision and memory")
    log: LogConfig = section(LogConfig, "records and evaluations")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "checkpoints")

    def __post_init__(self) -> None:
        require_bounds(self, "")
        require(0 <= self.seed < 2**63, "seed must be from 0 to 2**63 - 1", got=self.seed)
        require(
            bool(self.name) and Path(self.name).name == self.name and self.name != "..",
            "name must be the name of one directory",
            got=repr(self.name),
        )
        require(
            self.relora.warm_start <= self.steps,
            "relora.warm_start must be at most steps",
            warm_start=self.relora.warm_start,
            steps=self.steps,
        )
        require(
            self.relora.base == "keep" or self.parallel.layout == "replicate",
            "relora.base=bf16 needs parallel.layout=replicate: only a whole weight can be split",
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
