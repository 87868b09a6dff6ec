"""The model, optimizer and schedule of one phase: built, then filled."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import relora_core as relora
from reference_trainer.checkpoint.format import Position, read_position
from reference_trainer.checkpoint.load import load_
from reference_trainer.checkpoint.save import Saver
from reference_trainer.config import Config
from reference_trainer.distributed import World
from reference_trainer.logging.records import Rates
from reference_trainer.logging.spectra import spread
from reference_trainer.model.llama import Llama, LlamaShape
from reference_trainer.parallelize import init_weights_, rows_of
from reference_trainer.phase_model import build_model
from reference_trainer.phases import Envelope, Phase
from reference_trainer.pretrained import fill_from_

_BASE = ".parametrizations.weight.original"


@dataclass(frozen=True)
class TrainState:
    """One phase's model and what drives it.

    Args:
        phase: the phase.
        model: the sharded model.
        parameters: the trained parameters, by plain name.
        optimizer: the optimizer of `parameters`, with groups "adapters", "matrices" and "norms".
        schedule: the schedule of the learning rate.
        spectra: the spectra of the updates accumulated at some sites; None if no site is followed.
    """

    phase: Phase
    model: Llama
    parameters: dict[str, nn.Parameter]
    optimizer: relora.ResettableOptimizer
    schedule: LRScheduler
    spectra: relora.UpdateSpectra | None

    def keep_updates_(self) -> None:
        """Keep the updates that a restart is about to merge, where their spectra are followed."""
        if self.spectra is not None:
            self.spectra.keep_()

    def measured(self) -> dict[str, relora.Spectrum]:
        """Return the spectra of what the followed sites have added to W; every process calls it."""
        return self.spectra.measure() if self.spectra is not None else {}

    def tensors(self, world: World) -> dict[str, Tensor]:
        """Return the model's whole state by names without wrappers, the same in every layout.

        A base that is whole on every process appears as an fp32 copy, sharded by rows over the
        processes as other bases are.
        """
        tensors = {relora.clean_name(k): v for k, v in self.model.state_dict().items()}
        for name, site in self._whole_bases():
            tensors.pop(name.replace("original", "0.low_bits"), None)
            tensors[name] = rows_of(site.exact(), world)
        return tensors

    def followed(self) -> dict[str, Tensor]:
        """Return the kept updates, by their names in a checkpoint."""
        state = self.spectra.state_dict() if self.spectra is not None else {}
        return {f"update_spectra.{name}": tensor for name, tensor in state.items()}

    def take_bases_(self, tensors: dict[str, Tensor]) -> None:
        """Set the whole bases from `tensors`, the filled result of `self.tensors`."""
        for name, site in self._whole_bases():
            rows = tensors.pop(name)
            assert isinstance(rows, DTensor)
            site.set_exact_(rows.full_tensor())

    def _whole_bases(self) -> list[tuple[str, relora.Site]]:
        sites = relora.low_rank_sites(self.model)
        whole = ((n, site) for n, site in sites if not isinstance(site.weight, DTensor))
        return [(f"{name}{_BASE}", site) for name, site in whole]

    def rates(self) -> Rates:
        """Return each group's learning rate."""
        rates: Rates = {}
        for group in self.optimizer.param_groups:
            match group["name"]:
                case "adapters":
                    rates["lr_adapters"] = float(group["lr"])
                case "matrices":
                    rates["lr_matrices"] = float(group["lr"])
                case "norms":
                    rates["lr_norms"] = float(group["lr"])
        return rates


def build_state(
    config: Config, phase: Phase, shape: LlamaShape, world: World, *, merged: bool = True
) -> TrainState:
    """Build a phase's model, optimizer and schedule; `fill_` gives the model its values.

    Args:
        config: the run's configuration.
        phase: the phase.
        shape: the shape of the model.
        world: the processes.
        merged: whether to keep merged copies where they pay.
    """
    model = build_model(config, phase, shape, world, merged=merged)
    return with_memory(model, config, phase, world)


