"""Checks of numbers, names and devices."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch

__all__ = [
    "MAX_TIMEOUT",
    "check_choice",
    "check_integer",
    "check_max_iterations",
    "check_number",
    "check_timeout",
    "check_tolerance",
    "nearest_divisors",
    "nearest_multiples",
    "on_host",
    "require_int",
    "resolve_device",
    "would_do",
]

# The largest ``max_iterations``: it bounds the time that a kernel can take.
MOST_ITERATIONS = 10_000
# The longest time-out in seconds: kernels count milliseconds in int32.
MAX_TIMEOUT = 2_000_000.0


def require_int(name: str, value: object) -> int:
    """Return an integer, NumPy's included, as an int; raise a TypeError naming ``name`` else."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return int(value)


def check_integer(name: str, value: object, minimum: int = 1) -> int:
    """Return an int of at least ``minimum``, or raise naming ``name``."""
    number = require_int(name, value)
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def check_flag(name: str, value: object) -> bool:
    """Return a bool, or raise naming the argument."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def check_number(name: str, value: object, most: float = sys.float_info.max) -> float:
    """Return a float from 0 to ``most``, or raise naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 <= value <= most:
        raise ValueError(f"{name} must be in [0, {most:g}], got {value}")
    return float(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise a ValueError naming ``name`` unless the value is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_tolerance(tolerance: float, minimum: float) -> float:
    """Return ``tolerance`` as a float, or raise a ValueError that names it."""
    value = float(tolerance)
    if not (minimum <= value < 1.0) or math.isnan(value):
        raise ValueError(f"tolerance must be in [{minimum:g}, 1), got {tolerance!r}")
    return value


def check_max_iterations(max_iterations: int) -> int:
    """Return ``max_iterations``, or raise a ValueError that names it."""
    if not isinstance(max_iterations, int) or not 1 <= max_iterations <= MOST_ITERATIONS:
        raise ValueError(
            f"max_iterations must be an int in [1, {MOST_ITERATIONS}], got {max_iterations!r}"
        )
    return max_iterations


def check_timeout(timeout: object) -> float:
    """Return seconds as a float, or raise naming ``timeout``."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds, got {timeout!r}")
    if not 0 < timeout <= MAX_TIMEOUT:
        raise ValueError(f"timeout must be in (0, {MAX_TIMEOUT:g}] seconds, got {timeout!r}")
    return float(timeout)


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
    """Return the divisors of a number next to the one wanted, below and above it."""
    wanted = min(wanted, number)
    below = next(n for n in range(wanted, 0, -1) if number % n == 0)
    above = next(n for n in range(wanted, number + 1) if number % n == 0)
    return [below, above]


def nearest_multiples(step: int, wanted: int, minimum: int = 1) -> list[int]:
    """Return the multiples of ``step`` next to the one wanted, none of them below ``minimum``."""
    least = -(-minimum // step)
    return [step * max(least, wanted // step), step * max(least, -(-wanted // step))]


def would_do(sizes: list[int]) -> str:
    """Return the end of a message that says which sizes work; empty if there are none."""
    listed = " and ".join(map(str, sorted(set(sizes))))
    return f"; {listed} would do" if listed else ""
