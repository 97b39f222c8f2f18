"""Fit the cost of ``objective="time"`` to times of this machine's GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lplb_triton import TimeCost
from lplb_triton.bench.advise.table import split_rows
from lplb_triton.costs.gemm import PAIRS, Point

__all__ = ["calibrate", "list_rows"]

# Average rows of a rank's experts that are measured, on both sides of every change of tiles that
# `TimeCost.fit` looks for.
AVERAGES = (1, 8, 14, 24, 48, 80, 112, 160, 224, 320, 448, 640, 1024, 2048)


def list_rows(slots: int) -> list[list[int]]:
    """List the rows of every expert that are measured, for a rank with ``slots`` experts."""
    return [rows for average in AVERAGES for rows in split_rows(average * slots, slots)]


def calibrate(
    hidden: int,
    inner: int,
    slots: int,
    time_rows: Callable[[Sequence[int]], float],
    source: str,
    pairs: int = PAIRS,
) -> tuple[TimeCost, list[Point], list[float]]:
    """Measure a rank's products and fit a cost to them.

    Parameters
    ----------
    hidden, inner
        Sizes of an expert.
    slots
        Experts of a rank.
    time_rows
        Returns the microseconds of a rank whose experts have so many rows.
    source
        Kept in the cost.
    pairs
        Pairs of SMs of the GPU.

    Returns
    -------
    tuple of TimeCost, list of Point, list of float
        The cost, the measured times, and its predictions of them, microseconds.
    """
    points = [Point(hidden, inner, rows, time_rows(rows)) for rows in list_rows(slots)]
    cost = TimeCost.fit(points, most_active=slots, source=source, pairs=pairs)
    return cost, points, cost.predict(np.array([point.rows for point in points])).tolist()
