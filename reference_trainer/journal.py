"""Events of a run as records and as lines on the terminal."""

import logging
import statistics
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

import relora_core as relora
from reference_trainer.config import Config
from reference_trainer.metrics import Metrics
from reference_trainer.peak import PeakMemory
from reference_trainer.rank import ranks_of, values_of
from reference_trainer.stage import Stage
from reference_trainer.terminal import hidden, log
from reference_trainer.world import World


class Journal:
    """Keeps a phase's records.

    Args:
        config: the run.
        stage: the phase's.
        metrics: where records go.
        world: the processes; all call alike, the first writes.
    """

    def __init__(self, config: Config, stage: Stage, metrics: Metrics, world: World) -> None:
        self.config = config
        self.stage = stage
        self.metrics = metrics
        self.world = world
        self._losses: list[Tensor] = []
        self._norm = torch.zeros(())
        self._means: deque[float] = deque(maxlen=20)
        self._seconds = 0.0
        self._began = 0.0
        self._peak = PeakMemory(world.device)
        self._graphs = graphs()

    def steps(self, start: int) -> Iterator[int]:
        """Iterate over the phase's steps from `start`, with a progress bar on a terminal."""
        with tqdm(
            total=self.config.steps,
            initial=start,
            disable=hidden() if self.world.first else True,
            desc=self.stage.phase.name,
            unit="step",
        ) as bar:
            self._bar = bar
            for step in range(start, self.stage.phase.stop):
                self._began = time.perf_counter()
                yield step
                bar.update()

    def step(
        self, step: int, loss: Tensor, norm: Tensor, rates: dict[str, float], *, skipped: bool
    ) -> None:
        """Record a step; every `log.every` steps the mean loss is written, of those not skipped.

        With it goes the gradient's norm at the last of those.
        A skipped step is written at once. So is a spike: a mean loss that stands out of the last
        ones by more than six times what they differ by.
        """
        self._seconds += time.perf_counter() - self._began
        if skipped:
            found = {"loss": str(loss.item()), "gradient_norm": str(norm.item())}
            self.metrics.write("skipped", step, phase=self.stage.phase.name, **found)
            self._warn(step, f"skipped, with a loss of {loss:.3g} and a gradient of {norm:.3g}")
        else:
            self._losses.append(loss)
            self._norm = norm
        last = (step + 1) % self.config.log.every == 0 or step + 1 == self.stage.phase.stop
        if not last or not self._losses:
            return
        mean = self.world.mean(torch.stack(self._losses).mean())
        if is_spike(mean, self._means):
            self.metrics.write("spike", step, phase=self.stage.phase.name, loss=mean)
            self._warn(step, f"the loss jumped to {mean:.3f}")
        self._means.append(mean)
        tokens = len(self._losses) * self.config.batch.sequences * self.config.batch.length
        speed = tokens / self._seconds
        self.metrics.write(
            "step",
            step,
            phase=self.stage.phase.name,
            loss=mean,
            gradient_norm=self._norm.item(),
            tokens_per_second=speed,
            peak_memory=self.world.largest(self._peak.bytes()),
            **{f"lr_{name}": rate for name, rate in rates.items()},
        )
        done = self.stage.phase.restarts(step)
        shown = f"loss {mean:.3f}, lr {max(rates.values()):.1e}, {speed:,.0f} tokens/s"
        self._bar.set_postfix_str(f"{shown}, {done} restarts", refresh=False)
        self._say(logging.DEBUG, step, shown)
        self._losses, self._seconds = [], 0.0

    def restart(self, step: int, report: relora.RestartReport) -> None:
        """Record the restart that ran before `step`."""
        seconds = time.perf_counter() - self._began
        norms = list(report.update_norms.values())
        number = self.stage.phase.restarts(step)
        self.metrics.write(
            "restart",
            step,
            restart=number,
            sites=report.sites,
            mean_update_norm=sum(norms) / len(norms),
            zeroed_fraction=report.zeroed_fraction,
            seconds=seconds,
            **{f"lr_{name}": rate for name, rate in self.stage.rates().items()},
            **ranks_of(self._spectra(), self.stage.bound(number)),
        )
        merged = f"restart {number}: {report.sites} matrices merged"
        self._say(logging.INFO, step, f"{merged}, {report.zeroed_fraction:.1%} of moments zeroed")
        self._began = time.perf_counter()

    def evaluation(self, step: int, loss: float) -> None:
        """Record the held-out loss before `step`."""
        self.metrics.write("evaluation", step, phase=self.stage.phase.name, held_out_loss=loss)
        self._say(logging.INFO, step, f"held-out loss {loss:.4f}")
        self._began = time.perf_counter()

    def end(self) -> None:
        """Record the graphs that were compiled, and the spectra that the phase has reached.

        Its last cycle is counted as merged.
        """
        phase, compiled = self.stage.phase, graphs() - self._graphs
        if compiled:
            self.metrics.write("compiled", phase.stop, phase=phase.name, graphs=compiled)
            self._say(logging.INFO, phase.stop, f"compiled {compiled} graphs")
        if self.stage.spectra is None:
            return
        spectra = self._spectra()
        self.metrics.write(
            "end",
            phase.stop,
            phase=phase.name,
            cycles=phase.cycles,
            **ranks_of(spectra, self.stage.bound(phase.cycles)),
            spectra={name: values_of(spectrum) for name, spectrum in spectra.items()},
        )

    def _say(self, level: int, step: int, what: str) -> None:
        if self.world.first:
            name, steps = self.stage.phase.name, self.config.steps
            log.log(level, f"step {step:>{len(str(steps))}} of {steps}  {name:<10}  {what}")

    def _warn(self, step: int, what: str) -> None:
        if self.world.first:
            log.warning(f"step {step}: {what}")

    def _spectra(self) -> dict[str, relora.Spectrum]:
        return self.stage.spectra.measure() if self.stage.spectra is not None else {}


def graphs() -> int:
    """Return how many graphs this process has compiled: for all blocks of a phase it should be 2.

    One is of training and one of evaluation; the loss has a few more.
    """
    counters = sys.modules.get("torch._dynamo.utils")  # which costs a second to import
    return 0 if counters is None else int(counters.counters["stats"]["unique_graphs"])


def is_spike(mean: float, before: Collection[float]) -> bool:
    """Whether `mean` lies above the median of ten or more by six times their median deviation.

    Examples:
        >>> is_spike(3.0, [2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0])
        True
    """
    if len(before) < 10:
        return False
    middle = statistics.median(before)
    deviation = statistics.median(abs(value - middle) for value in before)
    return mean > middle + 6 * max(deviation, 0.01 * middle)
