"""Other placements for the balancers of one layer or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from lplb_triton._membership import Agreed, agree_all, bound_of
from lplb_triton.placement import Placement

if TYPE_CHECKING:
    from lplb_triton.balancer import Balancer

__all__ = ["update_placements"]


def update_placements(
    balancers: Sequence[Balancer],
    placements: Sequence[Placement],
    purpose: str,
    *,
    problem: Exception | None = None,
    also: Callable[[list[Placement]], None] = lambda _: None,
) -> list[Placement]:
    """Write other placements of the same sizes into the device tables; collective.

    However many layers there are, the ranks meet once, and the device is waited for twice.

    Parameters
    ----------
    balancers : sequence of Balancer
        Of one group and one device, in the same order on every rank.
    placements : sequence of Placement
        One for each; may be anything if there is a ``problem``.
    purpose : str
        What the caller is doing, for messages.
    problem : Exception or None
        What keeps this rank from it: raised here once the other ranks know, and they raise too.
    also : callable
        Called with the placements agreed on while the device is idle, to write what else belongs
        to them.

    Returns
    -------
    list of Placement
        Those in use: rank 0's.
    """
    first = balancers[0]
    for balancer in balancers:
        balancer._check_open()
    if problem is None:
        refusals = map(_refusal, (b.placement for b in balancers), placements)
        problem = next((refusal for refusal in refusals if refusal is not None), None)
    wanted = [b.placement for b in balancers] if problem else placements
    mine = [Agreed(p, b._number) for b, p in zip(balancers, wanted, strict=True)]
    bound = bound_of(first.group, first.device, first._timeout)
    agreed = agree_all(first.group, purpose, bound, mine, first._kinds, problem)
    used = [each.placement for each in agreed]
    _wait(first.device)
    for balancer, each in zip(balancers, agreed, strict=True):
        balancer._put(each)
    try:
        also(used)
    finally:
        _wait(first.device)
    return used


def _refusal(old: Placement, placement: object) -> Exception | None:
    """Find what is wrong with another placement, if anything."""
    if not isinstance(placement, Placement):
        return TypeError(f"placement must be a Placement, got {type(placement).__name__}")
    for name in ("n_logical", "n_physical", "ep_size", "n_group", "max_columns"):
        if getattr(placement, name) != getattr(old, name):
            return ValueError(
                f"placement must have {name} {getattr(old, name)}, got {getattr(placement, name)}"
            )
    return None


def _wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
