"""Activation checkpointing: what a block keeps for its backward, and what it recomputes."""

import logging
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from reference_trainer.config import Checkpointing
from reference_trainer.model.llama import LlamaShape

# Torch warns of in-place operations under selective checkpointing; a compiled block has none.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(
    lambda record: "context_fn is passed" not in record.getMessage()
)
_aten = torch.ops.aten
# Each product with the index of its left operand. Not addmm_: the result of an in-place product is
# not restored from what was kept.
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def checkpointed(block: nn.Module, mode: Checkpointing, shape: LlamaShape) -> nn.Module:
    """Return a block that keeps less for its backward.

    Args:
        block: a block of the model.
        mode: "none" keeps everything. "selective" keeps the outputs of attention and of products
            over the residual stream's width (q, k, v, o, gate and up: most of the arithmetic), and
            recomputes norms, rotations and SwiGLU; in eager mode, a low-rank block also recomputes
            the down product, because its Function saves tensors after it. "full" keeps only the
            block's input.
        shape: the shape of the model.
    """
    if mode == "none":
        return block
    if mode == "full":
        return checkpoint_wrapper(block)
    policy = partial(_policy, shape.hidden_size)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint_wrapper(block, context_fn=contexts)


def _policy(width: int, ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    place = _PRODUCTS.get(operation)
    if place is None and operation == torch.ops.relora.sum_of_products.default:
        place = 2
    if operation in _ATTENTION or (place is not None and args[place].shape[1] == width):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
