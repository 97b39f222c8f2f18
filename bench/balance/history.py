"""Cut a trace into stretches without a gap, each with a history and test batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Stretch", "find_stretches"]


@dataclass(frozen=True)
class Stretch:
    """Batches without a gap: ``[start, split)`` is history, ``[split, stop)`` is tested."""

    start: int
    split: int
    stop: int


def find_stretches(steps: npt.NDArray[np.int64], history: float | int) -> tuple[Stretch, ...]:
    """Cut a trace where batches are missing, and each part into history and test batches.

    A placement is made from the batches just before those it serves. A trace may hold several
    separate recordings (early and late in training, say); history of the first says little about
    the last, so each gets its own. A gap is a distance in steps that is negative, or over twice
    the median one.

    Parameters
    ----------
    steps
        int64 [batches].
    history
        Part in (0, 1) of the batches of each stretch, rounded down but at least one, or their
        number.

    Returns
    -------
    tuple of Stretch
        In order.

    Raises
    ------
    ValueError
        If ``history`` is out of range or leaves a stretch without test batches.
    """
    whole = isinstance(history, int)
    if history < 1 if whole else not 0 < history < 1:
        raise ValueError(
            f"history must be a part in (0, 1) or a number of batches from 1 on, got {history}"
        )
    distance = np.diff(steps)
    typical = max(1.0, float(np.median(distance))) if distance.size else 1.0
    cuts = np.flatnonzero((distance < 0) | (distance > 2 * typical)) + 1
    edges = [0, *cuts.tolist(), len(steps)]
    found = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        size = stop - start
        kept = int(history) if whole else max(1, math.floor(history * size + 1e-9))
        if kept >= size:
            raise ValueError(
                f"history must leave test batches, got {history} for the {size} batches from "
                f"step {int(steps[start])} to {int(steps[stop - 1])}"
            )
        found.append(Stretch(start, start + kept, stop))
    return tuple(found)
