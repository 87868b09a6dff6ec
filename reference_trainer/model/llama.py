"""A Llama: RMSNorm, rotary positions, SwiGLU, grouped-query attention. It knows nothing of ReLoRA.

Weight names are those of Hugging Face's `LlamaForCausalLM`. Shapes in comments: b sequences,
t tokens, d hidden, h query heads, k key-value heads, e entries a head.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from reference_trainer.model.head import Head
from reference_trainer.model.loss import CrossEntropy


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies scaled for longer sequences: Hugging Face's "rope_scaling".

    Args:
        kind: "linear" divides all frequencies by `factor`; "llama3" divides only those of long
            wavelengths, with a smooth transition between two bounds (Llama 3.1).
        factor: the divisor, at least 1.
        low_freq_factor: frequencies of wavelengths above the original length / this are divided.
        high_freq_factor: frequencies of wavelengths below the original length / this do not change.
        original_max_position_embeddings: the original length, in tokens.

    Raises:
        ValueError: if a number is out of range.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor must be at least 1; got {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                "low_freq_factor must lie between 0 and high_freq_factor; got "
                f"{self.low_freq_factor}, {self.high_freq_factor}"
            )
        if self.original_max_position_embeddings < 1:
            raise ValueError("original_max_position_embeddings must be at least 1")

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Return the frequencies, in radians a token, scaled."""
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = share.clamp(0, 1)
        return frequencies * (share + (1 - share) / self.factor)


@dataclass(frozen=True)
class LlamaShape:
    """The sizes and constants that define a Llama.

    Args:
        hidden_size: width of the residual stream; a multiple of `heads`. `hidden_size / heads` must
            be even, because rotary positions turn pairs.
        intermediate_size: width of the SwiGLU.
        layers: number of blocks.
        heads: number of query heads.
        kv_heads: number of key-value heads, which must divide `heads`.
        vocab_size: number of token ids.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: scaling of the rotary frequencies, or None.

    Raises:
        ValueError: if a number is out of range, or is not a multiple where it must be one.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "vocab_size")
        for name in sizes:
            most = 2**12 if name == "layers" else 2**24  # a damaged file may say anything
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in 1 .. {most}; got {getattr(self, name)}")
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            raise ValueError(
                "hidden_size must be a multiple of 2 * heads; got "
                f"hidden_size={self.hidden_size}, heads={self.heads}"
            )
        if not (0 < self.norm_eps < 1 and 1 <= self.rope_theta < math.inf):
            raise ValueError(
                "norm_eps must lie between 0 and 1 and rope_theta be at least 1; got "
                f"{self.norm_eps}, {self.rope_theta}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must divide heads; got heads={self.heads}, kv_heads={self.kv_heads}"
            )

    @property
    def head_size(self) -> int:
        """The number of entries of one head."""
        return self.hidden_size // self.heads


# (hidden, intermediate, layers, heads). 1m to 3m are ours, for byte tokens on a laptop; the others
# are the shapes of the ReLoRA paper's code, https://github.com/Guitaricet/relora/tree/main/configs.
PRESETS = {
    "1m": (128, 352, 5, 4),
    "2m": (192, 512, 4, 6),
    "3m": (256, 688, 4, 4),
    "9m": (128, 352, 4, 4),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "250m": (768, 2560, 24, 16),
    "350m": (1024, 2736, 24, 16),
    "1.3b": (2048, 5461, 24, 32),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
}


def preset(name: str, *, vocab_size: int) -> LlamaShape:
    """Return the shape of a preset.

    Examples:
        >>> preset("1.3b", vocab_size=32100).layers
        24
    """
    hidden, intermediate, layers, heads = PRESETS[name]
    return LlamaShape(hidden, intermediate, layers, heads, heads, vocab_size)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key-value heads."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        d, e = shape.hidden_size, shape.head_size
        self.head_size = e
        self.q_proj = nn.Linear(d, shape.heads * e, bias=False)
        self.k_proj = nn.Linear(d, shape.kv_heads * e, bias=False)
        self.v_proj = nn.Linear(d, shape.kv_heads * e, bias=False)
        self.o_proj = nn.Linear(shape.heads * e, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (b, t, d) to (b, t, d)."""
        heads = "b t (h e) -> b h t e"
        q = rotate(rearrange(self.q_proj(x), heads, e=self.head_size), cos, sin)
        k = rotate(rearrange(self.k_proj(x), heads, e=self.head_size), cos, sin)
        v = rearrange(self.v_proj(x), heads, e=self.head_size)
        grouped = k.shape[1] != q.shape[1]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.o_proj(rearrange(mixed, "b h t e -> b t (h e)"))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        d, f = shape.hidden_size, shape.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, t, d) to (b, t, d)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and MLP, each on the norm of the residual stream."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (b, t, d) to (b, t, d)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ids (b, t) to (b, t, d)."""
        cos, sin = rotary_table(tokens.shape[1], self.shape, tokens.device)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)  # type: ignore[no-any-return]


class Llama(nn.Module):
    """A decoder and its output head, untied."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.lm_head = Head(shape.hidden_size, shape.vocab_size)
        self.loss = CrossEntropy()

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Map ids (b, t) to logits (b, t, vocab); with targets (b, t), to the mean loss in nats."""
        logits: Tensor = self.lm_head(self.model(tokens).flatten(0, 1))
        if targets is None:
            return logits.view(*tokens.shape, -1)
        loss: Tensor = self.loss(logits, targets.flatten(), divisor=targets.numel())
        return loss


def rotary_table(length: int, shape: LlamaShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position's angles, each (t, e), fp32."""
    half = torch.arange(0, shape.head_size, 2, device=device, dtype=torch.float32)
    frequencies = shape.rope_theta ** -(half / shape.head_size)
    if shape.rope_scaling is not None:
        frequencies = shape.rope_scaling(frequencies)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + e/2) of each head (b, h, t, e) by their position's angles."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)
