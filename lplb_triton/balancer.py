"""The per-batch pipeline for any placement: count, sync, solve, select."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from lplb_triton import reference
from lplb_triton._backends import interior_point, workspace
from lplb_triton._backends.tables import DeviceTables
from lplb_triton._checks import resolve_device
from lplb_triton._counts import check_counts, counts_to_int32
from lplb_triton._limits import check_dense_size, check_placement_size
from lplb_triton._membership import (
    Agreed,
    agree,
    bound_of,
    let_go,
    share,
    take_communicator,
    warn_if_alone,
)
from lplb_triton._torch_op import is_plain, opaque, outside_modes, register
from lplb_triton._updates import update_placements
from lplb_triton.placement import Placement
from lplb_triton.reference import levelling as reference_levelling
from lplb_triton.solution import Solution, SolveError, Status
from lplb_triton.solver import (
    DEFAULT_MAX_ITERATIONS,
    DEFAULT_TOLERANCE,
    MIN_TOLERANCE_FLOAT32,
    check_max_iterations,
    check_tolerance,
    resolve_backend,
)
from lplb_triton.sync._base import Communicator, check_timeout
from lplb_triton.sync._meeting import meet
from lplb_triton.sync._peer import Endpoint, PeerCommunicator

if TYPE_CHECKING:
    from lplb_triton import kernels

__all__ = ["Balancer"]

# Chunks of the batch start on whole multiples of this many ids.
CHUNK_ALIGNMENT = 128
CPU_PROGRAMS = 4
QUOTAS = ("local", "global", "replicated")
# What the torch backend solves with, by solver.
TWINS = {"levelling": reference_levelling.solve, "interior_point": reference.solve}
SOLVERS = tuple(TWINS)
# Attributes that copies and files keep.
SETTINGS = (
    "tolerance", "max_iterations", "quotas", "solver", "_given_backend", "_own_rank", "_timeout",
    "_checked",
)  # fmt: skip
COUNTERS = ("certified", "solves", "uncertified", "traffic")


class _Scratch(NamedTuple):
    """A workspace block as one layer on one stream sees it."""

    block: torch.Tensor
    pipeline: kernels.Pipeline
    exchange: Callable[[], None] | None
    """Sums counts over the ranks, where no kernel of the pipeline does."""


def _chunk(n_ids: int, n_sms: int) -> int:
    """Ids per program: an even part, rounded up to whole multiples of CHUNK_ALIGNMENT."""
    part = -(-n_ids // n_sms)
    return max(1, -(-part // CHUNK_ALIGNMENT)) * CHUNK_ALIGNMENT


def _count_statuses(
    status: torch.Tensor, certified: torch.Tensor, solves: torch.Tensor, uncertified: torch.Tensor
) -> None:
    """Add groups to the counters; no host sync."""
    # A counter of the caller's may have been made in inference mode, and is changed there only.
    with torch.inference_mode(certified.is_inference()):
        _add(certified, status == Status.CERTIFIED)
    _add(solves, torch.ones_like(status))
    _add(uncertified, status == Status.GAP)


def _add(counter: torch.Tensor, amounts: torch.Tensor) -> None:
    """Add a sum to a counter of one element, at once: other streams may add to it, too."""
    first = torch.zeros(1, dtype=torch.int64, device=counter.device)
    counter.view(-1).index_add_(0, first, amounts.sum().reshape(1).to(counter.dtype))


def check_counter(name: str, counter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a counter of one int32 or int64 element on ``device``, or raise naming it."""
    if not isinstance(counter, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(counter).__name__}")
    if counter.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {counter.dtype}")
    if counter.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(counter.shape)}")
    if counter.device != device:
        raise ValueError(f"{name} is on {counter.device}, expected {device}")
    return counter


