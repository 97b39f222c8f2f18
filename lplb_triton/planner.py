"""DeepSeek LPLB's planner interface, for replica topologies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lplb_triton import reference, topologies
from lplb_triton._checks import (
    check_counter,
    check_counts,
    check_device,
    check_floating_point,
    check_id_values,
    check_ids,
    counts_to_int32,
)
from lplb_triton._membership import warn_if_no_group
from lplb_triton._torch_op import opaque
from lplb_triton.balancer import Balancer
from lplb_triton.placement import Placement
from lplb_triton.solution import SHARE_BITS
from lplb_triton.solver import DEFAULT_TOLERANCE
from lplb_triton.sync._base import Communicator
from lplb_triton.sync._connect import deep_ep_domain
from lplb_triton.topologies._validate import checked_topology

__all__ = ["Planner"]


class _PlannersBalancer(Balancer):
    """A balancer whose group may be given later, by a DeepEP buffer."""

    _expects_group_later = True

    @property
    def checks_on_host(self) -> bool:
        """Whether the host reads values of arguments, and raises at once for bad ones."""
        return self._backend.checks_on_host


class Planner:
    """Plans, batch by batch, how replicated experts share their tokens along a topology.

    A script that has ``from lplb import Planner`` can import this one instead. What the
    original leaves undefined is defined here: a batch without tokens, ``n_sms`` larger than
    the batch, non-contiguous ids (copied), ids out of range (see `Balancer.run`), arguments on
    another device (refused by name). For placements other than a topology use `Balancer`.

    Parameters
    ----------
    redundant_to_original : torch.Tensor
        ``[group_size, num_redundants]`` int; ``r2o[i, d]`` is the rank, within the group, whose
        d-th expert is copied into rank i's d-th redundant slot. Each column is a permutation
        without fixed point; see `lplb_triton.topologies`. A rank may have a multiple of
        ``num_redundants`` redundant slots; experts of one column then share one weight.
    n_routed_experts : int
        Physical experts over all ranks, redundant ones included.
    n_logical_routed_experts : int
        Logical experts.
    ep_size : int or None
        Number of EP ranks; by default the group's size.
    group : torch.distributed.ProcessGroup or None
        EP group over which workloads are summed; with None, workloads are global already.
    device, backend, tolerance, sync, timeout, quotas
        As for `Balancer`. ``quotas`` applies to `run`; `weighted_select_target` rounds on each
        rank.

    Attributes
    ----------
    r2o, o2r : torch.Tensor
        ``[group_size, num_redundants]`` int32 on the device, the topology and its inverse.
    group_size, num_redundants, n_routed_experts, n_logical_routed_experts, ep_size, n_group : int
        Sizes.
    n_local_routed_experts, n_local_logical_routed_experts : int
        Slots, and logical experts, of each rank.
    combined_redundant_experts : int
        Experts per (rank, column) that share one weight.
    phy2log : torch.Tensor
        ``[n_routed_experts]`` int32 on the device, a snapshot of the current slot map; in
        order of logical ids at construction.
    ep_group : torch.distributed.ProcessGroup or None
        The group in use.
    deep_ep_initialized : bool
        Whether `init_from_deep_ep` was called.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that doesn't fit.
    """

    @opaque
    def __init__(
        self,
        redundant_to_original: torch.Tensor,
        n_routed_experts: int,
        n_logical_routed_experts: int,
        ep_size: int | None = None,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        backend: str | None = None,
        tolerance: float = DEFAULT_TOLERANCE,
        sync: str | Communicator = "auto",
        timeout: float | None = None,
        quotas: str = "local",
    ) -> None:
        if ep_size is None:
            if group is None:
                raise ValueError("ep_size must be given when group is None")
            ep_size = group.size()
        r2o = checked_topology("redundant_to_original", redundant_to_original)
        self._topology = r2o
        placement = Placement.from_topology(
            r2o, n_routed_experts, n_logical_routed_experts, ep_size
        )
        self.balancer = _PlannersBalancer(
            placement, group=group, device=device, backend=backend, tolerance=tolerance,
            sync=sync, timeout=timeout, quotas=quotas,
        )  # fmt: skip
        on = self.balancer.device
        self.r2o = r2o.to(on)
        self.o2r = topologies.inverse(r2o).to(on)
        self.group_size, self.num_redundants = r2o.shape
        self.n_routed_experts = n_routed_experts
        self.n_logical_routed_experts = n_logical_routed_experts
        self.ep_size = ep_size
        self.n_group = ep_size // self.group_size
        self.n_local_routed_experts = n_routed_experts // ep_size
        self.n_local_logical_routed_experts = n_logical_routed_experts // ep_size
        self.combined_redundant_experts = (
            self.n_local_routed_experts - self.n_local_logical_routed_experts
        ) // self.num_redundants
        self._has_run = self.deep_ep_initialized = False

        cells = (self.n_group, self.group_size, self.num_redundants)
        self._column = torch.zeros(cells, dtype=torch.int64, device=on)
        self._edge = torch.zeros(n_routed_experts, dtype=torch.int64, device=on)
        self._original_first = torch.zeros(n_routed_experts, dtype=torch.bool, device=on)
        self._last = torch.zeros(n_routed_experts, dtype=torch.bool, device=on)
        self._index_edges()

    @property
    def phy2log(self) -> torch.Tensor:
        """``[n_routed_experts]`` int32 on the device, a snapshot of the current slot map."""
        return self.balancer.placement.phy2log.to(self.balancer.device)

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        """EP group in use."""
        return self.balancer.group

    def init_from_deep_ep(self, buffer: Any) -> None:
        """Sum workloads over the process group of a DeepEP buffer.

        Collective over the group; a second call does nothing, unless the planner was loaded from a
        file in between. The buffer says which ranks NVLink joins. With ``sync="auto"`` on GPUs
        these exchange counts through each other's memory, and torch.distributed sums over the
        rest. The buffer's own memory isn't used.

        Parameters
        ----------
        buffer : deep_ep.Buffer or deep_ep.ElasticBuffer
            Anything with the process group as its ``group``, and ``num_nvlink_ranks`` or a
            ``runtime`` with ``get_num_rdma_ranks()`` if it knows.

        Raises
        ------
        TypeError
            If ``buffer`` has no process group of torch.distributed.
        ValueError
            If the group's size isn't ``ep_size``.
        """
        if self.deep_ep_initialized and self.ep_group is not None:
            return
        group, domain_size = deep_ep_domain(buffer)
        self.balancer.set_group(group, domain_size=domain_size)
        self._index_edges()
        self.deep_ep_initialized = True

    def _warn_if_no_group(self) -> None:
        """Warn in the first batch, since a DeepEP buffer may provide a group until then."""
        if not self._has_run:
            self._has_run = True
            if self.balancer.group is None and self.balancer.quotas == "local":
                warn_if_no_group(self.balancer.placement, stacklevel=3)

    def close(self) -> None:
        """Release the communicator; see `Balancer.close`."""
        self.balancer.close()

    def update_redundancy_mapping(
        self, workload: torch.Tensor | None = None, *, num_nodes: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reorder experts by load history and choose anew which of them are replicated.

        Collective over the group: all ranks use rank 0's result. Waits for the device. The caller
        has to move the experts' weights according to the returned map.

        Parameters
        ----------
        workload : torch.Tensor or None
            ``[n_logical_routed_experts]`` load by logical expert, non-negative; ``None`` puts
            experts in order of their ids.
        num_nodes : int
            Nodes that EPLB packs groups of experts to.

        Returns
        -------
        phy2log : torch.Tensor
            ``[n_routed_experts]`` int32, logical expert of each slot.
        log2phy : torch.Tensor
            ``[n_logical_routed_experts, 2]`` int32, slots of each expert, the original first,
            padded with -1.
        logcnt : torch.Tensor
            ``[n_logical_routed_experts]`` int32, number of slots of each expert.
        """
        placement = Placement.from_topology(
            self._topology,
            self.n_routed_experts,
            self.n_logical_routed_experts,
            self.ep_size,
            workload=workload,
            num_nodes=num_nodes,
        )
        placement = self.balancer.update_placement(placement)
        self._index_edges()
        on = self.balancer.device
        return placement.phy2log.to(on), placement.log2phy.to(on), placement.logcnt.to(on)

    def count_workload(self, idx: torch.Tensor, n_sms: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the tokens of each logical expert in ``idx``.

        Parameters
        ----------
        idx : torch.Tensor
            int64 or int32, any shape, ids in [-1, n_logical_routed_experts); -1 isn't counted.
        n_sms : int
            Number of programs; may exceed what the batch can fill.

        Returns
        -------
        workload : torch.Tensor
            ``[n_logical_routed_experts]`` int32, fresh.
        local_workload_by_sm : torch.Tensor
            ``[n_sms, n_logical_routed_experts]`` int32, fresh; row i sums programs 0..i.
        """
        return self.balancer.count(idx, n_sms=n_sms)

    def solve_probs(
        self, workload: torch.Tensor, avail_counter: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve the LP of every group for this batch.

        Parameters
        ----------
        workload : torch.Tensor
            ``n_logical_routed_experts`` elements of any shape, int32 or int64 in [0, 2**31):
            tokens of each logical expert on this rank (summed over the group here), or global if
            there is no group.
        avail_counter : torch.Tensor
            One int32 or int64 element of any shape on the device; rises by the number of
            groups certified within the tolerance.

        Returns
        -------
        o_weight : torch.Tensor
            ``[n_group, group_size, num_redundants]`` float32, share kept by the original.
        global_workload : torch.Tensor
            ``[n_group, group_size, n_local_logical_routed_experts]`` float32, the summed
            workload divided by its largest entry (zeros if there are no tokens). Viewed flat
            it is indexed by logical id, whatever the placement.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As for `Balancer.solve`, naming ``workload``.
        """
        device = self.balancer.device
        workload = check_counts("workload", workload, None, device)
        if workload.numel() != self.n_logical_routed_experts:
            raise ValueError(
                f"workload must have {self.n_logical_routed_experts} elements, "
                f"got shape {tuple(workload.shape)}"
            )
        counter = check_counter("avail_counter", avail_counter, device)
        counts = counts_to_int32("workload", workload.reshape(-1), self.balancer.checks_on_host)
        self._warn_if_no_group()
        counts = self.balancer.sync(counts)
        solution = self.balancer.solve(counts, certified=counter)
        o_weight = solution.shares.gather(2, self._column)
        valid = counts.clamp(min=0)
        scaled = valid.float() / valid.max().clamp(min=1)
        return o_weight, scaled.reshape(self.n_group, self.group_size, -1)

    def weighted_select_target(
        self,
        idx: torch.Tensor,
        o_weight: torch.Tensor,
        local_workload_by_sm: torch.Tensor,
        n_sms: int,
    ) -> torch.Tensor:
        """Rewrite logical into physical ids by given weights; quotas are met exactly.

        Parameters
        ----------
        idx : torch.Tensor
            As for `count_workload`.
        o_weight : torch.Tensor
            ``[n_group, group_size, num_redundants]`` float, share kept by the original, in
            [0, 1] (clamped).
        local_workload_by_sm : torch.Tensor
            The second result of `count_workload` for the same ``idx``.
        n_sms : int
            As given to `count_workload`.

        Returns
        -------
        torch.Tensor
            Physical ids, of the shape and dtype of ``idx``; -1 stays -1.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As for `Balancer.select`, naming the argument.
        """
        o_weight = check_floating_point("o_weight", o_weight)
        if tuple(o_weight.shape) != tuple(self._column.shape):
            raise ValueError(
                f"o_weight must have shape {tuple(self._column.shape)}, got {tuple(o_weight.shape)}"
            )
        device = self.balancer.device
        check_device("o_weight", o_weight, device)
        name = "local_workload_by_sm"
        running = check_counts(name, local_workload_by_sm, None, device)
        if running.ndim != 2 or running.shape[1] != self.n_logical_routed_experts:
            raise ValueError(
                f"{name} must have shape [n_sms, {self.n_logical_routed_experts}], "
                f"got {list(running.shape)}"
            )
        if len(running) != n_sms:
            raise ValueError(f"n_sms is {n_sms}, but {name} has {len(running)} rows")
        on_host = self.balancer.checks_on_host
        running = counts_to_int32(name, running, on_host)
        if on_host:
            check_ids("idx", idx, device)
            check_id_values("idx", idx, self.n_logical_routed_experts)
            reference.check_counts_of(name, idx, running[-1])
            if bool(o_weight.isnan().any()):
                raise ValueError("o_weight must not be NaN")
        one = 1 << SHARE_BITS
        # NaN becomes -1, which `Balancer.select` reports, since no share is negative.
        kept = torch.round(o_weight.reshape(-1).double().clamp(0, 1) * one)
        kept = kept.nan_to_num(nan=-1.0).int()[self._edge]
        first = torch.where(self._original_first, kept, one - kept)
        cumulative = torch.where(self._last, one, first).int()
        return self.balancer.select(idx, cumulative, running)

    def run(
        self, idx: torch.Tensor, avail_counter: torch.Tensor, n_sms: int | None = None
    ) -> torch.Tensor:
        """Return physical ids for this batch's logical ids.

        Parameters
        ----------
        idx : torch.Tensor
            As for `count_workload`.
        avail_counter : torch.Tensor
            As for `solve_probs`.
        n_sms : int or None
            Number of programs; by default two per multiprocessor, at most 256.

        Returns
        -------
        torch.Tensor
            Physical ids, of the shape and dtype of ``idx``.
        """
        counter = check_counter("avail_counter", avail_counter, self.balancer.device)
        self._warn_if_no_group()
        return self.balancer.run(idx, n_sms=n_sms, certified=counter)

    def check(self) -> None:
        """Wait for the device and raise if a call met an id out of range; see `Balancer.check`."""
        self.balancer.check()

    def warmup(self) -> None:
        """Compile everything that `run` uses; see `Balancer.warmup`."""
        self.balancer.warmup()

    def _index_edges(self) -> None:
        """Map (rank, column) pairs of the topology to the LP's columns and to copies."""
        placement = self.balancer.placement
        s = placement.structure
        local = self.n_local_routed_experts
        redundant = self.combined_redundant_experts * self.num_redundants
        slots = np.arange(placement.n_physical).reshape(self.ep_size, local)
        originals = placement.phy2log.numpy()[slots[:, :redundant]]
        column = s.column_of[originals[:, : self.num_redundants]]
        self._column.copy_(torch.from_numpy(column.astype(np.int64)).reshape(self._column.shape))

        edge_of_expert = np.zeros(placement.n_logical, dtype=np.int64)
        edges = np.arange(self.ep_size)[:, None] * self.num_redundants + (
            np.arange(redundant)[None, :] % self.num_redundants
        )
        edge_of_expert[originals] = edges
        expert = np.repeat(np.arange(placement.n_logical), np.diff(s.copy_start))
        is_original = s.copy_slot % local < self.n_local_logical_routed_experts
        last = np.zeros(placement.n_physical, dtype=np.bool_)
        last[s.copy_start[1:] - 1] = True
        self._edge.copy_(torch.from_numpy(edge_of_expert[expert]))
        self._original_first.copy_(torch.from_numpy(is_original))
        self._last.copy_(torch.from_numpy(last))
