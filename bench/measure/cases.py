"""Cases of real traffic.

A *case* is what a kernel is compiled for and how experts are placed: experts, ranks, placement,
redundant slots. Placements of one case have the same sizes, so that its kernel is compiled once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lplb_triton.bench.balance import make_placement
from lplb_triton.bench.placement import impossible

__all__ = [
    "STEPS",
    "TRIALS",
    "Case",
]


# Effort of `place` where nothing is said: its own takes minutes from 64 ranks on.
TRIALS = 100

# Numbers of steps by potentials that are told apart; the last stands for more too.
STEPS = ("0", "1", "2", "3+")


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled for, and how experts are placed.

    Attributes
    ----------
    experts, ep
        Logical experts, and ranks.
    placement
        As for `lplb_triton.bench.balance.make_placement`.
    slots
        Redundant slots per rank.
    """

    experts: int
    ep: int
    placement: str
    slots: int

    def __str__(self) -> str:
        """One line for people."""
        plural = "" if self.slots == 1 else "s"
        return f"{self.experts} experts, EP {self.ep}, {self.placement}, {self.slots} slot{plural}"

    def refusal(self) -> str | None:
        """Why there is no such placement, or None where there is one."""
        reason = impossible(self.experts, self.ep, self.slots)
        if reason is None:
            # The search needs what EPLB needs, and takes longer.
            kind = "eplb" if self.placement == "place" else self.placement
            try:
                make_placement(kind, torch.ones(self.experts), self.ep, self.slots)
            except ValueError as error:
                reason = str(error)
        return reason


# What is timed where nothing is said.
CASES = tuple(
    Case(*sizes)
    for sizes in (
        (256, 8, "eplb", 1),
        (256, 8, "chain", 1),
        (128, 16, "place", 1),
        (256, 16, "eplb", 2),
        (256, 32, "eplb", 1),
        (256, 32, "eplb", 2),
        (256, 32, "chain", 1),
        (256, 32, "place", 2),
        (256, 32, "torus:4x8", 2),
        (256, 64, "eplb", 1),
        (256, 64, "eplb", 2),
        (256, 64, "eplb", 4),
        (256, 64, "chain", 1),
        (256, 64, "chain", 2),
        (256, 64, "place", 1),
        (256, 64, "place", 2),
        (384, 64, "eplb", 1),
        (512, 64, "eplb", 2),
        (288, 72, "eplb", 2),
        (288, 72, "chain", 1),
        (288, 96, "place", 1),
        (288, 144, "eplb", 2),
        (256, 128, "eplb", 2),
        (256, 256, "eplb", 1),
    )
)

# Of the whole run, and how many batches of a layer of a trace.
RUN_CASES = (
    Case(256, 8, "eplb", 1),
    Case(256, 32, "eplb", 2),
    Case(256, 64, "eplb", 2),
    Case(256, 64, "chain", 1),
)

RUN_BATCHES = 25


def experts_for(ep: int) -> int:
    """Return the number of experts where none is said: 256, or 288 for 72, 96 or 144 ranks."""
    return 288 if 256 % ep and 288 % ep == 0 else 256


def product(
    experts: Sequence[int] | None,
    eps: Sequence[int],
    placements: Sequence[str],
    slots: Sequence[int],
) -> tuple[list[Case], list[tuple[Case, str]]]:
    """Combine sizes and placements.

    Parameters
    ----------
    experts
        None for those of `experts_for`.
    eps, placements, slots
        All combinations of these.

    Returns
    -------
    tuple
        The cases that can be placed, and the others with the reason.
    """
    possible, others = [], []
    for ep in eps:
        for n_experts in (experts_for(ep),) if experts is None else experts:
            for placement in placements:
                for n_slots in slots:
                    case = Case(n_experts, ep, placement, n_slots)
                    reason = case.refusal()
                    if reason is None:
                        possible.append(case)
                    else:
                        others.append((case, reason))
    return possible, others
