"""The table of optimizers: what each keeps, and which properties cannot hold for it, and why."""

import importlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

LARGE = ((64, 80), (9,))  # low-bit optimizers keep less than 4096 entries in full


@dataclass(frozen=True)
class Row:
    """One optimizer, with flags that change its state.

    Args:
        path: of its class.
        options: beside `lr`.
        moments: keys that a reset prunes, the leading one first.
        copies: keys that a reset sets to the parameter.
        shared: keys that only a full reset zeroes.
        clock: keys that `reset_step` begins anew, and where.
        shapes: of its parameters.
        sparse: whether it takes sparse gradients only.
        devices: where it runs.
        refused: for each kind of reset that is refused ("reset", "prune", "reset_step"), the
            reason that the error must give.
        cannot: for each other promise, why this optimizer cannot keep it, wrapped or not.
    """

    path: str
    options: Mapping[str, object] = field(default_factory=dict)
    moments: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    clock: Mapping[str, float] = field(default_factory=lambda: {"step": 0})
    shapes: tuple[tuple[int, ...], ...] = ((6, 5), (7,))
    sparse: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    refused: Mapping[str, str] = field(default_factory=dict)
    cannot: Mapping[str, str] = field(default_factory=dict)


ADAM = ("exp_avg", "exp_avg_sq")
NO_COUNT = {"reset_step": "counts no steps for each parameter"}
FACTORED = {"prune": "factored statistics, which many entries of a parameter share"}
TOUCHED = (
    "its train() looks at state[p], which makes an empty one: DCP takes the state for made, and "
    "loads nothing"
)
BNB_FLAT = "its state_dict() nests the quantized state in a dict, which DCP cannot flatten"
DENSE = "DCP makes its state by a step with dense gradients, which it refuses"


def adam(path: str, **options: object) -> Row:
    more = ("max_exp_avg_sq",) if options.get("amsgrad") else ()
    devices = ("cuda",) if options.get("capturable") else ("cpu", "cuda")
    return Row(path, options, (*ADAM, *more), devices=devices)


def of(path: str, *moments: str, **options: object) -> Row:
    return Row(path, options, moments)


def momentum(path: str, **options: object) -> Row:
    return Row(path, options, ("momentum_buffer",), clock={}, refused=NO_COUNT)


def refused(path: str, reason: str, **cannot: str) -> Row:
    named = {promise.replace("_", " "): why for promise, why in cannot.items()}
    return Row(path, refused={"reset": reason}, cannot=named)


def bnb(
    name: str, *moments: str, shapes: tuple[tuple[int, ...], ...] = LARGE, **options: object
) -> Row:
    return Row(
        f"bitsandbytes.optim.{name}",
        options,
        moments,
        shapes=shapes,
        cannot={"dcp flat": BNB_FLAT},
    )


def torchao(name: str, **more: object) -> Row:
    return Row(f"torchao.optim.{name}", moments=ADAM, shapes=LARGE, **more)


def schedule_free(name: str, *moments: str) -> Row:
    return Row(
        f"schedulefree.{name}",
        moments=moments,
        copies=("z",),
        clock={},
        refused=NO_COUNT,
        cannot={"dcp": TOUCHED, "dcp flat": TOUCHED},
    )


OPTIMIZERS = {
    "Adam": adam("torch.optim.Adam"),
    "Adam amsgrad": adam("torch.optim.Adam", amsgrad=True),
    "Adam capturable": adam("torch.optim.Adam", capturable=True),
    "AdamW": adam("torch.optim.AdamW"),
    "AdamW amsgrad": adam("torch.optim.AdamW", amsgrad=True),
    "AdamW single tensor": adam("torch.optim.AdamW", foreach=False),
    "AdamW foreach": adam("torch.optim.AdamW", foreach=True),
    "AdamW fused": adam("torch.optim.AdamW", fused=True),
    "AdamW capturable": adam("torch.optim.AdamW", capturable=True),
    "AdamW tensor lr": adam("torch.optim.AdamW", lr=torch.tensor(1e-2)),
    "SparseAdam": Row(
        "torch.optim.SparseAdam",
        moments=ADAM,
        sparse=True,
        cannot={"dcp": DENSE, "dcp flat": DENSE},
    ),
    "NAdam": Row("torch.optim.NAdam", {}, ADAM, clock={"step": 0, "mu_product": 1}),
    "RAdam": of("torch.optim.RAdam", *ADAM),
    "Adamax": of("torch.optim.Adamax", "exp_avg", "exp_inf"),
    "SGD": Row("torch.optim.SGD", clock={}),
    "SGD momentum": momentum("torch.optim.SGD", momentum=0.9),
    "SGD nesterov": momentum("torch.optim.SGD", momentum=0.9, nesterov=True),
    "SGD fused": momentum("torch.optim.SGD", momentum=0.9, fused=True),
    "Muon": Row(
        "torch.optim.Muon",
        moments=("momentum_buffer",),
        clock={},
        shapes=((6, 5), (7, 4)),
        refused=NO_COUNT,
    ),
    "RMSprop": of("torch.optim.RMSprop", "square_avg"),
    "RMSprop momentum": of("torch.optim.RMSprop", "momentum_buffer", "square_avg", momentum=0.9),
    "RMSprop centered": of(
        *("torch.optim.RMSprop", "momentum_buffer", "grad_avg", "square_avg"),
        momentum=0.9,
        centered=True,
    ),
    "Adagrad": of("torch.optim.Adagrad", "sum"),
    "Adadelta": of("torch.optim.Adadelta", "acc_delta", "square_avg"),
    "Adafactor": Row(
        "torch.optim.Adafactor",
        shared=("row_var", "col_var"),
        shapes=((6, 5), (7, 4)),
        refused=FACTORED,
    ),
    "ASGD": refused("torch.optim.ASGD", "its `ax` is an average of the parameter"),
    "Rprop": refused("torch.optim.Rprop", "its `step_size` is a step length"),
    "LBFGS": refused("torch.optim.LBFGS", "its history belongs to all parameters together"),
    "bitsandbytes AdamW8bit": bnb("AdamW8bit", "state1", "state2"),
    "bitsandbytes AdamW8bit over a block in part": bnb(
        *("AdamW8bit", "state1", "state2"), shapes=((65, 71), (9,))
    ),
    "bitsandbytes AdamW 32 bits": bnb("AdamW", "state1", "state2"),
    "bitsandbytes LAMB8bit": bnb("LAMB8bit", "state1", "state2"),
    "bitsandbytes Lion8bit": bnb("Lion8bit", "state1"),
    "bitsandbytes SGD8bit": bnb("SGD8bit", "state1", momentum=0.9),
    "bitsandbytes RMSprop8bit": bnb("RMSprop8bit", "state1"),
    "bitsandbytes AdEMAMix8bit": refused(
        "bitsandbytes.optim.AdEMAMix8bit", "stacks two averages", dcp_flat=BNB_FLAT
    ),
    "torchao AdamW8bit": torchao("AdamW8bit"),
    "torchao AdamWFp8": torchao("AdamWFp8"),
    "torchao AdamW4bit": torchao(
        "AdamW4bit", refused={"prune": "4-bit second moment has no code for zero"}
    ),
    "schedule-free AdamW": schedule_free("AdamWScheduleFree", "exp_avg_sq"),
    "schedule-free RAdam": schedule_free("RAdamScheduleFree", "exp_avg_sq"),
    "schedule-free SGD": schedule_free("SGDScheduleFree"),
    "transformers Adafactor": Row(
        "transformers.Adafactor",
        {"relative_step": False, "scale_parameter": False, "beta1": 0.9},
        ("exp_avg",),
        shared=("exp_avg_sq_row", "exp_avg_sq_col"),
        shapes=((6, 5), (7, 4)),
    ),
    "transformers Adafactor without beta1": Row(
        "transformers.Adafactor",
        {"relative_step": False, "scale_parameter": False},
        shared=("exp_avg_sq_row", "exp_avg_sq_col"),
        shapes=((6, 5), (7, 4)),
        refused=FACTORED,
    ),
}


