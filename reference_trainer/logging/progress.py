"""The progress of a phase: records, lines on the terminal, and a bar."""

import logging
import statistics
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.config import Config
from reference_trainer.logging.console import hidden, log
from reference_trainer.logging.metrics import Metrics
from reference_trainer.logging.records import Rates
from reference_trainer.logging.spectra import ranks_of, values_of
from reference_trainer.phases import Phase
from relora_core import RestartReport, Spectrum


class Progress:
    """Records and shows a phase. It speaks to no other process: values come from the loop.

    Args:
        config: the run's options.
        phase: the phase.
        metrics: the writer of records; only the first process writes.
        shown: whether this process shows them on the terminal too.
    """

    def __init__(self, config: Config, phase: Phase, metrics: Metrics, *, shown: bool) -> None:
        self._config = config
        self._phase = phase
        self._metrics = metrics
        self._shown = shown
        self._losses: list[Tensor] = []
        self._norm = torch.zeros(())
        self._means: deque[float] = deque(maxlen=20)
        self._seconds = 0.0
        self._began = 0.0
        self._graphs = graphs()

    def steps(self, start: int) -> Iterator[int]:
        """Iterate over the phase's steps from `start`, with a progress bar on a terminal."""
        with tqdm(
            total=self._config.steps,
            initial=start,
            disable=hidden() if self._shown else True,
            desc=self._phase.name,
            unit="step",
        ) as bar:
            self._bar = bar
            for step in range(start, self._phase.stop):
                self._began = time.perf_counter()
                yield step
                bar.update()

    def step(self, step: int, loss: Tensor, norm: Tensor, *, skipped: bool) -> None:
        """Take note of a step's loss and gradient norm; a skipped step is recorded at once."""
        self._seconds += time.perf_counter() - self._began
        if not skipped:
            self._losses.append(loss)
            self._norm = norm
            return
        self._metrics.write(
            {
                "event": "skipped",
                "step": step,
                "phase": self._phase.name,
                "loss": str(loss.item()),
                "gradient_norm": str(norm.item()),
            }
        )
        self._warn(step, f"skipped, with a loss of {loss:.3g} and a gradient of {norm:.3g}")

    def due(self, step: int) -> Tensor | None:
        """Return the mean loss since the last record, if one is due after `step`.

        It is due every `log.every` steps and at the end, unless all steps were skipped.
        """
        last = (step + 1) % self._config.log.every == 0 or step + 1 == self._phase.stop
        return torch.stack(self._losses).mean() if last and self._losses else None

    def record(self, step: int, mean: float, rates: Rates, peak_memory: int) -> None:
        """Record the steps up to `step`, with the gradient norm of the last that was not skipped.

        A spike is recorded beside: a mean loss above the recent ones by more than six times their
        deviation.

        Args:
            step: the last.
            mean: loss of the steps since the last record, over all processes.
            rates: the step's learning rates.
            peak_memory: bytes of the process that took most.
        """
        phase = self._phase
        if is_spike(mean, self._means):
            self._metrics.write({"event": "spike", "step": step, "phase": phase.name, "loss": mean})
            self._warn(step, f"the loss jumped to {mean:.3f}")
        self._means.append(mean)
        tokens = len(self._losses) * self._config.batch.sequences * self._config.batch.length
        speed = tokens / self._seconds
        self._metrics.write(
            {
                "event": "step",
                "step": step,
                "phase": phase.name,
                "loss": mean,
                "gradient_norm": self._norm.item(),
                "tokens_per_second": speed,
                "peak_memory": peak_memory,
                **rates,
            }
        )
        highest = max(rates.get("lr_adapters", 0.0), rates.get("lr_matrices", 0.0))
        shown = f"loss {mean:.3f}, lr {highest:.1e}, {speed:,.0f} tokens/s"
        self._bar.set_postfix_str(f"{shown}, {phase.restarts(step)} restarts", refresh=False)
        self._say(logging.DEBUG, step, shown)
        self._losses, self._seconds = [], 0.0

    def restart(
        self, step: int, report: RestartReport, rates: Rates, spectra: Mapping[str, Spectrum]
    ) -> None:
        """Record the restart that ran before `step`.

        Args:
            step: of the run.
            report: what the restart did.
            rates: the learning rates at that step.
            spectra: of the accumulated updates of the followed matrices.
        """
        seconds = time.perf_counter() - self._began
        norms = list(report.update_norms.values())
        number = self._phase.restarts(step)
        self._metrics.write(
            {
                "event": "restart",
                "step": step,
                "restart": number,
                "sites": report.sites,
                "mean_update_norm": sum(norms) / len(norms),
                "zeroed_fraction": report.zeroed_fraction,
                "seconds": seconds,
                **rates,
                **ranks_of(spectra, number * self._config.relora.rank),
            }
        )
        merged = f"restart {number}: {report.sites} matrices merged"
        self._say(logging.INFO, step, f"{merged}, {report.zeroed_fraction:.1%} of moments zeroed")
        self._began = time.perf_counter()

    def evaluation(self, step: int, loss: float) -> None:
        """Record the held-out loss before `step`."""
        name = self._phase.name
        self._metrics.write(
            {"event": "evaluation", "step": step, "phase": name, "held_out_loss": loss}
        )
        self._say(logging.INFO, step, f"held-out loss {loss:.4f}")
        self._began = time.perf_counter()

    def end(self, spectra: Mapping[str, Spectrum]) -> None:
        """Record the graphs that were compiled, and the spectra that the phase has reached.

        Args:
            spectra: of the accumulated updates, the last cycle's as if it were merged; empty if
                none is followed.
        """
        phase, compiled = self._phase, graphs() - self._graphs
        if compiled:
            self._metrics.write(
                {"event": "compiled", "step": phase.stop, "phase": phase.name, "graphs": compiled}
            )
            self._say(logging.INFO, phase.stop, f"compiled {compiled} graphs")
        if not spectra:
            return
        self._metrics.write(
            {
                "event": "end",
                "step": phase.stop,
                "phase": phase.name,
                "cycles": phase.cycles,
                **ranks_of(spectra, phase.cycles * self._config.relora.rank),
                "spectra": {name: values_of(spectrum) for name, spectrum in spectra.items()},
            }
        )

    def _say(self, level: int, step: int, what: str) -> None:
        if self._shown:
            steps = self._config.steps
            what = f"{self._phase.name:<10}  {what}"
            log.log(level, f"step {step:>{len(str(steps))}} of {steps}  {what}")

    def _warn(self, step: int, what: str) -> None:
        if self._shown:
            log.warning(f"step {step}: {what}")


def graphs() -> int:
    """Return how many graphs this process has compiled.

    All blocks of a phase should need two, one for training and one for evaluation; the loss has a
    few more.
    """
    counters = sys.modules.get("torch._dynamo.utils")  # which costs a second to import
    return 0 if counters is None else int(counters.counters["stats"]["unique_graphs"])


def is_spike(mean: float, before: Collection[float]) -> bool:
    """Whether `mean` is above the median of ten or more by six times their median deviation.

    Examples:
        >>> is_spike(3.0, [2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0])
        True
    """
    if len(before) < 10:
        return False
    middle = statistics.median(before)
    deviation = statistics.median(abs(value - middle) for value in before)
    return mean > middle + 6 * max(deviation, 0.01 * middle)
