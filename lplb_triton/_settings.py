"""Settings of a balancer that go together, or don't."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lplb_triton._checks import check_dense_size, check_placement_size
from lplb_triton.placement import Placement

__all__ = ["QUOTAS", "SOLVERS", "check_combination", "check_size"]

QUOTAS = ("local", "global", "replicated")
SOLVERS = ("levelling", "interior_point")


def check_size(placement: Placement, solver: str, device: torch.device) -> None:
    """Raise a ValueError if the kernels of ``solver`` can't take the placement."""
    check_placement_size(placement)
    if solver == "interior_point":
        check_dense_size(placement, device)


def check_combination(quotas: str, group: dist.ProcessGroup | None, rank: int | None) -> None:
    """Raise a ValueError if quotas don't go with the group or rank that is given."""
    if quotas == "global" and (group is None or rank is not None):
        raise ValueError("quotas='global' needs a group, and no other rank than the group's")
    if quotas == "replicated" and rank is not None:
        raise ValueError("rank must not be given with quotas='replicated'")
