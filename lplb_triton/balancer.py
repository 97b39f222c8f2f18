"""The per-batch pipeline for any placement: count, sync, solve, select."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from lplb_triton import _workspace, reference
from lplb_triton._counts import check_counts, counts_to_int32
from lplb_triton._limits import check_placement_size
from lplb_triton._tables import DeviceTables
from lplb_triton.placement import Placement
from lplb_triton.solution import Solution
from lplb_triton.solver import (
    DEFAULT_MAX_ITERATIONS,
    DEFAULT_TOLERANCE,
    MIN_TOLERANCE_FLOAT32,
    check_max_iterations,
    check_tolerance,
    resolve_backend,
)
from lplb_triton.sync._base import Communicator, gather_objects, message_version
from lplb_triton.sync._connect import acquire, release
from lplb_triton.sync._peer import Endpoint, PeerCommunicator

if TYPE_CHECKING:
    from lplb_triton import kernels

__all__ = ["Balancer"]

# Chunks of the batch start on whole multiples of this many ids.
CHUNK_ALIGNMENT = 128
CPU_PROGRAMS = 4


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


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


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
        Bound on interior-point iterations.
    sync : str or Communicator
        How counts are summed over the group: a name of `lplb_triton.sync.connect`, or a
        communicator made by it. Balancers that give a name share one communicator.
    timeout : float or None
        Bound on each wait for other ranks, in seconds; see `lplb_triton.sync.connect`.
    quotas : {"local", "global"}
        ``"local"``: each rank rounds its own quotas, so a copy's load over all ranks differs
        from its share by up to one token per rank. ``"global"``: quotas of all ranks together
        are exact, to less than one token per copy, and each rank serves its own rank and then
        its own node first. Needs a group, and fewer than 2**24 ids in a batch.

    Attributes
    ----------
    certified, solves : torch.Tensor
        One int64 element on the device: groups certified within the tolerance, and groups
        solved, since the start.
    traffic : torch.Tensor
        ``[3]`` int64 on the device, with ``quotas="global"``: this rank's tokens that stayed on
        the rank, that stayed on its node, and all of them, since the start.
    communicator : Communicator or None
        In use for summing counts.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that doesn't fit.

    Examples
    --------
    >>> load = torch.tensor([90.0, 10.0, 40.0, 60.0])
    >>> balancer = Balancer(Placement.from_history(load, 2, redundant_per_rank=1), device="cpu")
    >>> balancer.run(torch.tensor([[0, 2], [0, 3], [0, -1]])).shape
    torch.Size([3, 2])
    """

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
    ) -> None:
        if not isinstance(placement, Placement):
            raise TypeError(f"placement must be a Placement, got {type(placement).__name__}")
        check_max_iterations(max_iterations)
        device = _default_device() if device is None else torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device.type not in ("cuda", "cpu"):
            raise ValueError(f"device must be a CUDA/ROCm GPU or the CPU, got {device}")
        self.device = device
        self.backend = resolve_backend(backend, device)
        if self.backend == "triton":
            check_placement_size(placement)
        self.tolerance = check_tolerance(tolerance, MIN_TOLERANCE_FLOAT32)
        self.max_iterations = max_iterations
        self.group: dist.ProcessGroup | None = None
        self.rank = 0 if rank is None else rank
        self._own_rank = rank
        self._placement = placement
        self._scratches: dict[tuple[int, int], _Scratch] = {}
        if quotas not in ("local", "global"):
            raise ValueError(f"quotas must be 'local' or 'global', got {quotas!r}")
        self.quotas = quotas
        self._handle = next(_handles)
        self._sync, self._timeout = sync, timeout
        self._closed = False
        self.communicator: Communicator | None = None
        # The same, if the solving kernel does the exchange.
        self._peers: PeerCommunicator | None = None
        self._version = torch.zeros(1, dtype=torch.int32, device=device)
        self.traffic = torch.zeros(3, dtype=torch.int64, device=device)
        if isinstance(sync, Communicator) and group is None:
            group = sync.group
        if quotas == "global" and (group is None or rank is not None):
            raise ValueError("quotas='global' needs a group, and no other rank than the group's")
        self._join(group, sync)
        if not 0 <= self.rank < placement.ep_size:
            raise ValueError(f"rank must be in [0, {placement.ep_size}), got {rank}")

        self._placement = self._agree(placement)
        self._tables = DeviceTables(self._placement, device)
        self._version.fill_(self._next_version)
        self.certified = torch.zeros(1, dtype=torch.int64, device=device)
        self.solves = torch.zeros(1, dtype=torch.int64, device=device)
        # Kernels write here, so the host can look without waiting for the device.
        self._status = torch.zeros(2, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._status_view = self._status.numpy()
        self._offsets: dict[int, list[tuple[int, int, tuple[int, ...], torch.dtype]]] = {}
        self.default_n_sms = CPU_PROGRAMS
        if device.type == "cuda":
            # Two on each multiprocessor hide each other's waiting; 256 rows are summed at once.
            sms = torch.cuda.get_device_properties(device).multi_processor_count
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
            self._layout(self.default_n_sms)
        _balancers[self._handle] = self
        self._meet()

    @property
    def placement(self) -> Placement:
        """The placement in use (immutable)."""
        return self._placement

    def __repr__(self) -> str:
        """Placement, device, backend, group and tolerance in one line."""
        sync = "none" if self.communicator is None else repr(self.communicator)
        return (
            f"Balancer({self._placement!r}, device={self.device}, backend={self.backend}, "
            f"sync={sync}, quotas={self.quotas}, rank={self.rank}, tolerance={self.tolerance:g})"
        )

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
        """
        if group is None and self.quotas == "global":
            raise ValueError("group must not be None with quotas='global'")
        self._join(group, self._sync if sync is None else sync, domain_size)
        self._write(self._agree(self._placement))
        self._meet()

    def _join(
        self,
        group: dist.ProcessGroup | None,
        sync: str | Communicator,
        domain_size: int | None = None,
    ) -> None:
        """Take the group, this rank's number in it, and a communicator over it."""
        p = self._placement
        communicator = None
        if group is not None:
            if group.size() != p.ep_size:
                raise ValueError(f"group must have {p.ep_size} ranks, got {group.size()}")
            sizes = (p.n_logical, p.n_physical, p.n_group, p.max_columns, self.quotas)
            with self._on_device():
                everyone = gather_objects(sizes, group)
            if len(set(everyone)) > 1:
                raise ValueError(
                    "placement and quotas must be of the same sizes and kind on every rank, got "
                    f"{everyone} (logical experts, slots, groups, columns, quotas)"
                )
            if isinstance(sync, Communicator):
                if sync.group is not group or sync.device != self.device:
                    raise ValueError(f"sync must be over the group and on {self.device}")
                communicator = sync
            else:
                communicator = acquire(
                    group, sync, self.device, self._timeout, p.n_logical, domain_size
                )
            self.rank = dist.get_rank(group) if self._own_rank is None else self._own_rank
        self._scratches.clear()
        self._leave()
        self.group, self.communicator, self._sync = group, communicator, sync
        self._peers = None
        if isinstance(communicator, PeerCommunicator) and p.n_group == 1:
            self._peers = communicator

    def _leave(self) -> None:
        """Let go of a communicator that this balancer came to by itself."""
        if self.communicator is not None and not isinstance(self._sync, Communicator):
            release(self.communicator)

    def _meet(self) -> None:
        """Load all kernels on all ranks before any of them waits for another; collective."""
        if self.communicator is not None and self.communicator.waits_on_device:
            self.warmup()
            with self._on_device():
                dist.barrier(self.group)

    def _on_device(self) -> AbstractContextManager[object]:
        """Make this GPU the current one: collectives of objects go through it."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def close(self) -> None:
        """Let go of the communicator; the last balancer that shares it closes it.

        Collective over the group, unless a call failed. A communicator that was given as
        ``sync`` stays open. Later calls raise.
        """
        if not self._closed:
            self._closed = True
            self._leave()

    def __enter__(self) -> Balancer:
        """Return the balancer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _agree(self, placement: Placement) -> Placement:
        """Rank 0's placement, on every rank of the group."""
        number = self._handle
        if self.group is not None:
            on_gpu = dist.get_backend(self.group) == "nccl"
            mine = placement.phy2log.long()
            wire = torch.cat([mine, torch.tensor([number])])
            wire = wire.to(self.device) if on_gpu else wire
            dist.broadcast(wire, src=dist.get_global_rank(self.group, 0), group=self.group)
            theirs, number = wire[:-1].cpu(), int(wire[-1])
            if not torch.equal(theirs, mine):
                placement = Placement(
                    theirs,
                    placement.ep_size,
                    n_logical=placement.n_logical,
                    n_group=placement.n_group,
                    max_columns=placement.max_columns,
                )
        # What tells this layer with this placement from others, the same on all ranks.
        table = placement.phy2log.numpy().tobytes()
        self._next_version = message_version(table, str((number, placement.n_group)).encode())
        return placement

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
            If it is no placement, or its sizes differ (nothing is changed then).
        """
        if not isinstance(placement, Placement):
            raise TypeError(f"placement must be a Placement, got {type(placement).__name__}")
        old = self._placement
        for name in ("n_logical", "n_physical", "ep_size", "n_group", "max_columns"):
            if getattr(placement, name) != getattr(old, name):
                raise ValueError(
                    f"placement must have {name} {getattr(old, name)}, "
                    f"got {getattr(placement, name)}"
                )
        agreed = self._agree(placement)
        self._write(agreed)
        return agreed

    def _write(self, placement: Placement) -> None:
        """Use ``placement`` from the next batch on, with the device idle in between."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._tables.write(placement)
        self._version.fill_(self._next_version)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._placement = placement

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
        certified = self.certified if certified is None else certified
        n_sms = self._check_n_sms(n_sms)
        if type(idx) is torch.Tensor and not torch.compiler.is_compiling():
            # What the operator does, without the dispatcher's part of the host time.
            return self._run(idx, certified, self.solves, n_sms)
        result: torch.Tensor = torch.ops.lplb_triton.balance(
            idx, certified, self.solves, self._handle, n_sms
        )
        return result

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
        counts = check_counts("counts", counts, (self._placement.n_logical,), self.device)
        counts = counts_to_int32("counts", counts, self._checks_at_once)
        if self.communicator is None:
            return counts
        self._check_open()
        counts = counts.contiguous()
        total = torch.empty_like(counts)
        self.communicator.exchange(counts, self._version, total)
        return total

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this Balancer is closed")

    def bind(self, channel: int) -> None:
        """Give the current stream a channel of its own for `run`; see `Communicator.bind`.

        Parameters
        ----------
        channel : int
            From 0; the same on every rank.
        """
        if self.communicator is not None:
            self.communicator.bind(channel)

    def solve(self, counts: torch.Tensor, *, certified: torch.Tensor | None = None) -> Solution:
        """Solve the LP of every group for counts summed over all ranks.

        What `run` needs comes from the first of two launches, the shares from the second.

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
            return self._solve_torch(counts, certified, self.solves)
        self._raise_on_status()
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
        settings = self._settings(certified, self.solves)
        self._kernels.solve_counts(None, buffers, self._solve_tables, settings, self._status)
        return buffers

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

    def warmup(self) -> None:
        """Compile every kernel that `run` uses, for int32 and int64 ids; local to this rank."""
        if self.backend != "triton":
            return
        counters = torch.zeros(2, 1, dtype=torch.int64, device=self.device)
        narrow = torch.zeros(1, dtype=torch.int32, device=self.device)
        block, _ = self._block(self.default_n_sms)
        # Nobody else takes part.
        endpoint = None if self._peers is None else self._peers.endpoint.alone()
        traffic = torch.zeros_like(self.traffic)
        pipeline = self._scratch_in(block, self.default_n_sms, endpoint, traffic).pipeline
        for dtype in (torch.int64, torch.int32):
            idx = torch.arange(2, device=self.device).to(dtype) % self._placement.n_logical
            out, chunk = torch.empty_like(idx), _chunk(2, self.default_n_sms)
            for certified in (counters[0], narrow):
                settings = self._settings(certified, counters[1])
                for between in (None, lambda: None):
                    pipeline.run(idx, out, chunk, settings, 0, between)
        if self.communicator is not None:
            self.communicator.prepare(self._placement.n_logical)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def check(self) -> None:
        """Wait for the device and raise if a call, or a graph replay, met bad ids or counts.

        Raises
        ------
        RuntimeError
            Naming what was bad. The report is cleared, so the next call starts afresh.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._raise_on_status()
        if self.communicator is not None:
            self.communicator.check()

    def _raise_on_status(self) -> None:
        if not self._status_view[0]:
            return
        what = self._kernels.read_report(self._status_view)
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

    def _run(
        self, idx: torch.Tensor, certified: torch.Tensor, solves: torch.Tensor, n_sms: int
    ) -> torch.Tensor:
        idx = idx.contiguous()
        if self.communicator is not None:
            self._check_open()
            if self.quotas == "global" and idx.numel() >= 1 << 24:
                raise ValueError(
                    f"idx must have fewer than 2**24 elements with quotas='global', "
                    f"got {idx.numel()}"
                )
        if self.backend == "triton":
            self._raise_on_status()
            self._check_values(idx)
            return self._run_triton(idx, certified, solves, n_sms)
        self._check_values(idx)
        n_logical, ep_size = self._placement.n_logical, self._placement.ep_size
        counts, _ = reference.count_experts(idx, n_logical, max(1, idx.numel()), 1)
        total, gathered = counts, None
        if self.communicator is not None:
            total = torch.empty_like(counts)
            if self.quotas == "global":
                gathered = counts.new_empty(ep_size, n_logical)
            self.communicator.exchange(counts, self._version, total, gathered)
        solution = self._solve_torch(total, certified, solves)
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

    def _solve_torch(
        self, counts: torch.Tensor, certified: torch.Tensor, solves: torch.Tensor
    ) -> Solution:
        if counts.device.type == "cpu" and bool((counts < 0).any()):
            raise ValueError("counts, summed over the ranks, must be below 2**31")
        solution = reference.solve(
            self._placement.problem(counts), self.tolerance, self.max_iterations, torch.float64
        )
        certified += (solution.status == 0).sum()
        solves += solution.status.numel()
        return solution

    def _run_triton(
        self, idx: torch.Tensor, certified: torch.Tensor, solves: torch.Tensor, n_sms: int
    ) -> torch.Tensor:
        channel = 0 if self._peers is None else self._peers.begin(self._placement.n_logical)
        scratch = self._scratch(n_sms)
        settings = self._settings(certified, solves)
        out = torch.empty_like(idx)
        chunk = _chunk(idx.numel(), n_sms)
        scratch.pipeline.run(idx, out, chunk, settings, channel, scratch.exchange)
        return out

    def _settings(self, certified: torch.Tensor, solves: torch.Tensor) -> kernels.Settings:
        return self._kernels.Settings(certified, solves, self.tolerance, self.max_iterations)

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
            _workspace.reserve(self.device, offset)
            self._offsets[n_sms] = layout
        return layout

    def _block(self, n_sms: int) -> tuple[torch.Tensor, int | None]:
        """Workspace of the current stream, and the stream (see `_workspace.scratch`)."""
        self._layout(n_sms)
        return _workspace.scratch(self.device)

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
        kernels, p, views = self._kernels, self._placement, self._tables.views
        running, *rest = (block[a:b].view(d).view(s) for a, b, s, d in self._layout(n_sms))
        n_buffers = len(kernels.SolveBuffers._fields)
        buffers, total = kernels.SolveBuffers(*rest[:n_buffers]), rest[n_buffers]
        side = quotas = between = gathered = None
        if self.quotas == "global" and self.communicator is not None:
            gathered, mine = rest[n_buffers + 1 :]
            quotas = kernels.Quotas(
                gathered, views["copy_start"], views["copy_slot"], views["copy_index"], mine,
                traffic, self.rank, p.slots_per_rank, self.communicator.ranks_per_node,
                p.redundant_per_group + 1,
            )  # fmt: skip
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


_handles = itertools.count()
_balancers: weakref.WeakValueDictionary[int, Balancer] = weakref.WeakValueDictionary()

# The op takes an integer for the balancer, so that torch.compile sees one opaque call whose
# only side effect is on the two counters.
torch.library.define(
    "lplb_triton::balance",
    "(Tensor idx, Tensor(a!) certified, Tensor(b!) solves, int handle, int n_sms) -> Tensor",
)


def _balance(
    idx: torch.Tensor, certified: torch.Tensor, solves: torch.Tensor, handle: int, n_sms: int
) -> torch.Tensor:
    balancer = _balancers.get(handle)
    if balancer is None:
        raise RuntimeError("the Balancer of this call no longer exists; keep a reference to it")
    return balancer._run(idx, certified, solves, n_sms)


def _balance_fake(
    idx: torch.Tensor, certified: torch.Tensor, solves: torch.Tensor, handle: int, n_sms: int
) -> torch.Tensor:
    return torch.empty_like(idx, memory_format=torch.contiguous_format)


torch.library.impl("lplb_triton::balance", "CompositeExplicitAutograd", _balance)
torch.library.register_fake("lplb_triton::balance", _balance_fake)