def made(row: Row, device: str = "cpu", seed: int = 1) -> tuple[torch.optim.Optimizer, nn.Module]:
    """Make a row's optimizer over the parameters of a module, not yet stepped.

    Skips the test where the library, or the class, is not installed.
    """
    package, _, name = row.path.rpartition(".")
    root = package.split(".")[0]
    pytest.importorskip(root, reason=f"{root} is not installed", exc_type=ImportError)
    module = importlib.import_module(package)
    if not hasattr(module, name):
        pytest.skip(f"{package} has no {name} in this version")
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator).to(device) for shape in row.shapes]
    model = nn.ParameterList([nn.Parameter(weight) for weight in weights])
    model.sparse = row.sparse
    options = {"lr": 1e-2, **row.options}
    if isinstance(options["lr"], Tensor):
        options["lr"] = options["lr"].clone()
    optimizer = getattr(module, name)(model.parameters(), **options)
    if hasattr(optimizer, "train"):  # schedule-free steps in its training mode only
        optimizer.train()
    return optimizer, model


def set_gradients(model: nn.Module, step: int, zero: int = 0) -> None:
    """Give every parameter the gradient of this step, and the first `zero` none but zeros."""
    for index, p in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * index + step)
        grad = torch.randn(p.shape, generator=generator).to(p.device)
        grad = torch.zeros_like(grad) if index < zero else grad
        p.grad = grad.to_sparse() if model.sparse else grad


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Step; LBFGS wants a closure."""
    inner = getattr(optimizer, "inner", optimizer)
    if isinstance(inner, torch.optim.LBFGS):
        optimizer.step(lambda: torch.ones(()))
    else:
        optimizer.step()


def stepped(
    row: Row, device: str = "cpu", steps: int = 3
) -> tuple[torch.optim.Optimizer, nn.Module]:
    """Make a row's optimizer and take steps."""
    optimizer, model = made(row, device)
    for step in range(steps):
        set_gradients(model, step)
        take_step(optimizer)
    return optimizer, model


@contextmanager
def quiet_and_eager() -> Iterator[None]:
    """Take torchao's compiled step as written: what is compiled is not ours."""
    with warnings.catch_warnings():
        for library in ("torchao", "bitsandbytes", "triton"):
            warnings.filterwarnings("ignore", module=library)
        torch.compiler.set_stance("force_eager")
        yield
        torch.compiler.set_stance("default")


def value_of(state: Mapping[str, object], key: str) -> Tensor:
    """Return what a moment stands for, by the library's own reading of its codes."""
    value = state[key]
    if key in ("state1", "state2") and value.dtype == torch.uint8:
        from bitsandbytes.functional import dequantize_blockwise

        number = key[-1]
        return dequantize_blockwise(
            value, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
        )
    return value.dequantize() if hasattr(value, "codes") else value


def raw(value: object) -> object:
    """Return a value that compares bit for bit: the bytes of every tensor in it."""
    if isinstance(value, Mapping):
        return {str(key): raw(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [raw(entry) for entry in value]
    if hasattr(value, "codes"):
        return [raw(value.codes), raw(value.scale)]
    if isinstance(value, Tensor):
        own = value.detach().cpu().contiguous().flatten()
        return own.view(torch.uint8).tolist() if own.numel() else []
    return value
