"""Inputs that fit a module, and helpers that read its outputs."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from relora_core._torch_private import CONVOLUTION
from relora_core.testing.subjects import LowRankSite

Inputs = Callable[[nn.Module], Tensor | tuple[Tensor, ...]]


def example_inputs(model: nn.Module, *, seed: int = 0) -> tuple[Tensor, ...]:
    """Return random inputs for a model whose first layer has a known input shape.

    The first layer must be one of torch's, have `in_features`, or be a `LowRankSite`.

    The inputs are a batch of 5 vectors, of 2 x 5 tokens, of 2 sequences of 5 vectors, or of 2
    images that are one larger than the kernel.

    Raises:
        ValueError: if the input shape is not known; pass `inputs=` in that case.

    Examples:
        >>> [x.shape for x in example_inputs(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))]
        [torch.Size([5, 3])]
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        shapes = _shapes(module)[: None if module is model else 1]  # nested: one input
        if shapes:
            return tuple(torch.randn(shape, generator=generator) for shape in shapes)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return (torch.randint(module.num_embeddings, (2, 5), generator=generator),)
        if isinstance(module, LowRankSite):
            return (torch.randn(5, module.lora_A.shape[1], generator=generator),)
    raise ValueError(
        f"the inputs of {type(model).__name__} must be known; got no layer with a known input "
        "shape: pass inputs=, a function of the model that returns a tensor or a tuple of tensors"
    )


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    # mypy does not infer that `module.in_features` is an int.
    if isinstance(getattr(module, "in_features", None), int):
        return [(5, module.in_features)]  # type: ignore[list-item]
    if isinstance(module, nn.Bilinear):
        return [(5, module.in1_features), (5, module.in2_features)]
    if isinstance(module, nn.MultiheadAttention):
        return [(5, 2, module.embed_dim)] * 3
    if isinstance(module, nn.RNNBase):
        return [(5, 2, module.input_size)]
    if isinstance(module, CONVOLUTION):
        return [(2, module.in_channels, *(size + 1 for size in module.kernel_size))]
    return []


def given_inputs(
    model: nn.Module, inputs: Inputs | None = None, *, seed: int = 0
) -> tuple[Tensor, ...]:
    """Return the inputs of one call of a model, in the dtype of its first parameter.

    Args:
        model: model to call.
        inputs: function that makes the inputs from the model; None for random inputs that fit the
            first layer.
        seed: seed of torch's global generator while `inputs` runs, or of the random inputs.

    Raises:
        ValueError: if `inputs` is None and the input shape of the model's first layer is not known.
        TypeError: if `inputs` returns anything but a tensor or a tuple of tensors.

    Examples:
        >>> given_inputs(nn.Linear(2, 1), lambda model: torch.ones(1, model.in_features))
        (tensor([[1., 1.]]),)
    """
    if inputs is None:
        return fitting(example_inputs(model, seed=seed), model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given = inputs(model)
    given = (given,) if isinstance(given, Tensor) else given
    if not isinstance(given, tuple) or not all(isinstance(x, Tensor) for x in given):
        raise TypeError(
            "inputs must return a tensor or a tuple of tensors, the arguments of one call; got "
            f"{type(given).__name__}: for other arguments, let the factory wrap the module"
        )
    return fitting(given, model)


def fitting(inputs: tuple[Tensor, ...], model: nn.Module) -> tuple[Tensor, ...]:
    """Return floating-point inputs in the dtype of the model's first parameter, others as is."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def outputs(result: Any) -> list[Tensor]:
    """Return the floating-point tensors in a module's return value, in order."""
    return [t for t in _tensors(result) if t.is_floating_point()]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def loss_of(result: Any, seed: int) -> Tensor:
    """Return a random linear function of a module's outputs."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for y in outputs(result):
        total = total + (y.double() * torch.randn(y.shape, generator=generator).double()).sum()
    return total
