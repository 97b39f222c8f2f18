"""The balancer: for every batch it counts, sums over ranks, solves and selects."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lplb_triton import _saving
from lplb_triton._backends.choose import create_backend
from lplb_triton._backends.layer import Layer, LayerAttribute, create_layer
from lplb_triton._checks import (
    check_choice,
    check_counter,
    check_ids,
    check_integer,
    check_max_iterations,
    check_timeout,
    check_tolerance,
    resolve_device,
)
from lplb_triton._load_history import LoadHistory
from lplb_triton._locality import DEFAULT_SLACK, resolve_locality
from lplb_triton._membership import Membership, wait_for_device, warn_if_no_group
from lplb_triton._objective import resolve_cost
from lplb_triton._reports import BatchReports
from lplb_triton._settings import QUOTAS, SOLVERS, check_combination, check_size
from lplb_triton._steps import BatchSteps
from lplb_triton._torch_op import is_plain, opaque, register
from lplb_triton._updates import update_placements
from lplb_triton.costs import TimeCost
from lplb_triton.live import LiveRules, make_rules
from lplb_triton.placement import Placement
from lplb_triton.placement.moves import require_placement
from lplb_triton.solver import (
    DEFAULT_MAX_ITERATIONS,
    DEFAULT_TOLERANCE,
    MIN_TOLERANCE_FLOAT32,
    resolve_backend,
)
from lplb_triton.sync._base import Communicator

__all__ = ["Balancer"]


class Balancer(LoadHistory, BatchSteps, BatchReports):
    """Rewrites logical into physical expert ids so that the ranks of a group finish together.

    One balancer serves one MoE layer on one rank. Make it with the layer's `Placement`, call
    `run` on every batch. All ranks of ``group`` take part in every call, with or without
    tokens. Calls on several streams, and micro-batches in flight, are independent: scratch
    belongs to the stream, not to the layer.

    Parameters
    ----------
    placement : Placement
        The expert of every slot. With a ``group``, rank 0's placement is broadcast and used by
        all.
    group : torch.distributed.ProcessGroup or None
        The EP group to sum counts over. ``None``: counts are global as they are (one process,
        or the caller has summed them).
    rank : int or None
        This rank's number in the EP group; by default the group's, or 0 without one. It only
        decides how this rank rounds its quotas. It can't be given with ``quotas="global"`` or
        ``"replicated"``.
    device : torch.device, str or None
        Device of the ids; by default the current GPU, or the CPU if there is none.
    backend : {"triton", "torch"} or None
        ``None`` takes the Triton kernels on a GPU and the torch twin on a CPU. An explicit
        backend is used or refused, never replaced. The kernels take up to 512 ranks and 2,048
        redundant slots in a group, and 16,384 logical experts; the twin takes any number.
    tolerance : float
        Certified relative gap of the plans, at least 1e-5.
    max_iterations : int
        The most steps by potentials of a solve with ``solver="levelling"``, the most
        interior-point iterations with ``solver="interior_point"``. A batch that needs more returns
        its plan with its true gap and is counted in ``uncertified``; only
        ``check(certified=True)`` raises for it.
    sync : str or Communicator
        How counts are summed over the group: a name of `lplb_triton.sync.connect`, or a
        communicator made by it. Balancers that give a name share one communicator.
    timeout : float or None
        Bound on each wait for other ranks, in seconds, by default the group's own; also on the
        collective calls: making a balancer, `update_placement`, `set_group` and `close`. See
        `lplb_triton.sync.connect`.
    quotas : {"local", "global", "replicated"}
        ``"local"``: each rank rounds its own quotas, so a copy's load over all ranks differs
        from its share by up to one token per rank. ``"global"``: quotas of all ranks together
        are exact, to less than one token per copy, and each rank serves its own rank and then
        its own node first. This needs a group, and fewer than 2**24 ids in a batch.
        ``"replicated"``: every rank holds all tokens of the group, as in layers without an
        all-to-all. Counts are not summed, and every rank picks the same copies; a group, if given,
        is only used to broadcast rank 0's placement.
    solver : {"levelling", "interior_point"}
        ``"levelling"``: plans are made in the kernel that sums the counts. ``"interior_point"``:
        plans are made by the kernel of `lplb_triton.solve`, which has limits on sizes; it is a
        launch of its own between torch operations, so a batch takes longer. The solver must be the
        same on every rank. Both solvers keep the tolerance, but their plans differ.
    objective : {"tokens", "time"}
        ``"tokens"``: the plan of the linear program. ``"time"``: a plan made from it, by which the
        slowest rank's expert products take less time: see ``docs/time.md``. Not with live slots.
    cost : TimeCost or None
        What a rank's products take, with ``objective="time"``; the same on every rank.
    locality : {"none", "node"}
        ``"node"``: with ``quotas="global"``, a plan made from that of the linear program, by which
        fewer tokens leave their node at nearly the same largest load: see ``docs/nodes.md``. Not
        with live slots nor ``objective="time"``.
    ranks_per_node : int or None
        Consecutive ranks on a node, with ``quotas="global"``; by default as many as the
        communicator finds on one host. Needed with ``locality="node"``.
    slack : float
        With ``locality="node"``: the part by which the largest load may be above the bound of the
        linear program, 0 to 1. Where that plan's own largest load is more, it may be that.
    live_above : float
        With live slots (`Placement.with_live_slots`): they are filled in batches whose largest load
        would exceed this many times the mean otherwise, 1 to 2. The plan aims at half of that
        excess. A solve ends early once its bound is above this.
    live_cost : int
        Tokens of load that a fetched expert costs at the busiest rank, sent or received: an expert
        is fetched only if that lowers the largest load by more. 0 fetches whatever helps.
    live_fanout : int or None
        The most copies of experts that are fetched from one home rank in a batch.
    live_domain : int or None
        Consecutive ranks, such as those of an NVLink domain, among which experts are fetched; by
        default all.
    live_resident : bool
        Whether live slots keep what they hold from batch to batch, as in inference: what lies
        there is used first, and costs nothing. All calls are then made on one stream.

    Attributes
    ----------
    certified, solves, uncertified : torch.Tensor
        One int64 element each on the device: groups certified within the tolerance, groups solved,
        and groups whose plan has a gap above the tolerance (`Status.GAP`), since the start.
    traffic : torch.Tensor
        ``[3]`` int64 on the device, with ``quotas="global"``: this rank's tokens that stayed on
        the rank, that stayed on its node, and all of them, since the start.
    communicator : Communicator or None
        Sums the counts; None if counts are not summed.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that doesn't fit.
    SyncError
        If a rank of the group doesn't come within the time-out; it is named.

    Warns
    -----
    RuntimeWarning
        If torch.distributed is up with ``ep_size`` ranks and neither ``group`` nor ``rank`` is
        given.

    Notes
    -----
    A copy (`copy.deepcopy`) is a balancer of its own in the same group, with the communicator
    shared: copies are made in the same order on every rank. Pickling, and `torch.save` of a model,
    keep the placement, the settings and the counters, not the group: a balancer that had one
    raises when it is used after loading, until `set_group` has been called. It is loaded onto the
    current GPU, or onto the CPU if it was there.

    Examples
    --------
    >>> load = torch.tensor([90.0, 10.0, 40.0, 60.0])
    >>> balancer = Balancer(Placement.from_history(load, 2, redundant_per_rank=1), device="cpu")
    >>> balancer.run(torch.tensor([[0, 2], [0, 3], [0, -1]])).shape
    torch.Size([3, 2])
    """

    device = LayerAttribute[torch.device]()
    backend = LayerAttribute[str]()
    rank = LayerAttribute[int]()
    quotas = LayerAttribute[str]()
    solver = LayerAttribute[str]()
    cost = LayerAttribute["TimeCost | None"]()
    tolerance = LayerAttribute[float]()
    max_iterations = LayerAttribute[int]()
    default_n_sms = LayerAttribute[int]()
    certified = LayerAttribute[torch.Tensor]()
    solves = LayerAttribute[torch.Tensor]()
    uncertified = LayerAttribute[torch.Tensor]()
    traffic = LayerAttribute[torch.Tensor]()
    group = LayerAttribute["dist.ProcessGroup | None"]()
    communicator = LayerAttribute["Communicator | None"]()

    # Whether the group may be given after construction, so that a missing group is no reason for a
    # warning yet.
    _expects_group_later = False

    @opaque
    def __init__(
        self,
        placement: Placement,
        *,
        group: dist.ProcessGroup | None = None,
        rank: int | None = None,
        device: torch.device | str | None = None,
        backend: str | None = None,
        tolerance: float = DEFAULT_TOLERANCE,
        max_iterations: int = DEFAULT_MAX_ITERATIONS,
        sync: str | Communicator = "auto",
        timeout: float | None = None,
        quotas: str = "local",
        solver: str = "levelling",
        objective: str = "tokens",
        cost: TimeCost | None = None,
        locality: str = "none",
        ranks_per_node: int | None = None,
        slack: float = DEFAULT_SLACK,
        live_above: float = LiveRules().above,
        live_cost: int = 0,
        live_fanout: int | None = None,
        live_domain: int | None = None,
        live_resident: bool = False,
    ) -> None:
        placement = require_placement("placement", placement)
        check_max_iterations(max_iterations)
        device = resolve_device(device)
        chosen = resolve_backend(backend, device)
        check_choice("solver", solver, SOLVERS)
        if chosen == "triton":
            check_size(placement, solver, device)
        tolerance = check_tolerance(tolerance, MIN_TOLERANCE_FLOAT32)
        check_choice("quotas", quotas, QUOTAS)
        if rank is not None and not 0 <= rank < placement.ep_size:
            raise ValueError(f"rank must be in [0, {placement.ep_size}), got {rank}")
        timeout = None if timeout is None else check_timeout(timeout)
        if isinstance(sync, Communicator) and group is None:
            group = sync.group
        check_combination(quotas, group, rank)
        if group is None and rank is None and quotas == "local" and not self._expects_group_later:
            warn_if_no_group(placement, stacklevel=3)
        rules = make_rules(
            placement, solver, live_above, live_cost, live_fanout, live_domain, live_resident
        )
        layer = create_layer(
            placement, device, chosen, rank=rank or 0, quotas=quotas, solver=solver,
            tolerance=tolerance, max_iterations=max_iterations, live=rules,
            cost=resolve_cost(placement, objective, cost),
            locality=resolve_locality(
                placement, quotas, locality, ranks_per_node, slack, objective
            ),
        )  # fmt: skip
        self._set_up(layer, backend, rank, sync, timeout)
        self._membership.join("making a Balancer", group, sync, self.warmup)

    def _set_up(
        self,
        layer: Layer,
        given_backend: str | None,
        own_rank: int | None,
        sync: str | Communicator,
        timeout: float | None,
    ) -> None:
        """Make what belongs to this balancer alone; ``given_backend`` is the caller's argument."""
        self._layer, self._given_backend = layer, given_backend
        self._metrics = None
        self._backend = create_backend(layer)
        self._tables = self._backend.tables
        self._handle = register(self._backend)
        self._membership = Membership(
            layer, self._backend, (self._handle,), own_rank=own_rank, sync=sync, timeout=timeout
        )

    @property
    def objective(self) -> str:
        """What plans are made for: ``"tokens"`` or ``"time"``."""
        return "tokens" if self._layer.cost is None else "time"

    @property
    def locality(self) -> str:
        """Where plans keep tokens: ``"none"`` or ``"node"``."""
        return "none" if self._layer.locality.slack is None else "node"

    def __repr__(self) -> str:
        """Placement, device, backend, group, solver and tolerance in one line."""
        sync = "none" if self.communicator is None else repr(self.communicator)
        kinds = "" if self.cost is None else ", objective=time"
        ranks_per_node, slack = self._layer.locality
        kinds += "" if ranks_per_node is None else f", ranks_per_node={ranks_per_node}"
        kinds += "" if slack is None else f", locality=node, slack={slack:g}"
        return (
            f"Balancer({self.placement!r}, device={self.device}, backend={self.backend}, "
            f"sync={sync}, quotas={self.quotas}, rank={self.rank}, solver={self.solver}, "
            f"tolerance={self.tolerance:g}{kinds})"
        )

    @opaque
    def set_group(
        self,
        group: dist.ProcessGroup | None,
        *,
        sync: str | Communicator | None = None,
        domain_size: int | None = None,
    ) -> None:
        """Use ``group`` for summing counts from the next call on; collective over it.

        Parameters
        ----------
        group : torch.distributed.ProcessGroup or None
            Its size must be the placement's ``ep_size``. Rank 0's placement is broadcast.
        sync, domain_size
            As for `lplb_triton.sync.connect`; by default as at the start.

        Raises
        ------
        ValueError
            If the size doesn't fit, or ``quotas="global"`` would be left without a group.
        SyncError
            If a rank doesn't come within the time-out; it is named.
        """
        member, layer = self._membership, self._layer
        if member.saved_ranks is None:
            layer.check_open()
        if group is None and layer.quotas == "global":
            raise ValueError("group must not be None with quotas='global'")
        sync = member.sync if sync is None else sync
        member.join("Balancer.set_group", group, sync, self.warmup, domain_size)

    def close(self) -> None:
        """Release the communicator; the last balancer that shares it closes it.

        Collective over the group, unless a call failed. A communicator that was given as
        ``sync`` stays open. Later calls raise.

        Raises
        ------
        SyncError
            If a rank doesn't come within the time-out; it is named.
        """
        self._membership.close(local=False)

    def __enter__(self) -> Balancer:
        """Return the balancer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close it; after an exception locally, since other ranks may have had none."""
        self._membership.close(local=kind is not None)

    def __copy__(self) -> Balancer:
        """Make a balancer of its own, in the same group; see the class's notes."""
        return _saving.copy_balancer(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Balancer:
        """Make a balancer of its own, in the same group; see the class's notes."""
        return _saving.copy_balancer(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make the balancer again from what a file keeps; see the class's notes."""
        return _load, (type(self), _saving.saved_state(self))

    @opaque
    def update_placement(self, placement: Placement) -> Placement:
        """Write another placement of the same sizes into the device tables.

        Waits for the device before and after, so no batch sees half of it. Captured CUDA
        graphs use the new placement from their next replay on. Collective over the group.

        Parameters
        ----------
        placement : Placement
            Same numbers of experts, slots, ranks, groups and columns as the first.

        Returns
        -------
        Placement
            The one in use: rank 0's.

        Raises
        ------
        TypeError, ValueError
            If it is no placement, or its sizes differ, on any rank (nothing is changed then).
        SyncError
            If a rank doesn't come within the time-out; it is named, and nothing is changed.
        """
        return update_placements([self], [placement], "Balancer.update_placement")[0]

    def run(
        self,
        idx: torch.Tensor,
        *,
        n_sms: int | None = None,
        certified: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return physical ids for this batch's logical ids, without a host sync.

        A CUDA graph can capture this call.

        Parameters
        ----------
        idx : torch.Tensor
            int64 or int32, any shape, logical ids in [-1, n_logical); -1 stays -1. A
            non-contiguous tensor is copied first.
        n_sms : int or None
            Programs for counting and selecting; by default two per multiprocessor, at most 256.
            The result doesn't depend on it.
        certified : torch.Tensor or None
            One int32 or int64 element on the device that rises by each group certified; by
            default the balancer's own.

        Returns
        -------
        torch.Tensor
            Physical ids, contiguous, of the shape and dtype of ``idx``. The result is the same
            in every run: nothing depends on timing.

        Raises
        ------
        TypeError, ValueError
            For an argument of the wrong kind, dtype or device; on a CPU for ids out of range.
        RuntimeError
            On a GPU, if an earlier call met an id out of range (it became -1); see `check`.
        """
        layer = self._layer
        check_ids("idx", idx, layer.device)
        if certified is not None:
            check_counter("certified", certified, layer.device)
        n_sms = layer.default_n_sms if n_sms is None else check_integer("n_sms", n_sms)
        if is_plain(idx):
            # The operators do the same, but the dispatcher takes host time.
            return self._backend.run(idx, certified, n_sms)
        result: torch.Tensor
        if certified is None:
            result = torch.ops.lplb_triton.balance(idx, self._handle, n_sms)
        else:
            result = torch.ops.lplb_triton.balance_counted(idx, certified, self._handle, n_sms)
        return result

    def bind(self, channel: int) -> None:
        """Assign a channel to the current stream for `run`; see `Communicator.bind`.

        Parameters
        ----------
        channel : int
            From 0; the same on every rank.
        """
        if self.communicator is not None:
            self.communicator.bind(channel)

    @opaque
    def warmup(self) -> None:
        """Compile every kernel that `run` uses, for int32 and int64 ids; local to this rank."""
        self._backend.warmup()

    @opaque
    def check(self, *, certified: bool = False) -> None:
        """Wait for the device and raise if a call, or a graph replay, met bad ids or counts.

        Parameters
        ----------
        certified : bool
            Whether to raise, too, if a plan's gap was above the tolerance since the last call that
            asked for this, or the start. Such plans are feasible, and no worse than the even split.

        Raises
        ------
        RuntimeError
            Naming what was bad. The report is cleared, so the next call starts afresh.
        SolveError
            With ``certified``: how many of how many groups ended above the tolerance.
        """
        layer = self._layer
        wait_for_device(layer.device)
        self._backend.raise_on_report()
        if layer.communicator is not None:
            layer.communicator.check()
        if certified:
            layer.raise_on_uncertified()


def _load(kind: type[Balancer], state: dict[str, Any]) -> Balancer:
    """Make a balancer from the state in a file, which names this function."""
    return _saving.load_balancer(kind, state)
