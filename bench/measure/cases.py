"""Sizes and placements that are timed on real traffic.

A *case* is what a kernel is compiled for and how experts are placed: experts, ranks, placement,
redundant slots. All placements of a case have the same sizes, so its kernel is compiled once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lplb_triton.bench.balance import make_placement
from lplb_triton.bench.placement import explain_impossible

__all__ = [
    "STEPS",
    "TRIALS",
    "Case",
]


# Trials of `place` by default: with its own default it takes minutes from 64 ranks on.
TRIALS = 100

# Numbers of steps by potentials that are counted separately; the last includes larger numbers.
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
        """Describe the case in one line."""
        plural = "" if self.slots == 1 else "s"
        return f"{self.experts} experts, EP {self.ep}, {self.placement}, {self.slots} slot{plural}"

    def explain_impossible(self) -> str | None:
        """Say why there is no such placement, or return None where there is one."""
        reason = explain_impossible(self.experts, self.ep, self.slots)
        if reason is None:
            # `place` accepts the same sizes as EPLB, which is faster.
            kind = "eplb" if self.placement == "place" else self.placement
            try:
                make_placement(kind, torch.ones(self.experts), self.ep, self.slots)
            except ValueError as error:
                reason = str(error)
        return reason


# Cases of the solve that are timed by default.
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

# Cases of the whole run that are timed by default, and batches of a layer of the trace.
RUN_CASES = (
    Case(256, 8, "eplb", 1),
    Case(256, 32, "eplb", 2),
    Case(256, 64, "eplb", 2),
    Case(256, 64, "chain", 1),
)

RUN_BATCHES = 25


def choose_experts(ep: int) -> int:
    """Return the default number of experts: 256, or 288 for 72, 96 or 144 ranks."""
    return 288 if 256 % ep and 288 % ep == 0 else 256


def combine_sizes(
    experts: Sequence[int] | None,
    eps: Sequence[int],
    placements: Sequence[str],
    slots: Sequence[int],
) -> tuple[list[Case], list[tuple[Case, str]]]:
    """Combine all sizes and placements, and separate the impossible cases.

    Parameters
    ----------
    experts
        Numbers of experts; None for that of `choose_experts`.
    eps, placements, slots
        All combinations of these.

    Returns
    -------
    tuple
        The cases that can be placed, and the others with the reason.
    """
    possible, others = [], []
    for ep in eps:
        for n_experts in (choose_experts(ep),) if experts is None else experts:
            for placement in placements:
                for n_slots in slots:
                    case = Case(n_experts, ep, placement, n_slots)
                    reason = case.explain_impossible()
                    if reason is None:
                        possible.append(case)
                    else:
                        others.append((case, reason))
    return possible, others
