"""Which expert sits in which slot: one immutable object, whatever it was made from."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import topologies

# Other modules take `check_integer` from here.
from lplb_triton._checks import check_integer as check_integer
from lplb_triton._checks import (
    check_load_dtype,
    check_load_values,
    nearest_divisors,
    nearest_multiples,
    on_host,
    would_do,
)
from lplb_triton.eplb import checked_weight, rebalance
from lplb_triton.placement.structure import Structure, build_structure
from lplb_triton.problem import Problem
from lplb_triton.solution import Solution

__all__ = ["Placement"]


def _as_int_array(name: str, value: object) -> NDArray[np.int64]:
    """Copy an integer tensor or array to the CPU, or raise naming ``name``."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            raise TypeError(f"{name} must hold integers, got dtype {value.dtype}")
        value = on_host(name, value).numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be an array of integers: {error}") from None
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
    return array.astype(np.int64)


def _as_loads(name: str, value: object) -> torch.Tensor:
    """Return loads as a tensor on the CPU: a tensor as it is, anything else as float64."""
    if isinstance(value, torch.Tensor):
        return on_host(name, value)
    try:
        return torch.from_numpy(np.array(value, dtype=np.float64))
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a torch.Tensor or array of numbers, got {type(value).__name__}"
        ) from None


