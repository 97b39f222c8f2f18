"""The min-max linear program for experts with any number of copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lplb_triton._checks import check_load_dtype, check_load_values, check_tensor

__all__ = ["Problem"]


@dataclass(frozen=True, eq=False)
class Problem:
    """A batch of min-max programs (method.md, equation 1).

    Every instance is one group of ranks in one batch: which share of each replicated expert
    (*column*) goes to which of the ranks that hold a copy, so that the load of the most loaded
    rank is as small as possible. Any unit of load may be used, usually tokens.

    Parameters
    ----------
    weights : torch.Tensor
        ``[B, C]``, load of each column, non-negative. Integers or real numbers.
    fixed : torch.Tensor
        ``[B, G]``, load that each rank has under every plan, non-negative.
    mask : torch.Tensor
        ``[B, G, C]`` or ``[1, G, C]`` bool, whether a rank holds a copy of a column. A column
        with weight needs at least one copy; a column without copies and without weight is
        padding.
    start : torch.Tensor or None
        ``[B, G, C]`` float, shares of a plan. The answer is not worse than this plan, nor than the
        split that is even over ranks, except for the rounding of shares. Columns are divided by
        their sums.

    Raises
    ------
    TypeError
        If an argument is no tensor, or its dtype doesn't fit.
    ValueError
        If shapes or devices don't match; on a CPU also if a value is negative, not finite, or
        a column has weight but no copy. On a GPU the solver reports such values by
        `Status.INVALID` instead, so that building a problem never waits for the device.
    """

    weights: torch.Tensor
    fixed: torch.Tensor
    mask: torch.Tensor
    start: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Validate shapes, dtypes, devices and, on a CPU, values."""
        for name, ndim in (("weights", 2), ("fixed", 2), ("mask", 3), ("start", 3)):
            if name == "start" and self.start is None:
                continue
            value = check_tensor(name, getattr(self, name))
            if value.ndim != ndim:
                raise ValueError(f"{name} must have {ndim} dimensions, got {tuple(value.shape)}")
            if value.device != self.weights.device:
                raise ValueError(
                    f"{name} is on {value.device}, expected weights' device {self.weights.device}"
                )
        if self.mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {self.mask.dtype}")
        for name in ("weights", "fixed"):
            check_load_dtype(name, getattr(self, name))
        if self.start is not None and not self.start.is_floating_point():
            raise TypeError(f"start must be floating-point, got {self.start.dtype}")
        batch, columns = self.weights.shape
        if self.fixed.shape[0] != batch:
            raise ValueError(f"fixed must have {batch} rows like weights, got {len(self.fixed)}")
        ranks = self.fixed.shape[1]
        if ranks < 1:
            raise ValueError("fixed must have at least one rank, got shape " + str((batch, ranks)))
        if self.mask.shape[0] not in (1, batch) or self.mask.shape[1:] != (ranks, columns):
            raise ValueError(
                f"mask must have shape [1 or {batch}, {ranks}, {columns}], "
                f"got {tuple(self.mask.shape)}"
            )
        if self.start is not None and self.start.shape != (batch, ranks, columns):
            raise ValueError(
                f"start must have shape [{batch}, {ranks}, {columns}], "
                f"got {tuple(self.start.shape)}"
            )
        if self.weights.device.type == "cpu":
            self.validate()

    def __repr__(self) -> str:
        """Write sizes, dtypes and device in one line."""
        return (
            f"Problem({self.n_instances} instances, {self.group_size} ranks, "
            f"{self.n_columns} columns, weights {self.weights.dtype}, fixed {self.fixed.dtype}, "
            f"on {self.device})"
        )

    @property
    def n_instances(self) -> int:
        """Number of programs in the batch, B."""
        return self.weights.shape[0]

    @property
    def group_size(self) -> int:
        """Number of ranks per group, G."""
        return self.fixed.shape[1]

    @property
    def n_columns(self) -> int:
        """Number of columns, C, padding included."""
        return self.weights.shape[1]

    @property
    def device(self) -> torch.device:
        """Device that holds the problem."""
        return self.weights.device

    def to(self, device: torch.device | str) -> Problem:
        """Copy the problem to a device.

        Parameters
        ----------
        device : torch.device or str
            The target.

        Returns
        -------
        Problem
        """
        start = None if self.start is None else self.start.to(device)
        return Problem(self.weights.to(device), self.fixed.to(device), self.mask.to(device), start)

    def validate(self) -> None:
        """Check the values; waits for the device.

        Raises
        ------
        ValueError
            If a load is negative or not finite, or the sum of a program's loads isn't; if a column
            has weight but no copy, or the start isn't a plan.
        """
        for name in ("weights", "fixed"):
            check_load_values(name, getattr(self, name))
        total = self.weights.double().sum(1) + self.fixed.double().sum(1)
        if not bool(torch.isfinite(total).all()):
            raise ValueError("weights and fixed must have finite sums")
        if bool(((self.weights > 0) & ~self.mask.any(1)).any()):
            raise ValueError("mask leaves a column of positive weight without a copy")
        if self.start is not None:
            check_load_values("start", self.start)
            if bool(((self.start > 0) & ~self.mask).any()):
                raise ValueError("start gives a share to a rank that mask gives no copy")
