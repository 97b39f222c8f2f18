"""Checks of token counts and loads, wherever they enter."""

from __future__ import annotations

import torch

__all__ = [
    "INVALID_COUNT",
    "MAX_COUNT",
    "check_counts",
    "check_load_dtype",
    "check_load_values",
    "counts_to_int32",
]

# Counts travel and are solved as int32.
MAX_COUNT = 2**31 - 1
# What no solver takes for a count, and a sum over ranks keeps.
INVALID_COUNT = -1
# Loads may be of these dtypes: float64 holds all of them.
LOAD_DTYPES = frozenset(
    {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)


def check_counts(
    name: str, counts: object, shape: tuple[int, ...] | None, device: torch.device
) -> torch.Tensor:
    """Return counts, an int32 or int64 tensor on ``device``, or raise naming them.

    ``shape`` None allows any.
    """
    if not isinstance(counts, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(counts).__name__}")
    if counts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {counts.dtype}")
    if shape is not None and counts.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(counts.shape)}")
    if counts.device != device:
        raise ValueError(f"{name} is on {counts.device}, expected {device}")
    return counts


def counts_to_int32(name: str, counts: torch.Tensor, at_once: bool) -> torch.Tensor:
    """Return checked counts as int32.

    Counts outside [0, 2**31) raise ``at_once``, which waits for the device. Otherwise they become
    `INVALID_COUNT`, which solvers report.
    """
    if at_once and counts.numel():
        low, high = int(counts.min()), int(counts.max())
        if low < 0 or high > MAX_COUNT:
            raise ValueError(f"{name} must be in [0, 2**31), got {low}..{high}")
    if counts.dtype == torch.int32:
        return counts
    if not at_once:
        counts = torch.where((counts < 0) | (counts > MAX_COUNT), INVALID_COUNT, counts)
    return counts.to(torch.int32)


def check_load_dtype(name: str, loads: torch.Tensor) -> None:
    """Raise a TypeError that names ``loads`` unless they are real numbers that float64 holds."""
    if loads.dtype not in LOAD_DTYPES:
        raise TypeError(f"{name} must be integers or real numbers, got {loads.dtype}")


def check_load_values(name: str, loads: torch.Tensor) -> None:
    """Raise a ValueError that names ``loads`` if one is negative or not finite; waits for them."""
    if not bool((torch.isfinite(loads) & (loads >= 0)).all()):
        raise ValueError(f"{name} must be finite and non-negative")
