"""Checks of tensors: ids, token counts, counters and loads."""

from __future__ import annotations

import torch

from lplb_triton._layout import INVALID_COUNT, MAX_COUNT

__all__ = [
    "check_counter",
    "check_counts",
    "check_device",
    "check_floating_point",
    "check_id_values",
    "check_ids",
    "check_load_dtype",
    "check_load_values",
    "check_real",
    "check_tensor",
    "counts_to_int32",
]

# Dtypes of loads: float64 represents every value of each.
LOAD_DTYPES = frozenset(
    {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)


def check_tensor(name: str, value: object) -> torch.Tensor:
    """Return ``value`` if it is a tensor, or raise a TypeError naming ``name``."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raise a ValueError naming ``name`` unless the tensor is on ``device``."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def check_floating_point(name: str, value: object) -> torch.Tensor:
    """Return a floating-point tensor, or raise a TypeError naming ``name``."""
    tensor = check_tensor(name, value)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
    return tensor


def check_real(name: str, value: object) -> torch.Tensor:
    """Return a tensor that isn't complex, or raise a TypeError naming ``name``."""
    tensor = check_tensor(name, value)
    if tensor.is_complex():
        raise TypeError(f"{name} must have a real dtype, got {tensor.dtype}")
    return tensor


def check_ids(name: str, ids: object, device: torch.device) -> None:
    """Raise naming ``name`` unless ``ids`` is an int64 or int32 tensor on ``device``.

    Fewer than 2**31 elements are allowed. The values are not read.
    """
    # This runs in every batch, so good ids cost no further call.
    if not isinstance(ids, torch.Tensor):
        ids = check_tensor(name, ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")
    if ids.device != device:
        check_device(name, ids, device)
    if ids.numel() > MAX_COUNT:
        raise ValueError(f"{name} must have fewer than 2**31 elements, got {ids.numel()}")


def check_id_values(name: str, ids: torch.Tensor, n_logical: int) -> None:
    """Raise a ValueError naming ``name`` if an id is outside [-1, n_logical); waits for them."""
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < -1 or high >= n_logical:
            raise ValueError(f"{name} must hold ids in [-1, {n_logical}), got {low}..{high}")


def check_counter(name: str, counter: object, device: torch.device) -> torch.Tensor:
    """Return a counter of one int32 or int64 element on ``device``, or raise naming it."""
    counter = check_tensor(name, counter)
    if counter.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {counter.dtype}")
    if counter.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(counter.shape)}")
    check_device(name, counter, device)
    return counter


def check_counts(
    name: str, counts: object, shape: tuple[int, ...] | None, device: torch.device
) -> torch.Tensor:
    """Return counts, an int32 or int64 tensor on ``device``, or raise naming them.

    Any shape is allowed if ``shape`` is None. The values are not read.
    """
    counts = check_tensor(name, counts)
    if counts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {counts.dtype}")
    if shape is not None and counts.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(counts.shape)}")
    check_device(name, counts, device)
    return counts


def counts_to_int32(name: str, counts: torch.Tensor, on_host: bool) -> torch.Tensor:
    """Return checked counts as int32.

    With ``on_host`` the host reads the counts, which waits for the device, and raises a ValueError
    for counts outside [0, 2**31). Otherwise these become `INVALID_COUNT`, which solvers report.
    """
    if on_host and counts.numel():
        low, high = int(counts.min()), int(counts.max())
        if low < 0 or high > MAX_COUNT:
            raise ValueError(f"{name} must be in [0, 2**31), got {low}..{high}")
    if counts.dtype == torch.int32:
        return counts
    if not on_host:
        counts = torch.where((counts < 0) | (counts > MAX_COUNT), INVALID_COUNT, counts)
    return counts.to(torch.int32)


def check_load_dtype(name: str, loads: torch.Tensor) -> None:
    """Raise a TypeError naming ``name`` unless loads are integers or reals that float64 holds."""
    if loads.dtype not in LOAD_DTYPES:
        raise TypeError(f"{name} must be integers or real numbers, got {loads.dtype}")


def check_load_values(name: str, loads: torch.Tensor) -> None:
    """Raise a ValueError naming ``name`` if a load is negative or not finite; waits for them."""
    if not bool((torch.isfinite(loads) & (loads >= 0)).all()):
        raise ValueError(f"{name} must be finite and non-negative")
