"""Which expert weights to copy when one placement replaces another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lplb_triton._checks import check_integer, nearest_divisors, would_do
from lplb_triton.placement import Placement

__all__ = [
    "MovePlan",
    "check_same_sizes",
    "keep_slots",
    "number_domains",
    "plan_moves",
    "require_placement",
    "require_static_slots",
]


@dataclass(frozen=True, eq=False, repr=False)
class MovePlan:
    """Expert weights to copy, one entry for each slot whose expert changes.

    All sources are slots of the placement before. A source may be a target of another entry:
    where weights are overwritten in place, read every source (or send it) before its slot is
    written.

    Attributes
    ----------
    expert : torch.Tensor
        ``[n]`` int64, logical expert that the slot is to hold.
    target : torch.Tensor
        ``[n]`` int64, slot to write, ascending.
    source : torch.Tensor
        ``[n]`` int64, slot to read: on the same rank if it holds the expert already, else in the
        same domain if one does, else any; of several, one on the rank that sends the fewest so far.
    source_rank, target_rank : torch.Tensor
        ``[n]`` int64, ranks of the two slots.
    crossing : torch.Tensor
        ``[n]`` bool, whether the two ranks are of different domains.
    """

    expert: torch.Tensor
    target: torch.Tensor
    source: torch.Tensor
    source_rank: torch.Tensor
    target_rank: torch.Tensor
    crossing: torch.Tensor

    @property
    def moved(self) -> int:
        """Number of expert weights that a rank receives from another one."""
        return int((self.source_rank != self.target_rank).sum())

    def __len__(self) -> int:
        """Count the slots to write."""
        return len(self.expert)

    def __repr__(self) -> str:
        """Count the slots to write, the weights that change rank, and those that change domain."""
        crossing = int(self.crossing.sum())
        return f"MovePlan({len(self)} slots to write, {self.moved} moved, {crossing} crossing)"


def plan_moves(
    previous: Placement, placement: Placement, *, ranks_per_domain: int | None = None
) -> MovePlan:
    """List the weights to copy when `placement` replaces `previous`.

    Parameters
    ----------
    previous, placement : Placement
        Of the same numbers of experts, slots and ranks.
    ranks_per_domain : int or None
        Consecutive ranks that form a node or NVLink domain; divides the number of ranks. None:
        all ranks form one.

    Returns
    -------
    MovePlan
        On the CPU.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.
    """
    placement = require_placement("placement", placement)
    sizes = (placement.n_logical, placement.n_physical, placement.ep_size)
    check_same_sizes("previous", previous, sizes)
    if previous.live_per_rank != placement.live_per_rank:
        raise ValueError(
            f"previous must have {placement.live_per_rank} live slots a rank, "
            f"got {previous.live_per_rank}"
        )
    domain = number_domains(placement.ep_size, ranks_per_domain)
    old, new = previous.phy2log.long().numpy(), placement.phy2log.long().numpy()
    rank = placement.rank_of_slot.long().numpy()
    sent = np.zeros(placement.ep_size, dtype=np.int64)
    targets = np.flatnonzero(old != new)
    sources = np.empty_like(targets)
    for i, target in enumerate(targets):
        holders = np.flatnonzero(old == new[target])
        distance = np.where(
            rank[holders] == rank[target], 0, 1 + (domain[rank[holders]] != domain[rank[target]])
        )
        nearest = holders[distance == distance.min()]
        sources[i] = nearest[sent[rank[nearest]].argmin()]
        sent[rank[sources[i]]] += rank[sources[i]] != rank[target]
    crossing = domain[rank[sources]] != domain[rank[targets]]
    columns = (new[targets], targets, sources, rank[sources], rank[targets], crossing)
    return MovePlan(*(torch.from_numpy(column) for column in columns))


def require_placement(name: str, value: object) -> Placement:
    """Return a placement, or raise a TypeError that names it."""
    if not isinstance(value, Placement):
        raise TypeError(f"{name} must be a Placement, got {type(value).__name__}")
    return value


def require_static_slots(name: str, placement: Placement) -> Placement:
    """Return a placement without live slots, or raise a ValueError that names it."""
    if placement.live_per_rank:
        raise ValueError(f"{name} must have no live slots here, got {placement}")
    return placement


def check_same_sizes(name: str, previous: object, sizes: tuple[int, int, int]) -> None:
    """Raise, naming the argument, unless it is a placement of these experts, slots and ranks."""
    previous = require_placement(name, previous)
    found = (previous.n_logical, previous.n_physical, previous.ep_size)
    if found != sizes:
        raise ValueError(f"{name} must have (experts, slots, ranks) = {sizes}, got {found}")


def number_domains(ep_size: int, ranks_per_domain: int | None) -> np.ndarray:
    """Return the domain of each rank, ``[ep_size]`` int64, or raise naming the argument."""
    if ranks_per_domain is None:
        return np.zeros(ep_size, dtype=np.int64)
    size = check_integer("ranks_per_domain", ranks_per_domain)
    if ep_size % size:
        raise ValueError(
            f"ranks_per_domain must divide the {ep_size} ranks, got {size}"
            f"{would_do(nearest_divisors(ep_size, size))}"
        )
    return np.arange(ep_size, dtype=np.int64) // size


def keep_slots(new: torch.Tensor, old: torch.Tensor, n_ranks: int) -> torch.Tensor:
    """Reorder each rank's slots so that experts which stay on the rank keep theirs.

    Both maps are int64 ``[layers, n_physical]``. Experts new to the rank take the other slots, in
    order.
    """
    n_slots = new.shape[1] // n_ranks
    after, before = new.reshape(-1, n_slots), old.reshape(-1, n_slots)
    # The k-th copy of an expert on a rank takes the k-th of its old slots there.
    same = after.unsqueeze(2) == before.unsqueeze(1)
    same &= _count_earlier(after).unsqueeze(2) == _count_earlier(before).unsqueeze(1)
    target = same.int().argmax(2)
    stays, taken = same.any(2), same.any(1)
    # Every row has as many new experts as free slots, and both masks select row by row.
    target[~stays] = torch.arange(n_slots, device=target.device).expand_as(target)[~taken]
    return torch.empty_like(after).scatter_(1, target, after).reshape(new.shape)


def _count_earlier(slots: torch.Tensor) -> torch.Tensor:
    """Count the earlier slots of the row that hold the same expert, ``[rows, n]``."""
    same = slots.unsqueeze(2) == slots.unsqueeze(1)
    return same.tril_(-1).sum(2)
