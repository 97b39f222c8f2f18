"""Process groups of a part of the EP group's ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lplb_triton.sync._rendezvous import all_gather_objects

__all__ = ["split_group"]

# The least number that the next split may use; see `_count_groups_as`.
_next_number = 0


def split_group(
    group: dist.ProcessGroup, domain: int, timeout: float, longest_wait: float
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Make two groups; collective over ``group``.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        The EP group.
    domain : int
        Consecutive ranks of a domain.
    timeout : float
        Bound on the wait until all ranks are here, in seconds.
    longest_wait : float
        Time-out of the new groups, in seconds.

    Returns
    -------
    tuple of torch.distributed.ProcessGroup
        The group of this domain's ranks, and that of the ranks with this number in each domain.

    Raises
    ------
    SyncError
        If a rank doesn't come within the time-out.
    """
    global _next_number
    mine = max(len(_group_names()), _next_number)
    number = max(all_gather_objects(group, "making groups of a domain's ranks", timeout, mine))
    _next_number = number + 2
    backend = dist.get_backend(group)
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
    first = rank - rank % domain
    made = []
    with _count_groups_as(number):
        for members in (ranks[first : first + domain], ranks[rank % domain :: domain]):
            made.append(
                dist.new_group(
                    members, timedelta(seconds=longest_wait), backend,
                    use_local_synchronization=True,
                )
            )  # fmt: skip
    return made[0], made[1]


def _group_names() -> dict[object, str]:
    """Return torch's table of the names of this process's groups."""
    world: Any = dist.distributed_c10d._world
    names: dict[object, str] = world.pg_names
    return names


@contextmanager
def _count_groups_as(number: int) -> Iterator[None]:
    """Let this process seem to have ``number`` process groups.

    torch names a group that only its members make after its ranks and the number of groups that
    the process has. Ranks that differ in that number, such as those of a pipeline's ends, would
    wait for one another under different names.
    """
    names = _group_names()
    extra = [object() for _ in range(number - len(names))]
    names.update((key, f"lplb_triton {i}") for i, key in enumerate(extra))
    try:
        yield
    finally:
        for key in extra:
            del names[key]
