"""Checks of the arguments of a trace, which are also those of what its file holds."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["AXES", "MOST_TOKENS", "check_counts", "check_meta", "check_steps", "check_totals"]

AXES = "[batches, layers, sources, experts]"
# Tokens of an expert in one batch, over all sources, at most: ranks exchange them in int32. Times
# 2**24, the unit of shares, they stay far below 2**63.
MOST_TOKENS = 2**31 - 1


def check_counts(counts: object, name: str) -> None:
    """Raise unless this is an array of integers from 0 on, of whatever axes."""
    if not isinstance(counts, np.ndarray):
        raise TypeError(f"{name} must be a numpy array, got {type(counts).__name__}")
    if counts.ndim > 0 and counts.size == 0:
        raise ValueError(
            f"{name} must hold at least one batch, layer, source and expert, "
            f"got shape {counts.shape}"
        )
    if counts.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got dtype {counts.dtype}")
    if counts.min() < 0:
        raise ValueError(f"{name} must not be negative, got {int(counts.min())}")


def check_totals(counts: npt.NDArray[np.integer[Any]], name: str) -> None:
    """Raise where an expert of ``[batches, layers, sources, experts]`` has too many tokens."""
    largest = int(counts.max())
    if largest <= MOST_TOKENS // counts.shape[2]:
        return
    # A count that is too large by itself may not be added to others: that could overflow.
    totals = counts.max(2) if largest > MOST_TOKENS else counts.sum(2, dtype=np.int64)
    batch, layer, expert = (int(i) for i in np.unravel_index(int(totals.argmax()), totals.shape))
    tokens = int(totals[batch, layer, expert])
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"{name} must give an expert at most {MOST_TOKENS} tokens in a batch over all sources "
            f"(ranks exchange them in int32), got {tokens} or more for expert {expert} of layer "
            f"{layer} in batch {batch}; record shorter batches, or divide all counts by one number"
        )


def check_steps(steps: object, batches: int, name: str) -> None:
    """Raise unless this is int64 ``[batches]`` from 0 on."""
    if not isinstance(steps, np.ndarray) or steps.dtype != np.int64:
        found = steps.dtype if isinstance(steps, np.ndarray) else type(steps).__name__
        raise TypeError(f"{name} must be an int64 numpy array, got {found}")
    if steps.shape != (batches,):
        raise ValueError(f"{name} must have shape ({batches},), one per batch, got {steps.shape}")
    if steps.min() < 0:
        raise ValueError(f"{name} must not be negative, got {int(steps.min())}")


def check_meta(meta: object, name: str) -> None:
    """Raise unless this is a dict with strings as keys that JSON can hold."""
    if not isinstance(meta, dict):
        raise TypeError(f"{name} must be a dict, got {type(meta).__name__}")
    for key in meta:
        if not isinstance(key, str):
            raise TypeError(f"{name} must have string keys, got {key!r}")
    try:
        json.dumps(meta, allow_nan=False)
    except RecursionError:
        raise ValueError(f"{name} must be something JSON can hold: nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be something JSON can hold: {error}") from error
