"""Results of a comparison, and the figures computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lplb_triton import Placement, Status
from lplb_triton.bench.balance.history import Stretch
from lplb_triton.bench.types import Floats

__all__ = ["VARIANTS", "Cell", "Example", "LayerResult", "find_typical", "imbalance"]

VARIANTS = ("none", "reordered", "even", "lp", "integer")


@dataclass(frozen=True)
class LayerResult:
    """One layer over the test batches of one stretch.

    Attributes
    ----------
    layer
        Index in the trace.
    stretch
        Which batches.
    placement
        Made from the history of the stretch.
    loads
        By variant, and ``"eplb"`` for EPLB with as many slots whose copies share evenly, float64
        [test batches, ep_size], tokens on each rank.
    bound
        float64 [test batches], load of the most loaded rank that no split over these copies can
        beat.
    gap, iterations, status
        Of each LP, [test batches * groups]; empty where there are no replicas.
    seconds
        Wall time of the one call that solved them all, after a warm-up.
    """

    layer: int
    stretch: Stretch
    placement: Placement
    loads: dict[str, Floats]
    bound: Floats
    gap: Floats
    iterations: npt.NDArray[np.int64]
    status: npt.NDArray[np.int64]
    seconds: float


@dataclass(frozen=True)
class Example:
    """The rank loads of one batch."""

    layer: int
    batch: int
    loads: dict[str, Floats]


@dataclass(frozen=True)
class Cell:
    """One combination of EP size, slots and placement.

    Attributes
    ----------
    ep, slots, placement
        The combination; ``slots`` is 0 for the placement ``"none"``.
    results
        One entry for each stretch of each layer, layers first; empty if not applicable.
    reason
        Why the combination is impossible, or ``None``.
    """

    ep: int
    slots: int
    placement: str
    results: tuple[LayerResult, ...] = field(default=(), repr=False)
    reason: str | None = None

    def imbalance(self, variant: str) -> Floats:
        """Imbalance of every test batch of every layer.

        Parameters
        ----------
        variant
            One of `VARIANTS`, or ``"eplb"``.

        Returns
        -------
        numpy.ndarray
            float64 [layers, test batches], the batches of all stretches in order.
        """
        by_layer: dict[int, list[Floats]] = {}
        for result in self.results:
            by_layer.setdefault(result.layer, []).append(imbalance(result.loads[variant]))
        return np.stack([np.concatenate(parts) for parts in by_layer.values()])

    def bound(self) -> Floats:
        """Imbalance that no split over these copies can beat, [layers, test batches] float64."""
        by_layer: dict[int, list[Floats]] = {}
        for result in self.results:
            mean = result.loads["even"].mean(1)
            by_layer.setdefault(result.layer, []).append(_ratio(result.bound, mean))
        return np.stack([np.concatenate(parts) for parts in by_layer.values()])

    def gap(self) -> Floats:
        """Certified relative gaps of all LPs, float64."""
        return np.concatenate([result.gap for result in self.results])

    def iterations(self) -> npt.NDArray[np.int64]:
        """Interior-point iterations of all LPs."""
        return np.concatenate([result.iterations for result in self.results])

    def status(self) -> npt.NDArray[np.int64]:
        """`lplb_triton.Status` of all LPs."""
        return np.concatenate([result.status for result in self.results])

    @property
    def all_certified(self) -> bool:
        """Whether every LP reached the tolerance (true also where there is none)."""
        return self.reason is not None or bool((self.status() == Status.CERTIFIED).all())

    def microseconds(self) -> float | None:
        """Median over the solve calls of wall time per LP in microseconds; None without LPs."""
        times = [1e6 * r.seconds / len(r.gap) for r in self.results if len(r.gap)]
        return float(np.median(times)) if times else None

    def worst(self) -> Example:
        """Return the test batch that an even split leaves the most imbalanced."""
        values = self.imbalance("even")
        return self.example_at(int(values.argmax()))

    def typical(self) -> Example:
        """Return the test batch whose gain of the LP over EPLB is the median of all."""
        return find_typical([self])[0]

    def example_at(self, at: int) -> Example:
        """Return the rank loads of one place of `imbalance`, flattened."""
        number, offset = divmod(at, self.imbalance("even").shape[1])
        layer = list(dict.fromkeys(result.layer for result in self.results))[number]
        for result in self.results:
            if result.layer != layer:
                continue
            size = result.stretch.stop - result.stretch.split
            if offset < size:
                loads = {name: values[offset] for name, values in result.loads.items()}
                return Example(result.layer, result.stretch.split + offset, loads)
            offset -= size
        raise RuntimeError("results do not hold the batches they were indexed by")


def find_typical(cells: Sequence[Cell]) -> list[Example]:
    """Return one test batch under each cell: the one whose mean gain over EPLB is the median.

    Parameters
    ----------
    cells
        Results on the same batches and layers of one trace, none of them impossible.

    Returns
    -------
    list of Example
        The same layer and batch for each cell.
    """
    gain = np.mean([cell.imbalance("eplb") - cell.imbalance("integer") for cell in cells], axis=0)
    order = gain.flatten().argsort(kind="stable")
    return [cell.example_at(int(order[len(order) // 2])) for cell in cells]


def imbalance(loads: npt.NDArray[np.floating] | npt.NDArray[np.integer]) -> Floats:
    """Compute the largest over the mean rank load.

    Parameters
    ----------
    loads
        [batches, ranks].

    Returns
    -------
    numpy.ndarray
        float64 [batches]; 1 for a batch without tokens.
    """
    mean = loads.mean(axis=1, dtype=np.float64)
    largest = loads.max(axis=1).astype(np.float64)
    return _ratio(largest, mean)


def _ratio(largest: Floats, mean: Floats) -> Floats:
    ratio = np.ones_like(mean)
    np.divide(largest, mean, out=ratio, where=mean > 0)
    return ratio
