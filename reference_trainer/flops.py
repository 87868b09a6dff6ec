"""Floating-point operations of a training step: by formula, and by counting.

Only matrix products are counted, a multiplication and an addition as two operations. Everything
else is of the order of 1%.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from reference_trainer.model.llama import LlamaShape

Form = Literal["full rank", "two paths", "merged", "dense"]


def linear_flops(form: Form, *, tokens: int, out: int, inner: int, rank: int) -> int:
    r"""Return the operations of forward and backward of one linear: T tokens, m x n, rank r.

    Full rank $6Tmn$: the output, the input's gradient and the weight's. The others need no
    gradient of W:

    - two paths: $4Tmn + 6Tr(m + n)$, W and the update applied side by side;
    - merged: $4Tmn + 4Tr(m + n) + 4mnr$, with $W + sBA$ formed in forward and again in backward,
      which saves the two thin products that apply the update;
    - dense: $6Tmn + 6mnr$, a plain parametrization, whose gradient of $W + sBA$ is formed first.

    Args:
        form: how the update is computed.
        tokens: T.
        out: m.
        inner: n.
        rank: r.
    """
    T, m, n, r = tokens, out, inner, rank
    return {
        "full rank": 6 * T * m * n,
        "two paths": 4 * T * m * n + 6 * T * r * (m + n),
        "merged": 4 * T * m * n + 4 * T * r * (m + n) + 4 * m * n * r,
        "dense": 6 * T * m * n + 6 * m * n * r,
    }[form]


def step_flops(form: Form, shape: LlamaShape, *, sequences: int, length: int, rank: int) -> int:
    """Return the operations of forward and backward of a whole Llama.

    Every matrix of attention and MLP is computed in `form`; the head is at full rank. Causal
    attention counts half of the full square, which is what kernels compute.

    Args:
        form: how the update is computed.
        shape: the shape of the model.
        sequences: the number of sequences in the batch.
        length: the number of tokens in a sequence.
        rank: r.
    """
    tokens = sequences * length
    matrices = sum(
        linear_flops(form, tokens=tokens, out=out, inner=inner, rank=rank)
        for out, inner in block_matrices(shape)
    )
    attention = 6 * tokens * length * shape.heads * shape.head_size
    head = 6 * tokens * shape.vocab_size * shape.hidden_size
    return shape.layers * (matrices + attention) + head


def block_matrices(shape: LlamaShape) -> list[tuple[int, int]]:
    """Return (out, in) of the seven matrices of a block.

    Examples:
        >>> from reference_trainer.model.llama import preset
        >>> block_matrices(preset("1.3b", vocab_size=32000))[-1]
        (2048, 5461)
    """
    d, f = shape.hidden_size, shape.intermediate_size
    q, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    return [(q, d), (kv, d), (kv, d), (d, q), (f, d), (f, d), (d, f)]


def counted_flops(run: Callable[[], object]) -> int:
    """Return the operations of the products that `run` computes, on meta tensors or others.

    This is torch's counter, plus `addmm_`, which it leaves out. Batched products, which are those
    of causal attention here, count half.
    """
    mapping: dict[Any, Any] = {torch.ops.aten.addmm_: _addmm, torch.ops.aten.bmm: _half_bmm}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return int(counter.get_total_flops())


def _addmm(y: Any, a: Any, b: Any, out_shape: Any = None, **_: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


def _half_bmm(a: Any, b: Any, out_shape: Any = None, **_: Any) -> int:
    return int(a[0] * a[1] * a[2] * b[2])
