"""The time of a rank by its active experts, tiles and rows: the cost of ``objective="time"``.

Equation numbers refer to docs/method.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lplb_triton._checks import check_integer, check_number
from lplb_triton.costs.files import CostFile
from lplb_triton.costs.gemm import (
    FEW_ROWS,
    NARROW,
    PACKAGED,
    PAIRS,
    WIDE,
    GemmModel,
    Point,
    fit,
    slope_by_tile,
    tabulate,
    time_by_row,
)
from lplb_triton.sync._base import message_version

__all__ = ["MOST_ACTIVE", "TILES", "TimeCost"]

Floats = NDArray[np.float32]

# Active experts and tiles of the tables that are made of a model.
MOST_ACTIVE, TILES = 64, 256
# Part of every wave without steps in the smoothed table.
SMOOTHED = 0.5
# Tables of a model are rounded to one part in so many of a microsecond.
GRID = 1024
# The largest side of a tile, the most entries of a table by tiles, and the most active experts.
MOST_SIDE, MOST_TILES, MOST_EXPERTS = 1 << 12, 1 << 12, 1 << 10
# The most average rows from which tiles are wide: kernels count those of two ranks in int32.
MOST_WIDE_FROM = 1 << 20
# The most microseconds of a tile or of a row.
MOST_US = 1e9
# Average rows of a rank's experts at which `TimeCost.fit` looks for the change of tiles.
THRESHOLDS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, eq=False)
class TimeCost(CostFile):
    """Time of one rank's expert products, for ``Balancer(objective="time")`` (equation 28).

    A rank with A active experts, n tiles and R rows takes ``table[size, A, n] + per_row * R``
    microseconds, where *size* is 1, for wide tiles, if its slots have ``wide_from`` rows or more
    on average, and else 0. Above the table every tile adds ``slopes[size]``.

    Parameters
    ----------
    table : array_like
        ``[2, A + 1, T]``, stored as float32: microseconds with narrow and with wide tiles, by
        active experts 0 to A and tiles 0 to T - 1. It may nowhere fall along the last two axes;
        row 0 is taken as 0.
    slopes : tuple of float
        Microseconds of a further tile, narrow and wide, up to 1e9.
    per_row : float
        Microseconds of a row, up to 1e9.
    sides : tuple of int
        Rows of a narrow and of a wide tile, powers of two from 2 to 4096.
    wide_from : int
        Average rows of a rank's slots, rounded down, from which tiles are wide; up to 2**20.
    smoothed : array_like or None
        As ``table``, with steps only half as high: plans are compared by it, so that little is
        lost where the steps lie elsewhere. By default the table itself.
    source : str
        Text that says where the numbers come from.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that doesn't fit.

    Examples
    --------
    >>> cost = TimeCost.for_model(7168, 2048)
    >>> times = cost.predict([[16, 0, 0], [6, 5, 5]])
    >>> bool(times[0] < times[1])
    True
    """

    table: Any
    slopes: tuple[float, float]
    per_row: float
    sides: tuple[int, int] = (NARROW, WIDE)
    wide_from: int = FEW_ROWS + 1
    smoothed: Any = None
    source: str = field(default="")

    def __post_init__(self) -> None:
        """Check all fields, and make the tables arrays of our own."""
        table = _check_table("table", self.table)
        smoothed = table if self.smoothed is None else _check_table("smoothed", self.smoothed)
        if smoothed.shape != table.shape:
            raise ValueError(f"smoothed must have the shape {table.shape}, got {smoothed.shape}")
        for name in ("slopes", "sides"):
            pair = getattr(self, name)
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise ValueError(f"{name} must be a pair, of narrow and wide tiles, got {pair!r}")
        slopes = tuple(check_number("slopes", value, MOST_US) for value in self.slopes)
        sides = tuple(check_integer("sides", side, 2) for side in self.sides)
        for side in sides:
            if side & (side - 1) or side > MOST_SIDE:
                raise ValueError(f"sides must be powers of two up to {MOST_SIDE}, got {side}")
        if not isinstance(self.source, str):
            raise TypeError(f"source must be a str, got {type(self.source).__name__}")
        wide_from = check_integer("wide_from", self.wide_from)
        if wide_from > MOST_WIDE_FROM:
            raise ValueError(f"wide_from must be at most {MOST_WIDE_FROM}, got {wide_from}")
        checked = {
            "table": table, "smoothed": smoothed, "slopes": slopes, "sides": sides,
            "per_row": check_number("per_row", self.per_row, MOST_US), "wide_from": wide_from,
        }  # fmt: skip
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy's fields, whose tables are read-only too."""
        self.__dict__.update(state)
        for table in (self.table, self.smoothed):
            table.setflags(write=False)

    @classmethod
    def for_model(
        cls,
        hidden: int,
        inner: int,
        *,
        most_active: int = MOST_ACTIVE,
        model: GemmModel | None = None,
    ) -> TimeCost:
        """Make the cost of experts of these sizes, by default from the packaged times of one H100.

        Parameters
        ----------
        hidden, inner : int
            Width of the model, and inner width of an expert.
        most_active : int
            The most experts of a rank: at least the slots of a rank.
        model : lplb_triton.costs.gemm.GemmModel or None
            Fitted times.

        Returns
        -------
        TimeCost

        Raises
        ------
        TypeError, ValueError
            Naming the argument that doesn't fit.
        """
        check_integer("hidden", hidden)
        check_integer("inner", inner)
        check_integer("most_active", most_active)
        model = PACKAGED if model is None else model
        if not isinstance(model, GemmModel):
            raise TypeError(f"model must be a GemmModel, got {type(model).__name__}")
        sizes = hidden, inner, most_active, TILES
        # Powers may differ in the last bits from machine to machine, and tables must not.
        table, smoothed = (
            np.round(tabulate(model, *sizes, smooth=part) * GRID) / GRID for part in (0.0, SMOOTHED)
        )
        return cls(
            table,
            slope_by_tile(model, hidden, inner),
            time_by_row(model, inner),
            wide_from=model.few_rows + 1,
            smoothed=smoothed,
            source=f"experts {hidden}x{inner}; {model.source}",
        )

    @classmethod
    def fit(
        cls,
        points: Sequence[Point],
        *,
        most_active: int = MOST_ACTIVE,
        source: str = "measured",
        pairs: int = PAIRS,
    ) -> TimeCost:
        """Fit a cost to measured times of a rank's two grouped products.

        The model is that of `lplb_triton.costs.gemm`. The average rows from which tiles are wide
        are those, of a few, that fit best.

        Parameters
        ----------
        points : sequence of Point
            ``(hidden, inner, rows, us)`` each, of one size: rows of every expert of a rank, and
            the time in microseconds.
        most_active
            As for `for_model`.
        source : str
            Kept in the cost.
        pairs : int
            Pairs of SMs of the GPU.

        Returns
        -------
        TimeCost

        Raises
        ------
        ValueError
            If there are fewer than eight times, sizes differ, or something isn't positive.
        """
        points = [Point(*point) for point in points]
        if len(points) < 8:
            raise ValueError(f"points must be eight or more, got {len(points)}")
        sizes = {(p.hidden, p.inner, len(p.rows)) for p in points}
        if len(sizes) > 1:
            raise ValueError(f"points must be of one size and number of experts, got {sizes}")
        if not all(0 < p.us < np.inf and sum(p.rows) > 0 and min(p.rows) >= 0 for p in points):
            raise ValueError("points must have positive times, and rows")
        models = [fit(points, source, pairs, few_rows) for few_rows in THRESHOLDS]
        best = min(models, key=lambda model: (model.error, abs(model.few_rows - FEW_ROWS)))
        return cls.for_model(points[0].hidden, points[0].inner, most_active=most_active, model=best)

    @property
    def most_active(self) -> int:
        """The most active experts of a rank that the table has."""
        return int(self.table.shape[1]) - 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all numbers, in hexadecimal; the source doesn't matter."""
        numbers = np.array([*self.slopes, self.per_row], dtype=np.float32)
        sizes = np.array([*self.sides, self.wide_from, *self.table.shape], dtype=np.int64)
        parts = (sizes, numbers, self.table, self.smoothed)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    @property
    def checksum(self) -> int:
        """Checksum of all numbers as int32, which ranks compare with every batch."""
        return message_version(self.digest.encode())

    def __eq__(self, other: object) -> bool:
        """Whether all numbers are the same."""
        if not isinstance(other, TimeCost):
            return NotImplemented
        return self.digest == other.digest

    def __hash__(self) -> int:
        """Agree with `__eq__`."""
        return hash(self.digest)

    def __repr__(self) -> str:
        """Write source and sizes in one line."""
        return (
            f"TimeCost({self.source!r}, up to {self.most_active} experts a rank, "
            f"tiles of {self.sides[0]} and from {self.wide_from} rows on {self.sides[1]})"
        )

    def predict(self, rows: ArrayLike, *, smoothed: bool = False) -> Floats:
        """Predict the time of ranks from the rows of their slots.

        Parameters
        ----------
        rows : array_like
            ``[..., slots]`` int, rows of every slot of a rank, empty ones too.
        smoothed : bool
            Whether to predict with steps half as high, which is how plans are compared.

        Returns
        -------
        numpy.ndarray
            ``[...]`` float32 microseconds, 0 for a rank without rows.

        Raises
        ------
        ValueError
            If rows are negative, or more slots have some than the table has.
        """
        x = np.asarray(rows)
        if x.ndim < 1 or x.dtype.kind not in "iu" or (x < 0).any():
            raise ValueError("rows must be whole numbers of 0 or more, [..., slots]")
        active = (x > 0).sum(-1)
        if active.max(initial=0) > self.most_active:
            raise ValueError(
                f"rows must be in at most {self.most_active} slots of a rank, got {active.max()}"
            )
        tiles = [(-(-x.astype(np.int64) // side)).sum(-1) for side in self.sides]
        return self.evaluate(active, tiles[0], tiles[1], x.sum(-1), x.shape[-1], smoothed)

    def evaluate(
        self,
        active: NDArray[Any],
        narrow: NDArray[Any],
        wide: NDArray[Any],
        rows: NDArray[Any],
        n_slots: int,
        smoothed: bool = False,
    ) -> Floats:
        """Evaluate the cost of ranks in float32, in the kernel's order (equation 28).

        ``active``, ``narrow``, ``wide`` (tiles of both sizes) and ``rows`` are integer arrays of
        one shape, of ranks with ``n_slots`` slots.
        """
        table = self.smoothed if smoothed else self.table
        size = (rows >= self.wide_from * n_slots).astype(np.int64)
        tiles = np.where(size > 0, wide, narrow)
        over = np.maximum(tiles - (table.shape[2] - 1), 0)
        by_row = rows.astype(np.float32) * np.float32(self.per_row)
        by_tile = over.astype(np.float32) * np.array(self.slopes, dtype=np.float32)[size]
        times: Floats = (table[size, active, tiles - over] + by_row) + by_tile
        return times


def _check_table(name: str, values: object) -> Floats:
    """Return a read-only float32 copy of a table, or raise naming it."""
    try:
        table = np.array(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from error
    if table.ndim != 3 or len(table) != 2 or min(table.shape[1:]) < 2:
        raise ValueError(
            f"{name} must be [2, experts + 1, tiles] with two of each or more, got {table.shape}"
        )
    if table.shape[1] > MOST_EXPERTS or table.shape[2] > MOST_TILES:
        raise ValueError(
            f"{name} must have fewer than {MOST_EXPERTS} experts and at most {MOST_TILES} tiles, "
            f"got {table.shape}"
        )
    table[:, 0] = 0.0
    if not np.isfinite(table).all() or (table < 0).any():
        raise ValueError(f"{name} must hold finite times of 0 or more")
    if (np.diff(table, axis=1) < 0).any() or (np.diff(table, axis=2) < 0).any():
        raise ValueError(f"{name} must not fall with more experts or more tiles")
    table.setflags(write=False)
    return table
