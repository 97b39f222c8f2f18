"""Which expert sits in which slot: one immutable object, whatever it was made from."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import topologies
from lplb_triton._counts import check_load_dtype, check_load_values
from lplb_triton.eplb import rebalance_experts
from lplb_triton.problem import Problem
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
        redundant_per_rank: int,
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
        start = np.zeros(n_logical + 1, dtype=np.int32)
        start[1:] = self._counts.cumsum()
        # An expert's copies ascend by rank.
        first_rank, last_rank = rank[start[:-1]], rank[start[1:] - 1]
        group = first_rank // self.group_size
        spanning = last_rank // self.group_size != group
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

        column_of = np.full(n_logical, -1, dtype=np.int32)
        replicated = (first_rank != last_rank).nonzero()[0]
        if replicated.size:
            held = np.zeros((n_logical, ep_size), dtype=np.bool_)
            held[expert, rank] = True
            column_of[replicated] = self._columns(held[replicated], group[replicated])
        # Copies of one expert on one rank are neighbours in this order.
        fresh = np.ones(n_physical, dtype=np.bool_)
        fresh[1:] = (expert[1:] != expert[:-1]) | (rank[1:] != rank[:-1])
        runs = fresh.nonzero()[0]
        lengths = np.append(runs[1:], n_physical) - runs
        column = column_of[expert]
        cell = np.where(column < 0, -1, rank * self.max_columns + column)
        mask = np.zeros((self.n_group, self.group_size, self.max_columns), dtype=np.bool_)
        mask.reshape(-1)[cell[cell >= 0]] = True

        members = np.full(n_logical, -1, dtype=np.int32)
        of = group[replicated] * self.max_columns + column_of[replicated]
        members[: replicated.size] = replicated[np.argsort(of, kind="stable")]
        per_column = np.bincount(of, minlength=self.n_group * self.max_columns)
        per_column = per_column.reshape(self.n_group, self.max_columns)
        ends = np.cumsum(per_column.reshape(-1)).reshape(per_column.shape)
        column_start = np.zeros((self.n_group, self.max_columns + 1), dtype=np.int32)
        if self.max_columns:
            column_start[:, 1:] = ends
            column_start[:, 0] = ends[:, 0] - per_column[:, 0]

        fixed = np.full((ep_size, self.slots_per_rank), -1, dtype=np.int32)
        single = (column_of < 0).nonzero()[0]
        single_rank = first_rank[single]
        by_rank = single_rank.argsort(kind="stable")
        per_rank = np.bincount(single_rank, minlength=ep_size)
        place = np.arange(single.size) - (per_rank.cumsum() - per_rank).repeat(per_rank)
        fixed[single_rank[by_rank], place] = single[by_rank]
        return Structure(
            column_of=column_of,
            cell_group=group.astype(np.int32),
            mask=mask,
            fixed_experts=fixed.reshape(self.n_group, self.group_size, self.slots_per_rank),
            column_start=column_start,
            column_members=members,
            copy_start=start,
            copy_slot=order.astype(np.int32),
            copy_cell=cell.astype(np.int32),
            copy_index=(np.arange(n_physical) - np.repeat(runs, lengths)).astype(np.int32),
            copy_multiplicity=np.repeat(lengths, lengths).astype(np.int32),
        )

    def _columns(self, held: BoolArray, group: NDArray[np.int64]) -> NDArray[np.int64]:
        """Column of each replicated expert, from the ranks that hold it and its group.

        Experts with the same set of ranks become one column: the optimum is the same. A group's
        columns are in the order of their sets, as rows of zeros and ones.
        """
        packed = np.packbits(held, axis=1)
        words = np.zeros((len(held), -(-packed.shape[1] // 8) * 8), dtype=np.uint8)
        words[:, : packed.shape[1]] = packed
        keys = words.view(">u8").astype(np.uint64)
        order = np.lexsort((*keys.T[::-1], group))
        keys, in_order = keys[order], group[order]
        fresh = np.ones(len(held), dtype=np.bool_)
        fresh[1:] = (keys[1:] != keys[:-1]).any(1)
        n_columns = np.bincount(in_order[fresh], minlength=self.n_group)
        if n_columns.max() > self.max_columns:
            raise ValueError(
                f"max_columns is {self.max_columns}, but phy2log needs {n_columns.max()}"
            )
        before = np.cumsum(n_columns) - n_columns
        column = np.empty(len(held), dtype=np.int64)
        column[order] = np.cumsum(fresh) - 1 - before[in_order]
        return column

    @cached_property
    def _fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of a [n_logical] -> [n_group * (G + C)] scatter: target per expert."""
        s = self.structure
        fixed_rank = np.full(self.n_logical, -1, dtype=np.int64)
        g, r, k = np.nonzero(s.fixed_experts >= 0)
        fixed_rank[s.fixed_experts[g, r, k]] = g * self.group_size + r
        column = s.cell_group.astype(np.int64) * self.max_columns + s.column_of
        # Kept for calls in inference mode or not.
        with torch.inference_mode(False):
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
        check_load_dtype("counts", counts)
        if counts.device.type == "cpu":
            check_load_values("counts", counts)
        return counts.reshape(-1, self.n_logical).double()

    def problem(self, counts: torch.Tensor) -> Problem:
        """Fold counts by logical expert into programs, one per batch and group.

        Parameters
        ----------
        counts : torch.Tensor
            ``[n_logical]`` or ``[B, n_logical]``, load of each logical expert over all ranks:
            integers or real numbers, finite and non-negative.

        Returns
        -------
        Problem
            ``B * n_group`` instances, batch-major, float64, on the device of ``counts``.

        Raises
        ------
        TypeError, ValueError
            For counts of the wrong dtype or shape; on a CPU also for negative or non-finite ones.
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
            self._split_over_copies(counts) if self._splits_differ else None,
        )

    @cached_property
    def _splits_differ(self) -> bool:
        """Whether splits that are even over ranks and over copies differ."""
        s = self.structure
        return bool((s.copy_multiplicity[s.copy_cell >= 0] > 1).any())

    def _split_over_copies(self, counts: torch.Tensor) -> torch.Tensor:
        """Shares of columns if every expert is split evenly over its copies.

        ``counts`` are ``[B, n_logical]`` float64; the result is
        ``[B * n_group, group_size, max_columns]``. A column without tokens gets 0.
        """
        s, device = self.structure, counts.device
        shared = np.flatnonzero(s.copy_cell >= 0)
        expert = self._phy2log[s.copy_slot[shared]]
        cell = torch.from_numpy(s.copy_cell[shared].astype(np.int64)).to(device)
        per_copy = (counts / self.logcnt.to(device))[:, torch.from_numpy(expert).to(device)]
        size = self.ep_size * self.max_columns
        tokens = torch.zeros(len(counts), size, dtype=torch.float64, device=device)
        tokens.index_add_(1, cell, per_copy)
        tokens = tokens.reshape(-1, self.group_size, self.max_columns)
        total = tokens.sum(1, keepdim=True)
        return torch.where(total > 0, tokens / total, 0.0)

    def even_loads(self, counts: torch.Tensor) -> torch.Tensor:
        """Rank loads when each expert's load is split evenly over its copies (EPLB's way).

        Parameters
        ----------
        counts : torch.Tensor
            ``[n_logical]`` or ``[B, n_logical]``, as for `problem`.

        Returns
        -------
        torch.Tensor
            ``[B, ep_size]`` float64.

        Raises
        ------
        TypeError, ValueError
            As `problem` does.
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

        Raises
        ------
        TypeError, ValueError
            As `problem` does, and for a solution of other programs.
        """
        if not isinstance(solution, Solution):
            raise TypeError(f"solution must be a Solution, got {type(solution).__name__}")
        p = self.problem(counts)
        if solution.shares.shape != (p.n_instances, p.group_size, p.n_columns):
            raise ValueError(
                f"solution must have shares [{p.n_instances}, {p.group_size}, {p.n_columns}] like "
                f"the programs of counts, got {list(solution.shares.shape)}"
            )
        if solution.shares.device != p.device:
            raise ValueError(f"solution is on {solution.shares.device}, expected {p.device}")
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
