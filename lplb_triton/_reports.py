"""What a balancer says about the batches that it has balanced."""

from __future__ import annotations

import torch

from lplb_triton._backends.base import Backend
from lplb_triton._backends.layer import Layer
from lplb_triton._checks import check_id_values, check_ids
from lplb_triton._locality import NodeTraffic, read_node_traffic
from lplb_triton._objective import PlanTimes, read_times
from lplb_triton._torch_op import opaque
from lplb_triton.live import LivePlan, read_experts, read_plan
from lplb_triton.metrics import Metrics, MetricsReader
from lplb_triton.placement import Placement

__all__ = ["BatchReports"]


class BatchReports:
    """The part of `Balancer` that reports plans, times, traffic and sums over batches."""

    _layer: Layer
    _backend: Backend
    _metrics: MetricsReader | None

    @property
    def placement(self) -> Placement:
        """The placement in use (immutable)."""
        return self._layer.placement

    @property
    def live(self) -> LivePlan:
        """What this rank's last call of `run` put into live slots; new tensors in every call.

        A replay of a CUDA graph writes the plan of the call that was captured: keep what this
        returns after each capture.

        Raises
        ------
        RuntimeError
            If the placement has no live slots, or before the first call.
        """
        p = self.placement
        return read_plan(self._require_live(), p.ep_size, p.live_per_rank)

    @property
    def live_experts(self) -> torch.Tensor:
        """The ``experts`` of `live`, which take less host time when the rest isn't needed.

        Raises
        ------
        RuntimeError
            As for `live`.
        """
        p = self.placement
        return read_experts(self._require_live(), p.ep_size, p.live_per_rank)

    def _require_live(self) -> torch.Tensor:
        """Return what the last batch wrote about live slots, or raise a RuntimeError."""
        out = self._backend.live_out
        if not self.placement.live_per_rank:
            raise RuntimeError("the placement has no live slots: see Placement.with_live_slots")
        if out is None:
            raise RuntimeError("no batch has been planned yet: call run first")
        return out

    @opaque
    def metrics(self, *, wait: bool = True) -> Metrics | None:
        """Return how well the batches since the last reading were balanced.

        `run` adds to sums on the device in its last launch, in graph replays too.

        Parameters
        ----------
        wait : bool
            Whether to wait for the device. If not, a copy is started, and the result is what the
            copy of an earlier call says: None as long as none has ended.
        """
        if self._metrics is None:
            layer = self._layer
            sources = layer.metrics, layer.certified, layer.solves, layer.traffic
            self._metrics = MetricsReader(sources)
        return self._metrics.read() if wait else self._metrics.poll()

    @property
    def times(self) -> PlanTimes:
        """Predicted times of the last batch's plan and of the token plan; new tensors.

        They are 0 before the first batch. Batches on several streams write the same place.

        Raises
        ------
        RuntimeError
            With ``objective="tokens"``.
        """
        if self._layer.times is None:
            raise RuntimeError("times are predicted with objective='time' only")
        return read_times(self._layer.times)

    @property
    def node_traffic(self) -> NodeTraffic:
        """Tokens of the last batch that leave their node; new tensors.

        They are 0 before the first batch, and for batches without tokens. Batches on several
        streams write the same place.

        Raises
        ------
        RuntimeError
            With ``locality="none"``.
        """
        if self._layer.node_traffic is None:
            raise RuntimeError("traffic between nodes is known with locality='node' only")
        return read_node_traffic(self._layer.node_traffic)

    @opaque
    def count_node_pairs(self, physical_ids: torch.Tensor) -> torch.Tensor:
        """Count the pairs of a token of this rank and another node that it goes to.

        An all-to-all that sends a token to a node once, however many of its experts are there,
        sends so many over the network.

        Parameters
        ----------
        physical_ids : torch.Tensor
            ``[..., top_k]`` int, what `run` has returned; -1 counts nowhere. On a GPU ids out of
            range count nowhere either.

        Returns
        -------
        torch.Tensor
            ``[1]`` int64 on the device, without a wait for it.

        Raises
        ------
        TypeError, ValueError
            For ids of the wrong dtype or device, or without a dimension; on a CPU, and by the
            torch backend, also for ids out of range.
        RuntimeError
            If the balancer has neither ``ranks_per_node`` nor a group that it sums counts over.
        """
        layer, p = self._layer, self.placement
        check_ids("physical_ids", physical_ids, layer.device)
        if physical_ids.ndim == 0:
            raise ValueError("physical_ids must be [..., top_k], got a single number")
        ranks_per_node = layer.locality.ranks_per_node
        if ranks_per_node is None:
            if layer.communicator is None:
                raise RuntimeError(
                    "pairs of tokens and nodes need ranks_per_node, or a group that counts are "
                    "summed over"
                )
            ranks_per_node = layer.communicator.ranks_per_node
        if self._backend.checks_on_host:
            check_id_values("physical_ids", physical_ids, p.n_physical)
        if not physical_ids.numel():
            return torch.zeros(1, dtype=torch.int64, device=layer.device)
        n_nodes = -(-p.ep_size // ranks_per_node)
        ids = physical_ids.reshape(-1, physical_ids.shape[-1]).long()
        # Dropped ones, and those out of range on a GPU, go to a node behind the last.
        known = (ids >= 0) & (ids < p.n_physical)
        node = torch.where(known, ids // (p.slots_per_rank * ranks_per_node), n_nodes)
        reached = torch.zeros(len(ids), n_nodes + 1, dtype=torch.bool, device=layer.device)
        reached.scatter_(1, node, True)
        reached[:, n_nodes] = False
        reached[:, layer.rank // ranks_per_node] = False
        return reached.sum().reshape(1)
