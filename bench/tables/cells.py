"""Format numbers for the cells of tables."""

from __future__ import annotations

import math
from typing import Any

__all__ = [
    "format_case",
    "format_at_most",
    "format_or_na",
    "format_percent",
    "format_share",
    "format_spread",
    "format_us",
]


def format_share(part: float) -> str:
    """Return a share in percent, rounded down so that only a share of 1 gives 100%."""
    return f"{math.floor(1e4 * part + 1e-9) / 100:.2f}%"


def format_us(value: float) -> str:
    """Return microseconds with one decimal."""
    return f"{value:.1f}"


def format_spread(statistics: dict[str, float]) -> tuple[str, ...]:
    """Return the cells of median, p99 and maximum."""
    return tuple(format_us(statistics[name]) for name in ("median", "p99", "max"))


def format_case(row: dict[str, Any]) -> str:
    """Return the name of a case of real traffic, such as ``256/64 chain+1``."""
    return f"{row['experts']}/{row['ep']} {row['placement']}+{row['slots']}"


def format_percent(share: float) -> str:
    """Return a share in percent, with a decimal below one percent."""
    return f"{100 * share:.1f}%" if 0 < share < 0.01 else f"{100 * share:.0f}%"


def format_at_most(traffic: dict[str, Any]) -> str:
    """Return the part of a note that names the limit on batches, empty if there is none."""
    most = traffic["most"]
    return "" if most is None else f", at most {most} of a layer, evenly spread"


def format_or_na(value: float | None, spec: str) -> str:
    """Return a number in a format, or ``n/a`` where there is none."""
    return "n/a" if value is None else format(value, spec)
