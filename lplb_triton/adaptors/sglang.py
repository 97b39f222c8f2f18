"""SGLang's placement entry point and per-batch LP solver, backed by this library."""

from __future__ import annotations

import enum
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from lplb_triton import eplb
from lplb_triton.balancer import Balancer
from lplb_triton.placement import Placement
from lplb_triton.solution import SolveError
from lplb_triton.solver import DEFAULT_TOLERANCE

__all__ = ["EplbAlgorithm", "LPLBSolver", "compute_algorithm", "rebalance_experts"]


class EplbAlgorithm(enum.Enum):
    """The two of SGLang's placement algorithms that are EPLB's own."""

    deepseek = enum.auto()
    """Global: groups and nodes are ignored."""
    deepseek_hierarchical = enum.auto()
    """Expert groups are packed onto nodes first."""


def compute_algorithm(raw_algorithm: str, num_groups: int | None, num_nodes: int) -> EplbAlgorithm:
    """Choose the algorithm from SGLang's ``--eplb-algorithm``.

    Parameters
    ----------
    raw_algorithm : str
        ``"auto"``, or the name of an `EplbAlgorithm`.
    num_groups : int or None
        Expert groups of the model, None if it has none.
    num_nodes : int
        Servers.

    Returns
    -------
    EplbAlgorithm
        Under ``"auto"``, hierarchical if there are groups and nodes divide them.

    Raises
    ------
    ValueError
        If ``raw_algorithm`` is another name, or ``num_nodes`` is below 1.
    """
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1, got {num_nodes}")
    if raw_algorithm != "auto":
        return _named("raw_algorithm", raw_algorithm)
    if num_groups is not None and num_groups % num_nodes == 0:
        return EplbAlgorithm.deepseek_hierarchical
    return EplbAlgorithm.deepseek


def _named(name: str, algorithm: object) -> EplbAlgorithm:
    """Return the member of that name; SGLang's own enum counts by its members' names."""
    wanted = algorithm.name if isinstance(algorithm, enum.Enum) else algorithm
    if not isinstance(wanted, str) or wanted not in EplbAlgorithm.__members__:
        known = ", ".join(EplbAlgorithm.__members__)
        raise ValueError(f"{name} must be one of {known}, got {wanted!r}")
    return EplbAlgorithm[wanted]


