"""The loss on held-out tokens."""

import numpy as np
import torch

from reference_trainer.config import Config
from reference_trainer.data.windows import Windows
from reference_trainer.distributed import World
from reference_trainer.model.llama import Llama
from reference_trainer.model.loss import IGNORED


@torch.no_grad()
def evaluate(model: Llama, held_out: Windows, config: Config, world: World) -> float:
    """Return the mean loss on held-out tokens, in nats per token; the same at every world size."""
    count = min(config.log.evaluate_sequences, len(held_out))
    # As many at once as in training: a larger batch might not fit.
    at_once = config.batch.at_once(world.size)
    a_round = at_once * world.size
    padded = -(-count // a_round) * a_round
    places = np.arange(padded, dtype=np.uint64) * np.uint64(len(held_out)) // np.uint64(count)
    places[count:] = 0
    windows = held_out.read(places)
    windows[count:, 1:] = IGNORED
    total = torch.zeros((), device=world.device)
    for part in windows.view(-1, world.size, at_once, windows.shape[1]):
        mine = part[world.rank].to(world.device)
        tokens = mine[:, :-1].clamp(min=0)
        logits, targets = model(tokens).flatten(0, 1), mine[:, 1:].flatten()
        total += model.loss(logits, targets, divisor=1)
    model.reshard()  # type: ignore[operator]
    return world.sum(total) / (count * config.batch.length)
