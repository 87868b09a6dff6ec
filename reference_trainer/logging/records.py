"""The records of a run: a TypedDict for each event of `metrics.jsonl`.

Losses are in nats a token, memory in bytes, times in seconds. What is `NotRequired` is absent from
records of older versions, or where it does not apply.
"""

from typing import Literal, NotRequired, TypedDict


class Environment(TypedDict):
    """Hardware and versions, which stand beside every measurement."""

    date: str
    device: str
    threads: int
    cores: int | None
    python: str
    torch: str


class Rates(TypedDict):
    """The learning rate of each parameter group that there is."""

    lr_adapters: NotRequired[float]
    lr_matrices: NotRequired[float]
    lr_norms: NotRequired[float]


class Ranks(TypedDict):
    """What the accumulated updates of the followed matrices have reached, by matrix.

    `bound` is the sum of the ranks of the updates, or the least side of the matrix if that is less.
    """

    bound: int
    ranks: dict[str, int]
    effective_ranks: NotRequired[dict[str, float]]
    stable_ranks: NotRequired[dict[str, float]]


class Start(Environment):
    """The run begins, or goes on, before `step`."""

    event: Literal["start"]
    step: int
    processes: int
    seed: int
    rank: int


class Step(Rates):
    """The steps since the last such record, without skipped ones."""

    event: Literal["step"]
    step: int
    phase: str
    loss: float
    gradient_norm: float
    tokens_per_second: float
    peak_memory: NotRequired[int]


class Skipped(TypedDict):
    """A step without a finite loss and gradient."""

    event: Literal["skipped"]
    step: int
    phase: str
    loss: str
    gradient_norm: str


class Spike(TypedDict):
    """A mean loss far above those before it."""

    event: Literal["spike"]
    step: int
    phase: str
    loss: float


class Restart(Rates, Ranks):
    """A restart that ran before `step`."""

    event: Literal["restart"]
    step: int
    restart: int
    sites: int
    mean_update_norm: float
    zeroed_fraction: float
    seconds: float


class Evaluation(TypedDict):
    """The held-out loss before `step`."""

    event: Literal["evaluation"]
    step: int
    phase: str
    held_out_loss: float


class Compiled(TypedDict):
    """The graphs that a phase has compiled."""

    event: Literal["compiled"]
    step: int
    phase: str
    graphs: int


class End(Ranks):
    """The spectra that a phase has reached: the singular values by matrix."""

    event: Literal["end"]
    step: int
    phase: str
    cycles: int
    spectra: NotRequired[dict[str, list[float]]]


Record = Start | Step | Skipped | Spike | Restart | Evaluation | Compiled | End
