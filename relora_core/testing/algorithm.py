"""Algorithm 1 as the paper writes it, in float64, slow and plain: what all else is compared to."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Matrices = dict[str, Tensor]


@dataclass
class Algorithm1:
    r"""Two low-rank layers and their biases, trained by AdamW, restarted by merge and prune.

    $y = W_2' \tanh(W_1' x + b_1) + b_2$ with $W_i' = W_i + s B_i A_i$, and the loss
    $\lVert y - t \rVert^2 / 2$ summed over a batch. All gradients are written out.

    Args:
        W: W_1 and W_2, by name.
        A: their A.
        B: their B.
        b: their biases.
        s: the scale.
        draw: gives the A of (name, number of the restart).
        weight_decay: of AdamW.
        betas: of AdamW.
        eps: of AdamW.
        restarts: so far.
        steps: so far.
        m: AdamW's first moments, by key.
        v: its second moments.

    Examples:
        >>> def one():
        ...     return {"1": torch.ones(1, 1), "2": torch.ones(1, 1)}
        >>> biases = {"1": torch.zeros(1), "2": torch.zeros(1)}
        >>> run = Algorithm1(one(), one(), one(), biases, 0.5, lambda name, k: torch.ones(1, 1))
        >>> run.restart(ratio=0.99)
        >>> run.W["1"], run.B["1"]
        (tensor([[1.5000]]), tensor([[0.]]))

    Reference: https://arxiv.org/abs/2307.05695, Algorithm 1; https://arxiv.org/abs/1711.05101.
    """

    W: Matrices
    A: Matrices
    B: Matrices
    b: Matrices
    s: float
    draw: Callable[[str, int], Tensor]
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    restarts: int = 0
    steps: int = 0
    m: Matrices = field(default_factory=dict)
    v: Matrices = field(default_factory=dict)

    def trained(self) -> Matrices:
        """Return what AdamW steps: A, B and b, by key."""
        return {
            f"{name}.{key}": matrices[name]
            for key, matrices in (("lora_A", self.A), ("lora_B", self.B), ("bias", self.b))
            for name in self.W
        }

    def whole(self, name: str) -> Tensor:
        """Return W + s B A."""
        return self.W[name] + self.s * self.B[name] @ self.A[name]

    def forward(self, x: Tensor) -> Tensor:
        """Return y for a batch x, `(tokens, in)`."""
        first, second = self.W
        hidden = torch.tanh(x @ self.whole(first).T + self.b[first])
        return hidden @ self.whole(second).T + self.b[second]

    def gradients(self, x: Tensor, t: Tensor) -> Matrices:
        """Return the gradients of the loss in A, B and b."""
        first, second = self.W
        hidden = torch.tanh(x @ self.whole(first).T + self.b[first])
        at_output = hidden @ self.whole(second).T + self.b[second] - t
        at_hidden = (at_output @ self.whole(second)) * (1 - hidden**2)
        found = {}
        for name, signal, input in ((first, at_hidden, x), (second, at_output, hidden)):
            dense = signal.T @ input  # of W + s B A
            found[f"{name}.lora_A"] = self.s * self.B[name].T @ dense
            found[f"{name}.lora_B"] = self.s * dense @ self.A[name].T
            found[f"{name}.bias"] = signal.sum(0)
        return found

    def step(self, x: Tensor, t: Tensor, lr: float) -> None:
        """Take one step of AdamW."""
        gradients = self.gradients(x, t)
        self.steps += 1
        beta1, beta2 = self.betas
        for key, p in self.trained().items():
            g = gradients[key]
            self.m[key] = beta1 * self.m.get(key, torch.zeros_like(p)) + (1 - beta1) * g
            self.v[key] = beta2 * self.v.get(key, torch.zeros_like(p)) + (1 - beta2) * g**2
            m = self.m[key] / (1 - beta1**self.steps)
            v = self.v[key] / (1 - beta2**self.steps)
            p.copy_(p - lr * self.weight_decay * p - lr * m / (v.sqrt() + self.eps))

    def merge(self) -> None:
        """Lines 8 and 9, first half: W takes s B A in, and B becomes zero."""
        for name in self.W:
            self.W[name] = self.whole(name)
            self.B[name].zero_()

    def restart(self, ratio: float) -> None:
        """Lines 8 to 12: merge, draw A anew, and prune the moments of A and B."""
        self.merge()
        self.restarts += 1
        for name in self.W:
            self.A[name].copy_(self.draw(name, self.restarts))
            for which in ("lora_A", "lora_B"):
                self._prune(f"{name}.{which}", ratio)

    def _prune(self, key: str, ratio: float) -> None:
        """Zero m and v where m is smallest, the first among equals first."""
        if key not in self.m:
            return
        m, v = self.m[key].flatten().tolist(), self.v[key].flatten().tolist()
        smallest = sorted(range(len(m)), key=lambda i: (abs(m[i]), i))
        for i in smallest[: math.floor(ratio * (len(m) - 1)) + 1]:
            m[i] = v[i] = 0.0
        shape = self.m[key].shape
        self.m[key] = torch.tensor(m, dtype=torch.float64).view(shape)
        self.v[key] = torch.tensor(v, dtype=torch.float64).view(shape)
