"""A run with restarts is the same through the wrappers of other trainers, bit for bit."""

import warnings

import pytest
import torch
from torch import nn

import relora_core as relora

STEPS = 9


class Parts:
    """A small model with low-rank sites, its optimizer, clock and schedule."""

    def __init__(self):
        torch.manual_seed(4)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        relora.add_low_rank_(self.model, "0", rank=3, alpha=6.0)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = relora.ResettableOptimizer(torch.optim.AdamW(trained, lr=1e-2))
        self.restarts = relora.Restarts(every=4, warmup=2)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.schedule = relora.JaggedLR(cosine, self.restarts)

    def restart_(self, step, optimizer):
        if self.restarts.at(step):
            report = relora.restart_(self.model, optimizer, prune_ratio=0.7)
            assert report.zeroed_fraction > 0.6

    def ends(self):
        return [p.detach().clone() for p in self.model.parameters()]


def batches():
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(4, 5, generator=generator) for _ in range(STEPS)]


@pytest.fixture
def expected():
    parts = Parts()
    for step, x in enumerate(batches()):
        parts.restart_(step, parts.optimizer)
        parts.model(x).square().mean().backward()
        parts.optimizer.step()
        parts.schedule.step()
        parts.optimizer.zero_grad()
    return parts.ends()


def assert_same(ends, expected):
    assert all(torch.equal(one, other) for one, other in zip(ends, expected, strict=True))


def test_accelerate(expected):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    parts = Parts()
    model, optimizer, schedule = accelerator.prepare(parts.model, parts.optimizer, parts.schedule)
    for step, x in enumerate(batches()):
        parts.restart_(step, optimizer)
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert_same(parts.ends(), expected)


def test_lightning(expected):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    parts = Parts()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = parts.model

        def on_train_batch_start(self, batch, index):
            parts.restart_(self.global_step, self.optimizers())

        def training_step(self, batch, index):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            each_step = {"scheduler": parts.schedule, "interval": "step"}
            return {"optimizer": parts.optimizer, "lr_scheduler": each_step}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = torch.utils.data.DataLoader(batches(), batch_size=None)
        trainer.fit(Module(), loader)
    assert_same(parts.ends(), expected)


class Container(torch.optim.Optimizer):
    """As torchtitan keeps one optimizer for each part: its own groups and state are not theirs."""

    def __init__(self, optimizers):
        self.optimizers = optimizers
        params = [p for one in optimizers for group in one.param_groups for p in group["params"]]
        super().__init__(params, {})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("inside", [False, True])
def test_a_container_of_optimizers(expected, inside):
    """The factors in one optimizer each, wrapped one by one or together."""
    parts = Parts()
    trained = [p for p in parts.model.parameters() if p.requires_grad]
    wrap = relora.ResettableOptimizer
    several = [torch.optim.AdamW([p], lr=1e-2) for p in trained]
    optimizer = Container([wrap(one) for one in several]) if inside else wrap(Container(several))
    schedules = [
        relora.JaggedLR(torch.optim.lr_scheduler.CosineAnnealingLR(one, 20), parts.restarts)
        for one in several
    ]
    for step, x in enumerate(batches()):
        parts.restart_(step, optimizer)
        parts.model(x).square().mean().backward()
        optimizer.step()
        for schedule in schedules:
            schedule.step()
        optimizer.zero_grad()
    assert_same(parts.ends(), expected)
