"""Sizes of the rows of a layer's tensors, and their places in the memory of live slots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["DEFAULT_SMS", "LiveRows", "RowKind"]

# Programs that copy by default: more are no faster over NVLink.
DEFAULT_SMS = 24

# Rows begin at multiples of so many bytes, the size of one access.
UNIT = 16


class RowKind(NamedTuple):
    """What the rows of one tensor are."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * self.dtype.itemsize


class LiveRows:
    """Rows of several tensors, each with ``slots`` live slots, one tensor after the other.

    Parameters
    ----------
    kinds : sequence of RowKind
        Of each tensor.
    slots : int
        Live slots of a rank.

    Attributes
    ----------
    units, offsets : list of int
        By tensor, units of 16 bytes of a row, and before its slot 0.
    total_units : int
        Units of all tensors' slots.
    trained : list of int
        Numbers of the tensors that get gradients.
    gradient_units : int
        Units of all gradients of the slots.
    """

    def __init__(self, kinds: Sequence[RowKind], slots: int) -> None:
        self.kinds, self.slots = tuple(kinds), slots
        self.units = [-(-kind.row_bytes // UNIT) for kind in kinds]
        self.offsets, self.total_units = _lay_out(self.units, slots)
        self.trained = [number for number, kind in enumerate(kinds) if kind.trained]
        offsets, self.gradient_units = _lay_out([self.units[i] for i in self.trained], slots)
        self._gradient_offsets = dict(zip(self.trained, offsets, strict=True))

    @property
    def words(self) -> int:
        """32-bit words of all tensors' slots."""
        return self.total_units * UNIT // 4

    @property
    def live_bytes(self) -> int:
        """Bytes of all tensors' slots."""
        return self.total_units * UNIT

    def gradient_place(self, number: int) -> tuple[int, int, int]:
        """Return units of a row, before a tensor's gradients, and of all gradients."""
        return self.units[number], self._gradient_offsets[number], self.gradient_units

    def view(self, live: torch.Tensor, number: int) -> torch.Tensor:
        """Return a tensor's slots ``[slots, ...]`` in memory of ``words`` int32."""
        return self.view_rows(live, number, self.slots, self.offsets[number])

    def view_rows(self, memory: torch.Tensor, number: int, n: int, offset: int) -> torch.Tensor:
        """Return ``n`` rows of a tensor that begin ``offset`` units into int32 memory."""
        kind = self.kinds[number]
        per_unit = UNIT // kind.dtype.itemsize
        inner = [math.prod(kind.shape[i + 1 :]) for i in range(len(kind.shape))]
        # A tensor with a count of writes of its own: that the slots' memory is filled anew while a
        # graph is alive is as it should be, so autograd must not know.
        view = torch.empty(0, dtype=kind.dtype, device=memory.device)
        begin = memory.storage_offset() * memory.element_size() // kind.dtype.itemsize
        outer = (self.units[number] * per_unit, *inner)
        storage = memory.untyped_storage()
        return view.set_(storage, begin + offset * per_unit, (n, *kind.shape), outer)

    def shrink(self) -> LiveRows:
        """Return small rows for which the same kernels are compiled."""
        small = []
        for kind in self.kinds:
            width = math.prod(kind.shape)
            small.append(kind._replace(shape=(16 if width % 8 == 0 else 1,)))
        return LiveRows(small, self.slots)


def _lay_out(units: Sequence[int], slots: int) -> tuple[list[int], int]:
    """Return where each tensor begins, and where the last one ends."""
    offsets, total = [], 0
    for n in units:
        offsets.append(total)
        total += n * slots
    return offsets, total
