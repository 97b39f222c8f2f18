"""The Triton back end with the levelling solver: the whole batch in a few launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from lplb_triton import kernels
from lplb_triton._backends import workspace
from lplb_triton._backends.base import chunk_size
from lplb_triton._backends.layer import Layer
from lplb_triton._backends.triton import TritonBackend
from lplb_triton._layout import CHANNELS
from lplb_triton.solution import Solution
from lplb_triton.sync._peer import Endpoint, PeerCommunicator

__all__ = ["LevellingBackend"]

# Fields of the workspace start on multiples of this many bytes.
FIELD_ALIGNMENT = 256


class _Field(NamedTuple):
    """A tensor's place in a workspace block."""

    start: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Scratch(NamedTuple):
    """A workspace block as one layer on one stream uses it."""

    block: torch.Tensor
    pipeline: kernels.Pipeline
    buffers: kernels.SolveBuffers
    exchange: Callable[[], None] | None
    """Sums counts over the ranks between two launches; None if a kernel does, or nothing does."""
    counts: torch.Tensor
    """``[n_logical]`` int32, of all ranks once a batch has been solved."""


class LevellingBackend(TritonBackend):
    """Counts, solves and selects in three launches on scratch memory that streams own."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        views = self.tables.views
        self.solve_tables = kernels.SolveTables(
            *(views[name] for name in kernels.SolveTables._fields)
        )
        self.expand_tables = kernels.ExpandTables(
            *(views[name] for name in kernels.ExpandTables._fields)
        )
        # The communicator, if the solving kernel contains the exchange.
        self.peers: PeerCommunicator | None = None
        self._scratches: dict[tuple[int, int], _Scratch] = {}
        # Numbers of streams, for versions with live slots.
        self._streams: dict[int, int] = {}
        self._fields: dict[int, list[_Field]] = {}
        self._lay_out(layer.default_n_sms)

    def follow_communicator(self) -> None:
        """See `Backend.follow_communicator`."""
        communicator = self.layer.communicator
        in_kernel = self.layer.placement.n_group == 1
        self.peers = None
        if in_kernel and isinstance(communicator, PeerCommunicator):
            self.peers = communicator
        self._scratches.clear()
        self._streams.clear()

    def balance(self, idx: torch.Tensor, certified: torch.Tensor, n_sms: int) -> torch.Tensor:
        """See `Backend.balance`."""
        self.raise_on_report()
        self.check_values(idx)
        layer = self.layer
        channel = kernels.FIRST_CHANNEL
        if self.peers is not None:
            channel = self.peers.begin(layer.placement.n_logical)
        elif layer.live is not None:
            channel = kernels.Channel(self._number_stream())
        scratch = self._find_scratch(n_sms)
        settings = self.settings(certified, layer.solves, layer.uncertified)
        out = torch.empty_like(idx)
        chunk = chunk_size(idx.numel(), n_sms)
        live_out = self._new_live_out()
        scratch.pipeline.run(idx, out, chunk, settings, channel, scratch.exchange, live_out)
        self.live_out = live_out
        self.record(scratch.counts)
        return out

    def _number_stream(self) -> int:
        """Return the current stream's number, in the order in which streams first made a call.

        Calls of torch.distributed are in the same order on every rank, so these numbers are, too.
        Each stream has a version of its own, since a plan on one of them may be made while another
        one sends.
        """
        stream = workspace.find_stream(self.layer.device)
        number = self._streams.setdefault(stream, len(self._streams))
        if number >= CHANNELS:
            raise RuntimeError(f"a Balancer with live slots takes at most {CHANNELS} streams")
        return number

    def _new_live_out(self) -> torch.Tensor | None:
        """Return memory for one plan of live slots, which nobody else holds; None without them."""
        p = self.layer.placement
        if not p.live_per_rank:
            return None
        size = p.ep_size * p.live_per_rank + 4
        return torch.empty(size, dtype=torch.int32, device=self.layer.device)

    def solve(self, counts: torch.Tensor, certified: torch.Tensor) -> Solution:
        """See `Backend.solve`."""
        self.raise_on_report()
        p = self.layer.placement
        size = p.n_group, p.group_size, p.max_columns
        shares = torch.empty(size, dtype=torch.float32, device=self.layer.device)
        buffers = self.solve_by_copy(counts, certified)
        kernels.expand_shares(buffers.cumulative, shares, self.expand_tables)
        stats, ints = buffers.stats, buffers.ints
        return Solution(
            shares, stats[0], stats[1], stats[2], ints[0], ints[1], self.layer.tolerance
        )

    def solve_by_copy(self, counts: torch.Tensor, certified: torch.Tensor) -> kernels.SolveBuffers:
        """Solve as `balance` does, in one launch, into fresh tensors; shares are by copy only."""
        # The first two shapes are those of the running sums and of the counts.
        shapes = self._solve_shapes(1)[2:]
        buffers: kernels.SolveBuffers = kernels.SolveBuffers(
            counts.contiguous(),
            *(torch.empty(s, dtype=d, device=self.layer.device) for s, d in shapes),
        )
        settings = self.settings(certified, self.layer.solves, self.layer.uncertified)
        kernels.solve_counts(None, buffers, self.solve_tables, settings, self.report)
        return buffers

    def plan_shares(self, counts: torch.Tensor, certified: torch.Tensor) -> torch.Tensor:
        """See `Backend.plan_shares`."""
        self.raise_on_report()
        buffers = self.solve_by_copy(counts, certified)
        if self.layer.cost is not None:
            self.plan_by_time(buffers.counts, buffers.cumulative, buffers.ints[1])
        return buffers.cumulative

    def settings(
        self, certified: torch.Tensor, solves: torch.Tensor, uncertified: torch.Tensor
    ) -> kernels.Settings:
        """Return the solving kernel's counters and tolerances."""
        layer = self.layer
        return kernels.Settings(
            certified, solves, uncertified, layer.tolerance, layer.max_iterations
        )

    def warmup_kernels(self, counters: torch.Tensor, narrow: torch.Tensor) -> None:
        """See `TritonBackend.warmup_kernels`."""
        n_sms = self.layer.default_n_sms
        block, _ = self._current_block(n_sms)
        # The exchange of this endpoint is with no other rank.
        endpoint = None if self.peers is None else self.peers.endpoint.solo_endpoint()
        traffic, sums = (torch.zeros_like(x) for x in (self.layer.traffic, self.layer.metrics))
        versions = self.layer.live_versions
        spare = None if versions is None else torch.zeros_like(versions)
        times, numbers = (
            None if own is None else torch.zeros_like(own)
            for own in (self.layer.times, self.layer.node_traffic)
        )
        made = self._create_scratch(block, n_sms, endpoint, traffic, sums, spare, times, numbers)
        pipeline = made.pipeline
        live_out = self._new_live_out()
        for dtype in (torch.int64, torch.int32):
            idx = self.warmup_ids(dtype)
            out, chunk = torch.empty_like(idx), chunk_size(2, n_sms)
            for certified in (counters[0], narrow):
                settings = self.settings(certified, counters[1], counters[2])
                for between in (None, lambda: None):
                    pipeline.run(idx, out, chunk, settings, between=between, live_out=live_out)

    def _solve_shapes(self, n_sms: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the running sums and of `kernels.SolveBuffers`."""
        p = self.layer.placement
        n_shares = self.count_shares()
        return [
            ((n_sms, p.n_logical), torch.int32),
            ((p.n_logical,), torch.int32),
            ((n_shares,), torch.int32),
            ((3, p.n_group), torch.float32),
            ((2, p.n_group), torch.int32),
            ((p.n_group, kernels.solve_scratch(self.solve_tables)), torch.float32),
        ]

    def _sync_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of total counts, and with global quotas of two more.

        These are the counts of every rank and this rank's cumulative shares. With live slots,
        plans by time or near plans, their scratch follows.
        """
        p = self.layer.placement
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((p.n_logical,), torch.int32)]
        if self.layer.quotas == "global":
            n_shares = self.count_shares()
            shapes += [((p.ep_size, p.n_logical), torch.int32), ((n_shares,), torch.int32)]
        if p.live_per_rank:
            sizes = p.n_logical, p.ep_size, p.static_per_rank, p.live_per_rank
            shapes.append(((kernels.live_scratch_words(*sizes),), torch.int32))
        if self.layer.cost is not None:
            shapes.append((self.time_plan_shape(), torch.int32))
        if self.layer.node_traffic is not None:
            shapes.append((self.near_scratch_shape(), torch.int32))
        return shapes

    def count_shares(self) -> int:
        """Count cumulative shares: of static copies, and with live slots of the batch's copies."""
        p = self.layer.placement
        if not p.live_per_rank:
            return p.n_copies
        return 2 * p.n_copies + p.ep_size * p.live_per_rank

    def _lay_out(self, n_sms: int) -> list[_Field]:
        """Return the places of all fields, with room for them in every block of the device."""
        fields = self._fields.get(n_sms)
        if fields is None:
            fields, offset = [], 0
            for shape, dtype in self._solve_shapes(n_sms) + self._sync_shapes():
                size = 4 * int(torch.Size(shape).numel())
                fields.append(_Field(offset, offset + size, shape, dtype))
                offset += -(-max(size, 1) // FIELD_ALIGNMENT) * FIELD_ALIGNMENT
            workspace.reserve(self.layer.device, offset)
            self._fields[n_sms] = fields
        return fields

    def _current_block(self, n_sms: int) -> tuple[torch.Tensor, int | None]:
        """Return the workspace of the current stream, and the stream; see `workspace.scratch`."""
        self._lay_out(n_sms)
        return workspace.scratch(self.layer.device)

    def _find_scratch(self, n_sms: int) -> _Scratch:
        """Return the scratch of the current stream, made new unless it is kept for the stream."""
        block, stream = self._current_block(n_sms)
        if stream is not None:
            kept = self._scratches.get((stream, n_sms))
            if kept is not None and kept.block is block:
                return kept
        endpoint = None if self.peers is None else self.peers.endpoint
        layer = self.layer
        scratch = self._create_scratch(block, n_sms, endpoint, layer.traffic, layer.metrics)
        if stream is not None:
            self._scratches[stream, n_sms] = scratch
        return scratch

    def _create_scratch(
        self,
        block: torch.Tensor,
        n_sms: int,
        endpoint: Endpoint | None,
        traffic: torch.Tensor,
        sums: torch.Tensor,
        versions: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
        numbers: torch.Tensor | None = None,
    ) -> _Scratch:
        """Make views of a block, and the pipeline on them.

        ``versions`` is as in `make_live`, ``times`` as in `make_time_plan`, and ``numbers`` as in
        `make_near_plan`.
        """
        layer = self.layer
        running, *rest = (
            block[field.start : field.end].view(field.dtype).view(field.shape)
            for field in self._lay_out(n_sms)
        )
        n_buffers = len(kernels.SolveBuffers._fields)
        buffers, total = kernels.SolveBuffers(*rest[:n_buffers]), rest[n_buffers]
        live = self.make_live(rest[-1], versions) if layer.live is not None else None
        in_kernel = quotas = exchange = gathered = None
        if layer.quotas == "global" and layer.communicator is not None:
            gathered, mine = rest[n_buffers + 1 : n_buffers + 3]
            quotas = self.quotas_of(gathered, mine, traffic, live)
        if endpoint is not None:
            in_kernel = endpoint.exchange_arguments(layer.version, total, gathered)
        elif layer.communicator is not None:
            version = layer.version
            if layer.live_versions is not None:
                number = self._number_stream()
                version = layer.live_versions[number : number + 1]
            # The pipeline leaves this rank's counts in the last row of the running sums.
            exchange = partial(
                layer.communicator.exchange,
                running[-1],
                version,
                buffers.counts,
                gathered,
            )
        metrics = kernels.BatchMetrics(
            sums, buffers.counts if in_kernel is None else total, self.tables.views["home_experts"],
            buffers.stats, buffers.ints, None if live is None else live.out,
        )  # fmt: skip
        by_time = self.make_time_plan(rest[-1], times) if layer.cost is not None else None
        near = None if layer.node_traffic is None else self.make_near_plan(rest[-1], numbers)
        pipeline = kernels.Pipeline(
            running, self.report, buffers, self.solve_tables, self.select_tables, layer.rank,
            in_kernel, quotas, live, metrics, by_time, near,
        )  # fmt: skip
        counts = buffers.counts if endpoint is None else total
        return _Scratch(block, pipeline, buffers, exchange, counts)

    def make_live(
        self, scratch: torch.Tensor | None = None, versions: torch.Tensor | None = None
    ) -> kernels.Live:
        """Return what planning live slots takes besides counts and shares.

        Parameters
        ----------
        scratch
            int32, of the size that `kernels.live_scratch_words` says; by default new memory.
        versions
            ``[channels]`` int32, which stand for the layer's own. What live slots hold is then a
            copy too.

        Returns
        -------
        kernels.Live
            Its output is new memory.

        Raises
        ------
        RuntimeError
            If the placement has no live slots.
        """
        layer, views = self.layer, self.tables.views
        own, out = layer.live_versions, self._new_live_out()
        if layer.live is None or own is None or out is None:
            raise RuntimeError("the placement has no live slots")
        tables = kernels.LiveTables(*(views[name] for name in kernels.LiveTables._fields))
        resident = layer.resident
        if resident is not None and versions is not None:
            resident = resident.clone()
        if scratch is None:
            shape, dtype = self._sync_shapes()[-1]
            scratch = torch.zeros(shape, dtype=dtype, device=layer.device)
        return kernels.Live(
            tables, resident, scratch, own if versions is None else versions,
            layer.version, out, kernels.LiveRules(*layer.live[:4]), layer.placement.live_per_rank,
        )  # fmt: skip

    def read_static_plan(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy what the last `balance` on the current stream found for the static copies.

        The solve of a run with live slots may end before that of `solve`, where a better plan
        would gain nothing, so its shares can't be had otherwise.

        Returns
        -------
        cumulative : torch.Tensor
            ``[n_copies]`` int32, cumulative shares in units of 2**-24.
        max_load : torch.Tensor
            ``[n_group]`` float32, largest load of this plan in tokens.
        """
        buffers = self._find_scratch(self.layer.default_n_sms).buffers
        n_copies = self.layer.placement.n_copies
        return buffers.cumulative[:n_copies].clone(), buffers.stats[0].clone()
