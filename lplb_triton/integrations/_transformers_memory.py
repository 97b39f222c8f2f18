"""Slots' weights of one experts module of transformers, in place of its parameters for one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lplb_triton.integrations._fsdp import find_lasting_memory
from lplb_triton.training.slot_memory import extend_memory, is_extended, keep_redundant_rows
from lplb_triton.training.spread import stack_slots
from lplb_triton.training.spread_plan import SpreadPlan

__all__ = ["ExpertMemory"]


class ExpertMemory:
    """Makes the slots' weights from an experts module's parameters, and puts them in their place.

    Where this rank's parameters stay in memory of their own, that memory is extended by the
    redundant slots, so that nothing is copied. Where FSDP gathers them, home and redundant rows are
    put together in each forward pass, and autograd keeps only the redundant ones.

    Parameters
    ----------
    experts : torch.nn.Module
        Whose own parameters, buffers included, hold a row for each local expert.
    n_local : int
        Experts of this rank.
    n_redundant : int
        Redundant slots of this rank.
    lends_memory : bool
        Whether parameters' memory is extended. Live slots hold other experts in each batch, whose
        weights a graph of an earlier batch has to keep, so they can't have one memory.
    """

    def __init__(
        self, experts: Any, n_local: int, n_redundant: int, *, lends_memory: bool = True
    ) -> None:
        self._experts, self._n_local, self._n_redundant = experts, n_local, n_redundant
        self._buffers: dict[str, torch.Tensor] = {}
        # Buffers that hold the present weights, from the hook to the experts' own forward.
        self._ready: dict[str, torch.Tensor] = {}
        # Memory can be replaced only where the DTensors themselves are at hand. Within the
        # experts' forward there are only their local tensors.
        if lends_memory:
            experts.register_forward_pre_hook(self._extend_parameters)

    def _extend_parameters(self, module: torch.nn.Module, args: object) -> None:
        """Extend the memory of parameters that were not extended yet, or were moved since."""
        self._ready = {}
        for name, (tensor, announce) in find_lasting_memory(module).items():
            buffer = self._buffers.get(name)
            if buffer is None or not is_extended(tensor, buffer):
                if not is_spreadable(tensor, self._n_local) or not tensor.is_contiguous():
                    continue
                buffer = self._buffers[name] = extend_memory(tensor, self._n_redundant)
                announce()
            self._ready[name] = buffer

    def take_originals(self) -> dict[str, torch.Tensor]:
        """Return the module's parameters, which are local tensors here.

        Raises
        ------
        ValueError
            Naming a tensor that does not hold a row of weights for each local expert.
        """
        module = self._experts
        found: dict[str, torch.Tensor] = dict(module.named_parameters(recurse=False))
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
            buffers = [self._ready[name] for name in part if name in self._ready]
            made = stack_slots(
                plan,
                list(part.values()),
                buffers=buffers if len(buffers) == len(part) else None,
                reuse_gradients=True,
            )
            slots.update(zip(part, made, strict=True))
        return {name: slots[name] for name in originals}

    def _lies_in_buffer(self, name: str, slots: torch.Tensor) -> bool:
        buffer = self._buffers.get(name)
        return buffer is not None and slots.data_ptr() == buffer.data_ptr()

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
            copied = [n for n, one in slots.items() if not self._lies_in_buffer(n, one)]
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
