"""A restart that is broken off, wherever, is finished by the next call or refused by it."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import relora_core as relora
from tests.core.banks import FORMS, Bank


class BreakOff(TorchDispatchMode):
    """Raises at one operation of those that write: between two of them nothing changes."""

    def __init__(self, at, error):
        super().__init__()
        self.left, self.error = at, error  # a class: one object would keep every traceback

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            self.left -= 1
            if self.left == -1:
                raise self.error("planted")
        return func(*args, **(kwargs or {}))


def matrices(dtype):
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype), torch.ones(2, 6)


def banks(dtype):
    return nn.Sequential(Bank(FORMS["bmm"], (3, 5, 6)), nn.Linear(5, 4)).to(dtype), torch.ones(
        3, 2, 6
    )


def split(dtype):
    return matrices(torch.float32)


def begun(kind, dtype):
    torch.manual_seed(3)
    model, x = kind(dtype)
    targets = ["*.experts", "1"] if kind is banks else ["0", "2"]
    relora.add_low_rank_(model, targets, rank=2, batch_dims=1)
    if kind is split:
        relora.split_bases_(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    x = x.to(model[-1].bias.dtype)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind is split):
            model(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, x


def state(model, optimizer):
    return [
        leaf
        for leaf in torch.utils._pytree.tree_leaves((model.state_dict(), optimizer.state_dict()))
        if isinstance(leaf, torch.Tensor)
    ]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def sites_of(model):
    return list(relora.low_rank_sites(model))


# What must wait until a restart that was broken off is finished.
CALLS = (
    relora.reinit_,
    lambda model: relora.save_adapters(model, "never"),
    lambda model: relora.load_adapters(model, "never"),
)
OUT_OF_MEMORY, CTRL_C = torch.OutOfMemoryError, KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "dtype", "error", "rule"),
    [
        (matrices, torch.float64, OUT_OF_MEMORY, "magnitude"),
        (matrices, torch.bfloat16, CTRL_C, "random"),
        (banks, torch.float32, OUT_OF_MEMORY, "random"),
        (split, torch.float32, CTRL_C, "magnitude"),
    ],
)
def test_anywhere_it_is_finished_or_refused(kind, dtype, error, rule):
    model, optimizer, _ = begun(kind, dtype)
    options = {"prune_ratio": 0.5, "rule": rule}
    whole = copy.deepcopy((model, optimizer))
    relora.restart_(*_both(whole), **options)
    done = state(*_both(whole))
    before = state(*_both(copy.deepcopy((model, optimizer))))
    finished = refused = 0
    for at in range(10_000):
        broken = _both(copy.deepcopy((model, optimizer)))
        try:
            with BreakOff(at, error):
                relora.restart_(*broken, **options)
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            pass
        else:
            break
        if any(site.low_rank.torn for _, site in sites_of(broken[0])):
            refused += 1
            with pytest.raises(ValueError, match="interrupted while it wrote"):
                relora.restart_(*broken, **options)
            for call in (*CALLS, relora.merged_state_dict, relora.merge_, nn.Module.state_dict):
                with pytest.raises(ValueError, match="interrupted"):
                    call(broken[0])
            broken[0].load_state_dict(model.state_dict())  # the way out
            broken[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert same(state(*broken), before)
            relora.restart_(*broken, **options)
        else:
            if any(site.low_rank.restarting is not None for _, site in sites_of(broken[0])):
                for call in CALLS:
                    with pytest.raises(ValueError, match="call restart_ again, which finishes it"):
                        call(broken[0])
                if at % 3 == 0:  # each takes as long as the restart
                    resumed = _both(copy.deepcopy((model, optimizer)))
                    resumed[0].load_state_dict(broken[0].state_dict())
                    resumed[1].load_state_dict(copy.deepcopy(broken[1].state_dict()))
                    relora.restart_(*resumed, **options)
                    assert same(state(*resumed), done), at
            relora.restart_(*broken, **options)
            assert same(state(*broken), done), at
            finished += 1
    assert finished > 10
    sites = len(sites_of(model))
    # Between B and W, or within two halves of W: the only places.
    assert refused <= 6 * sites


def _both(pair):
    """Return a copied model and an optimizer over its own parameters."""
    model, old = pair
    fresh = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    fresh.load_state_dict(old.state_dict())
    return model, fresh


def test_a_part_of_a_restart_counts_nothing_twice():
    """B is zeroed before W is written: at worst an update is lost, and that is refused."""
    model, optimizer, x = begun(matrices, torch.float64)
    expected = model(x).detach()
    for at in range(10_000):
        broken = _both(copy.deepcopy((model, optimizer)))
        try:
            with BreakOff(at, KeyboardInterrupt):
                relora.restart_(*broken)
        except KeyboardInterrupt:
            torn = any(site.low_rank.torn for _, site in sites_of(broken[0]))
            if not torn:
                torch.testing.assert_close(broken[0](x), expected)
        else:
            return


def torn():
    model, optimizer, x = begun(matrices, torch.float64)
    (_, site), *_ = relora.low_rank_sites(model)

    def broken():
        raise torch.OutOfMemoryError("planted")

    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        site.low_rank._move_(site.lora_B, broken)
    return model, optimizer, x


@pytest.mark.parametrize(
    "call",
    [
        lambda model: relora.remove_low_rank(model[0]),
        lambda model: relora.remove_low_rank(model[0], merge=False),
        lambda model: relora.Site(model[0], "weight").merge_(),
        lambda model: relora.Site(model[0], "weight").merged(),
        lambda model: AveragedModel(model).update_parameters(model),
        lambda model: model(torch.ones(2, 6, dtype=torch.float64)),
    ],
)
def test_a_torn_site_is_refused_wherever_it_is_met(call):
    model, _, _ = torn()
    with torch.no_grad(), pytest.raises(ValueError, match="interrupted while it wrote"):
        call(model)
    assert relora.Site(model[0], "weight").low_rank.torn


def test_a_torn_site_is_mended_by_its_weight_alone():
    model, optimizer, x = torn()
    good = begun(matrices, torch.float64)[0]
    factors = {k: v for k, v in good.state_dict().items() if ".0.lora" in k or "extra" in k}
    model.load_state_dict(factors, strict=False)
    with pytest.raises(ValueError, match="interrupted"):
        relora.restart_(model, optimizer)
    model.load_state_dict(good.state_dict())
    assert torch.equal(model(x), good(x))


def test_a_site_that_was_trained_between_is_merged_by_the_next_restart():
    """One that a restart had done already, and whose B has grown since."""
    model, optimizer, x = begun(matrices, torch.float64)
    (_, first), (_, second) = relora.low_rank_sites(model)

    def broken(*_):
        raise KeyboardInterrupt

    plain, second.low_rank._merge_and_redraw_ = second.low_rank._merge_and_redraw_, broken
    with pytest.raises(KeyboardInterrupt):
        relora.restart_(model, optimizer)
    second.low_rank._merge_and_redraw_ = plain
    assert (first.restart, second.restart) == (1, 0)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = model(x).detach()
    norms = relora.restart_(model, optimizer).update_norms
    assert all(norms.values())
    for site in (first, second):
        assert not site.lora_B.any()
        assert site.low_rank.restarting is None
    torch.testing.assert_close(model(x), before)
