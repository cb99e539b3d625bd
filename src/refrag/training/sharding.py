"""FSDP2: a model too large for one device, its weights, gradients and optimizer state split over all (`torch.distributed.fsdp.fully_shard`)."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from ..model import RefragModel


def shard(model: RefragModel, mesh: DeviceMesh, *, dtype: torch.dtype | None = None) -> RefragModel:
    """Split the weights of `model` over the processes of `mesh`, in place: its parameters become DTensors.

    Units, each gathered while it computes and let go afterwards: every block that must not be split (a layer of the encoder or
    the decoder, by `_no_split_modules`), the projector, the policy. What is left, first of all the token embeddings and the
    output layer, belongs to the root, which stays gathered from the model's own forward pass to the end of the backward pass.
    It must be so: the model looks token embeddings up before it calls the decoder, so the decoder as a whole cannot be a unit, and
    output weights may be tied to them, so they cannot either. Hence `forward` and `generate` are entered through the model;
    `mix`, `project` or `model.decoder(…)` alone meet split weights.

    Every process must hold the same weights before, run the same calls, and make its optimizer afterwards. With `dtype` (bfloat16)
    gathered weights and computation have that type, and shards, gradients' sums and the optimizer's state stay as they are
    (float32 master weights).
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype is not None else MixedPrecisionPolicy()
    whole = set(model._no_split_modules or ())
    units = [module for module in model.modules() if type(module).__name__ in whole]
    units += [part for part in (model.projector, model.policy) if part is not None]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "generate")
    return model


def full_state(model: RefragModel) -> dict[str, Tensor]:
    """The whole weights on the CPU, gathered from all processes, which must all call this; empty but in the first process.

    `model.save_pretrained(folder, state_dict=…)` writes them.
    """
    state: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state
