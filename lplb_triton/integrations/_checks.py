"""Checks of the arguments of inference engines, under the engines' names for them."""

from __future__ import annotations

import torch

from lplb_triton._checks import check_integer, check_real, check_tensor

__all__ = [
    "EplbSizeError",
    "check_int_map",
    "check_load",
    "check_sizes",
    "describe_fault",
    "find_usable",
]

# A layer's loads may add up to this in EPLB, which marks full ranks by infinity.
MAX_TOTAL_LOAD = torch.finfo(torch.float32).max / 2


class EplbSizeError(ValueError, AssertionError):
    """Sizes that don't fit; an AssertionError too, since engines check them by ``assert``."""


def check_load(name: str, value: object, axes: tuple[str, ...]) -> torch.Tensor:
    """Return a real tensor with these axes, none of them empty, or raise naming ``name``."""
    value = check_real(name, value)
    if value.ndim != len(axes) or value.numel() == 0:
        raise EplbSizeError(
            f"{name} must be [{', '.join(axes)}], no axis of length 0, got shape "
            f"{tuple(value.shape)}"
        )
    return value


def find_usable(load: torch.Tensor) -> torch.Tensor:
    """Find the loads of ``[layers, n_logical]`` float32 that EPLB can use: finite, not negative."""
    return load.isfinite() & (load >= 0)


def describe_fault(name: str, load: torch.Tensor) -> str | None:
    """Describe loads ``[layers, n_logical]`` on the CPU that EPLB can't use; None if it can."""
    load = load.float()
    bad = ~find_usable(load)
    if bool(bad.any()):
        return (
            f"{name} holds {int(bad.sum())} NaN, infinite or negative loads in "
            f"{int(bad.any(1).sum())} of {len(load)} layers"
        )
    largest = float(load.sum(1, dtype=torch.float64).max())
    if largest > MAX_TOTAL_LOAD:
        return f"{name} adds up to {largest:g} in a layer, more than {MAX_TOTAL_LOAD:g}"
    return None


def check_sizes(
    n_logical: int,
    physical: tuple[str, int],
    ranks: tuple[str, int],
    groups: tuple[str, int],
    nodes: tuple[str, int],
) -> None:
    """Raise unless sizes, each with its name, allow to place the experts and their groups."""
    for name, value in (physical, ranks, groups, nodes):
        check_integer(name, value)
    if physical[1] < n_logical:
        raise EplbSizeError(
            f"{physical[0]} must be at least the number of logical experts {n_logical}, "
            f"got {physical[1]}"
        )
    for (name, value), (other, divisor) in ((physical, ranks), (ranks, nodes), (groups, nodes)):
        if value % divisor:
            raise EplbSizeError(f"{name} must be a multiple of {other} {divisor}, got {value}")
    if n_logical % groups[1]:
        raise EplbSizeError(
            f"{groups[0]} must divide the number of logical experts {n_logical}, got {groups[1]}"
        )


def check_int_map(name: str, value: object, ndim: int) -> torch.Tensor:
    """Return a tensor of integers with ``ndim`` dimensions, or raise naming ``name``."""
    value = check_tensor(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {value.dtype}")
    if value.ndim != ndim or value.numel() == 0:
        raise EplbSizeError(
            f"{name} must have {ndim} dimension(s) and not be empty, got shape {tuple(value.shape)}"
        )
    return value
