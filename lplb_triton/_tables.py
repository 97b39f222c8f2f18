"""A placement's index tables in fixed device memory, rewritten in place."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lplb_triton.reference import last_copies, quantize_shares

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.placement import Placement

__all__ = ["DeviceTables"]

# Sections start on this many bytes, so that no kernel is compiled twice for alignment.
ALIGNMENT = 256
# Copies of a column of which each is joined with each.
FEW = 4


def _shared_copies(placement: Placement) -> NDArray[np.int32]:
    """[n_group, n] copies of replicated experts by group, padded with -1.

    Every redundant slot makes at most two of them, whatever the placement.
    """
    s = placement.structure
    size = (placement.n_group, 2 * placement.redundant_per_group)
    shared = np.full(size, -1, dtype=np.int32)
    per_expert = np.diff(s.copy_start)
    copies = np.flatnonzero(np.repeat(per_expert > 1, per_expert))
    group = np.repeat(s.cell_group, per_expert)[copies]
    for g in range(placement.n_group):
        mine = copies[group == g]
        shared[g, : mine.size] = mine
    return shared


def _edges(placement: Placement) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Pairs of copies that the solver levels, in classes that name no rank twice.

    Up to FEW copies of a column are joined each with each, more of them as the corners of a
    hypercube are, so that few sweeps reach all. Returns [n_group, most_classes + 1, width, 2]
    (the two ranks, the first times 2**16, and the column; -1 for none, all of it in the class
    after the last) and the number of classes [n_group]; see docs/method.md, equation 18.
    """
    mask = placement.structure.mask
    n_group, n_ranks, n_columns = mask.shape
    most_edges = max(FEW - 1, (n_ranks - 1).bit_length())
    most_on_a_rank = min(placement.slots_per_rank, n_columns)
    most = min(2 * most_on_a_rank, placement.redundant_per_group) * most_edges
    table = np.full((n_group, most + 1, max(1, n_ranks // 2), 2), -1, dtype=np.int32)
    n_classes = np.zeros(n_group, dtype=np.int32)
    for group in range(n_group):
        edges = []
        for column in np.flatnonzero(mask[group].any(0)):
            ranks = np.flatnonzero(mask[group, :, column]).tolist()
            for i, j in itertools.combinations(range(len(ranks)), 2):
                if len(ranks) <= FEW or (i ^ j).bit_count() == 1:
                    edges.append((ranks[i], ranks[j], int(column)))
        degree = np.bincount([r for edge in edges for r in edge[:2]], minlength=n_ranks)
        # Greedily, crowded ranks first: fewer than twice the largest degree.
        edges.sort(key=lambda edge: -int(degree[edge[0]] + degree[edge[1]]))
        taken: list[set[int]] = []
        for first, second, at in edges:
            fits = (k for k, t in enumerate(taken) if first not in t and second not in t)
            k = next(fits, len(taken))
            if k == len(taken):
                taken.append(set())
            table[group, k, len(taken[k]) // 2] = (first << 16 | second, at)
            taken[k] |= {first, second}
        n_classes[group] = len(taken)
    return table, n_classes


def _arrays(placement: Placement) -> dict[str, NDArray[Any]]:
    """Everything the kernels read of a placement; shapes depend on its sizes alone."""
    s = placement.structure
    lengths = np.diff(s.column_start, axis=1)
    first = np.full(lengths.shape, -1, dtype=np.int32)
    first[lengths > 0] = s.column_members[s.column_start[:, :-1][lengths > 0]]
    most_copies = int(np.diff(s.copy_start).max())
    shared = _shared_copies(placement)
    edges, n_classes = _edges(placement)
    mask = torch.from_numpy(s.mask)
    even_units = quantize_shares(mask / mask.sum(1, keepdim=True).clamp(min=1), mask)
    return {
        "even_units": even_units.numpy().astype(np.int32),
        "column_last": last_copies(mask).numpy().astype(np.int32),
        "fixed_experts": s.fixed_experts,
        "column_first": first,
        "column_start": s.column_start,
        "column_members": s.column_members,
        "longest_column": lengths.max(axis=1, initial=0).astype(np.int32),
        "copy_cell": s.copy_cell,
        "shared_copies": shared,
        "shared_cells": np.where(shared >= 0, s.copy_cell[shared], np.int32(-1)),
        "copy_index": s.copy_index,
        "copy_multiplicity": s.copy_multiplicity,
        "most_on_a_rank": s.copy_multiplicity.max(keepdims=True),
        "edges": edges,
        "n_classes": n_classes,
        "copy_start": s.copy_start,
        "copy_slot": s.copy_slot,
        "search_steps": np.array([math.ceil(math.log2(most_copies))], dtype=np.int32),
    }


class DeviceTables:
    """One block of device memory with a typed view for every table.

    Captured CUDA graphs and launches hold the views' addresses, so the block lives as long as
    its owner and `write` only changes what is in it.
    """

    def __init__(self, placement: Placement, device: torch.device) -> None:
        arrays = _arrays(placement)
        self._offsets: dict[str, int] = {}
        size = 0
        for name, array in arrays.items():
            self._offsets[name] = size
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        # A table may be empty (no columns); its view must still have an address.
        self._block = torch.zeros(size + ALIGNMENT, dtype=torch.uint8, device=device)
        self.views = {
            name: self._view(self._offsets[name], array) for name, array in arrays.items()
        }
        self._sizes = {name: array.shape for name, array in arrays.items()}
        self.write(placement)

    @property
    def n_bytes(self) -> int:
        """Size of the block."""
        return self._block.numel()

    def _view(self, offset: int, array: NDArray[Any]) -> torch.Tensor:
        dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
        return self._block[offset : offset + array.nbytes].view(dtype).view(array.shape)

    def write(self, placement: Placement) -> None:
        """Copy another placement of the same sizes into the block, on the current stream."""
        arrays = _arrays(placement)
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self._sizes:
            raise ValueError(f"placement must have the sizes of the first one, got {placement}")
        host = np.zeros(self._block.numel(), dtype=np.uint8)
        for name, array in arrays.items():
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            host[self._offsets[name] : self._offsets[name] + raw.size] = raw
        self._block.copy_(torch.from_numpy(host))
