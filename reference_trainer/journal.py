"""What happens in a run, turned into records and lines on the terminal."""

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import relora_core as relora
from reference_trainer.config import Config
from reference_trainer.metrics import Metrics
from reference_trainer.rank import RankMeter, spread
from reference_trainer.stage import Stage
from reference_trainer.world import World


class Journal:
    """Keeps a phase's records, without waiting for the device at every step.

    Args:
        config: the run.
        stage: the phase's.
        start: the run's first step here.
        metrics: where records go.
        world: the processes; all call alike, the first writes.
    """

    def __init__(
        self, config: Config, stage: Stage, start: int, metrics: Metrics, world: World
    ) -> None:
        self.config = config
        self.stage = stage
        self.metrics = metrics
        self.world = world
        self._losses: list[Tensor] = []
        self._seconds = 0.0
        self._began = 0.0
        self._meter = None
        if stage.restarts is not None and config.log.rank_sites:
            file = config.directory / "first-weights.safetensors"
            begins = start == stage.phase.start
            self._meter = RankMeter(file, self._followed(merged=False), world, begins=begins)

    def steps(self, start: int) -> Iterator[int]:
        """Iterate over the phase's steps from `start`, with a progress bar on a terminal."""
        quiet = None if self.world.first else True  # None: unless there is no terminal
        with tqdm(
            total=self.config.steps,
            initial=start,
            disable=quiet,
            desc=self.stage.phase.name,
            unit="step",
        ) as bar:
            self._bar = bar
            for step in range(start, self.stage.phase.stop):
                self._began = time.perf_counter()
                yield step
                bar.update()

    def step(self, step: int, loss: Tensor, norm: Tensor, rates: dict[str, float]) -> None:
        """Record a step; every `log.every` steps the mean loss is written.

        Raises:
            SharedError: if that mean is not finite.
        """
        self._losses.append(loss)
        last = (step + 1) % self.config.log.every == 0 or step + 1 == self.stage.phase.stop
        mean = self.world.mean(torch.stack(self._losses).mean()) if last else 0.0
        self._seconds += time.perf_counter() - self._began
        if not last:
            return
        if not np.isfinite(mean):
            self.world.refuse(
                f"the loss is {mean} at step {step}: lower optim.lr or relora.lr_multiple, in a "
                "run of another name"
            )
        tokens = len(self._losses) * self.config.batch.sequences * self.config.batch.length
        speed = tokens / self._seconds
        self.metrics.write(
            "step",
            step,
            phase=self.stage.phase.name,
            loss=mean,
            gradient_norm=float(norm.full_tensor() if isinstance(norm, DTensor) else norm),
            tokens_per_second=speed,
            **{f"lr_{name}": rate for name, rate in rates.items()},
        )
        restarts = self.stage.restarts
        done = restarts.count(step - self.stage.phase.start) if restarts else 0
        self._bar.set_postfix_str(
            f"loss {mean:.3f}, lr {max(rates.values()):.1e}, {speed:,.0f} tokens/s, "
            f"{done} restarts",
            refresh=False,
        )
        self._losses, self._seconds = [], 0.0

    def restart(self, step: int, report: relora.RestartReport) -> None:
        """Record the restart that ran before `step`."""
        seconds = time.perf_counter() - self._began
        norms = list(report.update_norms.values())
        assert self.stage.restarts is not None
        self.metrics.write(
            "restart",
            step,
            restart=self.stage.restarts.count(step - self.stage.phase.start),
            sites=report.sites,
            mean_update_norm=sum(norms) / len(norms),
            zeroed_fraction=report.zeroed_fraction,
            seconds=seconds,
            ranks=self._meter.measure(self._followed(merged=False)) if self._meter else {},
        )
        self._began = time.perf_counter()

    def evaluation(self, step: int, loss: float) -> None:
        """Record the held-out loss before `step`."""
        self.metrics.write("evaluation", step, phase=self.stage.phase.name, held_out_loss=loss)
        if self.world.first:
            steps, name = self.config.steps, self.stage.phase.name
            tqdm.write(f"step {step:>6} of {steps}  {name:<10}  held-out loss {loss:.4f}")
        self._began = time.perf_counter()

    def end(self) -> None:
        """Record the ranks that the phase has reached, its last cycle counted as merged."""
        if self._meter is not None and self.stage.restarts is not None:
            ranks = self._meter.measure(self._followed(merged=True))
            phase = self.stage.phase
            cycles = self.stage.restarts.count(phase.stop - 1 - phase.start) + 1
            self.metrics.write("end", phase.stop, phase=phase.name, cycles=cycles, ranks=ranks)

    def _followed(self, *, merged: bool) -> dict[str, Tensor]:
        sites = dict(relora.low_rank_sites(self.stage.model))
        names = spread(list(sites), self.config.log.rank_sites)
        return {name: sites[name].merged() if merged else sites[name].exact() for name in names}
