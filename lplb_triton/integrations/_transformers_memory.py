"""Slots' weights of one experts module of transformers, in place of its parameters for one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lplb_triton.training.slot_memory import extend_memory, is_extended, keep_redundant_rows
from lplb_triton.training.spread import stack_slots
from lplb_triton.training.spread_plan import SpreadPlan

__all__ = ["ExpertMemory"]


class ExpertMemory:
    """Makes the slots' weights from an experts module's parameters, and puts them in their place.

    Where parameters stay in memory of their own, that memory is extended by the redundant slots,
    so that nothing is copied. Under FSDP, whose memory comes and goes, home and redundant rows are
    put together in each forward pass, and autograd keeps only the redundant ones.

    Parameters
    ----------
    experts : torch.nn.Module
        Whose own parameters, buffers included, hold a row for each local expert.
    n_local : int
        Experts of this rank.
    n_redundant : int
        Redundant slots of this rank.
    """

    def __init__(self, experts: torch.nn.Module, n_local: int, n_redundant: int) -> None:
        self._experts, self._n_local, self._n_redundant = experts, n_local, n_redundant
        self._buffers: dict[str, torch.Tensor] = {}
        # A DTensor's memory can be replaced only where the DTensor itself is at hand. Within the
        # experts' forward there are only its local tensors.
        experts.register_forward_pre_hook(self._extend_parameters)

    def _extend_parameters(self, module: torch.nn.Module, args: object) -> None:
        """Extend the memory of the parameters that were not extended yet, or were moved."""
        pending = {}
        for name, parameter in module.named_parameters(recurse=False):
            local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
            if not is_extended(local, self._buffers.get(name)):
                pending[name] = local
        if not pending or is_managed_by_fsdp(module):
            return
        for name, local in pending.items():
            if is_spreadable(local, self._n_local) and local.is_contiguous():
                self._buffers[name] = extend_memory(local, self._n_redundant)

    def take_originals(self) -> dict[str, torch.Tensor]:
        """Return the module's parameters, which are local tensors here.

        Raises
        ------
        ValueError
            Naming a tensor that does not hold a row of weights for each local expert.
        """
        module = self._experts
        found = dict(module.named_parameters(recurse=False))
        buffers = dict(module.named_buffers(recurse=False))
        for name, tensor in {**found, **buffers}.items():
            if name in buffers or not is_spreadable(tensor, self._n_local):
                raise ValueError(
                    f"{type(module).__name__}.{name} can't have copies on other ranks: it must be "
                    f"a parameter of 16 bits or more with a row for each of the {self._n_local} "
                    f"local experts, got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        if not found:
            raise ValueError(
                f"{type(module).__name__} has no parameters of its own: experts that are modules "
                "of their own, as some quantizers make them, can't have copies on other ranks"
            )
        return found

    def make_slots(
        self, plan: SpreadPlan, originals: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the weights of this rank's slots; collective, forth and back."""
        slots: dict[str, torch.Tensor] = {}
        # Frozen weights go apart: their copies need no gradients, so none are made or returned.
        for trained in (True, False):
            part = {k: v for k, v in originals.items() if v.requires_grad == trained}
            if not part:
                continue
            if self.are_extended(part):
                buffers = [self._buffers[name] for name in part]
            else:
                buffers = None
            made = stack_slots(plan, list(part.values()), buffers=buffers, reuse_gradients=True)
            slots.update(zip(part, made, strict=True))
        return {name: slots[name] for name in originals}

    def are_extended(self, originals: dict[str, torch.Tensor]) -> bool:
        """Return whether each original is the first rows of a buffer with room for slots."""
        return all(is_extended(v, self._buffers.get(name)) for name, v in originals.items())

    @contextmanager
    def replace_parameters(
        self,
        plan: SpreadPlan,
        originals: dict[str, torch.Tensor],
        slots: dict[str, torch.Tensor],
    ) -> Iterator[None]:
        """Give the module the slots' weights for the time of its own forward."""
        module = self._experts
        with ExitStack() as stack:
            copied = [name for name in slots if not self.are_extended({name: originals[name]})]
            if copied and torch.is_grad_enabled():
                kept = keep_redundant_rows(
                    plan, [originals[n] for n in copied], [slots[n] for n in copied]
                )
                stack.enter_context(kept)
            parameters = {name: module._parameters.pop(name) for name in slots}
            try:
                for name, weights in slots.items():
                    setattr(module, name, weights)
                module.num_experts = plan.placement.slots_per_rank
                yield
            finally:
                module.num_experts = self._n_local
                for name in slots:
                    module.__dict__.pop(name, None)
                module._parameters.update(parameters)


def is_spreadable(tensor: torch.Tensor, n_local: int) -> bool:
    """Return whether a tensor holds a row of weights, of 16 bits or more, for each expert."""
    return (
        tensor.is_floating_point()
        and tensor.itemsize >= 2
        and tensor.ndim > 0
        and len(tensor) == n_local
    )


def is_managed_by_fsdp(module: torch.nn.Module) -> bool:
    """Return whether FSDP may take and give the memory of a module's parameters.

    If torch doesn't tell which modules FSDP manages, it may.
    """
    if isinstance(module, FSDPModule):
        return True
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError:
        return True
    # A module does not know its parents, so that those under FSDP are asked for their children.
    return any(
        isinstance(root, FSDPModule) and any(child is module for child in root.modules())
        for root in list(_module_state_mapping)
    )
