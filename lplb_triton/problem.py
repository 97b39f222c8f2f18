"""The min-max linear program, for any number of copies per expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Problem"]


@dataclass(frozen=True, eq=False)
class Problem:
    """A batch of min-max programs (method.md, equation 1).

    Every instance is one group of ranks in one batch: which share of each replicated expert
    (*column*) goes to which of the ranks that hold a copy, so that the most loaded rank has as
    little as possible. Any consistent unit of load will do (tokens, usually).

    Parameters
    ----------
    weights : torch.Tensor
        ``[B, C]``, load of each column, non-negative. int or float; float32 is used.
    fixed : torch.Tensor
        ``[B, G]``, load that each rank has whatever the plan, non-negative.
    mask : torch.Tensor
        ``[B, G, C]`` or ``[1, G, C]`` bool, whether a rank holds a copy of a column. A column
        with weight needs at least one copy; a column without copies and without weight is
        padding.

    Raises
    ------
    TypeError
        If an argument is no tensor, or ``mask`` is not bool.
    ValueError
        If shapes or devices don't match; on a CPU also if a value is negative, not finite, or
        a column has weight but no copy. On a GPU the solver reports such values by
        `Status.INVALID` instead, so that building a problem never waits for the device.
    """

    weights: torch.Tensor
    fixed: torch.Tensor
    mask: torch.Tensor

    def __post_init__(self) -> None:
        """Validate shapes, dtypes, devices and, on a CPU, values."""
        for name, ndim in (("weights", 2), ("fixed", 2), ("mask", 3)):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
            if value.ndim != ndim:
                raise ValueError(f"{name} must have {ndim} dimensions, got {tuple(value.shape)}")
            if value.device != self.weights.device:
                raise ValueError(
                    f"{name} is on {value.device}, expected weights' device {self.weights.device}"
                )
        if self.mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {self.mask.dtype}")
        for name in ("weights", "fixed"):
            if getattr(self, name).is_complex():
                raise TypeError(f"{name} must be real, got {getattr(self, name).dtype}")
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
        if self.weights.device.type == "cpu":
            self.validate()

    def __repr__(self) -> str:
        """Sizes, dtypes and device in one line."""
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

    def validate(self) -> None:
        """Check the values; waits for the device.

        Raises
        ------
        ValueError
            If a load is negative or not finite, or a column has weight but no copy.
        """
        for name in ("weights", "fixed"):
            value = getattr(self, name)
            if not bool((torch.isfinite(value) & (value >= 0)).all()):
                raise ValueError(f"{name} must be finite and non-negative")
        if bool(((self.weights > 0) & ~self.mask.any(1)).any()):
            raise ValueError("mask leaves a column of positive weight without a copy")
