"""A state machine that compares a training run, under random events, with Algorithm 1."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from relora_core.optim.reset import ResetReport
from relora_core.schedule import JaggedLR, Restarts
from relora_core.sites.site import low_rank_sites, merge_, reinit_
from relora_core.sites.targets import add_low_rank_
from relora_core.testing.algorithm import Algorithm1
from relora_core.testing.properties.restarts import Restart, restart_by_relora
from relora_core.testing.properties.schedules import Jagged
from relora_core.testing.subjects import PropertyError


@dataclass(frozen=True)
class _Settings:
    sizes: tuple[int, int, int]
    rank: int
    alpha: float
    seed: int
    clock: Restarts
    ratio: float


@dataclass
class _Run:
    model: nn.Sequential
    optimizer: Optimizer
    schedule: LRScheduler
    step: int = 0


@dataclass
class _Saved:
    model: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    step: int
    reference: Algorithm1


class RestartMachine(RuleBasedStateMachine):
    """A training run of two layers, as in the README, with steps, restarts and interruptions.

    The rules are: steps, with restarts when the clock says so; skipped steps; passes in `eval`
    mode; merges between restarts; saves; loads of any earlier save into new objects; deep copies;
    a move to float32 and back; other uses of torch's global generator; and restarts that must
    fail. After each rule, W, A, B, biases, moments and learning rates must equal those of
    `Algorithm1` to 1e-8.

    Attributes:
        restart: function of (model, optimizer, ratio).
        jagged: function that makes the schedule from a smooth schedule and the clock.

    Examples:
        >>> import hypothesis
        >>> from hypothesis.stateful import run_state_machine_as_test
        >>> few = hypothesis.settings(max_examples=2, deadline=None)
        >>> run_state_machine_as_test(RestartMachine, settings=few)
    """

    restart: ClassVar[Restart] = staticmethod(restart_by_relora)
    jagged: ClassVar[Jagged] = JaggedLR
    saves: Bundle[Any] = Bundle("saves")

    @initialize(
        sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4)),
        rank=st.integers(1, 3),
        alpha=st.sampled_from([1.0, 2.0, 0.5, 8.0]),
        seed=st.integers(0, 3),
        every=st.integers(2, 6),
        warmup=st.integers(1, 3),
        first=st.none() | st.integers(1, 7),
        ratio=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.0]),
    )
    def begin(
        self,
        sizes: tuple[int, int, int],
        rank: int,
        alpha: float,
        seed: int,
        every: int,
        warmup: int,
        first: int | None,
        ratio: float,
    ) -> None:
        """Make the model, the optimizer, the schedule and the reference."""
        clock = Restarts(every, min(warmup, every - 1), first=first)
        rank = min(rank, *sizes)
        self.settings = _Settings(sizes, rank, alpha, seed, clock, ratio)
        self.run_ = self._made()
        self.reference = self._reference()

    @rule(count=st.integers(1, 8), seed=st.integers(0, 9))
    def train(self, count: int, seed: int) -> None:
        """Take steps, with a restart before each step at which the clock says so."""
        for number in range(count):
            self._restart_if_due()
            x, t = self._batch(100 * seed + number)
            run, lr = self.run_, self._rate()
            y = run.model(x)
            ((y - t).square().sum() / 2).backward()
            self._expect("output", y.detach(), self.reference.forward(x))
            run.optimizer.step()
            self._advance()
            run.optimizer.zero_grad()
            self.reference.step(x, t, lr)

    @rule()
    def skip(self) -> None:
        """Skip a step, as after a gradient that is not finite; the clock still advances."""
        self._restart_if_due()
        self._advance()

    @rule(seed=st.integers(0, 9))
    def evaluate(self, seed: int) -> None:
        """Run a forward pass without gradients, in `eval` mode."""
        x, _ = self._batch(seed)
        self.run_.model.eval()
        with torch.no_grad():
            self._expect("output", self.run_.model(x), self.reference.forward(x))
        self.run_.model.train()

    @rule()
    def merge(self) -> None:
        """Merge between restarts, which must not change any output."""
        merge_(self.run_.model)
        self.reference.merge()

    @rule(target=saves)
    def save(self) -> _Saved:
        """Save all states."""
        run = self.run_
        return _Saved(
            copy.deepcopy(run.model.state_dict()),
            copy.deepcopy(run.optimizer.state_dict()),
            copy.deepcopy(run.schedule.state_dict()),
            run.step,
            copy.deepcopy(self.reference),
        )

    @rule(saved=consumes(saves))
    def load(self, saved: _Saved) -> None:
        """Continue from a saved state, in new objects."""
        self.run_ = self._made()
        self.run_.model.load_state_dict(saved.model)
        self.run_.optimizer.load_state_dict(saved.optimizer)
        self.run_.schedule.load_state_dict(saved.schedule)
        self.run_.step = saved.step
        self.reference = saved.reference

    @rule()
    def copy(self) -> None:
        """Continue with a deep copy, and overwrite the original's parameters."""
        old, self.run_ = self.run_, copy.deepcopy(self.run_)
        with torch.no_grad():
            for p in old.model.parameters():
                p.fill_(7.0)

    @rule()
    def move(self) -> None:
        """Convert the model to float32 and back."""
        self.run_.model.float().double()
        for matrices in (self.reference.W, self.reference.A, self.reference.B, self.reference.b):
            for name, matrix in matrices.items():
                matrices[name] = matrix.float().double()

    @rule(count=st.integers(1, 5))
    def disturb(self, count: int) -> None:
        """Use torch's global generator, as any other code in the process may."""
        torch.rand(count)

    @rule()
    def refuse(self) -> None:
        """Call a restart while A holds NaN: it must raise and change nothing."""
        run = self.run_
        site = next(site for _, site in low_rank_sites(run.model))
        kept = site.lora_A.detach().clone()
        with torch.no_grad():
            site.lora_A[0, 0] = float("nan")
        try:
            type(self).restart(run.model, run.optimizer, self.settings.ratio)
        except ValueError:
            pass
        else:
            raise PropertyError("a restart with NaN in A must raise a ValueError")
        with torch.no_grad():
            site.lora_A.copy_(kept)

    @invariant()
    def is_algorithm_1(self) -> None:
        """Compare all weights, moments and rates with the reference."""
        if not hasattr(self, "run_"):
            return
        run, reference = self.run_, self.reference
        for name, site in low_rank_sites(run.model):
            self._expect(f"W of {name}", site.weight, reference.W[name])
        parameters = self._parameters(run.model)
        for key, expected in reference.trained().items():
            self._expect(key, parameters[key], expected)
            state = run.optimizer.state.get(parameters[key], {})
            for moment, kept in (("exp_avg", reference.m), ("exp_avg_sq", reference.v)):
                if key in kept:
                    self._expect(f"{moment} of {key}", state[moment], kept[key])
        rate = torch.tensor(self._rate(), dtype=torch.float64)
        found = torch.tensor(float(run.optimizer.param_groups[0]["lr"]), dtype=torch.float64)
        self._expect("rate", found, rate)

    def _advance(self) -> None:
        with warnings.catch_warnings():  # torch warns of skipped steps and copied optimizers
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            warnings.filterwarnings("ignore", message="Seems like `optimizer.step")
            self.run_.schedule.step()
        self.run_.step += 1

    def _restart_if_due(self) -> None:
        run = self.run_
        if not self.settings.clock.at(run.step):
            return
        x, _ = self._batch(run.step)
        with torch.no_grad():
            before = run.model(x)
            report = type(self).restart(run.model, run.optimizer, self.settings.ratio)
            self._expect("output after a restart", run.model(x), before)
        self.reference.restart(self.settings.ratio)
        reset = getattr(report, "reset", None)
        if isinstance(reset, ResetReport) and self.reference.m:
            share = self.settings.ratio
            entries = sum(
                2 * matrix.numel()
                for matrices in (self.reference.A, self.reference.B)
                for matrix in matrices.values()
            )
            if reset.entries != entries or not (
                share * entries - 8 <= reset.zeroed <= share * entries + 8
            ):
                raise PropertyError(f"the report must match the restart; got {reset}")

    def _made(self) -> _Run:
        model = self._model()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.01)
        smooth = LambdaLR(optimizer, _smooth)
        return _Run(model, optimizer, type(self).jagged(smooth, self.settings.clock))

    def _model(self) -> nn.Sequential:
        inner, hidden, out = self.settings.sizes
        generator = torch.Generator().manual_seed(self.settings.seed)
        layers = (nn.Linear(inner, hidden), nn.Linear(hidden, out))
        model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        settings = self.settings
        add_low_rank_(model, "*", rank=settings.rank, alpha=settings.alpha, seed=settings.seed)
        return model

    def _reference(self) -> Algorithm1:
        draws = self._draws()
        sites = dict(low_rank_sites(self.run_.model))

        def own(key: str) -> dict[str, Tensor]:
            return {n: getattr(site, key).detach().clone() for n, site in sites.items()}

        biases = {
            name: site.module.get_parameter("bias").detach().clone() for name, site in sites.items()
        }
        scale = self.settings.alpha / self.settings.rank
        return Algorithm1(own("weight"), own("lora_A"), own("lora_B"), biases, scale, draws)

    def _draws(self) -> Callable[[str, int], Tensor]:
        """Return the sequence of A that a separate model draws by redraws alone."""
        other = self._model()
        table = {(name, 0): site.lora_A.detach().clone() for name, site in low_rank_sites(other)}

        def draw(name: str, number: int) -> Tensor:
            while (name, number) not in table:
                reinit_(other)
                for each, site in low_rank_sites(other):
                    table[each, site.restart] = site.lora_A.detach().clone()
            return table[name, number]

        return draw

    def _rate(self) -> float:
        step = self.run_.step
        return 0.02 * _smooth(step) * self.settings.clock.factor(step)

    def _batch(self, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        inner, _, out = self.settings.sizes
        x = torch.randn(3, inner, generator=generator, dtype=torch.float64)
        return x, torch.randn(3, out, generator=generator, dtype=torch.float64)

    @staticmethod
    def _parameters(model: nn.Sequential) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for name, site in low_rank_sites(model):
            found |= {f"{name}.lora_A": site.lora_A, f"{name}.lora_B": site.lora_B}
            found[f"{name}.bias"] = site.module.get_parameter("bias")
        return found

    @staticmethod
    def _expect(what: str, actual: Tensor, expected: Tensor) -> None:
        error = (actual.detach() - expected.detach()).abs().max()
        if not error <= 1e-8 * (1 + expected.detach().abs().max()):
            raise PropertyError(f"{what} differs from Algorithm 1 by {float(error):.3g}")


def _smooth(step: int) -> float:
    return 1 / (1 + 0.1 * step)
