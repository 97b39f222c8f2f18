"""Checks of what a `Placement` is made from and of the loads that it is given."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton._checks import (
    check_integer,
    check_load_dtype,
    check_load_values,
    check_tensor,
    on_host,
)

__all__ = [
    "average_batches",
    "check_batch",
    "check_live_slots",
    "count_copies",
    "take_static_slots",
    "to_int_array",
    "to_loads",
]

# The most live slots of a rank.
MOST_LIVE = 2


def to_int_array(name: str, value: object) -> NDArray[np.int64]:
    """Copy an integer tensor or array to the CPU, or raise naming ``name``."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            raise TypeError(f"{name} must hold integers, got dtype {value.dtype}")
        value = on_host(name, value).numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be an array of integers: {error}") from None
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
    return array.astype(np.int64)


def to_loads(name: str, value: object) -> torch.Tensor:
    """Return loads as a tensor on the CPU: a tensor as it is, anything else as float64."""
    if isinstance(value, torch.Tensor):
        return on_host(name, value)
    try:
        return torch.from_numpy(np.array(value, dtype=np.float64))
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a torch.Tensor or array of numbers, got {type(value).__name__}"
        ) from None


def average_batches(name: str, load: object) -> torch.Tensor:
    """Return loads ``[n_logical]``: as they are, or the mean over batches ``[batches, n_logical]``.

    Each batch counts equally, whatever its total; batches without load are left out.
    """
    load = to_loads(name, load)
    if load.ndim != 2 or load.numel() == 0:
        return load
    check_load_dtype(name, load)
    check_load_values(name, load)
    # The largest load is divided out first, so that sums stay finite.
    largest = load.double().amax(1, keepdim=True)
    parts = load.double() / torch.where(largest > 0, largest, 1.0)
    parts = parts[largest[:, 0] > 0]
    return (parts / parts.sum(1, keepdim=True)).sum(0) / max(len(parts), 1)


def check_batch(counts: object, n_logical: int) -> torch.Tensor:
    """Return counts as ``[B, n_logical]`` float64, or raise naming them."""
    counts = check_tensor("counts", counts)
    if counts.ndim not in (1, 2) or counts.shape[-1] != n_logical:
        raise ValueError(
            f"counts must be [{n_logical}] or [B, {n_logical}], got {tuple(counts.shape)}"
        )
    check_load_dtype("counts", counts)
    # Reading values on another device would wait for it; the solver reports bad loads there.
    if counts.device.type == "cpu":
        check_load_values("counts", counts)
    return counts.reshape(-1, n_logical).double()


def count_copies(phy2log: NDArray[np.int64], n_logical: int | None) -> NDArray[np.int64]:
    """Count the copies of each expert, ``[n_logical]``, or raise naming what doesn't fit."""
    low, high, n_slots = int(phy2log.min()), int(phy2log.max()), len(phy2log)
    n_logical = high + 1 if n_logical is None else check_integer("n_logical", n_logical)
    if low < 0 or high >= n_logical:
        raise ValueError(f"phy2log must hold ids in [0, {n_logical}), got {low}..{high}")
    if n_logical > n_slots:
        raise ValueError(
            f"phy2log has {n_slots} slots, too few for one of each of {n_logical} logical experts"
        )
    counts = np.bincount(phy2log, minlength=n_logical)
    missing = np.flatnonzero(counts == 0)
    if missing.size:
        raise ValueError(
            f"phy2log gives no slot to {missing.size} logical experts, first {int(missing[0])}"
        )
    return counts


def check_live_slots(live_per_rank: int, n_group: int, name: str = "live_per_rank") -> int:
    """Check the number ``name`` of live slots of a rank, and that one group holds them."""
    live_per_rank = check_integer(name, live_per_rank, 0)
    if live_per_rank > MOST_LIVE:
        raise ValueError(f"{name} must be at most {MOST_LIVE}, got {live_per_rank}")
    if live_per_rank and n_group > 1:
        raise ValueError(f"{name} needs a placement of one group, got {n_group} groups")
    return live_per_rank


def take_static_slots(
    phy2log: NDArray[np.int64], ep_size: int, n_group: int, live_per_rank: int
) -> NDArray[np.int64]:
    """Return the experts of the slots ahead of each rank's live ones, which must hold nothing."""
    live_per_rank = check_live_slots(live_per_rank, n_group)
    by_rank = phy2log.reshape(ep_size, -1)
    n_static = by_rank.shape[1] - live_per_rank
    if n_static < 1:
        raise ValueError(
            f"live_per_rank must leave static slots, got {live_per_rank} of {by_rank.shape[1]}"
        )
    if (by_rank[:, n_static:] != -1).any():
        raise ValueError(f"phy2log must be -1 in the last {live_per_rank} slots of each rank")
    return np.ascontiguousarray(by_rank[:, :n_static]).reshape(-1)