def with_memory(model: Llama, config: Config, phase: Phase, world: World) -> TrainState:
    """Give the model memory, and build its optimizer and schedule."""
    model.to_empty(device=world.device)
    parameters = {
        relora.clean_name(name): p for name, p in model.named_parameters() if p.requires_grad
    }
    optimizer = relora.ResettableOptimizer(
        torch.optim.AdamW(
            _groups(config, model, parameters),
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=True,
        )
    )
    envelope = Envelope(phase.start, config.steps, config.optim.warmup, config.optim.min_ratio)
    schedule: LRScheduler = LambdaLR(optimizer, envelope)
    if phase.clock is not None:
        schedule = relora.JaggedLR(schedule, phase.clock)
    spectra = None
    if phase.low_rank and config.log.rank_sites:
        names = [name for name, _ in relora.low_rank_sites(model)]
        followed = spread(names, config.log.rank_sites)
        spectra = relora.UpdateSpectra(model, followed, timeout=world.patience)
    return TrainState(phase, model, parameters, optimizer, schedule, spectra)


def fill_(state: TrainState, config: Config, source: Path | None, world: World) -> int:
    """Give the state its values and return the run's next step.

    Without a checkpoint, values come from `model.weights` or are drawn from the seed. A checkpoint
    of the same phase gives all values. A checkpoint of an earlier phase gives the plain weights and
    the optimizer state of every parameter that stays trainable; adapters start fresh.
    """
    position = read_position(source) if source else None
    continues = position is not None and position.phase == state.phase.name
    if not continues:
        for _, site in relora.low_rank_sites(state.model):
            site.low_rank.reset_parameters()
    tensors = state.tensors(world)
    plain = {
        name.replace(_BASE, ".weight"): tensor
        for name, tensor in tensors.items()
        if name.endswith(_BASE) or ".parametrizations." not in name
    }
    if source is None or position is None:
        if config.model.weights:
            fill_from_(plain, Path(config.model.weights))
        else:
            init_weights_(plain, hidden_size=state.model.shape.hidden_size, seed=config.seed)
        del plain
        state.take_bases_(tensors)
        _refresh_(state)
        return state.phase.start

    if continues and state.spectra is not None:
        state.spectra.reserve_(state.phase.restarts(position.step - 1))
    load_(
        source,
        position,
        tensors=tensors | state.followed() if continues else plain,
        parameters=state.parameters,
        optimizer=state.optimizer,
        world=world,
    )
    del plain  # so that each base's copy is freed as soon as it has been used
    state.take_bases_(tensors)
    if continues:
        extra = {name: t for name, t in tensors.items() if name.endswith("_extra_state")}
        state.model.load_state_dict(extra, strict=False)  # the rest is in place
        state.schedule.load_state_dict(position.schedule)
        rates = state.schedule.get_last_lr()
        for group, lr in zip(state.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
    _refresh_(state)
    return position.step


def _refresh_(state: TrainState) -> None:
    if state.phase.low_rank:
        relora.refresh_merged_(state.model)


def save(state: TrainState, step: int, saver: Saver, world: World, *, copied: bool) -> None:
    """Begin to write a checkpoint of the state before the run's `step`.

    Args:
        state: the state to write.
        step: the next step to run.
        saver: the writer of checkpoints.
        world: the processes.
        copied: whether training continues during the write.
    """
    moments = state.optimizer.state
    states = {name: dict(moments[p]) for name, p in state.parameters.items() if p in moments}
    shapes = {n: {k: list(t.shape) for k, t in kept.items()} for n, kept in states.items()}
    schedule = state.schedule.state_dict()
    position = Position(step, state.phase.name, schedule, shapes, saver.fixed)
    tensors = state.tensors(world) | state.followed()
    saver.save(position, tensors, states, copied=copied)


def _groups(
    config: Config, model: nn.Module, parameters: dict[str, nn.Parameter]
) -> list[dict[str, object]]:
    sites = [site for _, site in relora.low_rank_sites(model)]
    adapters = {id(p) for site in sites for p in (site.lora_A, site.lora_B)}
    rate, decay = config.optim.lr, config.optim.weight_decay
    members: dict[str, list[nn.Parameter]] = {"adapters": [], "matrices": [], "norms": []}
    for p in parameters.values():
        kind = "adapters" if id(p) in adapters else "matrices" if p.ndim > 1 else "norms"
        members[kind].append(p)
    rates = {"adapters": rate * config.relora.lr_multiple}
    return [
        {
            "name": name,
            "params": params,
            "lr": rates.get(name, rate),
            "weight_decay": 0.0 if name == "norms" else decay,
        }
        for name, params in members.items()
        if params
    ]
