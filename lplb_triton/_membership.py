"""What the balancers of an EP group settle among themselves, outside of batches."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist

from lplb_triton.placement import Placement
from lplb_triton.sync._base import Communicator, group_timeout, message_version
from lplb_triton.sync._connect import acquire, release
from lplb_triton.sync._meeting import meet

__all__ = [
    "Agreed", "agree", "agree_all", "bound_of", "let_go", "share", "take_communicator",
    "warn_if_alone",
]  # fmt: skip


class Agreed(NamedTuple):
    """What all ranks of a group have in common."""

    placement: Placement
    number: tuple[int, ...]
    """Tells this layer from others; rank 0's."""

    @property
    def version(self) -> int:
        """Checksum in 32 bits that tells this layer with this placement from others."""
        table = self.placement.phy2log.numpy().tobytes()
        return message_version(table, str((self.number, self.placement.n_group)).encode())


class _Brought(NamedTuple):
    """What a rank brings to a meeting about placements, one for each layer."""

    problem: str | None
    facts: list[tuple[object, ...]]
    tables: list[torch.Tensor] | None
    numbers: list[tuple[int, ...]]


def agree(
    group: dist.ProcessGroup | None,
    purpose: str,
    timeout: float,
    mine: Agreed,
    kinds: tuple[str, str],
) -> Agreed:
    """Rank 0's placement and number, on every rank of the group; collective."""
    return agree_all(group, purpose, timeout, [mine], kinds)[0]


def agree_all(
    group: dist.ProcessGroup | None,
    purpose: str,
    timeout: float,
    mine: list[Agreed],
    kinds: tuple[str, str],
    problem: Exception | None = None,
) -> list[Agreed]:
    """Agree on the placements and numbers of many layers, rank 0's, in one meeting; collective.

    ``kinds`` are quotas and solver. ``problem`` is what is wrong with this rank's arguments: it is
    raised here once the others know, and they raise too.
    """
    if group is not None and group.size() > 1:
        text = None if problem is None else f"{type(problem).__name__}: {problem}"
        placements = [each.placement for each in mine]
        facts: list[tuple[object, ...]] = [
            (p.n_logical, p.n_physical, p.n_group, p.max_columns, *kinds) for p in placements
        ]
        tables = [p.phy2log for p in placements] if dist.get_rank(group) == 0 else None
        brought = _Brought(text, facts, tables, [each.number for each in mine])
        everyone = meet(group, purpose, timeout, brought)
        _raise_for_others(everyone, problem)
        first = everyone[0]
        theirs = first.tables or [None] * len(mine)
        read = [_read(table, p) for table, p in zip(theirs, placements, strict=True)]
        return [Agreed(p, number) for p, number in zip(read, first.numbers, strict=True)]
    if problem is not None:
        raise problem
    return mine


def _raise_for_others(everyone: list[_Brought], problem: Exception | None) -> None:
    if problem is not None:
        raise problem
    for rank, brought in enumerate(everyone):
        if brought.problem is not None:
            raise ValueError(f"placement can't be used, since rank {rank}'s was refused: "
                             f"{brought.problem}")  # fmt: skip
    layers = [len(brought.facts) for brought in everyone]
    if len(set(layers)) > 1:
        raise ValueError(f"placements must be of as many layers on every rank, got {layers}")
    for facts in zip(*(brought.facts for brought in everyone), strict=True):
        if len(set(facts)) > 1:
            raise ValueError(
                "placement, quotas and solver must be of the same sizes and kinds on every rank, "
                f"got {list(facts)} (logical experts, slots, groups, columns, quotas, solver)"
            )


def _read(table: torch.Tensor | None, mine: Placement) -> Placement:
    """Placement of rank 0's table."""
    if table is None or torch.equal(table, mine.phy2log):
        return mine
    return Placement(
        table,
        mine.ep_size,
        n_logical=mine.n_logical,
        n_group=mine.n_group,
        max_columns=mine.max_columns,
    )


def bound_of(group: dist.ProcessGroup | None, device: torch.device, timeout: float | None) -> float:
    """Seconds that a rank waits for the others of its group."""
    if timeout is not None:
        return timeout
    return 0.0 if group is None else group_timeout(group, device)


def take_communicator(
    group: dist.ProcessGroup,
    sync: str | Communicator,
    device: torch.device,
    timeout: float | None,
    n_logical: int,
    domain_size: int | None,
) -> Communicator:
    """Communicator over the group: the one that is given, or the shared one; collective."""
    if not isinstance(sync, Communicator):
        return acquire(group, sync, device, timeout, n_logical, domain_size)
    if sync.group is not group or sync.device != device:
        raise ValueError(f"sync must be over the group and on {device}")
    return sync


def let_go(
    communicator: Communicator | None, sync: str | Communicator, alone: bool = False
) -> None:
    """Undo `take_communicator`; ``alone``: without waiting for other ranks."""
    if communicator is not None and not isinstance(sync, Communicator):
        release(communicator, alone)


def share(communicator: Communicator | None, sync: str | Communicator) -> None:
    """Count one more user of what `take_communicator` gave; local."""
    if communicator is not None and not isinstance(sync, Communicator):
        communicator.users += 1


_ALONE = (
    "Give the EP group as group= to sum counts over it. If counts are global as they are, say so: "
    "quotas='replicated' where every rank holds all tokens of the group, rank= elsewhere"
)


def warn_if_alone(placement: Placement, stacklevel: int, advice: str = _ALONE) -> None:
    """Warn where a process group fits the placement and isn't used."""
    if not dist.is_available() or not dist.is_initialized() or placement.ep_size == 1:
        return
    if dist.get_world_size() == placement.ep_size:
        warnings.warn(
            f"torch.distributed has {placement.ep_size} ranks, as many as the placement, but no "
            f"group is given, so each rank balances its own tokens alone. {advice}",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )
