"""Activation checkpointing: what a block keeps for its backward, and what it computes again."""

import logging
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from reference_trainer.config import Checkpointing
from reference_trainer.model.llama import LlamaShape

# Torch warns of operations in place under selective checkpointing: compiled, a block has none.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(
    lambda record: "context_fn is passed" not in record.getMessage()
)
_aten = torch.ops.aten
# Each with the place of its left operand. Not addmm_: what an in-place product gave is not put back
# from what was kept.
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
        block: of the model.
        mode: "none": it keeps all. "selective": the outputs of attention and of products over the
            residual stream's width (q, k, v, o, gate and up: most of the arithmetic), and computes
            norms, rotations and SwiGLU again; in eager mode a low-rank block the product down,
            too, as its Function saves after it. "full": its input only.
        shape: of the model.
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
