"""Linear programs of a placement, from token counts by logical expert."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton.placement.structure import Structure
from lplb_triton.problem import Problem

__all__ = ["ProgramBuilder", "find_load_targets"]

_Int64Array = NDArray[np.int64]


def find_load_targets(structure: Structure) -> tuple[_Int64Array, _Int64Array]:
    """Find where a program counts each expert's load.

    Parameters
    ----------
    structure : Structure
        Of the placement.

    Returns
    -------
    fixed_rank : numpy.ndarray
        ``[n_logical]`` int64, the rank with all copies of the expert, over all groups; -1 if
        several ranks have copies.
    column : numpy.ndarray
        ``[n_logical]`` int64, the expert's column, over all groups; of no meaning where
        ``fixed_rank`` is not -1.
    """
    _, group_size, max_columns = structure.mask.shape
    fixed_rank = np.full(len(structure.column_of), -1, dtype=np.int64)
    group, rank, slot = np.nonzero(structure.fixed_experts >= 0)
    fixed_rank[structure.fixed_experts[group, rank, slot]] = group * group_size + rank
    column = structure.cell_group.astype(np.int64) * max_columns + structure.column_of
    return fixed_rank, column


class ProgramBuilder:
    """What the programs of all batches under one placement have in common.

    Parameters
    ----------
    structure : Structure
        Of the placement.
    phy2log : numpy.ndarray
        ``[n_physical]`` int64, logical expert of each slot.
    n_copies : numpy.ndarray
        ``[n_logical]`` int64, copies of each expert.
    """

    def __init__(self, structure: Structure, phy2log: _Int64Array, n_copies: _Int64Array) -> None:
        self.structure, self.phy2log, self.n_copies = structure, phy2log, n_copies
        self.fixed_rank, self.column = find_load_targets(structure)
        in_columns = structure.copy_multiplicity[structure.copy_cell >= 0]
        # Splits that are even over ranks and over copies then differ.
        self.has_repeats = bool((in_columns > 1).any())

    def build(self, counts: torch.Tensor) -> Problem:
        """Return the programs of counts ``[B, n_logical]`` float64, ``B * n_group`` of them."""
        n_group, group_size, max_columns = self.structure.mask.shape
        batch, device = len(counts), counts.device
        fixed_rank = torch.from_numpy(self.fixed_rank).to(device)
        column = torch.from_numpy(self.column).to(device)
        single = fixed_rank >= 0
        fixed = counts.new_zeros(batch, n_group * group_size)
        fixed.index_add_(1, fixed_rank[single], counts[:, single])
        weights = counts.new_zeros(batch, n_group * max_columns)
        weights.index_add_(1, column[~single], counts[:, ~single])
        mask = torch.from_numpy(self.structure.mask.copy()).to(device)
        if n_group > 1:
            mask = mask.repeat(batch, 1, 1)
        instances = batch * n_group
        return Problem(
            weights.reshape(instances, max_columns),
            fixed.reshape(instances, group_size),
            mask,
            self._split_over_copies(counts) if self.has_repeats else None,
        )

    def _split_over_copies(self, counts: torch.Tensor) -> torch.Tensor:
        """Shares of columns if every expert is split evenly over its copies.

        ``counts`` are ``[B, n_logical]`` float64; the result is
        ``[B * n_group, group_size, max_columns]``. A column without tokens gets 0.
        """
        s, device = self.structure, counts.device
        n_group, group_size, max_columns = s.mask.shape
        shared = np.flatnonzero(s.copy_cell >= 0)
        expert = torch.from_numpy(self.phy2log[s.copy_slot[shared]]).to(device)
        cell = torch.from_numpy(s.copy_cell[shared].astype(np.int64)).to(device)
        n_copies = torch.from_numpy(self.n_copies.astype(np.int32)).to(device)
        per_copy = (counts / n_copies)[:, expert]
        tokens = counts.new_zeros(len(counts), n_group * group_size * max_columns)
        tokens.index_add_(1, cell, per_copy)
        tokens = tokens.reshape(-1, group_size, max_columns)
        total = tokens.sum(1, keepdim=True)
        return torch.where(total > 0, tokens / total, 0.0)
