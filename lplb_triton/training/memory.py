"""Which tensors are the same memory: what belongs to an expert must be moved once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from lplb_triton.training.rows import Rows

__all__ = ["keep_distinct"]


class _Extent(NamedTuple):
    """Bytes that one row takes: all ``start + sum(k * stride)`` with ``0 <= k < size``."""

    device: str
    start: int
    dims: tuple[tuple[int, int], ...]
    """(size, stride in bytes), the innermost first; neighbours that follow on are one."""

    @property
    def end(self) -> int:
        """One past the last byte."""
        if any(size == 0 for size, _ in self.dims):
            return self.start
        return self.start + 1 + sum((size - 1) * stride for size, stride in self.dims)


class _Row(NamedTuple):
    extent: _Extent
    label: str


def keep_distinct(entries: Mapping[str, Rows]) -> tuple[dict[str, Rows], dict[str, str]]:
    """Leave out what is the same rows as an earlier entry.

    Parameters
    ----------
    entries : mapping of str to Rows
        By what the caller calls them.

    Returns
    -------
    kept : dict
        The entries without those left out.
    same_as : dict
        For each that was left out the label of the entry that it is.

    Raises
    ------
    ValueError
        Naming both, if two of those kept share any memory.
    """
    kept: dict[str, Rows] = {}
    same_as: dict[str, str] = {}
    first: dict[tuple[_Extent, ...], str] = {}
    found: list[_Row] = []
    for label, rows in entries.items():
        extents = _extents(rows)
        if all(extent.end > extent.start for extent in extents):
            earlier = first.setdefault(extents, label)
            if earlier != label:
                same_as[label] = earlier
                continue
            found += [_Row(extent, label) for extent in extents]
        kept[label] = rows
    _refuse_shared(found)
    return kept, same_as


def _extents(rows: Rows) -> tuple[_Extent, ...]:
    if not isinstance(rows, torch.Tensor):
        return tuple(_extent(part, part.data_ptr(), 0) for part in rows)
    step = rows.stride(0) * rows.element_size()
    return tuple(_extent(rows, rows.data_ptr() + i * step, 1) for i in range(len(rows)))


def _extent(tensor: torch.Tensor, start: int, skip: int) -> _Extent:
    """Extent of what is at ``start``, of the tensor's layout without its first ``skip`` axes."""
    n_bytes = tensor.element_size()
    dims = [(n_bytes, 1)]
    layout = list(zip(tensor.shape, tensor.stride(), strict=True))[skip:]
    for size, stride in reversed(layout):
        inner_size, inner_stride = dims[-1]
        if size == 1:
            continue
        if stride * n_bytes == inner_size * inner_stride:
            dims[-1] = (inner_size * size, inner_stride)
        else:
            dims.append((size, stride * n_bytes))
    return _Extent(str(tensor.device), start, tuple(dims))


def _refuse_shared(rows: list[_Row]) -> None:
    """Raise if two rows have a byte in common."""
    together: list[_Row] = []
    device, end = "", 0
    for row in sorted(rows):
        if row.extent.device != device or row.extent.start >= end:
            _refuse_shared_among(together)
            together, device, end = [], row.extent.device, 0
        together.append(row)
        end = max(end, row.extent.end)
    _refuse_shared_among(together)


def _refuse_shared_among(rows: list[_Row]) -> None:
    """Raise if two of some rows whose ranges of addresses overlap have a byte in common.

    Ranges may overlap where memory does not, as those of two blocks of columns do. So the bytes
    are marked, in units that divide every size and distance.
    """
    if len(rows) < 2:
        return
    base = rows[0].extent.start
    unit = math.gcd(*(row.extent.start - base for row in rows))
    for row in rows:
        block, *outer = row.extent.dims
        unit = math.gcd(unit, block[0], *(stride for _, stride in outer))
    labels = sorted({row.label for row in rows})
    marks = np.zeros((max(row.extent.end for row in rows) - base) // unit, dtype=np.int16)
    for row in rows:
        block, *outer = row.extent.dims
        dims = [(block[0] // unit, 1), *((size, stride // unit) for size, stride in outer)]
        view = np.lib.stride_tricks.as_strided(
            marks[(row.extent.start - base) // unit :],
            [size for size, _ in dims],
            [stride * marks.itemsize for _, stride in dims],
        )
        other = int(view.max())
        if other:
            raise ValueError(_describe_shared(labels[other - 1], row.label))
        view[...] = labels.index(row.label) + 1


def _describe_shared(one: str, other: str) -> str:
    if one == other:
        return f"{one} must hold memory of its own for each expert, but its rows share some"
    return (
        f"{one} and {other} share memory without being the same rows in the same order: "
        "moving both would move experts twice"
    )
