"""Where the parameters of a module lie, under FSDP and without."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

__all__ = ["LastingMemory", "find_lasting_memory"]


class LastingMemory(NamedTuple):
    """A rank's part of a parameter, in memory that stays from step to step."""

    tensor: torch.Tensor
    """The part itself, which the optimizer changes."""
    announce: Callable[[], None]
    """To be called when the tensor was given other memory."""


def find_lasting_memory(module: torch.nn.Module) -> dict[str, LastingMemory]:
    """Return the parameters of a module whose values lie whole in memory that stays, by name.

    To be called within the module's forward pass. FSDP gathers parameters into memory of its own,
    takes it back, and is left alone, except where each rank has its shard to itself: then the
    shard holds the same values.
    """
    if isinstance(module, FSDPModule):
        try:
            return dict(_find_whole_shards(module))
        except AttributeError:
            # These are no public names. Under a torch without them the weights are copied instead.
            return {}
    if _is_managed_by_parent(module):
        return {}
    return {
        name: LastingMemory(_get_local(parameter), _do_nothing)
        for name, parameter in module.named_parameters(recurse=False)
    }


def _get_local(parameter: torch.Tensor) -> torch.Tensor:
    """Return the tensor with this rank's part of a parameter."""
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def _do_nothing() -> None:
    pass


def _find_whole_shards(module: Any) -> Iterator[tuple[str, LastingMemory]]:
    """Yield the shards of a module under FSDP that are whole and of the dtype it computes in."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for shard in (shard for group in groups for shard in group.fsdp_params):
        if shard._module_info.module is not module or shard.mesh_info.shard_mesh_size != 1:
            continue
        name, memory = shard._module_info.param_name, shard._sharded_param_data
        gathered, local = module._parameters[name], shard.sharded_param._local_tensor
        if (
            type(memory) is torch.Tensor
            and type(local) is torch.Tensor
            and memory.data_ptr() == local.data_ptr()
            and (gathered.dtype, gathered.device) == (local.dtype, local.device)
            and _get_local(gathered).shape == local.shape
        ):
            yield name, LastingMemory(local, _make_announcement(shard, local))


def _make_announcement(shard: Any, local: torch.Tensor) -> Callable[[], None]:
    """Return a function that has FSDP read a shard from where it lies now."""

    def announce() -> None:
        shard._sharded_param_data = local.view(-1)

    return announce


def _is_managed_by_parent(module: torch.nn.Module) -> bool:
    """Return whether FSDP may manage a module's parameters as part of another module.

    If torch doesn't tell which modules FSDP manages, it may.
    """
    try:
        states: Any = importlib.import_module("torch.distributed._composable_state")
        roots: list[torch.nn.Module] = list(states._module_state_mapping)
    except (ImportError, AttributeError):
        return True
    # A module does not know its parents, so that those under FSDP are asked for their children.
    managed = [root for root in roots if issubclass(type(root), FSDPModule)]
    return any(child is module for root in managed for child in root.modules())
