"""SGLang's maps of one layer: checks, and the tables that a solver makes of them."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton.integrations._checks import check_int_map
from lplb_triton.placement import Placement

__all__ = ["MAP_NAMES", "Maps", "Tables", "read_maps"]

# The maps of `LPLBSolver`, in the order of its arguments.
MAP_NAMES = ("phy2log", "log2phy", "logical_to_all_physical_map_num_valid")


class Maps(NamedTuple):
    """A layer's placement, and an entry for each slot that the rows of ``log2phy`` list."""

    placement: Placement
    at: NDArray[np.int64]
    """Index in the flat ``log2phy``, ascending."""
    slot: NDArray[np.int64]
    cell: NDArray[np.int64]
    """The copy's index in the flat shares; one past them if the expert is on one rank only. Where
    shares are by slot, the slot."""
    part: NDArray[np.float32]
    """The fraction of that share that goes to this copy."""
    even: NDArray[np.float32]
    """One divided by the number of slots that the row lists."""

    def same_entries(self, other: Maps) -> bool:
        """Whether the tables of both are the same."""
        return (
            np.array_equal(self.at, other.at)
            and np.array_equal(self.slot, other.slot)
            and np.array_equal(self.cell, other.cell)
            and np.array_equal(self.part, other.part)
        )


def read_maps(
    phy2log: torch.Tensor,
    log2phy: torch.Tensor,
    n_valid: torch.Tensor | None,
    num_gpus: int,
    known: Placement | None,
    stacklevel: int,
    by_slot: bool = False,
) -> Maps:
    """Check the maps of `LPLBSolver` against each other, or raise naming the argument.

    ``known`` is a placement that is returned if ``phy2log`` is its slot map. Shares are by rank and
    column, or ``by_slot``. Warns of rows that
    list only some of an expert's slots, on behalf of the caller ``stacklevel`` frames up.
    """
    n_physical, (n_logical, width) = len(phy2log), log2phy.shape
    if n_physical % num_gpus:
        raise ValueError(f"num_gpus must divide the number of slots {n_physical}, got {num_gpus}")
    experts = phy2log.detach().cpu().numpy()
    rows = np.ascontiguousarray(log2phy.detach().cpu().numpy()).reshape(-1)
    if known is not None and np.array_equal(known.phy2log.numpy(), experts):
        placement = known
    else:
        placement = Placement(phy2log, num_gpus, n_logical=n_logical)
    at = np.flatnonzero(rows != -1)
    expert, slot = at // width, rows[at].astype(np.int64)
    low, high = int(slot.min(initial=0)), int(slot.max(initial=0))
    if low < 0 or high >= n_physical:
        raise ValueError(f"log2phy must hold slots in [-1, {n_physical}), got {low}..{high}")
    wrong = experts[slot] != expert
    if wrong.any():
        raise ValueError(
            f"log2phy gives expert {int(expert[wrong.argmax()])} a slot that phy2log gives to "
            "another"
        )
    if np.bincount(slot, minlength=1).max() > 1:
        raise ValueError("log2phy lists a slot twice")
    listed = np.bincount(expert, minlength=n_logical)
    if not listed.all():
        raise ValueError(f"log2phy gives expert {int(listed.argmin())} no slot")
    _check_n_valid(n_valid, listed)
    s = placement.structure
    partial = int((listed != s.copy_start[1:] - s.copy_start[:-1]).sum())
    if partial:
        warnings.warn(
            f"log2phy lists only some of the slots of {partial} experts, so sampling cannot "
            "follow the plan for them; run() uses every slot",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )
    cell, multiplicity = np.empty((2, n_physical), dtype=np.int64)
    cell[s.copy_slot] = np.where(s.copy_cell < 0, s.mask.size, s.copy_cell)
    multiplicity[s.copy_slot] = s.copy_multiplicity
    one = np.float32(1)
    return Maps(
        placement=placement,
        at=at,
        slot=slot,
        cell=slot if by_slot else cell[slot],
        part=one / (np.ones_like(slot) if by_slot else multiplicity[slot]).astype(np.float32),
        even=one / listed[expert].astype(np.float32),
    )


def _check_n_valid(n_valid: object, listed: NDArray[np.int64]) -> None:
    """Raise unless ``n_valid``, if given, counts the slots that the rows list."""
    name = MAP_NAMES[2]
    if n_valid is None:
        return
    if not np.array_equal(check_int_map(name, n_valid, 1).detach().cpu().numpy(), listed):
        raise ValueError(f"{name} must count the slots in each row of log2phy")


class Tables:
    """Tables that turn shares by rank and column into probabilities by expert and copy.

    They are in fixed memory on the device, each ``[num_logical, max_copies]`` in the layout of
    ``log2phy``.
    """

    log2phy: torch.Tensor
    """int64, slots, padded with -1."""
    cell: torch.Tensor
    """int64, as in `Maps`; -1 on padding, which selects the last entry."""
    part: torch.Tensor
    """float32, as in `Maps`; 0 on padding."""
    even: torch.Tensor
    """float32, as in `Maps`; 0 on padding."""

    def __init__(self, maps: Maps, shape: tuple[int, int], device: torch.device) -> None:
        self._integers = torch.full((2, *shape), -1, dtype=torch.int64, device=device)
        self._fractions = torch.zeros((2, *shape), dtype=torch.float32, device=device)
        self.log2phy, self.cell = self._integers
        self.part, self.even = self._fractions
        self._maps: Maps | None = None
        self._at = torch.empty(0, dtype=torch.int64, device=device)
        self.write(maps)

    def write(self, maps: Maps) -> bool:
        """Write the entries of other maps of these sizes; return False if they are equal."""
        if self._maps is not None and self._maps.same_entries(maps):
            return False
        at = torch.from_numpy(maps.at).to(self._at.device)
        for tables, padding, entries in (
            (self._integers, -1, (maps.slot, maps.cell)),
            (self._fractions, 0, (maps.part, maps.even)),
        ):
            flat, values = tables.view(2, -1), torch.from_numpy(np.array(entries))
            flat.index_fill_(1, self._at, padding)
            flat.index_copy_(1, at, values.to(flat.device))
        self._at, self._maps = at, maps
        return True
