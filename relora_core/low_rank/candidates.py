"""Tensors that can become low-rank sites; all others are refused, with the reason."""

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from relora_core._torch_private import CONVOLUTION, has_hooks, is_wrapper
from relora_core.distributed.local import is_sharded, is_tensor_parallel, local
from relora_core.distributed.sharding import split_dim

# These modules use a tensor of more than two dimensions as one matrix, `(out, ...)`.
_WHOLE = (CONVOLUTION, nn.Bilinear)


def batch_dims_of(module: nn.Module, tensor_name: str, given: int | None = None) -> int:
    """Return the number of leading batch dimensions of a tensor.

    Args:
        module: the module that owns the tensor.
        tensor_name: the tensor's name in the module.
        given: the number for a tensor of more than two dimensions that is not a convolution's.

    Raises:
        ValueError: if `given` is None for such a tensor, because it may be a bank.
    """
    base = module._parameters[tensor_name]
    assert base is not None
    if is_lazy(base) or base.ndim <= 2 or isinstance(module, _WHOLE):
        return 0
    if given is None:
        raise ValueError(
            f"{type(module).__name__}.{tensor_name} has shape {tuple(base.shape)}: give "
            "batch_dims=1 if it is a bank of matrices, such as one for each expert (each matrix "
            "then has its own factors), or batch_dims=0 if it is one matrix"
        )
    return given


def check_target(module: nn.Module, tensor_name: str) -> nn.Parameter:
    """Return the Parameter to parametrize, or raise what `register_low_rank` raises for it."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module, tensor_name):
        raise ValueError(
            f"{kind}.{tensor_name} is parametrized already: remove that parametrization first"
        )
    base = module._parameters.get(tensor_name)
    if base is None:
        own = sorted(key for key, value in module._parameters.items() if value is not None)
        raise ValueError(f"{kind} has no Parameter {tensor_name!r}; it has {own}")
    _refuse_packed(module, tensor_name, base)
    if is_sharded(base) and not is_tensor_parallel(module):
        raise ValueError(
            f"{kind}.{tensor_name} is sharded already: add low-rank sites before fully_shard (and "
            "after parallelize_module, if it was split by hand for tensor parallelism)"
        )
    if isinstance(module, nn.Embedding) and split_dim(base) == 0:
        raise ValueError(
            f"{kind}.{tensor_name} is split by rows, and each process can look up only its own: "
            "use ColwiseParallel for an embedding with a low-rank site"
        )
    if has_hooks(base):
        raise ValueError(
            f"{kind}.{tensor_name} has gradient hooks, which would not run once W is frozen: "
            "remove them, and set them on lora_A and lora_B afterwards"
        )
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(
            f"{kind} with max_norm rewrites its weight at every look-up, which a low-rank site "
            f"forbids; got max_norm={module.max_norm}: build it without"
        )
    return base


def _refuse_packed(module: nn.Module, tensor_name: str, base: nn.Parameter) -> None:
    """Raise TypeError if a merge could not write to what a Parameter holds."""
    kind = f"{type(module).__name__}.{tensor_name}"
    without_shape: bool = is_lazy(base)
    if without_shape:
        return
    part: Any = local(base.detach())
    if is_wrapper(part):
        raise TypeError(
            f"{kind} is a {type(part).__name__}, which a merge cannot write to: add sites to the "
            "plain weight, in float32 or bfloat16, and leave quantization out"
        )
    features = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    packed = isinstance(module, nn.Linear) and tensor_name == "weight" and not is_sharded(base)
    if packed and tuple(base.shape) != features:
        raise TypeError(
            f"{kind} has shape {tuple(base.shape)} in a layer of {features[0]} x {features[1]}: it "
            "is packed, and a merge cannot write to it: add sites to the plain weight"
        )
    if base.is_meta and hasattr(module, "_hf_hook"):
        raise TypeError(
            f"{kind} is offloaded by hooks, which restore it before each use and lose any write: "
            "bring the model to a device first"
        )
