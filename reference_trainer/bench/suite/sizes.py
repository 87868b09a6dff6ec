"""The sizes of the suite: those of the 1.3b model on a GPU, tiny ones on a CPU."""

from dataclasses import dataclass

import torch

from reference_trainer.bench.ceilings import CEILINGS, Ceilings
from reference_trainer.bench.layouts import Layout, Step
from reference_trainer.model.llama import LlamaShape, preset


@dataclass(frozen=True)
class Sizes:
    """The sizes of the suite.

    Args:
        device: "cuda", or "cpu" for a dry run, whose figures mean nothing.
        gpu: name of the GPU whose ceilings are compared; None if its ceilings are not known.
        shape: shape of the model.
        rank: rank of the sites.
        length: number of tokens in a sequence.
        micros: numbers of sequences at once.
        widths: widths of the MLP in the table of products: the model's, then padded ones.
        vocabularies: vocabulary sizes in the table of products: the model's, then padded ones.
        repeats: number of timed rounds.
        entries: number of entries to prune, a power of two.
        preset: preset of the run that is stopped and resumed.
        run: steps, sequences per step and tokens per sequence of that run.
    """

    device: str
    gpu: str | None
    shape: LlamaShape
    rank: int
    length: int
    micros: tuple[int, ...]
    widths: tuple[int, ...]
    vocabularies: tuple[int, ...]
    repeats: int
    entries: int
    preset: str
    run: tuple[int, int, int]

    @property
    def ceilings(self) -> Ceilings | None:
        """The ceilings of the GPU, or None if they are not known."""
        return None if self.gpu is None else CEILINGS[self.gpu]

    def step(self, layout: Layout, micro: int) -> Step:
        """Return a step in a layout."""
        return Step(layout, self.shape, self.rank, self.length, micro)


def sizes() -> Sizes:
    """Return the sizes for this machine."""
    if torch.cuda.is_available():
        return Sizes(
            "cuda",
            gpu_of(torch.cuda.get_device_name()),
            preset("1.3b", vocab_size=32_000),
            128,
            1024,
            (8, 16),
            (5461, 5464, 5504),
            (32_000, 32_100, 32_128),
            10,
            2**24,
            "60m",
            (400, 64, 256),
        )
    small = LlamaShape(64, 171, 2, 4, 4, 128)
    return Sizes(
        "cpu", "h100", small, 4, 32, (1, 2), (171, 176), (128, 132), 3, 2**16, "1m", (48, 4, 32)
    )


def gpu_of(name: str) -> str | None:
    """Return the name in `CEILINGS` that matches a device's name, or None.

    Examples:
        >>> gpu_of("NVIDIA H100 80GB HBM3")
        'h100'
        >>> gpu_of("NVIDIA A100-SXM4-40GB")
        'a100-40gb'
    """
    words = name.lower().replace("-", " ").replace("rtx ", "rtx").split()
    memory = "40gb" if "40gb" in words else "80gb"
    names = (f"a100-{memory}" if word == "a100" else word for word in words)
    return next((one for one in names if one in CEILINGS), None)
