"""Agreement of an EP group's ranks on rank 0's placement of one layer or of many."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from lplb_triton.placement import Placement
from lplb_triton.sync._base import message_version
from lplb_triton.sync._rendezvous import all_gather_objects

__all__ = ["LayerPlacement", "agree_on_placements"]


class LayerPlacement(NamedTuple):
    """The placement of one layer, with the numbers that identify the layer."""

    placement: Placement
    layer_id: tuple[int, ...]

    @property
    def version(self) -> int:
        """Checksum in 32 bits of the layer's id and placement, which is sent with the counts."""
        table = self.placement.phy2log.numpy().tobytes()
        return message_version(table, str((self.layer_id, self.placement.n_group)).encode())


class _Proposal(NamedTuple):
    """What one rank sends to the others: its placements, one for each layer."""

    problem: str | None
    """What is wrong with this rank's arguments, if anything."""
    facts: list[tuple[object, ...]]
    """What must be the same on every rank, by layer."""
    tables: list[torch.Tensor] | None
    """Slot maps by layer, of rank 0 only."""
    layer_ids: list[tuple[int, ...]]


def agree_on_placements(
    group: dist.ProcessGroup | None,
    purpose: str,
    timeout: float,
    proposed: list[LayerPlacement],
    kinds: tuple[str, ...],
    problem: Exception | None = None,
) -> list[LayerPlacement]:
    """Return rank 0's placements and layer ids on every rank, by one rendezvous; collective.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup or None
        Without a group, or in a group of one, the result is what was proposed.
    purpose : str
        What the caller is doing, for messages.
    timeout : float
        Bound on the wait, in seconds.
    proposed : list of LayerPlacement
        This rank's, one for each layer.
    kinds : tuple of str
        Quotas, solver, rules of live slots, objective and locality, which must be the same on
        every rank.
    problem : Exception or None
        What is wrong with this rank's arguments. It is raised here once the other ranks know of
        it, and they raise too.

    Returns
    -------
    list of LayerPlacement
        Rank 0's.

    Raises
    ------
    ValueError
        If another rank has a problem, or sizes or kinds differ.
    SyncError
        If a rank doesn't arrive within the time-out.
    """
    if group is None or group.size() == 1:
        if problem is not None:
            raise problem
        return proposed
    text = None if problem is None else f"{type(problem).__name__}: {problem}"
    placements = [each.placement for each in proposed]
    facts: list[tuple[object, ...]] = [
        (p.n_logical, p.n_physical, p.live_per_rank, p.n_group, p.max_columns, *kinds)
        for p in placements
    ]
    tables = [p.phy2log for p in placements] if dist.get_rank(group) == 0 else None
    mine = _Proposal(text, facts, tables, [each.layer_id for each in proposed])
    proposals: list[_Proposal] = all_gather_objects(group, purpose, timeout, mine)
    if problem is not None:
        raise problem
    _raise_for_mismatch(proposals)
    first = proposals[0]
    no_tables: list[torch.Tensor | None] = [None] * len(proposed)
    return [
        LayerPlacement(_placement_of(table, placement), layer_id)
        for table, placement, layer_id in zip(
            first.tables or no_tables, placements, first.layer_ids, strict=True
        )
    ]


def _raise_for_mismatch(proposals: list[_Proposal]) -> None:
    """Raise a ValueError if a rank has a problem, or if ranks differ in sizes or kinds."""
    for rank, proposal in enumerate(proposals):
        if proposal.problem is not None:
            raise ValueError(
                f"placement can't be used, since rank {rank}'s was refused: {proposal.problem}"
            )
    layers = [len(proposal.facts) for proposal in proposals]
    if len(set(layers)) > 1:
        raise ValueError(f"placements must be of as many layers on every rank, got {layers}")
    for facts in zip(*(proposal.facts for proposal in proposals), strict=True):
        if len(set(facts)) > 1:
            raise ValueError(
                "placement, quotas and solver must be of the same sizes and kinds on every rank, "
                f"got {list(facts)} (logical experts, slots, live slots of a rank, groups, "
                "columns, quotas, solver, rules of live slots, objective, locality)"
            )


def _placement_of(table: torch.Tensor | None, mine: Placement) -> Placement:
    """Return a placement with this slot map and the sizes of ``mine``."""
    if table is None or torch.equal(table, mine.phy2log):
        return mine
    return Placement(
        table,
        mine.ep_size,
        n_logical=mine.n_logical,
        n_group=mine.n_group,
        max_columns=mine.max_columns,
        live_per_rank=mine.live_per_rank,
    )
