"""Which expert sits in which slot: one immutable object, whatever it was made from."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import topologies
from lplb_triton.eplb import rebalance_experts
from lplb_triton.problem import Problem

if TYPE_CHECKING:
    from lplb_triton.solution import Solution

__all__ = ["Placement"]

Int32Array = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


class Structure(NamedTuple):
    """The placement as the LP and the token kernels read it.

    Copies are numbered 0 .. n_physical - 1, sorted by logical expert, then by slot; so the
    copies of one expert are contiguous and ascend by rank. Columns and ranks are numbered
    within their group.
    """

    column_of: Int32Array
    """[n_logical] column of each expert, -1 if all its copies are on one rank."""
    cell_group: Int32Array
    """[n_logical] group of each expert."""
    mask: BoolArray
    """[n_group, group_size, max_columns] whether a rank holds a copy of a column."""
    fixed_experts: Int32Array
    """[n_group, group_size, slots_per_rank] experts that only this rank holds, padded with -1."""
    column_start: Int32Array
    """[n_group, max_columns + 1] start of each column's run in ``column_members``."""
    column_members: Int32Array
    """[n_logical] replicated experts, sorted by group and column (padded with -1)."""
    copy_start: Int32Array
    """[n_logical + 1] first copy of each expert."""
    copy_slot: Int32Array
    """[n_physical] slot of each copy."""
    copy_cell: Int32Array
    """[n_physical] flat index of the copy's share in [n_group, group_size, max_columns], or -1."""
    copy_index: Int32Array
    """[n_physical] index among the copies of one expert on one rank."""
    copy_multiplicity: Int32Array
    """[n_physical] number of copies of that expert on that rank."""


def _as_int_array(name: str, value: object) -> NDArray[np.int64]:
    """Copy an integer tensor or array to the CPU, or raise naming ``name``."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
    return array.astype(np.int64)


def check_integer(name: str, value: object, minimum: int = 1) -> int:
    """Return an int of at least ``minimum``, or raise naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


