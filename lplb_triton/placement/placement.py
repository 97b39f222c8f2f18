"""Which expert each slot holds: one immutable object, whatever it was made from."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import topologies
from lplb_triton._checks import check_flag, check_integer, nearest_divisors, would_do
from lplb_triton.placement.arguments import (
    average_batches,
    check_batch,
    check_live_slots,
    count_copies,
    take_static_slots,
    to_int_array,
)
from lplb_triton.placement.constructors import (
    copy_over_topology,
    replicate_at_home,
    replicate_by_history,
)
from lplb_triton.placement.files import PlacementFile
from lplb_triton.placement.programs import ProgramBuilder
from lplb_triton.placement.structure import Structure, build_structure
from lplb_triton.problem import Problem
from lplb_triton.solution import Solution

__all__ = ["Placement"]


class Placement(PlacementFile):
    """Which logical expert each physical slot holds, and what follows from it.

    Immutable and on the CPU; every tensor it returns is a fresh copy. Two placements are equal
    (and one key of a dict) if their sizes are and every slot holds the same expert. Slots of one
    rank are contiguous: slot p is on rank ``p // slots_per_rank``. Make one with `from_topology`,
    `from_phy2log` or `from_history`.

    Parameters
    ----------
    phy2log : torch.Tensor or array
        ``[n_physical]`` int, logical expert of each physical slot; -1 in live slots.
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
    live_per_rank : int
        Live slots of each rank, 0 to 2: its last ones. They hold nothing until a batch fills them,
        see `with_live_slots`. This takes a placement of one group.

    Raises
    ------
    TypeError, ValueError
        Naming the argument: an expert without a slot, an id out of range, sizes that don't
        divide, an expert whose copies span groups, too many columns, live slots that hold experts.
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
    """Slots of a rank, live ones included."""
    static_per_rank: int
    """Slots of a rank that hold an expert in every batch; they come first."""
    live_per_rank: int
    """Live slots of a rank."""
    n_copies: int
    """Number of slots over all ranks that hold an expert in every batch."""
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
        live_per_rank: int = 0,
    ) -> None:
        flat = to_int_array("phy2log", phy2log)
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
        static = take_static_slots(flat, ep_size, n_group, live_per_rank)
        counts = count_copies(static, n_logical)
        flat.setflags(write=False)
        redundant = (len(static) - len(counts)) // n_group
        if max_columns is None:
            max_columns = redundant
        max_columns = check_integer("max_columns", max_columns, 0)
        # `__setattr__` refuses to set attributes one by one.
        vars(self).update(
            n_logical=len(counts),
            n_physical=n_physical,
            ep_size=ep_size,
            n_group=n_group,
            group_size=ep_size // n_group,
            slots_per_rank=n_physical // ep_size,
            static_per_rank=len(static) // ep_size,
            live_per_rank=live_per_rank,
            n_copies=len(static),
            redundant_per_group=redundant,
            max_columns=max_columns,
            structure=build_structure(
                static, counts, n_group, ep_size // n_group, max_columns, live_per_rank
            ),
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
    def _content(self) -> tuple[int, int, int, int, int, bytes]:
        """Everything in which placements can differ."""
        sizes = (self.n_logical, self.ep_size, self.n_group, self.max_columns, self.live_per_rank)
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
        names = ("ep_size", "n_logical", "n_group", "max_columns", "live_per_rank")
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
        slots = copy_over_topology(
            r2o, n_routed_experts, n_logical_routed_experts, ep_size, workload, num_nodes
        )
        return cls(
            slots,
            ep_size,
            n_logical=n_logical_routed_experts,
            n_group=ep_size // len(r2o),
            max_columns=r2o.numel(),
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
        keep_home: bool = False,
    ) -> Placement:
        """Place and replicate experts with EPLB by a load history.

        Parameters
        ----------
        load : torch.Tensor or array
            ``[n_logical]``, load of each logical expert, finite and non-negative; or
            ``[batches, n_logical]``, of which each batch counts equally, whatever its total.
        ep_size : int
            Number of ranks; divides ``n_logical``.
        redundant_per_rank : int
            Redundant slots per rank (0: reorder only). EPLB may put several copies of an expert on
            one rank; `lplb_triton.chain` doesn't.
        num_groups, num_nodes : int
            EPLB's expert groups and nodes. If nodes divide groups, groups are packed onto nodes:
            `num_groups` must divide ``n_logical`` then, and `num_nodes` must divide `ep_size`.
        keep_home : bool
            Whether the first ``n_logical / ep_size`` slots of rank r hold experts
            ``r * n_logical / ep_size`` and following, in order, as frameworks shard them. Only the
            redundant slots are chosen then: further copies go to hot experts of loaded ranks and
            lie on the least loaded ranks. Groups and nodes must be 1.

        Returns
        -------
        Placement
            One LP group over all ranks.

        Raises
        ------
        TypeError, ValueError
            Naming the argument.
        """
        load = average_batches("load", load)
        if check_flag("keep_home", keep_home):
            at_home = replicate_at_home(load, ep_size, redundant_per_rank, num_groups, num_nodes)
            return cls(at_home, ep_size, n_logical=len(load))
        slots, n_logical = replicate_by_history(
            load, ep_size, redundant_per_rank, num_groups, num_nodes
        )
        return cls(slots, ep_size, n_logical=n_logical)

    def with_live_slots(self, live_per_rank: int) -> Placement:
        """Return a placement with this one's static slots, and live slots behind those of a rank.

        A live slot holds nothing until `lplb_triton.Balancer` finds that a batch needs an expert
        there; it is numbered like any slot, so physical ids and ``n_physical`` include it.

        Parameters
        ----------
        live_per_rank : int
            0, 1 or 2.

        Returns
        -------
        Placement

        Raises
        ------
        TypeError, ValueError
            For another number, or a placement of several groups.
        """
        live_per_rank = check_live_slots(live_per_rank, self.n_group)
        static = self._phy2log.reshape(self.ep_size, -1)[:, : self.static_per_rank]
        return Placement(
            np.pad(static, ((0, 0), (0, live_per_rank)), constant_values=-1).reshape(-1),
            self.ep_size,
            n_logical=self.n_logical,
            n_group=self.n_group,
            max_columns=self.max_columns,
            live_per_rank=live_per_rank,
        )

    @property
    def phy2log(self) -> torch.Tensor:
        """``[n_physical]`` int32, logical expert of each slot, -1 for live slots."""
        return torch.from_numpy(self._phy2log.astype(np.int32))

    @property
    def logcnt(self) -> torch.Tensor:
        """``[n_logical]`` int32, number of copies of each logical expert in static slots."""
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
        slots = np.flatnonzero(self._phy2log >= 0)
        local, rank = slots % self.slots_per_rank, slots // self.slots_per_rank
        order = slots[np.lexsort((rank, local, self._phy2log[slots]))]
        table = np.full((self.n_logical, int(self._counts.max())), -1, dtype=np.int32)
        first = np.repeat(self.structure.copy_start[:-1], self._counts)
        table[self._phy2log[order], np.arange(self.n_copies) - first] = order
        return torch.from_numpy(table)

    def __repr__(self) -> str:
        """Write the sizes in one line."""
        live = f", {self.live_per_rank} live slot(s) a rank" if self.live_per_rank else ""
        return (
            f"Placement({self.n_logical} experts in {self.n_copies} slots, {self.ep_size} ranks, "
            f"{self.n_group} group(s), up to {int(self._counts.max())} copies{live})"
        )

    def problem(self, counts: torch.Tensor) -> Problem:
        """Make linear programs of counts by logical expert, one per batch and group.

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
        return self._programs.build(check_batch(counts, self.n_logical))

    @cached_property
    def _programs(self) -> ProgramBuilder:
        """The builder of this placement's programs."""
        return ProgramBuilder(self.structure, self._phy2log, self._counts)

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
        counts = check_batch(counts, self.n_logical)
        experts = self.phy2log.long().to(counts.device)
        per_slot = (counts / self.logcnt.to(counts.device))[:, experts.clamp(min=0)]
        per_slot = torch.where(experts >= 0, per_slot, 0.0)
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