class Balancer:
    """Rewrites logical into physical expert ids so that the ranks of a group finish together.

    One balancer serves one MoE layer on one rank. Make it with the layer's `Placement`, call
    `run` on every batch. All ranks of ``group`` take part in every call, with or without
    tokens. Calls on several streams, and micro-batches in flight, are independent: scratch
    belongs to the stream, not to the layer.

    Parameters
    ----------
    placement : Placement
        Where experts are. With a ``group``, rank 0's placement is broadcast and used by all.
    group : torch.distributed.ProcessGroup or None
        The EP group to sum counts over. ``None``: counts are global as they are (one process,
        or the caller has summed them).
    rank : int or None
        This rank's number in the EP group; by default the group's, or 0 without one. It only
        decides how this rank rounds its quotas. Not with ``quotas="global"``.
    device : torch.device, str or None
        Where ids live; by default the current GPU, or the CPU if there is none.
    backend : {"triton", "torch"} or None
        ``None`` takes the Triton kernels on a GPU and the torch twin on a CPU. An explicit
        backend is used or refused, never replaced. The kernels take up to 512 ranks and 2,048
        redundant slots in a group, and 16,384 logical experts; the twin takes any.
    tolerance : float
        Certified relative gap of the plans, at least 1e-5.
    max_iterations : int
        Bound on the steps by potentials of a solve with ``solver="levelling"``, on interior-point
        iterations with ``solver="interior_point"``. A batch that needs more returns its plan with
        its true gap and is counted in ``uncertified``; only ``check(certified=True)`` raises for
        it.
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
        its own node first. Needs a group, and fewer than 2**24 ids in a batch. ``"replicated"``:
        every rank holds all tokens of the group, as where there is no all-to-all. Counts are not
        summed, and every rank picks the same copies; a group, if given, only settles on rank 0's
        placement.
    solver : {"levelling", "interior_point"}
        ``"levelling"``: plans are made in the kernel that sums the counts. ``"interior_point"``:
        by the kernel of `lplb_triton.solve`, in a launch of its own between others of torch, which
        takes longer; for up to 128 ranks in a group, see there. The same on every rank. Both keep
        the same tolerance, by plans that differ.

    Attributes
    ----------
    certified, solves, uncertified : torch.Tensor
        One int64 element each on the device: groups certified within the tolerance, groups solved,
        and groups whose plan has a gap above the tolerance (`Status.GAP`), since the start.
    traffic : torch.Tensor
        ``[3]`` int64 on the device, with ``quotas="global"``: this rank's tokens that stayed on
        the rank, that stayed on its node, and all of them, since the start.
    communicator : Communicator or None
        In use for summing counts.

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

    # Whether a group may come before the first batch: then there is nothing to warn of yet.
    _group_may_come = False

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
    ) -> None:
        if not isinstance(placement, Placement):
            raise TypeError(f"placement must be a Placement, got {type(placement).__name__}")
        check_max_iterations(max_iterations)
        self.device = resolve_device(device)
        self._given_backend = backend
        self.backend = resolve_backend(backend, self.device)
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        self.solver = solver
        if self.backend == "triton":
            check_placement_size(placement)
            if solver == "interior_point":
                check_dense_size(placement, self.device)
        self.tolerance = check_tolerance(tolerance, MIN_TOLERANCE_FLOAT32)
        self.max_iterations = max_iterations
        if quotas not in QUOTAS:
            raise ValueError(f"quotas must be one of {', '.join(QUOTAS)}, got {quotas!r}")
        self.quotas = quotas
        if rank is not None and not 0 <= rank < placement.ep_size:
            raise ValueError(f"rank must be in [0, {placement.ep_size}), got {rank}")
        self._own_rank = rank
        # Groups above the tolerance, and groups solved, at the last look for the former.
        self._checked = (0, 0)
        # Ranks of the group that it had when it was saved.
        self._left: tuple[int, ...] | None = None
        self._sync, self._timeout = sync, None if timeout is None else check_timeout(timeout)
        if isinstance(sync, Communicator) and group is None:
            group = sync.group
        if quotas == "global" and (group is None or rank is not None):
            raise ValueError("quotas='global' needs a group, and no other rank than the group's")
        if quotas == "replicated" and rank is not None:
            raise ValueError("rank must not be given with quotas='replicated'")
        if group is None and rank is None and quotas == "local" and not self._group_may_come:
            warn_if_alone(placement, stacklevel=3)
        self._prepare(placement)
        self._enter("making a Balancer", group, sync)

    def _prepare(self, placement: Placement) -> None:
        """Set up what belongs to this balancer alone."""
        self.group: dist.ProcessGroup | None = None
        self.communicator: Communicator | None = None
        # The same, if the solving kernel does the exchange.
        self._peers: PeerCommunicator | None = None
        self.rank = 0 if self._own_rank is None else self._own_rank
        self._blocked: str | None = None  # why it can't be used
        self._handle = register(self)
        self._number: tuple[int, ...] = (self._handle,)
        self._n_copies = 0
        self._placement = placement
        self._scratches: dict[tuple[int, int], _Scratch] = {}
        on = self.device
        self._dense = self.backend == "triton" and self.solver == "interior_point"
        self._tables = DeviceTables(
            placement, on, kernels=self.backend == "triton", dense=self._dense
        )
        self._version = torch.zeros(1, dtype=torch.int32, device=on)
        self.traffic = torch.zeros(3, dtype=torch.int64, device=on)
        self.certified = torch.zeros(1, dtype=torch.int64, device=on)
        self.solves = torch.zeros(1, dtype=torch.int64, device=on)
        self.uncertified = torch.zeros(1, dtype=torch.int64, device=on)
        # Kernels write here, so the host can look without waiting for the device.
        self._status = torch.zeros(2, dtype=torch.int64, device="cpu", pin_memory=on.type == "cuda")
        self._status_view = self._status.numpy()
        # Groups without a plan for want of counts, of the interior-point kernel, which reports
        # nothing: on the device, as the host sees it, and as it has been told.
        self._invalid = torch.zeros(1, dtype=torch.int64, device=on)
        self._invalid_seen = torch.zeros_like(self._status[:1], pin_memory=on.type == "cuda")
        self._invalid_view, self._invalid_told = self._invalid_seen.numpy(), 0
        self._offsets: dict[int, list[tuple[int, int, tuple[int, ...], torch.dtype]]] = {}
        self.default_n_sms = CPU_PROGRAMS
        if on.type == "cuda":
            # Two on each multiprocessor hide each other's waiting; 256 rows are summed at once.
            sms = torch.cuda.get_device_properties(on).multi_processor_count
            self.default_n_sms = min(2 * sms, 256)
        if self.backend == "triton":
            from lplb_triton import kernels

            # Kept, since an import statement takes its time in every batch.
            self._kernels = kernels
            views = self._tables.views
            self._solve_tables = kernels.SolveTables(
                *(views[name] for name in kernels.SolveTables._fields)
            )
            self._select_tables = kernels.SelectTables(
                *(views[name] for name in kernels.SelectTables._fields)
            )
            self._spread_tables = kernels.SpreadTables(
                *(views[name] for name in kernels.SpreadTables._fields)
            )
            if not self._dense:
                self._layout(self.default_n_sms)

    @property
    def placement(self) -> Placement:
        """The placement in use (immutable)."""
        return self._placement

    @property
    def _kinds(self) -> tuple[str, str]:
        """What must be the same on all ranks besides the sizes of the placement."""
        return self.quotas, self.solver

    def __repr__(self) -> str:
        """Placement, device, backend, group, solver and tolerance in one line."""
        sync = "none" if self.communicator is None else repr(self.communicator)
        return (
            f"Balancer({self._placement!r}, device={self.device}, backend={self.backend}, "
            f"sync={sync}, quotas={self.quotas}, rank={self.rank}, solver={self.solver}, "
            f"tolerance={self.tolerance:g})"
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
        if self._left is None:
            self._check_open()
        if group is None and self.quotas == "global":
            raise ValueError("group must not be None with quotas='global'")
        self._enter("Balancer.set_group", group, self._sync if sync is None else sync, domain_size)

    def _enter(
        self,
        purpose: str,
        group: dist.ProcessGroup | None,
        sync: str | Communicator,
        domain_size: int | None = None,
    ) -> None:
        """Take a group: rank 0's placement, this rank's number, and a communicator; collective."""
        p, communicator = self._placement, None
        if group is not None and group.size() != p.ep_size:
            raise ValueError(f"group must have {p.ep_size} ranks, got {group.size()}")
        bound = bound_of(group, self.device, self._timeout)
        agreed = agree(group, purpose, bound, Agreed(p, self._number), self._kinds)
        replicated = self.quotas == "replicated"
        if group is not None and not replicated:
            communicator = take_communicator(
                group, sync, self.device, self._timeout, p.n_logical, domain_size
            )
        self._leave()
        self.group, self.communicator, self._sync = group, communicator, sync
        self._left = self._blocked = self._peers = None
        if isinstance(communicator, PeerCommunicator) and p.n_group == 1 and not self._dense:
            self._peers = communicator
        if group is not None and self._own_rank is None and not replicated:
            self.rank = dist.get_rank(group)
        self._scratches.clear()
        self._write(agreed)
        if communicator is not None and communicator.waits_on_device:
            # All kernels are loaded on all ranks before any of them waits for another.
            try:
                self.warmup()
                meet(communicator.group, f"{purpose}, kernels loaded", bound)
            except BaseException:
                self._leave(alone=True)
                # Without a communicator it would take this rank's counts for everybody's.
                self._left = tuple(dist.get_process_group_ranks(communicator.group))
                self._blocked = f"{purpose} failed here: call set_group(group) on every rank"
                self.group = self.communicator = self._peers = None
                raise

    def _leave(self, alone: bool = False) -> None:
        """Let go of a communicator that this balancer came to by itself."""
        let_go(self.communicator, self._sync, alone)

    def close(self) -> None:
        """Let go of the communicator; the last balancer that shares it closes it.

        Collective over the group, unless a call failed. A communicator that was given as
        ``sync`` stays open. Later calls raise.

        Raises
        ------
        SyncError
            If a rank doesn't come within the time-out; it is named.
        """
        self._close(alone=False)

    def _close(self, alone: bool) -> None:
        if self._blocked is None:
            self._blocked = "this Balancer is closed"
            self._leave(alone)

    def __enter__(self) -> Balancer:
        """Return the balancer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close it; after an exception without the other ranks, which may have had none."""
        self._close(alone=kind is not None)

    def __copy__(self) -> Balancer:
        """Make a balancer of its own, in the same group; see the class's notes."""
        return self._copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Balancer:
        """Make a balancer of its own, in the same group; see the class's notes."""
        return self._copy()

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep what `_state` says."""
        return _load, (type(self), self._state())

    @opaque
    def _copy(self) -> Balancer:
        copied = type(self).__new__(type(self))
        copied._restore(self._state(), self.device)
        self._n_copies += 1
        copied._number = (*self._number, self._n_copies)
        copied.group, copied.rank, copied._blocked = self.group, self.rank, self._blocked
        copied._sync, copied._peers = self._sync, self._peers
        copied.communicator = self.communicator
        if self._blocked is None:
            share(self.communicator, self._sync)
        copied._write(Agreed(self._placement, copied._number))
        return copied

    def _state(self) -> dict[str, Any]:
        """Everything that can be kept in a file."""
        ranks = None if self.group is None else tuple(dist.get_process_group_ranks(self.group))
        return {
            "placement": self._placement,
            "settings": {name: getattr(self, name) for name in SETTINGS},
            "sync": self._sync if isinstance(self._sync, str) else "auto",
            "counters": {name: getattr(self, name).cpu() for name in COUNTERS},
            "device": self.device.type,
            "ranks": self._left if ranks is None else ranks,
        }

    def _restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Become what `_state` says, without a group."""
        for name, value in state["settings"].items():
            setattr(self, name, value)
        self.device, self._sync, self._left = device, state["sync"], state["ranks"]
        self.backend = resolve_backend(self._given_backend, device)
        self._prepare(state["placement"])
        for name, values in state["counters"].items():
            getattr(self, name).copy_(values)
        if self._left is not None:
            self._blocked = (
                f"this Balancer was saved with a group, of ranks {list(self._left)}, and has none "
                "here: call set_group(group) on every rank"
            )

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

    def _write(self, agreed: Agreed) -> None:
        """Use a placement from the next batch on, with the device idle in between."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._put(agreed)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _put(self, agreed: Agreed) -> None:
        """Write a placement into the tables; the caller waits for the device."""
        self._tables.write(agreed.placement)
        self._version.fill_(agreed.version)
        self._placement, self._number = agreed

    def run(
        self,
        idx: torch.Tensor,
        *,
        n_sms: int | None = None,
        certified: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Physical ids for this batch's logical ids; no host sync, CUDA-graph capturable.

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
        self._check_ids_tensor(idx)
        if certified is not None:
            check_counter("certified", certified, self.device)
        n_sms = self._check_n_sms(n_sms)
        if is_plain(idx):
            # What the operators do, without the dispatcher's part of the host time.
            return self._run(idx, certified, n_sms)
        result: torch.Tensor
        if certified is None:
            result = torch.ops.lplb_triton.balance(idx, self._handle, n_sms)
        else:
            result = torch.ops.lplb_triton.balance_counted(idx, certified, self._handle, n_sms)
        return result

    @opaque
    def count(
        self, idx: torch.Tensor, *, n_sms: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count this rank's tokens per logical expert.

        Parameters
        ----------
        idx, n_sms
            As for `run`.

        Returns
        -------
        counts : torch.Tensor
            ``[n_logical]`` int32, fresh.
        running : torch.Tensor
            ``[n_sms, n_logical]`` int32, fresh: row i counts what the first i + 1 programs see.
        """
        self._check_ids_tensor(idx)
        n_sms = self._check_n_sms(n_sms)
        idx = idx.contiguous()
        if self.backend == "torch":
            self._check_values(idx)
            return reference.count_experts(
                idx, self._placement.n_logical, _chunk(idx.numel(), n_sms), n_sms
            )
        kernels = self._kernels
        self._raise_on_status()
        self._check_values(idx)
        n_logical = self._placement.n_logical
        running = torch.empty(n_sms, n_logical, dtype=torch.int32, device=self.device)
        counts = torch.empty(n_logical, dtype=torch.int32, device=self.device)
        kernels.count_by_program(idx, running, counts, self._status, _chunk(idx.numel(), n_sms))
        kernels.sum_by_program(running, counts)
        return counts, running

    @opaque
    def sync(self, counts: torch.Tensor) -> torch.Tensor:
        """Sum counts over the EP group; without a group they come back as they are.

        Parameters
        ----------
        counts : torch.Tensor
            ``[n_logical]`` int32 or int64 in [0, 2**31).

        Returns
        -------
        torch.Tensor
            ``[n_logical]`` int32; fresh if there is a group. On a GPU, counts or sums out of range
            come out negative, and `solve` takes them for none.

        Raises
        ------
        TypeError, ValueError
            For counts of the wrong dtype, shape or device; on a CPU also for counts out of range.
        """
        self._check_open()
        counts = check_counts("counts", counts, (self._placement.n_logical,), self.device)
        counts = counts_to_int32("counts", counts, self._checks_at_once)
        if self.communicator is None:
            return counts
        counts = counts.contiguous()
        total = torch.empty_like(counts)
        self.communicator.exchange(counts, self._version, total)
        return total

    def _check_open(self) -> None:
        if self._blocked is not None:
            raise RuntimeError(self._blocked)

    def bind(self, channel: int) -> None:
        """Give the current stream a channel of its own for `run`; see `Communicator.bind`.

        Parameters
        ----------
        channel : int
            From 0; the same on every rank.
        """
        if self.communicator is not None:
            self.communicator.bind(channel)

    @opaque
    def solve(self, counts: torch.Tensor, *, certified: torch.Tensor | None = None) -> Solution:
        """Solve the LP of every group for counts summed over all ranks.

        With ``solver="levelling"`` what `run` needs comes from the first of two launches, the
        shares from the second.

        Parameters
        ----------
        counts : torch.Tensor
            ``[n_logical]`` int32 or int64 in [0, 2**31), tokens per logical expert over the EP
            group.
        certified : torch.Tensor or None
            One int32 or int64 element that rises by each group certified; by default the
            balancer's own.

        Returns
        -------
        Solution
            ``shares`` is ``[n_group, group_size, max_columns]``; fresh tensors.

        Raises
        ------
        TypeError, ValueError
            For counts of the wrong dtype, shape or device; on a CPU, and by the torch backend,
            also for counts out of range. On a GPU these make the status `Status.INVALID`.
        RuntimeError
            On a GPU, if an earlier call met counts or an id out of range; see `check`.
        """
        certified = self.certified if certified is None else certified
        check_counter("certified", certified, self.device)
        counts = check_counts("counts", counts, (self._placement.n_logical,), self.device)
        counts = counts_to_int32("counts", counts, self._checks_at_once)
        if self.backend == "torch":
            return self._solve_torch(counts, certified)
        self._raise_on_status()
        if self._dense:
            return self._solve_dense(counts, certified, self.solves, self.uncertified)
        p = self._placement
        size = p.n_group, p.group_size, p.max_columns
        shares = torch.empty(size, dtype=torch.float32, device=self.device)
        buffers = self._solve_counts(counts, certified)
        self._kernels.spread_shares(buffers.cumulative, shares, self._spread_tables)
        stats, ints = buffers.stats, buffers.ints
        return Solution(shares, stats[0], stats[1], stats[2], ints[0], ints[1], self.tolerance)

    def _solve_counts(self, counts: torch.Tensor, certified: torch.Tensor) -> kernels.SolveBuffers:
        """Solve as `run` does, in one launch, with fresh tensors for what comes out."""
        # Without the running sums and the counts, which are there.
        fresh = self._shapes(1)[2:]
        buffers: kernels.SolveBuffers = self._kernels.SolveBuffers(
            counts.contiguous(),
            *(torch.empty(s, dtype=d, device=self.device) for s, d in fresh),
        )
        settings = self._settings(certified, self.solves, self.uncertified)
        self._kernels.solve_counts(None, buffers, self._solve_tables, settings, self._status)
        return buffers

    @opaque
    def cumulative_shares(self, shares: torch.Tensor) -> torch.Tensor:
        """Cumulative shares by copy, as `select` wants them (method.md, equation 12).

        Parameters
        ----------
        shares : torch.Tensor
            ``[n_group, group_size, max_columns]`` float32 of a `Solution`.

        Returns
        -------
        torch.Tensor
            ``[n_physical]`` int32 in units of 2**-24, by copy.

        Raises
        ------
        TypeError, ValueError
            For shares of the wrong dtype, shape or device.
        """
        if not isinstance(shares, torch.Tensor):
            raise TypeError(f"shares must be a torch.Tensor, got {type(shares).__name__}")
        if not shares.is_floating_point():
            raise TypeError(f"shares must be floating-point, got {shares.dtype}")
        p, v = self._placement, self._tables.views
        if shares.shape != (p.n_group, p.group_size, p.max_columns) or shares.device != self.device:
            raise ValueError(
                f"shares must have shape [{p.n_group}, {p.group_size}, {p.max_columns}] on "
                f"{self.device}, got {list(shares.shape)} on {shares.device}"
            )
        return reference.cumulative_shares(
            shares, v["copy_cell"], v["copy_index"], v["copy_multiplicity"], v["copy_start"]
        )

    @opaque
    def select(
        self, idx: torch.Tensor, cumulative: torch.Tensor, running: torch.Tensor
    ) -> torch.Tensor:
        """Physical ids for given cumulative shares; quotas are met exactly.

        Parameters
        ----------
        idx : torch.Tensor
            As for `run`.
        cumulative : torch.Tensor
            ``[n_physical]`` int32 of `cumulative_shares`.
        running : torch.Tensor
            ``[n_sms, n_logical]`` int32 of `count` for the same ``idx``.

        Returns
        -------
        torch.Tensor
            Like `run`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `run` does, also for counts that aren't those of ``idx`` and for what is no
            cumulative share.
        """
        self._check_ids_tensor(idx)
        if running.ndim != 2 or running.shape[1] != self._placement.n_logical or not len(running):
            raise ValueError(
                f"running must be [n_sms, {self._placement.n_logical}], got {tuple(running.shape)}"
            )
        for name, table in (("cumulative", cumulative), ("running", running)):
            if table.dtype != torch.int32 or table.device != self.device:
                raise ValueError(
                    f"{name} must be int32 on {self.device}, got {table.dtype} on {table.device}"
                )
        if cumulative.shape != (self._placement.n_physical,):
            raise ValueError(
                f"cumulative must have shape [{self._placement.n_physical}], "
                f"got {tuple(cumulative.shape)}"
            )
        idx, cumulative = idx.contiguous(), cumulative.contiguous()
        views = self._tables.views
        self._check_values(idx)
        if self._checks_at_once:
            counts, start = running[-1], views["copy_start"]
            reference.check_counts_of("running", idx, counts)
            reference.check_cumulative(counts, cumulative, start, self.rank)
        if self.backend == "torch":
            return reference.assign_copies(
                idx, running[-1], cumulative, views["copy_start"], views["copy_slot"], self.rank
            )
        kernels = self._kernels
        self._raise_on_status()
        running = running.contiguous()
        out = torch.empty_like(idx)
        kernels.select(
            idx, out, running, cumulative, self._select_tables, self._status,
            _chunk(idx.numel(), len(running)), self.rank,
        )  # fmt: skip
        return out

    @opaque
    def warmup(self) -> None:
        """Compile every kernel that `run` uses, for int32 and int64 ids; local to this rank."""
        if self.backend != "triton":
            return
        counters = torch.zeros(3, 1, dtype=torch.int64, device=self.device)
        narrow = torch.zeros(1, dtype=torch.int32, device=self.device)
        if self._dense:
            self._warmup_dense(counters, narrow)
        else:
            self._warmup_levelling(counters, narrow)
        if self.communicator is not None:
            self.communicator.prepare(self._placement.n_logical)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _warmup_dense(self, counters: torch.Tensor, narrow: torch.Tensor) -> None:
        traffic = torch.zeros_like(self.traffic)
        for dtype in (torch.int64, torch.int32):
            idx = torch.arange(2, device=self.device).to(dtype) % self._placement.n_logical
            for certified in (counters[0], narrow):
                self._run_dense(
                    idx, (certified, counters[1], counters[2]), self.default_n_sms, traffic,
                    self._exchange_with_nobody,
                )  # fmt: skip

    def _exchange_with_nobody(
        self,
        counts: torch.Tensor,
        version: torch.Tensor,
        total: torch.Tensor,
        gathered: torch.Tensor | None = None,
    ) -> None:
        """Leave what an exchange would if no other rank had tokens."""
        total.copy_(counts)
        if gathered is not None:
            gathered.zero_()
            gathered[self.rank].copy_(counts)

    def _warmup_levelling(self, counters: torch.Tensor, narrow: torch.Tensor) -> None:
        block, _ = self._block(self.default_n_sms)
        # Nobody else takes part.
        endpoint = None if self._peers is None else self._peers.endpoint.alone()
        traffic = torch.zeros_like(self.traffic)
        pipeline = self._scratch_in(block, self.default_n_sms, endpoint, traffic).pipeline
        for dtype in (torch.int64, torch.int32):
            idx = torch.arange(2, device=self.device).to(dtype) % self._placement.n_logical
            out, chunk = torch.empty_like(idx), _chunk(2, self.default_n_sms)
            for certified in (counters[0], narrow):
                settings = self._settings(certified, counters[1], counters[2])
                for between in (None, lambda: None):
                    pipeline.run(idx, out, chunk, settings, between=between)

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
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._raise_on_status()
        if self.communicator is not None:
            self.communicator.check()
        if certified:
            self._raise_on_uncertified()

    def _raise_on_uncertified(self) -> None:
        """Raise if groups ended above the tolerance since the last look."""
        now = int(self.uncertified), int(self.solves)
        before, self._checked = self._checked, now
        if now[0] < before[0] or now[1] < before[1]:
            # The caller has set both counters back.
            before = 0, 0
        above, solved = now[0] - before[0], now[1] - before[1]
        if above:
            raise SolveError(
                f"{above} of {solved} groups ended with a gap above the tolerance "
                f"{self.tolerance:g} since the last such check, or the start"
            )

    def _raise_on_status(self) -> None:
        if self._status_view[0]:
            what = self._kernels.read_report(self._status_view)
        elif self._invalid_view[0] > self._invalid_told:
            what, self._invalid_told = "counts", int(self._invalid_view[0])
        else:
            return
        if what == "idx":
            raise RuntimeError(
                f"idx held {int(self._status_view[1])}, outside [-1, {self._placement.n_logical}), "
                "in an earlier call; such ids became -1"
            )
        if what == "counts":
            if self.communicator is not None:
                # Counts of a failed exchange are none: its own error says more.
                self.communicator.check()
            raise RuntimeError(
                "counts, or their sums over the ranks, were outside [0, 2**31) in an earlier call; "
                "its plan was the even split, with status INVALID"
            )
        if what == "running":
            raise RuntimeError(
                "running (of a Planner: local_workload_by_sm) didn't end with the counts of idx in "
                "an earlier call of select"
            )
        raise RuntimeError(
            "cumulative (of a Planner: o_weight) held no shares in an earlier call of select"
        )

    def _check_ids_tensor(self, idx: torch.Tensor) -> None:
        if not isinstance(idx, torch.Tensor):
            raise TypeError(f"idx must be a torch.Tensor, got {type(idx).__name__}")
        if idx.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"idx must be int64 or int32, got {idx.dtype}")
        if idx.device != self.device:
            raise ValueError(f"idx is on {idx.device}, expected {self.device}")
        if idx.numel() >= 2**31:
            raise ValueError(f"idx must have fewer than 2**31 elements, got {idx.numel()}")

    def _check_n_sms(self, n_sms: int | None) -> int:
        if n_sms is None:
            return self.default_n_sms
        if isinstance(n_sms, bool) or not isinstance(n_sms, int):
            raise TypeError(f"n_sms must be an int, got {type(n_sms).__name__}")
        if n_sms < 1:
            raise ValueError(f"n_sms must be at least 1, got {n_sms}")
        return n_sms

    @property
    def _checks_at_once(self) -> bool:
        """Whether the host looks at values, and not the kernels without a wait for the GPU."""
        return self.backend == "torch" or self.device.type == "cpu"

    def _check_values(self, idx: torch.Tensor) -> None:
        """Raise at once, unless the kernels do the looking."""
        if self._checks_at_once and idx.numel():
            low, high = int(idx.min()), int(idx.max())
            if low < -1 or high >= self._placement.n_logical:
                raise ValueError(
                    f"idx must hold ids in [-1, {self._placement.n_logical}), got {low}..{high}"
                )

    def _run(self, idx: torch.Tensor, certified: torch.Tensor | None, n_sms: int) -> torch.Tensor:
        """Do what `run` says, with checked arguments; ``certified`` is the balancer's by default.

        Called in place of, or by, the operators of `_torch_op`.
        """
        certified = self.certified if certified is None else certified
        self._check_open()
        if self.communicator is not None and idx.numel() * self._placement.ep_size >= 1 << 31:
            # Whatever the other ranks have, no sum wraps around.
            ranks = self._placement.ep_size
            raise ValueError(
                f"idx must have fewer than 2**31 elements over the {ranks} ranks of the group, "
                f"{(1 << 31) // ranks} on each, got {idx.numel()}"
            )
        if self.quotas == "global" and idx.numel() >= 1 << 24:
            raise ValueError(
                f"idx must have fewer than 2**24 elements with quotas='global', got {idx.numel()}"
            )
        idx = idx.contiguous()
        if self.backend == "triton":
            self._raise_on_status()
            self._check_values(idx)
            if self._dense:
                counters = certified, self.solves, self.uncertified
                return self._run_dense(idx, counters, n_sms, self.traffic)
            return self._run_triton(idx, certified, n_sms)
        self._check_values(idx)
        n_logical, ep_size = self._placement.n_logical, self._placement.ep_size
        counts, _ = reference.count_experts(idx, n_logical, max(1, idx.numel()), 1)
        total, gathered = counts, None
        if self.communicator is not None:
            total = torch.empty_like(counts)
            if self.quotas == "global":
                gathered = counts.new_empty(ep_size, n_logical)
            self.communicator.exchange(counts, self._version, total, gathered)
        solution = self._solve_torch(total, certified)
        cumulative = self.cumulative_shares(solution.shares)
        views = self._tables.views
        start, slot = views["copy_start"], views["copy_slot"]
        if gathered is not None and self.communicator is not None:
            holder = slot // self._placement.slots_per_rank
            quotas, kept = reference.divide_quotas(
                gathered, cumulative, start, holder, self.communicator.ranks_per_node
            )
            cumulative = reference.shares_of_quotas(quotas[self.rank], counts, start, self.rank)
            self.traffic += kept[self.rank]
        return reference.assign_copies(idx, counts, cumulative, start, slot, self.rank)

    def _solve_torch(self, counts: torch.Tensor, certified: torch.Tensor) -> Solution:
        if counts.device.type == "cpu" and bool((counts < 0).any()):
            raise ValueError("counts, summed over the ranks, must be below 2**31")
        solution = TWINS[self.solver](
            self._placement.problem(counts), self.tolerance, self.max_iterations, torch.float64
        )
        _count_statuses(solution.status, certified, self.solves, self.uncertified)
        return solution

    def _solve_dense(
        self,
        counts: torch.Tensor,
        certified: torch.Tensor,
        solves: torch.Tensor,
        uncertified: torch.Tensor,
    ) -> Solution:
        """Solve by the interior-point kernel; no host sync."""
        solution = interior_point.solve_counts(
            counts, self._placement, self._tables.views, self.tolerance, self.max_iterations
        )
        _count_statuses(solution.status, certified, solves, uncertified)
        _add(self._invalid, solution.status == Status.INVALID)
        self._invalid_seen.copy_(self._invalid, non_blocking=True)
        return solution

    def _run_dense(
        self,
        idx: torch.Tensor,
        counters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        n_sms: int,
        traffic: torch.Tensor,
        exchange: Callable[..., None] | None = None,
    ) -> torch.Tensor:
        """Do what `run` says with the interior-point kernel between launches of torch.

        ``counters`` are certified, solves and uncertified; ``exchange`` is by default the
        communicator's.
        """
        kernels, p = self._kernels, self._placement
        chunk = _chunk(idx.numel(), n_sms)
        running = torch.empty(n_sms, p.n_logical, dtype=torch.int32, device=self.device)
        counts = torch.empty(p.n_logical, dtype=torch.int32, device=self.device)
        kernels.count_by_program(idx, running, counts, self._status, chunk)
        kernels.sum_by_program(running, counts)
        total, gathered = counts, None
        if self.communicator is not None:
            total = torch.empty_like(counts)
            if self.quotas == "global":
                gathered = counts.new_empty(p.ep_size, p.n_logical)
            exchange = self.communicator.exchange if exchange is None else exchange
            exchange(counts, self._version, total, gathered)
        cumulative = self.cumulative_shares(self._solve_dense(total, *counters).shares)
        if gathered is not None:
            mine = torch.empty_like(cumulative)
            kernels.divide_quotas(cumulative, self._quotas_of(gathered, mine, traffic))
            cumulative = mine
        out = torch.empty_like(idx)
        kernels.select(
            idx, out, running, cumulative, self._select_tables, self._status, chunk, self.rank
        )
        return out

    def _run_triton(self, idx: torch.Tensor, certified: torch.Tensor, n_sms: int) -> torch.Tensor:
        channel = self._kernels.FIRST_CHANNEL
        if self._peers is not None:
            channel = self._peers.begin(self._placement.n_logical)
        scratch = self._scratch(n_sms)
        settings = self._settings(certified, self.solves, self.uncertified)
        out = torch.empty_like(idx)
        chunk = _chunk(idx.numel(), n_sms)
        scratch.pipeline.run(idx, out, chunk, settings, channel, scratch.exchange)
        return out

    def _settings(
        self, certified: torch.Tensor, solves: torch.Tensor, uncertified: torch.Tensor
    ) -> kernels.Settings:
        return self._kernels.Settings(
            certified, solves, uncertified, self.tolerance, self.max_iterations
        )

    def _quotas_of(
        self, gathered: torch.Tensor, mine: torch.Tensor, traffic: torch.Tensor
    ) -> kernels.Quotas:
        """Collect what divides quotas among the ranks of the communicator."""
        if self.communicator is None:
            raise RuntimeError("quotas of all ranks need a communicator")
        p, views = self._placement, self._tables.views
        return self._kernels.Quotas(
            gathered, views["copy_start"], views["copy_slot"], views["copy_index"], mine,
            traffic, self.rank, p.slots_per_rank, self.communicator.ranks_per_node,
            p.redundant_per_group + 1,
        )  # fmt: skip

    def _shapes(self, n_sms: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the running sums and of `kernels.SolveBuffers`."""
        p = self._placement
        return [
            ((n_sms, p.n_logical), torch.int32),
            ((p.n_logical,), torch.int32),
            ((p.n_physical,), torch.int32),
            ((3, p.n_group), torch.float32),
            ((2, p.n_group), torch.int32),
            ((p.n_group, self._kernels.solve_scratch(self._solve_tables)), torch.float32),
        ]

    def _sync_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of total counts, every rank's, and this rank's cumulative shares."""
        p = self._placement
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((p.n_logical,), torch.int32)]
        if self.quotas == "global":
            shapes += [((p.ep_size, p.n_logical), torch.int32), ((p.n_physical,), torch.int32)]
        return shapes

    def _layout(self, n_sms: int) -> list[tuple[int, int, tuple[int, ...], torch.dtype]]:
        """Byte ranges of the fields, and room for them in every block of the device."""
        layout = self._offsets.get(n_sms)
        if layout is None:
            layout, offset = [], 0
            for shape, dtype in self._shapes(n_sms) + self._sync_shapes():
                size = 4 * int(torch.Size(shape).numel())
                layout.append((offset, offset + size, shape, dtype))
                offset += -(-max(size, 1) // 256) * 256
            workspace.reserve(self.device, offset)
            self._offsets[n_sms] = layout
        return layout

    def _block(self, n_sms: int) -> tuple[torch.Tensor, int | None]:
        """Workspace of the current stream, and the stream (see `workspace.scratch`)."""
        self._layout(n_sms)
        return workspace.scratch(self.device)

    def _scratch(self, n_sms: int) -> _Scratch:
        block, stream = self._block(n_sms)
        if stream is not None:
            kept = self._scratches.get((stream, n_sms))
            if kept is not None and kept.block is block:
                return kept
        endpoint = None if self._peers is None else self._peers.endpoint
        scratch = self._scratch_in(block, n_sms, endpoint, self.traffic)
        if stream is not None:
            self._scratches[stream, n_sms] = scratch
        return scratch

    def _scratch_in(
        self, block: torch.Tensor, n_sms: int, endpoint: Endpoint | None, traffic: torch.Tensor
    ) -> _Scratch:
        """Make views of a block, and the pipeline on them."""
        kernels = self._kernels
        running, *rest = (block[a:b].view(d).view(s) for a, b, s, d in self._layout(n_sms))
        n_buffers = len(kernels.SolveBuffers._fields)
        buffers, total = kernels.SolveBuffers(*rest[:n_buffers]), rest[n_buffers]
        side = quotas = between = gathered = None
        if self.quotas == "global" and self.communicator is not None:
            gathered, mine = rest[n_buffers + 1 :]
            quotas = self._quotas_of(gathered, mine, traffic)
        if endpoint is not None:
            side = endpoint.side(self._version, total, gathered)
        elif self.communicator is not None:
            # This rank's own totals stay in the last row of the running sums.
            between = partial(
                self.communicator.exchange, running[-1], self._version, buffers.counts, gathered
            )
        pipeline = kernels.Pipeline(
            running, self._status, buffers, self._solve_tables, self._select_tables, self.rank,
            side, quotas,
        )  # fmt: skip
        return _Scratch(block, pipeline, between)


def _load(kind: type[Balancer], state: dict[str, Any]) -> Balancer:
    """Make a balancer from what was kept of one."""
    if state["device"] == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("this Balancer was saved on a GPU, and torch finds none here")
    balancer = kind.__new__(kind)
    with outside_modes():
        balancer._restore(state, resolve_device(state["device"]))
    return balancer