class Placement:
    """Which logical expert each physical slot holds, and what follows from it.

    Immutable and on the CPU; every tensor it returns is a fresh copy. Slots of one rank are
    contiguous: slot p is on rank ``p // slots_per_rank``. Make one with `from_topology`,
    `from_phy2log` or `from_history`.

    Parameters
    ----------
    phy2log : torch.Tensor or array
        ``[n_physical]`` int, logical expert of each physical slot.
    ep_size : int
        Number of expert-parallel ranks; divides ``n_physical``.
    n_logical : int or None
        Number of logical experts; by default the largest id plus one.
    n_group : int
        Number of groups of consecutive ranks, each with an LP of its own. All copies of an
        expert must lie in one group, and each group must hold equally many experts.
    max_columns : int or None
        Columns per group that device buffers are sized for. By default the number of redundant
        slots per group, which bounds the columns of any placement of the same sizes.

    Raises
    ------
    TypeError, ValueError
        Naming the argument: an expert without a slot, an id out of range, sizes that don't
        divide, an expert whose copies span groups, too many columns.
    """

    def __init__(
        self,
        phy2log: torch.Tensor | NDArray[np.integer],
        ep_size: int,
        *,
        n_logical: int | None = None,
        n_group: int = 1,
        max_columns: int | None = None,
    ) -> None:
        flat = _as_int_array("phy2log", phy2log)
        if flat.ndim != 1 or flat.size == 0:
            raise ValueError(f"phy2log must be one-dimensional and not empty, got {flat.shape}")
        self.ep_size = check_integer("ep_size", ep_size)
        self.n_group = check_integer("n_group", n_group)
        self.n_physical = int(flat.size)
        self.n_logical = (
            int(flat.max()) + 1 if n_logical is None else check_integer("n_logical", n_logical)
        )
        if self.n_physical % self.ep_size:
            raise ValueError(
                f"ep_size must divide the number of slots {self.n_physical}, got {self.ep_size}"
            )
        if self.ep_size % self.n_group:
            raise ValueError(f"n_group must divide ep_size {self.ep_size}, got {self.n_group}")
        if flat.min() < 0 or flat.max() >= self.n_logical:
            raise ValueError(
                f"phy2log must hold ids in [0, {self.n_logical}), got {flat.min()}..{flat.max()}"
            )
        counts = np.bincount(flat, minlength=self.n_logical)
        if (counts == 0).any():
            raise ValueError(
                f"phy2log gives no slot to {int((counts == 0).sum())} logical experts, "
                f"first {int(np.flatnonzero(counts == 0)[0])}"
            )
        self.slots_per_rank = self.n_physical // self.ep_size
        self.group_size = self.ep_size // self.n_group
        self._phy2log = flat
        self._phy2log.setflags(write=False)
        self._counts = counts
        self.redundant_per_group = (self.n_physical - self.n_logical) // self.n_group
        self.max_columns = self.redundant_per_group if max_columns is None else max_columns
        self.structure = self._build_structure()

    @classmethod
    def from_phy2log(
        cls,
        phy2log: torch.Tensor | NDArray[np.integer],
        ep_size: int,
        *,
        n_logical: int | None = None,
        n_group: int = 1,
    ) -> Placement:
        """Make a placement from any slot map, for example a row of EPLB's ``phy2log``.

        Parameters
        ----------
        phy2log : torch.Tensor or array
            ``[n_physical]`` int, logical expert of each slot.
        ep_size : int
            Number of ranks.
        n_logical : int or None
            Number of logical experts; by default the largest id plus one.
        n_group : int
            Number of groups of ranks.

        Returns
        -------
        Placement
        """
        return cls(phy2log, ep_size, n_logical=n_logical, n_group=n_group)

    @classmethod
    def from_topology(
        cls,
        r2o: torch.Tensor,
        n_routed_experts: int,
        n_logical_routed_experts: int,
        ep_size: int,
        *,
        workload: torch.Tensor | None = None,
        num_nodes: int = 1,
    ) -> Placement:
        """Make a placement from a topology, by the rules of DeepSeek's LPLB.

        Experts are spread over the ranks (in order, or by EPLB without replicas if there is a
        load history, the heaviest experts of each rank first). The first
        ``combined * num_redundants`` experts of each rank are copied: redundant slot
        ``(c, d)`` of rank i holds expert ``(c, d)`` of rank ``r2o[i, d]`` of the same group,
        where expert ``(c, d)`` is the ``(c * num_redundants + d)``-th.

        Parameters
        ----------
        r2o : torch.Tensor
            ``[group_size, num_redundants]`` int, see `lplb_triton.topologies`.
        n_routed_experts : int
            Number of slots over all ranks.
        n_logical_routed_experts : int
            Number of logical experts.
        ep_size : int
            Number of ranks, a multiple of ``group_size``.
        workload : torch.Tensor or None
            ``[n_logical]`` load history by logical expert.
        num_nodes : int
            Number of nodes that EPLB packs groups of experts to.

        Returns
        -------
        Placement
            With ``n_group = ep_size // group_size`` groups.

        Raises
        ------
        ValueError
            Naming the argument whose size doesn't fit.
        """
        r2o = topologies.validate(r2o)
        group_size, num_redundants = r2o.shape
        n_physical = check_integer("n_routed_experts", n_routed_experts)
        n_logical = check_integer("n_logical_routed_experts", n_logical_routed_experts)
        ep_size = check_integer("ep_size", ep_size)
        if ep_size % group_size:
            raise ValueError(f"ep_size must be a multiple of {group_size} (r2o), got {ep_size}")
        for name, value in (
            ("n_routed_experts", n_physical),
            ("n_logical_routed_experts", n_logical),
        ):
            if value % ep_size:
                raise ValueError(f"{name} must be a multiple of ep_size {ep_size}, got {value}")
        n_local = n_logical // ep_size
        redundant = n_physical // ep_size - n_local
        if redundant < num_redundants or redundant % num_redundants:
            raise ValueError(
                f"n_routed_experts gives {redundant} redundant slots per rank, expected a "
                f"positive multiple of the {num_redundants} columns of r2o"
            )
        if redundant > n_local:
            raise ValueError(
                f"n_routed_experts gives {redundant} redundant slots per rank, more than the "
                f"{n_local} logical experts a rank has"
            )
        n_group, combined = ep_size // group_size, redundant // num_redundants
        order = _spread(workload, n_logical, n_group, num_nodes, ep_size)
        order = order.reshape(n_group, group_size, n_local)
        originals = order[:, :, :redundant].reshape(n_group, group_size, combined, num_redundants)
        source = np.broadcast_to(r2o.numpy()[None, :, None, :], originals.shape)
        copies = np.take_along_axis(originals, source.astype(np.int64), axis=1)
        slots = np.concatenate([order, copies.reshape(n_group, group_size, redundant)], axis=2)
        return cls(
            slots.reshape(-1),
            ep_size,
            n_logical=n_logical,
            n_group=n_group,
            max_columns=group_size * num_redundants,
        )

    @classmethod
    def from_history(
        cls,
        load: torch.Tensor,
        ep_size: int,
        *,
        redundant_per_rank: int = 1,
        num_groups: int = 1,
        num_nodes: int = 1,
    ) -> Placement:
        """Place and replicate experts with EPLB by a load history.

        Parameters
        ----------
        load : torch.Tensor
            ``[n_logical]``, load of each logical expert, non-negative.
        ep_size : int
            Number of ranks.
        redundant_per_rank : int
            Redundant slots per rank (0: reorder only).
        num_groups, num_nodes : int
            EPLB's expert groups and nodes.

        Returns
        -------
        Placement
            One LP group over all ranks.
        """
        load = torch.as_tensor(load)
        if load.ndim != 1:
            raise ValueError(f"load must be one-dimensional, got shape {tuple(load.shape)}")
        if redundant_per_rank < 0:
            raise ValueError(f"redundant_per_rank must not be negative, got {redundant_per_rank}")
        n_physical = load.numel() + redundant_per_rank * ep_size
        phy2log, _, _ = rebalance_experts(
            load.unsqueeze(0), n_physical, num_groups, num_nodes, ep_size
        )
        return cls(phy2log[0], ep_size, n_logical=load.numel())

    @property
    def phy2log(self) -> torch.Tensor:
        """``[n_physical]`` int32, logical expert of each slot."""
        return torch.from_numpy(self._phy2log.astype(np.int32))

    @property
    def logcnt(self) -> torch.Tensor:
        """``[n_logical]`` int32, number of copies of each logical expert."""
        return torch.from_numpy(self._counts.astype(np.int32))

    @property
    def rank_of_slot(self) -> torch.Tensor:
        """``[n_physical]`` int32, rank of each slot."""
        ranks = np.arange(self.n_physical) // self.slots_per_rank
        return torch.from_numpy(ranks.astype(np.int32))

    @property
    def log2phy(self) -> torch.Tensor:
        """``[n_logical, max(logcnt)]`` int32, slots of each expert, padded with -1.

        Ordered by the slot's place within its rank, then by rank; under a topology, originals
        so come before copies.
        """
        slots = np.arange(self.n_physical)
        local, rank = slots % self.slots_per_rank, slots // self.slots_per_rank
        order = np.lexsort((rank, local, self._phy2log))
        table = np.full((self.n_logical, int(self._counts.max())), -1, dtype=np.int32)
        first = np.repeat(self.structure.copy_start[:-1], self._counts)
        table[self._phy2log[order], np.arange(self.n_physical) - first] = order
        return torch.from_numpy(table)

    def __repr__(self) -> str:
        """Sizes in one line."""
        return (
            f"Placement({self.n_logical} experts in {self.n_physical} slots, {self.ep_size} ranks, "
            f"{self.n_group} group(s), up to {int(self._counts.max())} copies)"
        )

    def _build_structure(self) -> Structure:
        """Derive every index table from ``phy2log``."""
        n_logical, n_physical, ep_size = self.n_logical, self.n_physical, self.ep_size
        order = np.argsort(self._phy2log, kind="stable")
        expert, rank = self._phy2log[order], order // self.slots_per_rank
        copies = np.zeros((n_logical, ep_size), dtype=np.int64)
        np.add.at(copies, (expert, rank), 1)
        held = copies > 0
        group = held.argmax(1) // self.group_size
        by_group = held.reshape(n_logical, self.n_group, self.group_size)
        spanning = by_group.any(2).sum(1) > 1
        if spanning.any():
            raise ValueError(
                f"phy2log spreads expert {int(np.flatnonzero(spanning)[0])} over several of the "
                f"{self.n_group} groups"
            )
        sizes = np.bincount(group, minlength=self.n_group)
        if (sizes != n_logical // self.n_group).any() or n_logical % self.n_group:
            raise ValueError(
                f"phy2log must give each of {self.n_group} groups equally many experts, got {sizes}"
            )

        # Experts with the same set of ranks become one column: the optimum is the same.
        column_of = np.full(n_logical, -1, dtype=np.int32)
        replicated = np.flatnonzero(held.sum(1) > 1)
        n_columns = np.zeros(self.n_group, dtype=np.int64)
        mask = np.zeros((self.n_group, self.group_size, self.max_columns), dtype=np.bool_)
        if replicated.size:
            sets, inverse = np.unique(held[replicated], axis=0, return_inverse=True)
            set_group = sets.argmax(1) // self.group_size
            n_columns = np.bincount(set_group, minlength=self.n_group)
            if n_columns.max() > self.max_columns:
                raise ValueError(
                    f"max_columns is {self.max_columns}, but phy2log needs {n_columns.max()}"
                )
            # np.unique sorts sets, not groups: number the sets within their group in order.
            by = np.argsort(set_group, kind="stable")
            within = np.empty(len(sets), dtype=np.int64)
            before = np.cumsum(n_columns) - n_columns
            within[by] = np.arange(len(sets)) - np.repeat(before, n_columns)
            column_of[replicated] = within[inverse.reshape(-1)]
            which, where = np.nonzero(sets)
            mask[set_group[which], where % self.group_size, within[which]] = True

        members = np.full(n_logical, -1, dtype=np.int32)
        sorted_members = replicated[np.lexsort((column_of[replicated], group[replicated]))]
        members[: replicated.size] = sorted_members
        per_column = np.zeros((self.n_group, self.max_columns), dtype=np.int64)
        np.add.at(per_column, (group[replicated], column_of[replicated]), 1)
        ends = np.cumsum(per_column.reshape(-1)).reshape(per_column.shape)
        column_start = np.zeros((self.n_group, self.max_columns + 1), dtype=np.int32)
        if self.max_columns:
            column_start[:, 1:] = ends
            column_start[:, 0] = ends[:, 0] - per_column[:, 0]

        fixed = np.full((ep_size, self.slots_per_rank), -1, dtype=np.int32)
        single = np.flatnonzero(column_of < 0)
        single_rank = held[single].argmax(1)
        by_rank = np.argsort(single_rank, kind="stable")
        per_rank = np.bincount(single_rank, minlength=ep_size)
        place = np.arange(single.size) - np.repeat(np.cumsum(per_rank) - per_rank, per_rank)
        fixed[single_rank[by_rank], place] = single[by_rank]

        start = np.zeros(n_logical + 1, dtype=np.int32)
        start[1:] = np.cumsum(self._counts)
        # Copies of one expert on one rank are neighbours in this order.
        fresh = np.ones(n_physical, dtype=np.bool_)
        fresh[1:] = (expert[1:] != expert[:-1]) | (rank[1:] != rank[:-1])
        run_start = np.maximum.accumulate(np.where(fresh, np.arange(n_physical), 0))
        cell = (rank * self.max_columns) + column_of[expert]
        return Structure(
            column_of=column_of,
            cell_group=group.astype(np.int32),
            mask=mask,
            fixed_experts=fixed.reshape(self.n_group, self.group_size, self.slots_per_rank),
            column_start=column_start,
            column_members=members,
            copy_start=start,
            copy_slot=order.astype(np.int32),
            copy_cell=np.where(column_of[expert] < 0, -1, cell).astype(np.int32),
            copy_index=(np.arange(n_physical) - run_start).astype(np.int32),
            copy_multiplicity=copies[expert, rank].astype(np.int32),
        )

    @cached_property
    def _fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of a [n_logical] -> [n_group * (G + C)] scatter: target per expert."""
        s = self.structure
        fixed_rank = np.full(self.n_logical, -1, dtype=np.int64)
        g, r, k = np.nonzero(s.fixed_experts >= 0)
        fixed_rank[s.fixed_experts[g, r, k]] = g * self.group_size + r
        column = s.cell_group.astype(np.int64) * self.max_columns + s.column_of
        return torch.from_numpy(fixed_rank), torch.from_numpy(column)

    def _batched(self, counts: torch.Tensor) -> torch.Tensor:
        """Check counts and return them as ``[B, n_logical]`` float64."""
        if not isinstance(counts, torch.Tensor):
            raise TypeError(f"counts must be a torch.Tensor, got {type(counts).__name__}")
        if counts.ndim not in (1, 2) or counts.shape[-1] != self.n_logical:
            raise ValueError(
                f"counts must be [{self.n_logical}] or [B, {self.n_logical}], "
                f"got {tuple(counts.shape)}"
            )
        return counts.reshape(-1, self.n_logical).double()

    def problem(self, counts: torch.Tensor) -> Problem:
        """Fold counts by logical expert into programs, one per batch and group.

        Parameters
        ----------
        counts : torch.Tensor
            ``[n_logical]`` or ``[B, n_logical]``, load of each logical expert over all ranks.

        Returns
        -------
        Problem
            ``B * n_group`` instances, batch-major, float64, on the device of ``counts``.
        """
        counts = self._batched(counts)
        batch, device = len(counts), counts.device
        fixed_rank, column = (index.to(device) for index in self._fold)
        single = fixed_rank >= 0
        fixed = torch.zeros(batch, self.ep_size, dtype=torch.float64, device=device)
        fixed.index_add_(1, fixed_rank[single], counts[:, single])
        weights = torch.zeros(
            batch, self.n_group * self.max_columns, dtype=torch.float64, device=device
        )
        weights.index_add_(1, column[~single], counts[:, ~single])
        mask = torch.from_numpy(self.structure.mask).to(device)
        if self.n_group > 1:
            mask = mask.repeat(batch, 1, 1)
        instances = batch * self.n_group
        return Problem(
            weights.reshape(instances, self.max_columns),
            fixed.reshape(instances, self.group_size),
            mask,
        )

    def even_loads(self, counts: torch.Tensor) -> torch.Tensor:
        """Rank loads when each expert's load is split evenly over its copies (EPLB's way).

        Parameters
        ----------
        counts : torch.Tensor
            ``[n_logical]`` or ``[B, n_logical]``.

        Returns
        -------
        torch.Tensor
            ``[B, ep_size]`` float64.
        """
        counts = self._batched(counts)
        per_slot = (counts / self.logcnt.to(counts.device))[:, self.phy2log.long()]
        return per_slot.reshape(len(counts), self.ep_size, -1).sum(2)

    def rank_loads(self, counts: torch.Tensor, solution: Solution) -> torch.Tensor:
        """Rank loads under the shares of a solution.

        Parameters
        ----------
        counts : torch.Tensor
            ``[n_logical]`` or ``[B, n_logical]``, as given to `problem`.
        solution : Solution
            Of those programs.

        Returns
        -------
        torch.Tensor
            ``[B, ep_size]`` float64.
        """
        p = self.problem(counts)
        loads = p.fixed + (p.weights.unsqueeze(1) * solution.shares.double()).sum(2)
        return loads.reshape(-1, self.ep_size)


def _spread(
    workload: torch.Tensor | None, n_logical: int, n_group: int, num_nodes: int, ep_size: int
) -> NDArray[np.int64]:
    """Order the logical experts rank by rank, heaviest first where a history is given."""
    if workload is None:
        return np.arange(n_logical)
    load = torch.as_tensor(workload).detach().cpu()
    if load.shape != (n_logical,):
        raise ValueError(f"workload must have shape [{n_logical}], got {tuple(load.shape)}")
    num_nodes = check_integer("num_nodes", num_nodes)
    phy2log, _, _ = rebalance_experts(load.unsqueeze(0), n_logical, n_group, num_nodes, ep_size)
    by_rank = phy2log[0].reshape(ep_size, -1)
    heaviest = load[by_rank].argsort(dim=1, descending=True, stable=True)
    return by_rank.gather(1, heaviest).reshape(-1).numpy()