class Placement:
    """Which logical expert each physical slot holds, and what follows from it.

    Immutable and on the CPU; every tensor it returns is a fresh copy. Two placements are equal
    (and one key of a dict) if their sizes are and every slot holds the same expert. Slots of one
    rank are contiguous: slot p is on rank ``p // slots_per_rank``. Make one with `from_topology`,
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

    n_logical: int
    """Number of logical experts."""
    n_physical: int
    """Number of slots over all ranks."""
    ep_size: int
    """Number of ranks."""
    n_group: int
    """Number of groups of consecutive ranks."""
    group_size: int
    """Ranks of a group."""
    slots_per_rank: int
    """Slots of a rank."""
    redundant_per_group: int
    """Slots of a group beyond one for each of its experts."""
    max_columns: int
    """Columns per group that device buffers are sized for."""
    structure: Structure
    """Index tables that the kernels read; read-only arrays."""
    _phy2log: NDArray[np.int64]
    _counts: NDArray[np.int64]

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
        n_physical = int(flat.size)
        ep_size = check_integer("ep_size", ep_size)
        n_group = check_integer("n_group", n_group)
        if n_physical % ep_size:
            sizes = [n for n in nearest_divisors(n_physical, ep_size) if n % n_group == 0]
            raise ValueError(
                f"ep_size must divide the number of slots {n_physical}, got {ep_size}"
                f"{would_do(sizes)}"
            )
        if ep_size % n_group:
            raise ValueError(f"n_group must divide ep_size {ep_size}, got {n_group}")
        counts = _count_copies(flat, n_logical)
        flat.setflags(write=False)
        redundant = (n_physical - len(counts)) // n_group
        if max_columns is None:
            max_columns = redundant
        max_columns = check_integer("max_columns", max_columns, 0)
        # Attributes can't be set one by one, see `__setattr__`.
        vars(self).update(
            n_logical=len(counts),
            n_physical=n_physical,
            ep_size=ep_size,
            n_group=n_group,
            group_size=ep_size // n_group,
            slots_per_rank=n_physical // ep_size,
            redundant_per_group=redundant,
            max_columns=max_columns,
            structure=build_structure(flat, counts, n_group, ep_size // n_group, max_columns),
            _phy2log=flat,
            _counts=counts,
        )

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """Refuse: a placement is immutable."""
        raise AttributeError(f"{name} can't be set: a Placement is immutable, make another one")

    def __delattr__(self, name: str) -> NoReturn:
        """Refuse: a placement is immutable."""
        raise AttributeError(f"{name} can't be deleted: a Placement is immutable")

    @cached_property
    def _content(self) -> tuple[int, int, int, int, bytes]:
        """All that one placement can differ in from another."""
        sizes = (self.n_logical, self.ep_size, self.n_group, self.max_columns)
        return *sizes, self._phy2log.tobytes()

    def __eq__(self, other: object) -> bool:
        """Whether the other is a placement of equal sizes with the same expert in each slot."""
        if not isinstance(other, Placement):
            return NotImplemented
        return self._content == other._content

    def __hash__(self) -> int:
        """Hash of the content, so that equal placements are one key."""
        return hash(self._content)

    def __copy__(self) -> Placement:
        """Return the placement itself, which can't change."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Placement:
        """Return the placement itself, which can't change."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Arguments that make an equal placement, in Python's own types."""
        names = ("ep_size", "n_logical", "n_group", "max_columns")
        return {"phy2log": self._phy2log.tolist(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill a new object from the state of another one."""
        if vars(self):
            raise AttributeError("a Placement is immutable, make another one")
        self.__init__(**state)  # type: ignore[misc]

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
        num_nodes = check_integer("num_nodes", num_nodes)
        _check_topology(n_physical, n_logical, ep_size, group_size, num_redundants)
        n_local = n_logical // ep_size
        redundant = n_physical // ep_size - n_local
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
        load: torch.Tensor | NDArray[np.floating],
        ep_size: int,
        *,
        redundant_per_rank: int = 1,
        num_groups: int = 1,
        num_nodes: int = 1,
    ) -> Placement:
        """Place and replicate experts with EPLB by a load history.

        Parameters
        ----------
        load : torch.Tensor or array
            ``[n_logical]``, load of each logical expert, finite and non-negative.
        ep_size : int
            Number of ranks; divides ``n_logical``.
        redundant_per_rank : int
            Redundant slots per rank (0: reorder only). EPLB may put several copies of an expert on
            one rank; `lplb_triton.chain` doesn't.
        num_groups, num_nodes : int
            EPLB's expert groups and nodes. If nodes divide groups, groups are packed onto nodes:
            `num_groups` must divide ``n_logical`` then, and `num_nodes` must divide `ep_size`.

        Returns
        -------
        Placement
            One LP group over all ranks.

        Raises
        ------
        TypeError, ValueError
            Naming the argument.
        """
        weight = checked_weight("load", _as_loads("load", load), "[n_logical]")
        n_logical = len(weight)
        ep_size = check_integer("ep_size", ep_size)
        redundant = check_integer("redundant_per_rank", redundant_per_rank, 0)
        num_groups = check_integer("num_groups", num_groups)
        num_nodes = check_integer("num_nodes", num_nodes)
        in_nodes = num_groups % num_nodes == 0
        if n_logical % ep_size:
            near = nearest_divisors(n_logical, ep_size)
            raise ValueError(
                f"ep_size must divide the number of logical experts, {n_logical}, got {ep_size}"
                f"{would_do([n for n in near if not in_nodes or n % num_nodes == 0])}"
            )
        if in_nodes and n_logical % num_groups:
            near = nearest_divisors(n_logical, num_groups)
            raise ValueError(
                f"num_groups must divide the number of logical experts, {n_logical}, got "
                f"{num_groups}"
                f"{would_do([n for n in near if n % num_nodes or ep_size % num_nodes == 0])}"
            )
        if in_nodes and ep_size % num_nodes:
            raise ValueError(
                f"num_nodes must divide ep_size, {ep_size}, got {num_nodes}"
                f"{would_do(nearest_divisors(ep_size, num_nodes))}"
            )
        phy2log, _, _ = rebalance(
            weight.unsqueeze(0), n_logical + redundant * ep_size, num_groups, num_nodes, ep_size
        )
        return cls(phy2log[0], ep_size, n_logical=n_logical)

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

    @cached_property
    def _fold(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Columns of a [n_logical] -> [n_group * (G + C)] scatter: target per expert."""
        s = self.structure
        fixed_rank = np.full(self.n_logical, -1, dtype=np.int64)
        g, r, k = np.nonzero(s.fixed_experts >= 0)
        fixed_rank[s.fixed_experts[g, r, k]] = g * self.group_size + r
        column = s.cell_group.astype(np.int64) * self.max_columns + s.column_of
        return fixed_rank, column

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
        # Elsewhere the look would be a wait; the solver reports such loads there.
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
        fixed_rank, column = (torch.from_numpy(index).to(device) for index in self._fold)
        single = fixed_rank >= 0
        fixed = torch.zeros(batch, self.ep_size, dtype=torch.float64, device=device)
        fixed.index_add_(1, fixed_rank[single], counts[:, single])
        weights = torch.zeros(
            batch, self.n_group * self.max_columns, dtype=torch.float64, device=device
        )
        weights.index_add_(1, column[~single], counts[:, ~single])
        mask = torch.from_numpy(self.structure.mask.copy()).to(device)
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


def _count_copies(phy2log: NDArray[np.int64], n_logical: int | None) -> NDArray[np.int64]:
    """Count the copies of each expert, ``[n_logical]``, or raise naming what doesn't fit."""
    low, high, n_slots = int(phy2log.min()), int(phy2log.max()), len(phy2log)
    n_logical = high + 1 if n_logical is None else check_integer("n_logical", n_logical)
    if low < 0 or high >= n_logical:
        raise ValueError(f"phy2log must hold ids in [0, {n_logical}), got {low}..{high}")
    if n_logical > n_slots:
        raise ValueError(
            f"phy2log has {n_slots} slots, too few for one of each of {n_logical} logical experts"
        )
    counts = np.bincount(phy2log, minlength=n_logical)
    missing = np.flatnonzero(counts == 0)
    if missing.size:
        raise ValueError(
            f"phy2log gives no slot to {missing.size} logical experts, first {int(missing[0])}"
        )
    return counts


def _check_topology(
    n_physical: int, n_logical: int, ep_size: int, group_size: int, num_redundants: int
) -> None:
    """Raise, naming the argument of `Placement.from_topology`, unless the sizes fit each other."""

    def fits(n_physical: int, n_logical: int, ep_size: int) -> bool:
        redundant = n_physical - n_logical
        return (
            ep_size % group_size == 0
            and n_logical % ep_size == 0
            and redundant % (ep_size * num_redundants) == 0
            and 0 < redundant <= n_logical
        )

    if fits(n_physical, n_logical, ep_size):
        return
    if ep_size % group_size:
        near = nearest_multiples(group_size, ep_size)
        raise ValueError(
            f"ep_size must be a multiple of the topology's {group_size} ranks, got {ep_size}"
            f"{would_do([n for n in near if fits(n_physical, n_logical, n)])}"
        )
    n_local, rest = divmod(n_logical, ep_size)
    if rest:
        near = nearest_multiples(ep_size, n_logical)
        raise ValueError(
            f"n_logical_routed_experts must be a multiple of ep_size {ep_size}, got {n_logical}"
            f"{would_do([n for n in near if fits(n_physical, n, ep_size)])}"
        )
    if num_redundants > n_local:
        raise ValueError(
            f"n_logical_routed_experts gives each rank {n_local} experts, fewer than the "
            f"topology's {num_redundants} columns"
        )
    near = nearest_multiples(ep_size * num_redundants, n_physical - n_logical)
    most = n_local // num_redundants * num_redundants * ep_size
    raise ValueError(
        f"n_routed_experts must give each of {ep_size} ranks a positive multiple of the "
        f"topology's {num_redundants} columns, at most its {n_local} logical experts, as "
        f"redundant slots, got {n_physical}{would_do([n_logical + min(n, most) for n in near])}"
    )


def _spread(
    workload: torch.Tensor | None, n_logical: int, n_group: int, num_nodes: int, ep_size: int
) -> NDArray[np.int64]:
    """Order the logical experts rank by rank, heaviest first where a history is given."""
    if workload is None:
        return np.arange(n_logical)
    load = _as_loads("workload", workload)
    if load.shape != (n_logical,):
        raise ValueError(f"workload must have shape [{n_logical}], got {list(load.shape)}")
    weight = checked_weight("workload", load, "[n_logical]")
    # The ranks' groups are consecutive experts here: a policy of nodes that don't divide them is
    # none, and those that do divide the ranks too.
    phy2log, _, _ = rebalance(weight.unsqueeze(0), n_logical, n_group, num_nodes, ep_size)
    by_rank = phy2log[0].reshape(ep_size, -1)
    heaviest = load[by_rank].argsort(dim=1, descending=True, stable=True)
    return by_rank.gather(1, heaviest).reshape(-1).numpy()
