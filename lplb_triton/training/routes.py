"""Positions of originals, and the rows that ranks send each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton.placement import Placement
from lplb_triton.training.rows import Index

__all__ = [
    "Ints",
    "Routes",
    "Traffic",
    "add_way_back",
    "assign_positions",
    "plan_layer_traffic",
    "plan_redundant_traffic",
    "plan_routes",
    "plan_traffic",
]

Ints = NDArray[np.int64]


class Routes(NamedTuple):
    """Rows that one rank copies, sends and receives; messages are grouped by peer."""

    local_from: Index
    local_to: Index
    out: Index
    out_counts: list[int]
    into: Index
    in_counts: list[int]
    remote: bool
    """Whether any rank sends anything: if not, no rank communicates."""

    def reverse(self) -> Routes:
        """Return the routes in the other direction."""
        return self._replace(
            local_from=self.local_to, local_to=self.local_from,
            out=self.into, out_counts=self.in_counts, into=self.out, in_counts=self.out_counts,
        )  # fmt: skip


class Traffic(NamedTuple):
    """How weights are sent from originals to slots, and gradients back."""

    weight_routes: Routes
    """From originals to slots."""
    gradient_routes: Routes
    """From slots to originals."""
    summed: Index
    """Rows of this rank's originals that gradients of slots are added to."""
    local_rounds: list[tuple[Index, Index]]
    """Rows of this rank's slots to add to rows of ``summed``, in rounds without a target twice."""
    arriving_rounds: list[tuple[Index, Index]]
    """The same for the rows that other ranks send."""
    arriving_starts: torch.Tensor
    """int32, where the rows that are sent for each of ``summed`` begin in ``arriving_sources``."""
    arriving_sources: torch.Tensor
    """int32, the rows that are sent, in the order in which they are added."""


def _make_index(rows: list[int], device: torch.device) -> Index:
    """Put row numbers on the host and on ``device``."""
    return Index(rows, torch.tensor(rows, dtype=torch.int64, device=device))


def plan_routes(
    source: Ints, per_source: int, target: Ints, per_target: int, ranks: int, rank: int,
    device: torch.device,
) -> Routes:  # fmt: skip
    """Plan what ``rank`` does to bring items from global rows ``source`` to rows ``target``.

    ``per_source`` and ``per_target`` are the numbers of rows per rank on either side.
    """
    src, dst = source // per_source, target // per_target
    local = np.flatnonzero((src == rank) & (dst == rank))
    out = np.flatnonzero((src == rank) & (dst != rank))
    into = np.flatnonzero((src != rank) & (dst == rank))
    # Both ends list the items of a pair of ranks in the same order.
    out = out[np.argsort(dst[out], kind="stable")]
    into = into[np.argsort(src[into], kind="stable")]

    def rows(values: Ints, per_rank: int) -> Index:
        return _make_index((values % per_rank).tolist(), device)

    return Routes(
        rows(source[local], per_source),
        rows(target[local], per_target),
        rows(source[out], per_source),
        np.bincount(dst[out], minlength=ranks).tolist(),
        rows(target[into], per_target),
        np.bincount(src[into], minlength=ranks).tolist(),
        bool((src != dst).any()),
    )


def _make_rounds(
    source: Sequence[int], target: Sequence[int], device: torch.device
) -> list[tuple[Index, Index]]:
    """Split additions into rounds that name no target twice, so that the order of sums is fixed.

    ``source`` are the rows to add and ``target``, as many, the rows that they are added to.
    """
    seen: dict[int, int] = {}
    rounds: list[tuple[list[int], list[int]]] = []
    for origin, row in zip(source, target, strict=True):
        number = seen.get(row, 0)
        if number == len(rounds):
            rounds.append(([], []))
        rounds[number][0].append(origin)
        rounds[number][1].append(row)
        seen[row] = number + 1
    return [(_make_index(a, device), _make_index(b, device)) for a, b in rounds]


