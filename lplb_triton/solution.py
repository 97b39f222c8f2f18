"""The result of a solve: a feasible plan and its certificate."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from lplb_triton._layout import SHARE_BITS, STATUS_CERTIFIED, STATUS_GAP, STATUS_INVALID

__all__ = ["SHARE_BITS", "Solution", "SolveError", "Status"]


class Status(enum.IntEnum):
    """Outcome of one instance."""

    CERTIFIED = STATUS_CERTIFIED
    """The gap is within the tolerance."""
    GAP = STATUS_GAP
    """The plan is feasible and its gap correct, but larger than the tolerance."""
    INVALID = STATUS_INVALID
    """A load was negative or not finite, a count out of range, or a weight had no copy."""


class SolveError(RuntimeError):
    """An instance was not certified within its tolerance."""


@dataclass(frozen=True, eq=False)
class Solution:
    """Plans and certificates of a batch of programs; everything stays on the device.

    Unless the status is `Status.INVALID`, the plan is feasible, and never worse than the even split
    except for the rounding of shares (at most ``G * 2**-24`` of the largest load), and
    ``lower_bound <= optimum <= max_load`` holds.

    Attributes
    ----------
    shares : torch.Tensor
        ``[B, G, C]`` float32, the part of column c that rank g takes; multiples of 2**-24 that
        add up to exactly 1 over the ranks with a copy, 0 elsewhere.
    max_load : torch.Tensor
        ``[B]``, load of the most loaded rank under ``shares``, in the unit of the weights
        (infinite for an invalid instance).
    lower_bound : torch.Tensor
        ``[B]``, a load that no plan can beat (method.md, equation 3).
    gap : torch.Tensor
        ``[B]``, ``(max_load - lower_bound) / max_load``; 0 where there is no load at all.
    iterations : torch.Tensor
        ``[B]`` int32. For `Balancer`'s default solver, steps by potentials (0 where levelling along
        edges was enough); for `lplb_triton.solve` and ``Balancer(solver="interior_point")``,
        interior-point iterations.
    status : torch.Tensor
        ``[B]`` int32, values of `Status`.
    tolerance : float
        The relative gap within which an instance counts as certified.
    """

    shares: torch.Tensor
    max_load: torch.Tensor
    lower_bound: torch.Tensor
    gap: torch.Tensor
    iterations: torch.Tensor
    status: torch.Tensor
    tolerance: float

    def __repr__(self) -> str:
        """Write sizes and device in one line, without a wait for the device."""
        instances, ranks, columns = self.shares.shape
        return (
            f"Solution({instances} instances, {ranks} ranks, {columns} columns, "
            f"tolerance {self.tolerance:g}, on {self.shares.device})"
        )

    def check(self) -> None:
        """Raise unless every instance is certified; waits for the device.

        Raises
        ------
        SolveError
            Naming the worst instance, its status and its gap.
        """
        bad = torch.nonzero(self.status != Status.CERTIFIED).flatten()
        if bad.numel() == 0:
            return
        worst = int(bad[self.gap[bad].argmax()])
        raise SolveError(
            f"{bad.numel()} of {self.status.numel()} instances not certified within "
            f"{self.tolerance:g}; worst is instance {worst}: "
            f"{Status(int(self.status[worst])).name}, gap {float(self.gap[worst]):.3g} after "
            f"{int(self.iterations[worst])} iterations"
        )
