"""Memory for the slots of stacked originals without a second copy of what is at home.

Grouped products need the weights of all slots in one tensor. Two ways avoid keeping a copy of the
originals in it for every layer:

- `extend_memory` moves an original into memory with room for the redundant slots behind it. This
  is for tensors that stay where they are, as plain parameters do.
- `keep_redundant_rows` has autograd keep only the redundant rows, and stack them with the originals
  again in the backward pass. This is for tensors whose memory a framework takes and gives, as FSDP
  does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lplb_triton.training.spread_plan import SpreadPlan

__all__ = ["Stamp", "extend_memory", "is_extended", "keep_redundant_rows"]


class Stamp:
    """How often tensors were written, to notice a change between a forward and a backward pass.

    Slots in the originals' memory, or stacked again from them, change with them, where autograd
    would have noticed that a tensor which it keeps was changed.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        # Torch doesn't count the writes of tensors made in inference mode.
        self._tensors = [one.detach() for one in tensors if not one.is_inference()]
        self._versions = [one._version for one in self._tensors]

    def require_unchanged(self) -> None:
        """Raise a RuntimeError if one of the tensors was written since."""
        if [one._version for one in self._tensors] != self._versions:
            raise RuntimeError(
                "parameters changed between a forward pass and its backward pass, which reads the "
                "slots' weights from their memory: run backward before the optimizer's step"
            )


def extend_memory(original: torch.Tensor, n_redundant: int) -> torch.Tensor:
    """Move ``original`` to the first rows of a new buffer, and return the buffer.

    Parameters
    ----------
    original : torch.Tensor
        ``[n_local, ...]``, a plain contiguous tensor. It stays the same object with the same
        values. Whoever holds other views of its old memory no longer sees its changes.
    n_redundant : int
        Rows to have behind it.

    Returns
    -------
    torch.Tensor
        ``[n_local + n_redundant, ...]``.

    Raises
    ------
    ValueError
        If the tensor isn't contiguous.
    """
    if not original.is_contiguous():
        raise ValueError(f"original must be contiguous, got strides {original.stride()}")
    with torch.inference_mode(False), torch.no_grad():
        buffer = torch.zeros(
            (len(original) + n_redundant, *original.shape[1:]),
            dtype=original.dtype,
            device=original.device,
        )
        buffer[: len(original)].copy_(original)
        original.data = buffer[: len(original)]
    return buffer


def is_extended(original: torch.Tensor, buffer: torch.Tensor | None) -> bool:
    """Return whether ``original`` still is the first rows of ``buffer``."""
    return (
        buffer is not None
        and original.data_ptr() == buffer.data_ptr()
        and original.dtype == buffer.dtype
        and original.is_contiguous()
        and original.shape[1:] == buffer.shape[1:]
    )


@contextmanager
def keep_redundant_rows(
    plan: SpreadPlan, originals: Sequence[torch.Tensor], slots: Sequence[torch.Tensor]
) -> Iterator[None]:
    """Have autograd keep only the redundant rows of ``slots`` for the operations in the context.

    In the backward pass the slots are stacked again from the originals' memory, which must hold
    the same weights by then. Where other hooks on saved tensors are active, as in a checkpointed
    region, which keeps nothing, these stay in charge.

    Parameters
    ----------
    plan : SpreadPlan
        The plan that the slots were made by.
    originals : sequence of torch.Tensor
        ``[n_local, ...]`` each.
    slots : sequence of torch.Tensor
        ``[slots_per_rank, ...]`` each, by `stack_slots` without buffers.
    """
    if (
        not torch.is_grad_enabled()
        or torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    ):
        yield
        return
    kept = {
        one.untyped_storage().data_ptr(): _Kept(original.detach(), one.detach(), plan)
        for original, one in zip(originals, slots, strict=True)
    }

    def pack(tensor: torch.Tensor) -> Any:
        found = kept.get(tensor.untyped_storage().data_ptr())
        if found is None or tensor.dtype != found.dtype:
            return tensor
        return found, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        found, shape, stride, offset = packed
        return torch.as_strided(found.stack(), shape, stride, offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    for one in kept.values():
        one.drop()


class _Kept:
    """The rows of a stacked tensor that are kept, and where the others can be read."""

    def __init__(self, original: torch.Tensor, slots: torch.Tensor, plan: SpreadPlan) -> None:
        self.dtype = slots.dtype
        self._original, self._plan = original, plan
        self._stamp = Stamp([original])
        self._slots: torch.Tensor | None = slots
        self._redundant = slots[plan.n_local :].clone()

    def drop(self) -> None:
        """Forget the stacked tensor; from now on it is made again."""
        self._slots = None

    def stack(self) -> torch.Tensor:
        """Return the stacked tensor."""
        if self._slots is not None:
            return self._slots
        self._plan.require_current()
        self._stamp.require_unchanged()
        with torch.no_grad():
            return torch.cat([self._original, self._redundant])
