"""Tensors that share memory: what belongs to an expert must be moved once."""

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
    """(size, stride in bytes), the innermost first; contiguous dimensions are merged."""

    @property
    def end(self) -> int:
        """One past the last byte."""
        if any(size == 0 for size, _ in self.dims):
            return self.start
        return self.start + 1 + sum((size - 1) * stride for size, stride in self.dims)


class _Row(NamedTuple):
    """Memory of one row, and the label of its entry."""

    extent: _Extent
    label: str


def keep_distinct(entries: Mapping[str, Rows]) -> tuple[dict[str, Rows], dict[str, str]]:
    """Leave out entries that are the same rows as an earlier entry.

    Parameters
    ----------
    entries : mapping of str to Rows
        By what the caller calls them.

    Returns
    -------
    kept : dict
        The entries without those left out.
    same_as : dict
        For each entry that was left out, the label of the entry with the same rows.

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
        extents = _list_extents(rows)
        if all(extent.end > extent.start for extent in extents):
            earlier = first.setdefault(extents, label)
            if earlier != label:
                same_as[label] = earlier
                continue
            found += [_Row(extent, label) for extent in extents]
        kept[label] = rows
    _reject_overlap(found)
    return kept, same_as


def _list_extents(rows: Rows) -> tuple[_Extent, ...]:
    """List the memory of each row."""
    if not isinstance(rows, torch.Tensor):
        return tuple(_find_extent(part, part.data_ptr(), 0) for part in rows)
    step = rows.stride(0) * rows.element_size()
    return tuple(_find_extent(rows, rows.data_ptr() + i * step, 1) for i in range(len(rows)))


def _find_extent(tensor: torch.Tensor, start: int, skip: int) -> _Extent:
    """Find the extent from ``start`` of the tensor's layout without its first ``skip`` axes."""
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


def _reject_overlap(rows: list[_Row]) -> None:
    """Raise if two rows have a byte in common."""
    candidates: list[_Row] = []
    device, end = "", 0
    for row in sorted(rows):
        if row.extent.device != device or row.extent.start >= end:
            _reject_overlap_among(candidates)
            candidates, device, end = [], row.extent.device, 0
        candidates.append(row)
        end = max(end, row.extent.end)
    _reject_overlap_among(candidates)


def _reject_overlap_among(rows: list[_Row]) -> None:
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
    """Say which entries share memory."""
    if one == other:
        return f"{one} must hold memory of its own for each expert, but its rows share some"
    return (
        f"{one} and {other} share memory without being the same rows in the same order: "
        "moving both would move experts twice"
    )