def rebalance_experts(
    tokens_per_expert: torch.Tensor,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: EplbAlgorithm | enum.Enum | str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Place and replicate the experts of every layer by recorded loads.

    Parameters
    ----------
    tokens_per_expert : torch.Tensor
        ``[steps, layers, num_logical]``, load of each logical expert at each recorded step; the
        steps are summed. Any real dtype and device.
    num_physical_experts : int
        Slots per layer.
    num_local_physical_experts : int
        Slots per layer and rank; divides ``num_physical_experts``.
    num_groups : int or None
        Expert groups; needed by the hierarchical algorithm only.
    num_nodes : int
        Servers; under the hierarchical algorithm a divisor of ``num_groups``.
    algorithm : EplbAlgorithm, enum.Enum or str
        One of `EplbAlgorithm`, the member of the same name of SGLang's enum, or the name.

    Returns
    -------
    physical_to_logical_map : torch.Tensor
        ``[layers, num_physical_experts]`` int64, logical expert of each slot.
    logical_to_all_physical_map : torch.Tensor
        ``[layers, num_logical, K]`` int64, slots of each expert, padded with -1; ``K`` is the
        largest entry of ``expert_count``.
    expert_count : torch.Tensor
        ``[layers, num_logical]`` int64, copies of each expert.

        All three are on the CPU.

    Raises
    ------
    TypeError
        If ``tokens_per_expert`` is not a tensor or a number is not an integer.
    ValueError
        For shapes, values or divisors that don't fit, and for SGLang's algorithms that aren't
        EPLB's.
    """
    chosen = _named("algorithm", algorithm)
    if not isinstance(tokens_per_expert, torch.Tensor):
        raise TypeError(
            f"tokens_per_expert must be a torch.Tensor, got {type(tokens_per_expert).__name__}"
        )
    if tokens_per_expert.ndim != 3:
        raise ValueError(
            "tokens_per_expert must be [steps, layers, experts], got shape "
            f"{tuple(tokens_per_expert.shape)}"
        )
    n_physical = _size("num_physical_experts", num_physical_experts)
    n_local = _size("num_local_physical_experts", num_local_physical_experts)
    if n_physical % n_local:
        raise ValueError(
            f"num_local_physical_experts must divide num_physical_experts {n_physical}, "
            f"got {n_local}"
        )
    groups = nodes = 1
    if chosen is EplbAlgorithm.deepseek_hierarchical:
        nodes = _size("num_nodes", num_nodes)
        # Without this, EPLB would turn to its global policy by itself.
        if num_groups is None or _size("num_groups", num_groups) % nodes:
            raise ValueError(
                f"num_groups must be a multiple of num_nodes {nodes} for {chosen.name}, "
                f"got {num_groups}"
            )
        groups = num_groups
    return eplb.rebalance_experts(
        tokens_per_expert.sum(0), n_physical, groups, nodes, n_physical // n_local
    )


def _size(name: str, value: object) -> int:
    """Return a positive int, or raise naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


class _Tables(NamedTuple):
    """How shares by rank and column turn into probabilities by expert and copy.

    All are ``[num_logical, max_copies]``, in the layout of ``log2phy``.
    """

    cell: torch.Tensor
    """int64, the copy's place in the flat shares; one past them if only its rank can serve it."""
    part: torch.Tensor
    """float32, the part of the rank's share that goes to this copy; 0 on padding."""
    even: torch.Tensor
    """float32, one over the slots listed; 0 on padding."""
    log2phy: torch.Tensor
    """int64, the slots, padded with -1."""


class LPLBSolver:
    """One MoE layer's LP solver, with the interface of SGLang's class of that name.

    `solve` counts the tokens, sums them over the group, solves the LP and returns the share of
    every copy, for SGLang's sampling. `run` returns physical ids instead, with quotas met exactly.
    All ranks of the group call one or the other for every batch, with or without tokens; a rank
    that has none may call `solve` while others call `run`.

    Parameters
    ----------
    phy2log : torch.Tensor
        ``[num_physical]`` int, logical expert of each slot; the same on every rank. Rank r owns
        the r-th run of ``num_physical / num_gpus`` slots. Its device is the solver's.
    log2phy : torch.Tensor
        ``[num_logical, max_copies]`` int, slots of each expert, padded with -1. A row that lists
        only some of the expert's slots is warned of: its probabilities are the plan's shares of
        the slots listed, scaled to sum to 1, and so not the plan's.
    num_gpus : int
        Ranks; divides ``num_physical``.
    ep_group : ProcessGroup, GroupCoordinator or None
        The group to sum over: torch's, or an object whose ``device_group`` is torch's. Collective:
        every rank constructs its solvers in the same order. ``None``: counts are global.
    logical_to_all_physical_map_num_valid : torch.Tensor or None
        ``[num_logical]`` int, slots that each row lists. Only checked.
    backend : {"triton", "torch"} or None
        As for `lplb_triton.Balancer`.
    tolerance : float
        Certified relative gap of the plans, at least 1e-5.

    Attributes
    ----------
    balancer : lplb_triton.Balancer
        What does the work; counts groups solved and certified.
    num_gpus, num_logical, num_phy, max_copies : int
        Sizes.
    ep_group
        As given.
    log2phy : torch.Tensor
        ``[num_logical, max_copies]`` int64 on the device.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that doesn't fit.

    Warns
    -----
    RuntimeWarning
        If rows of ``log2phy`` list only some of their expert's slots.

    Notes
    -----
    The tensor that `solve` returns is the same in every call, so CUDA graphs that read it stay
    valid; after a change of placement call `update` on the old solver instead of making another.

    Examples
    --------
    >>> phy2log = torch.tensor([0, 1, 0, 2])
    >>> log2phy = torch.tensor([[0, 2], [1, -1], [3, -1]])
    >>> solver = LPLBSolver(phy2log, log2phy, 2)
    >>> solver.solve(torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]])).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        phy2log: torch.Tensor,
        log2phy: torch.Tensor,
        num_gpus: int,
        ep_group: object = None,
        logical_to_all_physical_map_num_valid: torch.Tensor | None = None,
        *,
        backend: str | None = None,
        tolerance: float = DEFAULT_TOLERANCE,
    ) -> None:
        self.num_gpus = _size("num_gpus", num_gpus)
        self.ep_group = ep_group
        group = _process_group(ep_group)
        phy2log, log2phy = _check_int("phy2log", phy2log, 1), _check_int("log2phy", log2phy, 2)
        self.num_phy, (self.num_logical, self.max_copies) = len(phy2log), log2phy.shape
        placement, tables = self._read(phy2log, log2phy, logical_to_all_physical_map_num_valid)
        self.balancer = Balancer(
            placement, group=group, device=phy2log.device, backend=backend, tolerance=tolerance
        )
        _check_agreed(placement, self.balancer.placement)
        device = self.balancer.device
        self._tables = _Tables(*(table.to(device) for table in tables))
        self._whole = torch.ones(1, dtype=torch.float32, device=device)
        self._prob = torch.empty(log2phy.shape, dtype=torch.float32, device=device)
        # Compiles what a batch needs, and leaves a plan in the buffer.
        self.balancer.warmup()
        nothing = torch.zeros(self.num_logical, dtype=torch.int32, device=device)
        self._write(self.balancer.solve(nothing).shares)
        self.balancer.certified.zero_()
        self.balancer.solves.zero_()

    @property
    def log2phy(self) -> torch.Tensor:
        """``[num_logical, max_copies]`` int64 on the device, slots of each expert."""
        return self._tables.log2phy

    def solve(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Shares of every copy for this batch; collective over the group, no host sync on Triton.

        Parameters
        ----------
        topk_ids : torch.Tensor
            int32 or int64, any shape (SGLang: ``[tokens, top_k]``, possibly no tokens), logical
            ids in [-1, num_logical); -1 is not counted.

        Returns
        -------
        torch.Tensor
            ``[num_logical, max_copies]`` float32, in the layout of ``log2phy``: the part of the
            expert's tokens that each copy should take. Each row sums to 1, padding is 0. The same
            tensor in every call: the next one overwrites it.

        Raises
        ------
        TypeError, ValueError
            As for `lplb_triton.Balancer.run`.
        RuntimeError
            On a GPU, if an earlier call met an id out of range (it was not counted).
        """
        counts, _ = self.balancer.count(topk_ids)
        return self._write(self.balancer.solve(self.balancer.sync(counts)).shares)

    def run(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Physical ids for this batch, in place of `solve` and sampling; quotas are met exactly.

        Parameters
        ----------
        topk_ids : torch.Tensor
            As for `solve`.

        Returns
        -------
        torch.Tensor
            Physical ids, contiguous, of the shape and dtype of ``topk_ids``; -1 stays -1. All
            slots of ``phy2log`` are used, whatever ``log2phy`` lists.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As for `solve`.
        """
        return self.balancer.run(topk_ids)

    def update(
        self,
        phy2log: torch.Tensor,
        log2phy: torch.Tensor,
        logical_to_all_physical_map_num_valid: torch.Tensor | None = None,
    ) -> None:
        """Write another placement of the same sizes into the tables; collective over the group.

        Waits for the device. Captured CUDA graphs use the new placement from their next replay on.

        Parameters
        ----------
        phy2log, log2phy, logical_to_all_physical_map_num_valid : torch.Tensor
            As at construction, of the same shapes.

        Raises
        ------
        TypeError, ValueError
            Naming the argument that doesn't fit. Nothing is changed then, unless the cause is
            that ranks disagree on ``phy2log``.
        """
        phy2log, log2phy = _check_int("phy2log", phy2log, 1), _check_int("log2phy", log2phy, 2)
        for name, value, shape in (
            ("phy2log", phy2log, (self.num_phy,)),
            ("log2phy", log2phy, (self.num_logical, self.max_copies)),
        ):
            if value.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        placement, tables = self._read(phy2log, log2phy, logical_to_all_physical_map_num_valid)
        _check_agreed(placement, self.balancer.update_placement(placement))
        for mine, theirs in zip(self._tables, tables, strict=True):
            mine.copy_(theirs)
        if self.balancer.device.type == "cuda":
            torch.cuda.synchronize(self.balancer.device)

    def check(self) -> None:
        """Wait for the device and raise if a batch was not certified or held a bad id.

        Raises
        ------
        RuntimeError
            If a call, or a graph replay, met an id out of range.
        SolveError
            If a plan since the start was not certified within the tolerance; it was feasible and
            no worse than the even split all the same.
        """
        self.balancer.check()
        solves, certified = int(self.balancer.solves), int(self.balancer.certified)
        if certified != solves:
            raise SolveError(
                f"{solves - certified} of {solves} batches not certified within "
                f"{self.balancer.tolerance:g}"
            )

    def _write(self, shares: torch.Tensor) -> torch.Tensor:
        """Lay shares ``[1, num_gpus, columns]`` out by expert and copy, in the fixed buffer."""
        tables = self._tables
        part = torch.cat([shares.reshape(-1), self._whole])[tables.cell] * tables.part
        listed = part.sum(1, keepdim=True)
        torch.where(listed > 0, part / listed, tables.even, out=self._prob)
        return self._prob

    def _read(
        self, phy2log: torch.Tensor, log2phy: torch.Tensor, n_valid: torch.Tensor | None
    ) -> tuple[Placement, _Tables]:
        """Check both maps against each other; the placement and the tables, on the CPU."""
        if self.num_phy % self.num_gpus:
            raise ValueError(
                f"num_gpus must divide the number of slots {self.num_phy}, got {self.num_gpus}"
            )
        if phy2log.device != log2phy.device:
            raise ValueError(f"log2phy is on {log2phy.device}, phy2log on {phy2log.device}")
        placement = Placement(phy2log, self.num_gpus, n_logical=self.num_logical)
        rows = log2phy.detach().cpu().long()
        valid = rows >= 0
        if not bool(((rows >= -1) & (rows < self.num_phy)).all()):
            raise ValueError(
                f"log2phy must hold slots in [-1, {self.num_phy}), "
                f"got {int(rows.min())}..{int(rows.max())}"
            )
        expert = placement.phy2log.long()[rows.clamp(min=0)]
        wrong = valid & (expert != torch.arange(self.num_logical).unsqueeze(1))
        if bool(wrong.any()):
            row = int(wrong.any(1).int().argmax())
            raise ValueError(f"log2phy gives expert {row} a slot that phy2log gives to another")
        if int(torch.bincount(rows[valid], minlength=self.num_phy).max()) > 1:
            raise ValueError("log2phy lists a slot twice")
        listed = valid.sum(1)
        if not bool(listed.all()):
            raise ValueError(f"log2phy gives expert {int(listed.argmin())} no slot")
        _check_n_valid(n_valid, listed)
        partial = int((listed != placement.logcnt).sum())
        if partial:
            warnings.warn(
                f"log2phy lists only some of the slots of {partial} experts, so sampling cannot "
                "follow the plan for them; run() uses every slot",
                RuntimeWarning,
                stacklevel=3,
            )
        s = placement.structure
        shares = s.mask.size
        by_slot = np.empty((2, self.num_phy), dtype=np.int64)
        by_slot[0, s.copy_slot] = np.where(s.copy_cell < 0, shares, s.copy_cell)
        by_slot[1, s.copy_slot] = s.copy_multiplicity
        cell, multiplicity = torch.from_numpy(by_slot)[:, rows.clamp(min=0)]
        tables = _Tables(
            cell=cell,
            part=valid / multiplicity,
            even=valid / listed.unsqueeze(1),
            log2phy=rows,
        )
        return placement, tables


def _process_group(ep_group: object) -> dist.ProcessGroup | None:
    """Return torch's process group of ``ep_group``, or raise naming it."""
    if ep_group is None:
        return None
    for group in (ep_group, getattr(ep_group, "device_group", None)):
        if isinstance(group, dist.ProcessGroup):
            return group
    raise TypeError(
        "ep_group must be a ProcessGroup, have one as device_group, or be None, "
        f"got {type(ep_group).__name__}"
    )


def _check_int(name: str, value: object, ndim: int) -> torch.Tensor:
    """Return a tensor of integers with ``ndim`` dimensions, or raise naming ``name``."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {value.dtype}")
    if value.ndim != ndim or value.numel() == 0:
        raise ValueError(
            f"{name} must have {ndim} dimension(s) and not be empty, got shape {tuple(value.shape)}"
        )
    return value


def _check_n_valid(n_valid: object, listed: torch.Tensor) -> None:
    """Raise unless ``n_valid``, if given, counts the slots that the rows list."""
    name = "logical_to_all_physical_map_num_valid"
    if n_valid is None:
        return
    counted = _check_int(name, n_valid, 1).detach().cpu()
    if counted.shape != listed.shape or not bool((counted == listed).all()):
        raise ValueError(f"{name} must count the slots in each row of log2phy")


def _check_agreed(mine: Placement, agreed: Placement) -> None:
    """Raise if rank 0 came with another placement."""
    if not torch.equal(mine.phy2log, agreed.phy2log):
        raise ValueError("phy2log must be the same on every rank; rank 0's differs from this one's")