def plan_traffic(
    placement: Placement, positions: Ints, n_own: int, rank: int, device: torch.device
) -> Traffic:
    """Plan what ``rank`` sends between originals and the slots of ``placement``."""
    position = positions[placement.phy2log.numpy()]
    slots = np.arange(placement.n_physical)
    weight_routes = plan_routes(
        position, n_own, slots, placement.slots_per_rank, placement.ep_size, rank, device
    )
    return add_way_back(weight_routes, device)


def add_way_back(weight_routes: Routes, device: torch.device) -> Traffic:
    """Plan how gradients return, and how they are added up."""
    back = weight_routes.reverse()
    summed = sorted({*back.local_to.host, *back.into.host})
    place = {row: i for i, row in enumerate(summed)}
    arrived = range(len(back.into.host))
    targets = [place[row] for row in back.into.host]
    starts = np.cumsum([0, *np.bincount(np.array(targets, dtype=np.int64), minlength=len(summed))])
    order = sorted(arrived, key=lambda i: targets[i])  # stable, so that the order stays
    return Traffic(
        weight_routes,
        back,
        _make_index(summed, device),
        _make_rounds(back.local_from.host, [place[row] for row in back.local_to.host], device),
        _make_rounds(arrived, targets, device),
        torch.tensor(starts.tolist(), dtype=torch.int32, device=device),
        torch.tensor(order, dtype=torch.int32, device=device),
    )


def plan_redundant_traffic(
    placement: Placement,
    rank: int,
    device: torch.device,
    *,
    idle: bool = False,
    live: NDArray[np.int32] | None = None,
) -> Traffic:
    """Plan what ``rank`` sends between its experts and redundant slots, where experts stay at home.

    With ``idle`` it sends nothing, and redundant slots stay empty. Live slots are redundant ones,
    the last of each rank, and ``live`` ``[ep_size, live_per_rank]`` is what they hold; without it
    they stay empty.
    Sources are rows of the ranks' own experts, targets are rows of their redundant slots, both in
    order.
    """
    n_own = placement.n_logical // placement.ep_size
    n_redundant = placement.slots_per_rank - n_own
    slots = placement.phy2log.numpy().astype(np.int64).reshape(placement.ep_size, -1)
    if live is not None:
        slots[:, placement.static_per_rank :] = live
    experts = slots[:, n_own:].reshape(-1)
    target = np.flatnonzero(experts >= 0)
    if idle:
        target = target[:0]
    experts = experts[target]
    routes = plan_routes(
        experts, n_own, target, max(n_redundant, 1), placement.ep_size, rank, device
    )
    return add_way_back(routes, device)


def plan_layer_traffic(
    placement: Placement, positions: Ints, rank: int, device: torch.device, redundant_only: bool
) -> Traffic:
    """Plan what ``rank`` sends to fill all its slots, or the redundant ones only."""
    if redundant_only:
        return plan_redundant_traffic(placement, rank, device)
    n_own = placement.n_logical // placement.ep_size
    return plan_traffic(placement, positions, n_own, rank, device)


def assign_positions(placement: Placement, current: Ints) -> Ints:
    """Assign each expert's original a position, ``rank * n_own + row``, each position once.

    The rank holds a copy, if that is possible for all experts. Among such ranks the present
    position comes first, then the present rank, then that of the earliest copy by
    `Placement.log2phy`.
    """
    from scipy.optimize import linear_sum_assignment  # SciPy is slow to import

    n, ep_size = placement.n_logical, placement.ep_size
    n_own = n // ep_size
    slots = placement.log2phy.numpy()
    # All other costs add up to less than that of one original on a rank without a copy.
    absent = 4.0 * n
    by_rank = np.full((n, ep_size), absent)
    for j in reversed(range(slots.shape[1])):
        have = np.flatnonzero(slots[:, j] >= 0)
        by_rank[have, slots[have, j] // placement.slots_per_rank] = 1 + j / slots.shape[1]
    experts = np.arange(n)
    by_rank[experts, current // n_own] -= 0.75
    cost = np.repeat(by_rank, n_own, axis=1)
    cost[experts, current] -= 0.25
    _, positions = linear_sum_assignment(cost)
    return np.asarray(positions, dtype=np.int64)
