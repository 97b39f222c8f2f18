"""Change of the placement of one layer or of many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lplb_triton._consensus import LayerPlacement, agree_on_placements
from lplb_triton._membership import wait_for_device
from lplb_triton.placement import Placement
from lplb_triton.placement.moves import require_placement

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

    The ranks wait for one another once, and for the device twice, however many layers there are.

    Parameters
    ----------
    balancers : sequence of Balancer
        Of one group and one device, in the same order on every rank.
    placements : sequence of Placement
        One for each balancer; anything is allowed if there is a ``problem``.
    purpose : str
        What the caller is doing, for messages.
    problem : Exception or None
        What is wrong with this rank's arguments. It is raised here once the other ranks know of it,
        and they raise too.
    also : callable
        Called with the placements agreed on, while the device is idle, to write other data that
        depends on them.

    Returns
    -------
    list of Placement
        Those in use: rank 0's.
    """
    members = [balancer._membership for balancer in balancers]
    first = members[0]
    for member in members:
        member.layer.check_open()
    current = [member.layer.placement for member in members]
    if problem is None:
        refusals = map(_find_refusal, current, placements)
        problem = next((refusal for refusal in refusals if refusal is not None), None)
    wanted = current if problem else placements
    proposed = [LayerPlacement(p, m.layer_id) for m, p in zip(members, wanted, strict=True)]
    group, device = first.layer.group, first.layer.device
    limit = first.wait_limit(group)
    agreed = agree_on_placements(group, purpose, limit, proposed, first.kinds, problem)
    used = [each.placement for each in agreed]
    wait_for_device(device)
    for member, each in zip(members, agreed, strict=True):
        member.write(each)
    try:
        also(used)
    finally:
        wait_for_device(device)
    return used


def _find_refusal(old: Placement, placement: object) -> Exception | None:
    """Return the error for a placement that can't replace ``old``, or None."""
    try:
        placement = require_placement("placement", placement)
    except TypeError as error:
        return error
    for name in ("n_logical", "n_physical", "live_per_rank", "ep_size", "n_group", "max_columns"):
        if getattr(placement, name) != getattr(old, name):
            return ValueError(
                f"placement must have {name} {getattr(old, name)}, got {getattr(placement, name)}"
            )
    return None
