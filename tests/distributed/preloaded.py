"""Imports that every forked process would otherwise repeat."""

# Imported for those that are forked, not for this file.
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

import reference_trainer.commands.train  # noqa: F401
from reference_trainer.config import Config
from reference_trainer.validated import validated

validated(Config, {})  # pydantic takes a while to read what a Config is
