"""Checks of arguments; every message begins with the argument's name."""

from __future__ import annotations

import numpy as np
import torch

__all__ = [
    "check_integer",
    "nearest_divisors",
    "nearest_multiples",
    "on_host",
    "resolve_device",
    "would_do",
]


def check_integer(name: str, value: object, minimum: int = 1) -> int:
    """Return an int of at least ``minimum``, or raise naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def resolve_device(device: torch.device | str | None) -> torch.device:
    """Return a GPU with its index, or the CPU; by default the current GPU, if there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"device must be a CUDA/ROCm GPU or the CPU, got {device}")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def on_host(name: str, value: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values on the CPU, or raise naming ``name`` if it has none."""
    if value.device.type == "meta":
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")
    return value.detach().cpu()


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """Divisors of a number that are nearest to the one wanted, below and above it."""
    wanted = min(wanted, number)
    below = next(n for n in range(wanted, 0, -1) if number % n == 0)
    above = next(n for n in range(wanted, number + 1) if number % n == 0)
    return [below, above]


def nearest_multiples(step: int, wanted: int, minimum: int = 1) -> list[int]:
    """Multiples of a number that are nearest to the one wanted, from a minimum on."""
    least = -(-minimum // step)
    return [step * max(least, wanted // step), step * max(least, -(-wanted // step))]


def would_do(sizes: list[int]) -> str:
    """Say at the end of a message which sizes work, if there are any."""
    listed = " and ".join(map(str, sorted(set(sizes))))
    return f"; {listed} would do" if listed else ""
