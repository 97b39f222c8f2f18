"""Measured times of expert products on one H100, and the model fitted to them."""

from __future__ import annotations

from lplb_triton.costs.gemm import GemmModel, Point, fit

__all__ = ["TABLE", "packaged", "split_rows"]

# Measured: one H100 80GB HBM3, torch 2.11, bfloat16, both grouped products of one rank with nine
# experts, microseconds. By total rows: split evenly, geometrically (1/2, 1/4, ..), all to one.
TABLE: dict[tuple[int, int], dict[int, tuple[float, float, float]]] = {
    (7168, 2048): {
        256: (332, 329, 68.0),
        1024: (330, 400, 212),
        4096: (635, 683, 548),
        16384: (2286, 2223, 2497),
    },
    (2048, 768): {
        256: (58.2, 60.0, 30.9),
        1024: (61.8, 72.7, 46.2),
        4096: (112, 115, 96.7),
        16384: (344, 321, 355),
    },
}
TABLE_EXPERTS = 9


def split_rows(total: int, experts: int) -> list[list[int]]:
    """Divide rows among experts: evenly, geometrically, all to one."""
    even = [total // experts + (i < total % experts) for i in range(experts)]
    halves = [total >> (i + 1) for i in range(experts)]
    halves[-1] += total - sum(halves)
    return [even, halves, [total] + [0] * (experts - 1)]


def packaged(hidden: int, inner: int) -> GemmModel:
    """Return the model of one H100, fitted to all of `TABLE`.

    Parameters
    ----------
    hidden, inner
        Sizes of an expert; the model is the same for all, its ``source`` says if they were
        measured.

    Returns
    -------
    GemmModel
    """
    points = [
        Point(*size, rows, time)
        for size, lines in TABLE.items()
        for total, times in lines.items()
        for rows, time in zip(split_rows(total, TABLE_EXPERTS), times, strict=True)
    ]
    source = "packaged table: one H100 80GB HBM3, torch 2.11, experts 7168x2048 and 2048x768"
    if (hidden, inner) not in TABLE:
        source += "; this size was not measured"
    return fit(points, source)
