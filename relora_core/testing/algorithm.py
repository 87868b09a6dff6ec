"""The paper's Algorithm 1 in plain, slow float64: the reference for all other implementations."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Matrices = dict[str, Tensor]


@dataclass
class Algorithm1:
    r"""Two low-rank layers and their biases, trained by AdamW; restarts merge and prune.

    $y = W_2' \tanh(W_1' x + b_1) + b_2$ with $W_i' = W_i + s B_i A_i$, and the loss
    $\lVert y - t \rVert^2 / 2$ summed over a batch. All gradients are written out by hand.

    Args:
        W: W_1 and W_2, by layer name.
        A: A_1 and A_2, by layer name.
        B: B_1 and B_2, by layer name.
        b: b_1 and b_2, by layer name.
        s: scale.
        draw: function of (layer name, restart number) that returns the drawn A.
        weight_decay: AdamW's weight decay.
        betas: AdamW's betas.
        eps: AdamW's eps.
        restarts: number of restarts so far.
        steps: number of steps so far.
        m: AdamW's first moments, by key.
        v: AdamW's second moments, by key.

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
        """Return the tensors that AdamW trains, A, B and b, by key."""
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
        """Return the gradients of the loss with respect to A, B and b."""
        first, second = self.W
        hidden = torch.tanh(x @ self.whole(first).T + self.b[first])
        at_output = hidden @ self.whole(second).T + self.b[second] - t
        at_hidden = (at_output @ self.whole(second)) * (1 - hidden**2)
        found = {}
        for name, signal, input in ((first, at_hidden, x), (second, at_output, hidden)):
            dense = signal.T @ input  # the gradient of W + s B A
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
        """Run the first half of lines 8 and 9: add s B A to W, and set B to zero."""
        for name in self.W:
            self.W[name] = self.whole(name)
            self.B[name].zero_()

    def restart(self, ratio: float) -> None:
        """Run lines 8 to 12: merge, redraw A, and prune the moments of A and B."""
        self.merge()
        self.restarts += 1
        for name in self.W:
            self.A[name].copy_(self.draw(name, self.restarts))
            for which in ("lora_A", "lora_B"):
                self._prune(f"{name}.{which}", ratio)

    def _prune(self, key: str, ratio: float) -> None:
        """Zero m and v at the smallest entries of |m|; of equal entries, the first goes first."""
        if key not in self.m:
            return
        m, v = self.m[key].flatten().tolist(), self.v[key].flatten().tolist()
        smallest = sorted(range(len(m)), key=lambda i: (abs(m[i]), i))
        for i in smallest[: math.floor(ratio * (len(m) - 1)) + 1]:
            m[i] = v[i] = 0.0
        shape = self.m[key].shape
        self.m[key] = torch.tensor(m, dtype=torch.float64).view(shape)
        self.v[key] = torch.tensor(v, dtype=torch.float64).view(shape)
