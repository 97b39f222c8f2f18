"""What every training integration keeps for one MoE layer: placement, balancer, plan, and loads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist

from lplb_triton._checks import check_integer, check_number
from lplb_triton._torch_op import outside_modes
from lplb_triton._updates import update_placements
from lplb_triton.balancer import Balancer
from lplb_triton.live import LivePlan
from lplb_triton.placement import Placement
from lplb_triton.placement.arguments import check_live_slots
from lplb_triton.placement.chaining import chain
from lplb_triton.training.spread_plan import SpreadPlan

__all__ = ["Imbalance", "LayerBalance", "measure_imbalance", "rebalance_layers"]

# Batches that an imbalance is averaged over.
WINDOW = 8
# A layer that is this even gains at most so much, less what replicas cost.
BALANCE_ABOVE = 1.05


class Imbalance(NamedTuple):
    """Largest load of a rank over the mean one, averaged over the latest batches."""

    before: float
    """With every token on its expert's home rank."""
    after: float
    """With replicas, as the batches were routed."""


class LayerBalance:
    """Balances one MoE layer of a framework over one EP group.

    Experts stay at home. The first placement takes all experts for equally loaded, unless a load
    is given; `rebalance` makes another from the loads since then. Construction and `rebalance` are
    collective over the group.

    Parameters
    ----------
    n_logical : int
        Experts of the layer; a multiple of the group's size.
    group : torch.distributed.ProcessGroup or None
        The EP group; None for a single rank.
    device : torch.device
        Device of ids and weights.
    redundant : int
        Redundant slots per rank.
    load : torch.Tensor or None
        ``[n_logical]``, loads to make the first placement from.
    balance_above : float
        Where `rebalance` finds the layer's imbalance without replicas at or below this, the layer
        is idle until the next call: tokens go to the experts at home, and nothing is solved or
        sent, since that would cost more time than it saves.
    live : int
        Live slots per rank, 0 to 2: they hold what a batch needs beyond its redundant slots. The
        layer's weights are those of `batch_plan` then, which `route` makes anew.

    Attributes
    ----------
    balancer : Balancer
        Rewrites ids.
    plan : SpreadPlan
        Of the present placement.
    batch_plan : SpreadPlan
        Of the latest batch: what `spread` takes after `route`. Without live slots it is ``plan``.
    load : torch.Tensor
        ``[n_logical]`` int64 on the device: this rank's choices by expert since the last
        `rebalance`.
    logical_loads, physical_loads : torch.Tensor
        ``[9, ep_size]`` int64 on the device: this rank's choices by rank in the latest batches,
        with every token on its expert's home rank, and as it was routed.
    """

    def __init__(
        self,
        n_logical: int,
        *,
        group: dist.ProcessGroup | None,
        device: torch.device,
        redundant: int = 1,
        load: torch.Tensor | None = None,
        balance_above: float = BALANCE_ABOVE,
        live: int = 0,
    ) -> None:
        self.group, self.device, self.n_logical = group, device, n_logical
        self.redundant = check_integer("redundant", redundant, 0)
        self.live = check_live_slots(live, 1, "live")
        self.balance_above = check_number("balance_above", balance_above)
        self.ep_size = 1 if group is None else group.size()
        if n_logical % self.ep_size:
            raise ValueError(
                f"the EP group's size must divide the {n_logical} experts, got {self.ep_size}"
            )
        if load is not None and tuple(load.shape) != (n_logical,):
            raise ValueError(f"load must have shape ({n_logical},), got {tuple(load.shape)}")
        first = torch.ones(n_logical, device="cpu") if load is None else load
        with outside_modes():
            self.balancer = Balancer(
                self.place(first), group=group, rank=0 if group is None else None, device=device
            )
            self.plan = SpreadPlan(self.balancer.placement, group=group, device=device)
            self.batch_plan = self.plan
            self._filled: LivePlan | None = None
            self._make_counters()

    @property
    def placement(self) -> Placement:
        """The placement in use (immutable)."""
        return self.plan.placement

    def place(self, load: torch.Tensor) -> Placement:
        """Make a placement for loads ``[n_logical]``; not collective."""
        placement = chain(load, self.ep_size, redundant_per_rank=self.redundant, keep_home=True)
        return placement.with_live_slots(self.live)

    def _make_counters(self) -> None:
        """Start counting; the loads by rank have a row more, since the next batch's is cleared."""
        self.load = torch.zeros(self.n_logical, dtype=torch.int64, device=self.device)
        shape = (WINDOW + 1, self.ep_size)
        self.logical_loads = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.physical_loads = torch.zeros_like(self.logical_loads)
        self._batches = 0
        self._first_batch = 0

    def route(self, ids: torch.Tensor) -> torch.Tensor:
        """Rewrite logical into physical ids; collective over the group.

        Loads are counted, but not where a checkpointed region is recomputed.

        Parameters
        ----------
        ids : torch.Tensor
            int32 or int64, any shape; negative ids are dropped choices.

        Returns
        -------
        torch.Tensor
            Physical ids of the same shape and dtype.

        Raises
        ------
        RuntimeError
            If a region is recomputed whose forward pass ran with another placement.
        SyncError
            If the ranks' plans of live slots differ, or a rank doesn't come.
        """
        recomputed = torch._C._current_graph_task_id() != -1
        if recomputed and not self.has_batches:
            raise RuntimeError(
                "the placement changed between a forward pass and what its backward pass "
                "recomputes: rebalance between optimizer steps, when no graph is alive"
            )
        slots = self._keep_home(ids) if self.idle else self.balancer.run(ids.contiguous())
        if self.live and not self.idle:
            self._fill_slots()
        if not recomputed:
            with outside_modes(), torch.no_grad():
                self._count(ids.detach(), slots.detach())
        return slots

    def _fill_slots(self) -> None:
        """Make the plan of the batch that was routed last."""
        with outside_modes():
            live = self.balancer.live
            last, self._filled = self._filled, live
            # Every run makes a new tensor, and the last one is still alive here.
            if last is not None and last.experts.data_ptr() == live.experts.data_ptr():
                raise RuntimeError(
                    "the ids of a recomputed region were kept from its forward pass, so what live "
                    "slots held there is unknown: with live slots, let checkpointing recompute "
                    "lplb_triton.balance too"
                )
            self.batch_plan = self.plan.fill(live)

    @property
    def idle(self) -> bool:
        """Whether tokens go to the experts at home, since that balances them well enough."""
        return self.plan.idle

    def _keep_home(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the ids of the slots at home."""
        n_local = self.n_logical // self.ep_size
        home = ids + ids.div(n_local, rounding_mode="floor") * (self.redundant + self.live)
        return torch.where(ids < 0, ids, home)

    def _count(self, ids: torch.Tensor, slots: torch.Tensor) -> None:
        """Count the choices of one batch, without a wait for the device."""
        batch = self._batches
        self._batches += 1
        if ids.is_cuda:
            from lplb_triton import kernels  # it imports triton, which a CPU may lack

            if self.n_logical <= kernels.MOST_EXPERTS:
                kernels.record_loads(
                    ids.contiguous(), slots.contiguous(), self.load, self.logical_loads,
                    self.physical_loads, batch, self.placement.slots_per_rank,
                )  # fmt: skip
                return
        place = batch % len(self.logical_loads)
        logical = _count_ids(ids, self.n_logical)
        physical = _count_ids(slots, self.placement.n_physical)
        self.load += logical
        self.logical_loads[place] = logical.view(self.ep_size, -1).sum(1)
        self.physical_loads[place] = physical.view(self.ep_size, -1).sum(1)
        following = (place + 1) % len(self.logical_loads)
        self.logical_loads[following] = 0
        self.physical_loads[following] = 0

    @property
    def has_batches(self) -> bool:
        """Whether a batch was routed since the last `rebalance`."""
        return self._batches > self._first_batch

    def rebalance(self, load: torch.Tensor | None = None) -> None:
        """Place copies by the loads since the last call; see `rebalance_layers`.

        Parameters
        ----------
        load : torch.Tensor or None
            ``[n_logical]``, loads to place copies by instead; those of the group's first rank
            are used.
        """
        if load is None:
            rebalance_layers([self])
            return
        with outside_modes(), torch.no_grad():
            load = load.to(self.device, torch.float64, copy=True)
            if self.group is not None:
                first = dist.get_global_rank(self.group, 0)
                dist.broadcast(load, src=first, group=self.group)
            load = load.cpu()
            placement = self.balancer.update_placement(self.place(load))
            by_rank = load.view(1, self.ep_size, -1).sum(2)
            self.use(placement, float(_average_imbalance(by_rank)))

    def use(self, placement: Placement, imbalance: float) -> None:
        """Use a placement that the balancer uses already, and count loads afresh.

        ``imbalance`` is what the layer has without replicas, the same on all ranks.
        """
        self.plan.retire()
        idle = imbalance <= self.balance_above
        self.plan = SpreadPlan.of_agreed(placement, self.group, self.device, idle=idle)
        self.batch_plan = self.plan
        self.load.zero_()
        self._first_batch = self._batches


def rebalance_layers(layers: Iterable[LayerBalance]) -> int:
    """Place the copies of many layers by their loads since the last call; collective.

    The ranks wait for one another a few times, however many layers there are. A layer without any
    load keeps its placement. Call it between optimizer steps, when no graph is alive.

    Parameters
    ----------
    layers : iterable of LayerBalance
        In the same order on all ranks of their groups.

    Returns
    -------
    int
        How many layers have a new placement.
    """
    changed = 0
    with outside_modes(), torch.no_grad():
        for members in _by_group(layers):
            counts = [one for m in members for one in (m.load, m.logical_loads.view(-1))]
            summed = torch.cat(counts)
            if members[0].group is not None:
                dist.all_reduce(summed, group=members[0].group)
            parts = torch.split(summed.cpu(), [len(one) for one in counts])
            told = zip(members, parts[::2], parts[1::2], strict=True)
            loaded = [one for one in told if bool(one[1].any())]
            if not loaded:
                continue
            used = update_placements(
                [layer.balancer for layer, _, _ in loaded],
                [layer.place(load) for layer, load, _ in loaded],
                "rebalancing layers",
            )
            for (layer, _, by_rank), placement in zip(loaded, used, strict=True):
                rows = by_rank.double().view(-1, layer.ep_size)
                layer.use(placement, float(_average_imbalance(rows)))
            changed += len(loaded)
    return changed


def _count_ids(ids: torch.Tensor, n: int) -> torch.Tensor:
    """Count ids ``[n]`` int64; negative ones don't count. It never waits for the device."""
    flat = ids.reshape(-1).long()
    bins = torch.zeros(n + 1, dtype=torch.int64, device=ids.device)
    bins.scatter_add_(0, torch.where(flat < 0, n, flat), torch.ones_like(flat))
    return bins[:n]


def measure_imbalance(layers: Iterable[LayerBalance]) -> list[Imbalance]:
    """Return each layer's imbalance over its latest batches, at most eight; collective.

    It waits for the device. Layers are given in the same order on all ranks of their groups.
    Batches without tokens don't count, and a layer that saw no others has imbalances of 1.
    """
    layers = list(layers)
    found: dict[int, Imbalance] = {}
    for members in _by_group(layers):
        loads = torch.stack([torch.stack([m.logical_loads, m.physical_loads]) for m in members])
        if members[0].group is not None:
            dist.all_reduce(loads, group=members[0].group)
        averages = _average_imbalance(loads.double().cpu())
        for member, pair in zip(members, averages.tolist(), strict=True):
            found[id(member)] = Imbalance(*pair)
    return [found[id(layer)] for layer in layers]


def _average_imbalance(loads: torch.Tensor) -> torch.Tensor:
    """Average the largest load over the mean one, of ``[..., batches, ranks]``, over the batches.

    Batches without tokens don't count; without any other the result is 1.
    """
    mean = loads.mean(-1)
    ratio = torch.where(mean > 0, loads.amax(-1) / mean.clamp(min=1e-9), torch.nan)
    return ratio.nanmean(-1).nan_to_num(nan=1.0)


def _by_group(layers: Iterable[LayerBalance]) -> list[list[LayerBalance]]:
    """Return the layers of each group, in their order."""
    groups: dict[int, list[LayerBalance]] = {}
    for layer in layers:
        groups.setdefault(id(layer.group), []).append(layer)
    return list(groups.values())
