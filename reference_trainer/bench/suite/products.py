"""Stage 3: the products of linear layers and heads, compared with the roofline."""

from collections.abc import Callable

import torch
from torch import Tensor

from reference_trainer.bench.kernels import Kernel, product
from reference_trainer.bench.suite.records import Report
from reference_trainer.bench.suite.sizes import Sizes
from reference_trainer.bench.suite.timing import medians

_FP8 = (8, 9)  # the first compute capability that multiplies in fp8
Timed = tuple[Callable[[], object], list[Kernel]]


def run(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Time the products of a block's matrices, also with padded widths, and of the head."""
    d = sizes.shape.hidden_size
    own, *padded = sizes.widths
    for tokens in (micro * sizes.length for micro in sizes.micros):
        for out, inner in ((d, d), (own, d), (d, own)):
            products = _of_linear(tokens, out, inner, sizes.rank, device)
            _time(report, sizes, device, f"{tokens} tokens, {out} x {inner}", products)
        others = [*padded, *sizes.vocabularies]
        for out, inner in [(w, d) for w in others] + [(d, w) for w in padded]:
            products = _plain(tokens, out, inner, device)
            _time(report, sizes, device, f"{tokens} tokens, {out} x {inner}", products)


def _time(
    report: Report, sizes: Sizes, device: torch.device, of: str, products: dict[str, Timed]
) -> None:
    runs = {name: timed for name, (timed, _) in products.items()}
    for name, seconds in medians(runs, device, repeats=sizes.repeats).items():
        kernels, ceilings = products[name][1], sizes.ceilings
        expected = sum(map(ceilings.seconds, kernels)) if ceilings and kernels else None
        report.measured(f"{of}: {name}", seconds, expected=expected)


def _plain(tokens: int, out: int, inner: int, device: torch.device) -> dict[str, Timed]:
    x, W = _draw(device, (tokens, inner), (out, inner))
    g = _draw(device, (tokens, out))[0]
    found = {
        "x W^T": _product(x, W.t()),
        "g W": _product(g, W),
        "g^T x": _product(g.t(), x),
    }
    even = not (tokens % 16 or out % 16 or inner % 16)
    if device.type == "cuda" and even and torch.cuda.get_device_capability(device) >= _FP8:
        found["x W^T in fp8, scaled by rows"] = _scaled(x, W)
    return found


def _of_linear(
    tokens: int, out: int, inner: int, rank: int, device: torch.device
) -> dict[str, Timed]:
    x, g, W = _draw(device, (tokens, inner), (tokens, out), (out, inner))
    A, B, u, h = _draw(device, (rank, inner), (out, rank), (tokens, rank), (tokens, rank))
    width = -(-(inner + rank) // 8) * 8
    both = _draw(device, (out, width))[0][:, : inner + rank]
    y, sum = torch.empty_like(g), torch.empty_like(g)
    main, thin = product(x, W.t(), y), product(u, B.t(), y)
    adds, added = (product(a, b, y, addend=y) for a, b in ((u, B.t()), (x, W.t())))
    copied = Kernel("copy of an addend", 0, y.nbytes, y.nbytes)
    return _plain(tokens, out, inner, device) | {
        "u = x A^T": _product(x, A.t()),
        "h = g B": _product(g, B),
        "h^T x": _product(h.t(), x),
        "g^T u": _product(g.t(), u),
        "y += u B^T": (lambda: y.addmm_(u, B.t()), [adds]),
        "y + u B^T into another": (lambda: torch.addmm(y, u, B.t(), out=sum), [copied, adds]),
        "x W^T, then += u B^T": (lambda: (x @ W.t()).addmm_(u, B.t()), [main, adds]),
        "u B^T, then += x W^T": (lambda: (u @ B.t()).addmm_(x, W.t()), [thin, added]),
        "g [W | B]": _product(g, both),
    }


def _draw(device: torch.device, *shapes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in shapes]


def _product(a: Tensor, b: Tensor) -> Timed:
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    return lambda: torch.mm(a, b), [product(a, b, out)]


def _scaled(x: Tensor, W: Tensor) -> Timed:
    """Return the product of operands already in fp8; its ceiling is not known."""
    narrow = torch.float8_e4m3fn
    a, b = x.to(narrow), W.to(narrow).t()
    rows = torch.ones(x.shape[0], 1, device=x.device)
    columns = torch.ones(1, W.shape[0], device=x.device)
    return lambda: torch._scaled_mm(a, b, rows, columns, out_dtype=torch.bfloat16), []
