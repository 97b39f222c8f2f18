"""Model the time of one rank's expert products with four fitted parameters.

torch's grouped product for Hopper GPUs works on tiles of the output, each computed by a pair of
SMs; all pairs together compute one *wave* of tiles, and a last wave costs as much when it isn't
full. With ``waves`` from the rows of every expert, padded to whole tiles, a rank takes

    base + for both products: norm(waves * depth * step, weights of active experts / bandwidth)
         + activations / bandwidth

where ``depth`` is the length of the sum (``hidden``, then ``inner``) and ``norm(a, b)`` is
``(a^4 + b^4)^(1/4)``, the larger of the two, and somewhat more where they are close. Tiles are
256 x 256, or 128 x 128 if the rank's experts have 128 rows or fewer on average; each has a
``step``. The four parameters are fitted to times measured on this machine's GPU, or to
the table in `lplb_triton.bench.advise.table`, which gives `PACKAGED`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BYTES",
    "FEW_ROWS",
    "NARROW",
    "PACKAGED",
    "PAIRS",
    "WIDE",
    "GemmModel",
    "Point",
    "fit",
    "slope_by_tile",
    "tabulate",
    "time_by_row",
]

Floats = NDArray[np.float64]
# Bytes of a weight.
BYTES = 2

# Of torch's kernels: average rows of a rank's experts up to which tiles are narrow, and the sides
# of a pair's tile.
FEW_ROWS, NARROW, WIDE = 128, 128, 256
# Pairs of SMs of an H100.
PAIRS = 66
NORM = 4
# Values of width inner that the activation moves for a row: silu reads and writes, the product
# reads two and writes.
MOVED = 5


class Point(NamedTuple):
    """A measured time: microseconds of a rank whose experts have ``rows``."""

    hidden: int
    inner: int
    rows: list[int]
    us: float


class _Work(NamedTuple):
    """Work of ranks: ``[...]``, and ``[..., 2]`` for the two products."""

    narrow: NDArray[np.bool_]
    depth: Floats  # of the sums, times waves
    read: Floats  # bytes of weights
    moved: Floats  # bytes of the activation


def _count_work(hidden: int, inner: int, rows: Floats, pairs: int, few_rows: int) -> _Work:
    """Count the work of ranks whose experts have ``rows``."""
    total = rows.sum(-1)
    narrow = total // rows.shape[-1] <= few_rows
    side = np.where(narrow, NARROW, WIDE)
    tiles = np.ceil(rows / side[..., None]).sum(-1)
    depth, read = [], []
    for length, columns in ((hidden, 2 * inner), (inner, hidden)):
        depth.append(np.ceil(tiles * np.ceil(columns / side) / pairs) * length)
        read.append((rows > 0).sum(-1) * float(BYTES * length * columns))
    return _Work(narrow, np.stack(depth, -1), np.stack(read, -1), total * (MOVED * BYTES * inner))


@dataclass(frozen=True)
class GemmModel:
    """Time of one rank's expert products; see the head of this file.

    Attributes
    ----------
    base
        Microseconds.
    bandwidth
        Bytes a microsecond.
    narrow, wide
        Nanoseconds that a wave of tiles of 128 x 128 or 256 x 256 takes for a step of the sum.
    error, worst
        Of the fit: root mean square and largest relative difference from measured times.
    source
        What it was fitted to.
    pairs
        Of SMs.
    few_rows
        Average rows of a rank's experts up to which tiles are narrow.
    """

    base: float
    bandwidth: float
    narrow: float
    wide: float
    error: float
    worst: float
    source: str
    pairs: int = PAIRS
    few_rows: int = FEW_ROWS

    def __call__(self, hidden: int, inner: int, rows: Floats) -> Floats:
        """Microseconds of ranks whose experts have ``rows`` ``[..., experts]`` tokens."""
        times = self._times(_count_work(hidden, inner, rows, self.pairs, self.few_rows))
        return np.where(rows.sum(-1) > 0, times, 0.0)

    def _times(self, work: _Work) -> Floats:
        compute = work.depth * np.where(work.narrow, self.narrow, self.wide)[..., None] / 1e3
        products = (compute**NORM + (work.read / self.bandwidth) ** NORM) ** (1 / NORM)
        times: Floats = self.base + products.sum(-1) + work.moved / self.bandwidth
        return times


def fit(
    points: Sequence[Point], source: str, pairs: int = PAIRS, few_rows: int = FEW_ROWS
) -> GemmModel:
    """Fit a model to measured times, by the logarithm of their quotient.

    Parameters
    ----------
    points
        Measured; sizes of experts may differ.
    source
        Kept in the model.
    pairs
        Pairs of SMs.
    few_rows
        Average rows of a rank's experts up to which tiles are narrow.

    Returns
    -------
    GemmModel
    """
    from scipy.optimize import minimize  # slow to import, needed here only

    each = [
        _count_work(p.hidden, p.inner, np.array(p.rows, dtype=np.float64), pairs, few_rows)
        for p in points
    ]
    work = _Work(*(np.stack(part) for part in zip(*each, strict=True)))
    measured = np.array([p.us for p in points])

    def model(logs: Floats, error: float = 0.0, worst: float = 0.0) -> GemmModel:
        base, bandwidth, narrow, wide = (float(v) for v in np.exp(logs))
        return GemmModel(base, bandwidth, narrow, wide, error, worst, source, pairs, few_rows)

    def cost(logs: Floats) -> float:
        return float((np.log(model(logs)._times(work) / measured) ** 2).sum())

    # Starts around the speed of the fastest measurements.
    step = 1e3 * measured / work.depth.sum(-1)
    least = float(step.min())
    narrow, wide = (float(step[k].min()) if k.any() else least for k in (work.narrow, ~work.narrow))
    best = min(
        (
            minimize(
                cost,
                np.log([part * measured.min(), (work.read.sum(-1) / measured).max(), narrow, wide]),
                method="Nelder-Mead",
                options={"maxiter": 4000, "maxfev": 4000, "xatol": 1e-4, "fatol": 1e-8},
            )
            for part in (0.1, 0.5)
        ),
        key=lambda found: float(found.fun),
    )
    off = np.abs(model(best.x)._times(work) / measured - 1)
    return model(best.x, float(np.sqrt((off**2).mean())), float(off.max()))


def tabulate(
    model: GemmModel, hidden: int, inner: int, most_active: int, tiles: int, smooth: float = 0.0
) -> Floats:
    """Tabulate a rank's time without the part by row, by its active experts and its tiles.

    Parameters
    ----------
    model
        Times.
    hidden, inner
        Sizes of an expert.
    most_active
        The most active experts, A.
    tiles
        Entries by tiles: 0 to ``tiles - 1``.
    smooth
        Part of every wave that counts in proportion to its tiles, as if waves had no steps.

    Returns
    -------
    numpy.ndarray
        ``[2, A + 1, tiles]`` microseconds, of narrow and of wide tiles; 0 without active experts.
    """
    active = np.arange(most_active + 1)[:, None]
    count = np.arange(tiles)[None, :]
    found = np.zeros((2, most_active + 1, tiles))
    for size, (side, step) in enumerate(((NARROW, model.narrow), (WIDE, model.wide))):
        total = np.full((most_active + 1, tiles), model.base)
        for length, columns in ((hidden, 2 * inner), (inner, hidden)):
            exact = count * np.ceil(columns / side) / model.pairs
            waves = (1 - smooth) * np.ceil(exact) + smooth * np.maximum(exact, 1)
            compute = waves * length * step / 1e3
            read = active * float(BYTES * length * columns) / model.bandwidth
            total += (compute**NORM + read**NORM) ** (1 / NORM)
        found[size] = np.where(active > 0, total, 0.0)
    return found


def slope_by_tile(model: GemmModel, hidden: int, inner: int) -> tuple[float, float]:
    """Return the microseconds that a further tile takes, narrow or wide, where there are many."""
    slopes = [
        sum(
            float(np.ceil(columns / side)) / model.pairs * length * step / 1e3
            for length, columns in ((hidden, 2 * inner), (inner, hidden))
        )
        for side, step in ((NARROW, model.narrow), (WIDE, model.wide))
    ]
    return slopes[0], slopes[1]


def time_by_row(model: GemmModel, inner: int) -> float:
    """Return the microseconds that the activation takes for a row."""
    return MOVED * BYTES * inner / model.bandwidth


# One H100 80GB HBM3, torch 2.11: what `lplb_triton.bench.advise.table` fits to its times.
PACKAGED = GemmModel(
    base=20.854535188683975,
    bandwidth=2622901.829458555,
    narrow=4.126979826669328,
    wide=12.298492934924834,
    error=0.067,
    worst=0.17,
    source="packaged table: one H100 80GB HBM3, torch 2.11, experts 7168x2048 and 2048x768",
)
