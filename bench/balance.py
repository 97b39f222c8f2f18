"""Replay recorded expert loads through placements and the solver; no printing, no plotting.

For every combination of an EP size, a number of redundant slots and a placement, the experts are
placed by the first batches of the trace and the following ones are balanced. Five ways are
compared by their imbalance, the largest rank load over the mean rank load of a batch:

=============  =================================================================================
``none``       experts in order, as many on each rank, no replicas
``reordered``  EPLB by the history without replicas
``even``       the placement's copies, each expert's tokens split evenly over its copies
``lp``         the placement's copies, tokens split by the LP of that batch
``integer``    the same in whole tokens, as every source rank rounds its own quotas
=============  =================================================================================
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from lplb_triton import Placement, Solution, Status, chain, place, reference, solve
from lplb_triton.solver import DEFAULT_MAX_ITERATIONS, DEFAULT_TOLERANCE
from lplb_triton.testing.instances import named_topology
from lplb_triton.traces.trace import MOST_TOKENS, Trace

__all__ = [
    "BY_HISTORY",
    "VARIANTS",
    "Cell",
    "Example",
    "LayerResult",
    "Options",
    "Stretch",
    "check_tokens",
    "fold_sources",
    "imbalance",
    "integer_loads",
    "make_placement",
    "run",
    "stretches",
]

FloatArray = npt.NDArray[np.float64]

VARIANTS = ("none", "reordered", "even", "lp", "integer")
# Placements that are made for a number of slots from any history.
BY_HISTORY = ("eplb", "chain", "place")


@dataclass(frozen=True)
class Options:
    """What to compare; checked by `run`.

    Parameters
    ----------
    ep
        EP sizes.
    slots
        Redundant slots per rank.
    placements
        Names that `make_placement` knows.
    history
        Batches of each stretch that placements are made from: a part in (0, 1) or a number.
    layers
        Indices of layers; ``None`` for all.
    tolerance
        Certified relative gap asked of every LP.
    max_iterations
        Bound on interior-point iterations.
    backend
        ``"torch"``, ``"triton"`` or ``None`` for the device's own.
    device
        ``"cpu"`` or ``"cuda"``.
    """

    ep: tuple[int, ...] = (32,)
    slots: tuple[int, ...] = (1, 2)
    placements: tuple[str, ...] = ("eplb",)
    history: float | int = 0.5
    layers: tuple[int, ...] | None = None
    tolerance: float = DEFAULT_TOLERANCE
    max_iterations: int = DEFAULT_MAX_ITERATIONS
    backend: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Stretch:
    """Batches without a gap: ``[start, split)`` is history, ``[split, stop)`` is tested."""

    start: int
    split: int
    stop: int


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
        By variant, float64 [test batches, ep_size], tokens on each rank.
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
    loads: dict[str, FloatArray]
    bound: FloatArray
    gap: FloatArray
    iterations: npt.NDArray[np.int64]
    status: npt.NDArray[np.int64]
    seconds: float


@dataclass(frozen=True)
class Example:
    """The rank loads of one batch."""

    layer: int
    batch: int
    loads: dict[str, FloatArray]


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

    def imbalance(self, variant: str) -> FloatArray:
        """Imbalance of every test batch of every layer.

        Parameters
        ----------
        variant
            One of `VARIANTS`.

        Returns
        -------
        numpy.ndarray
            float64 [layers, test batches], the batches of all stretches in order.
        """
        by_layer: dict[int, list[FloatArray]] = {}
        for result in self.results:
            by_layer.setdefault(result.layer, []).append(imbalance(result.loads[variant]))
        return np.stack([np.concatenate(parts) for parts in by_layer.values()])

    def bound(self) -> FloatArray:
        """Imbalance that no split over these copies can beat, [layers, test batches] float64."""
        by_layer: dict[int, list[FloatArray]] = {}
        for result in self.results:
            mean = result.loads["even"].mean(1)
            by_layer.setdefault(result.layer, []).append(_ratio(result.bound, mean))
        return np.stack([np.concatenate(parts) for parts in by_layer.values()])

    def gap(self) -> FloatArray:
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
        layer, at = np.unravel_index(int(self.imbalance("even").argmax()), self._shape())
        layers = list(dict.fromkeys(result.layer for result in self.results))
        offset = int(at)
        for result in self.results:
            if result.layer != layers[int(layer)]:
                continue
            size = result.stretch.stop - result.stretch.split
            if offset < size:
                loads = {name: values[offset] for name, values in result.loads.items()}
                return Example(result.layer, result.stretch.split + offset, loads)
            offset -= size
        raise RuntimeError("results do not hold the batches they were indexed by")

    def _shape(self) -> tuple[int, ...]:
        return self.imbalance("even").shape


class _ImpossibleError(ValueError):
    """A combination that cannot be laid out."""


def imbalance(loads: npt.NDArray[np.floating] | npt.NDArray[np.integer]) -> FloatArray:
    """Largest over mean rank load.

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


def _ratio(largest: FloatArray, mean: FloatArray) -> FloatArray:
    ratio = np.ones_like(mean)
    np.divide(largest, mean, out=ratio, where=mean > 0)
    return ratio


def stretches(steps: npt.NDArray[np.int64], history: float | int) -> tuple[Stretch, ...]:
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


def make_placement(name: str, load: torch.Tensor, ep: int, slots: int) -> Placement:
    """Place experts by their load history.

    Parameters
    ----------
    name
        ``"none"`` (contiguous, no replicas), ``"eplb"``, ``"chain"``, ``"place"`` or a name that
        `lplb_triton.topologies.from_name` knows.
    load
        [n_logical] or [batches, n_logical], tokens of each logical expert. All but ``"place"``
        look at the sum over the batches only.
    ep
        Number of ranks; must divide ``n_logical``.
    slots
        Redundant slots per rank (``"none"`` has none).

    Returns
    -------
    Placement

    Raises
    ------
    ValueError
        If the combination is impossible; the message says which sizes don't fit.
    """
    n_logical = load.shape[-1]
    total = load.reshape(-1, n_logical).sum(0)
    if ep < 1 or n_logical % ep:
        raise ValueError(f"EP size {ep} does not divide the {n_logical} experts")
    if name == "none":
        return Placement.from_phy2log(np.arange(n_logical), ep, n_logical=n_logical)
    if name in BY_HISTORY:
        if n_logical + ep * slots > n_logical * ep:
            raise ValueError(f"{slots} redundant slots on {ep} ranks are more than copies can fill")
        if name == "place":
            return place(load, ep, redundant_per_rank=slots)
        if name == "chain":
            return chain(total, ep, redundant_per_rank=slots)
        return Placement.from_history(total, ep, redundant_per_rank=slots)
    r2o = named_topology(name)
    if ep % len(r2o):
        raise ValueError(f"{name} has groups of {len(r2o)} ranks, which do not divide EP size {ep}")
    columns = r2o.shape[1]
    if slots < columns or slots % columns:
        raise ValueError(
            f"{name} needs a positive multiple of {columns} redundant slots per rank, got {slots}"
        )
    if slots > n_logical // ep:
        raise ValueError(
            f"{name} copies at most the {n_logical // ep} experts that a rank has, "
            f"got {slots} slots"
        )
    return Placement.from_topology(r2o, n_logical + ep * slots, n_logical, ep, workload=total)


def fold_sources(counts: torch.Tensor, ep: int) -> torch.Tensor:
    """Let consecutive recorded sources share a rank where there are more of them than ranks.

    Parameters
    ----------
    counts
        int64 [batches, sources, n_logical].
    ep
        Number of ranks.

    Returns
    -------
    torch.Tensor
        int64 [batches, ep, n_logical] if ``ep`` divides the sources, else ``counts``.
    """
    batches, sources, experts = counts.shape
    if sources <= ep or sources % ep:
        return counts
    return counts.reshape(batches, ep, sources // ep, experts).sum(2)


def check_tokens(name: str, counts: torch.Tensor) -> None:
    """Refuse counts that whole-token arithmetic with shares in units of 2**-24 can't carry.

    Parameters
    ----------
    name
        Of the argument.
    counts
        Tokens, any shape.

    Raises
    ------
    TypeError
        If they are no integers.
    ValueError
        If one is outside of [0, `MOST_TOKENS`].
    """
    if not isinstance(counts, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(counts).__name__}")
    if counts.dtype.is_floating_point or counts.dtype.is_complex or counts.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {counts.dtype}")
    if counts.numel():
        least, most = (int(value) for value in counts.aminmax())
        if least < 0 or most > MOST_TOKENS:
            wrong = least if least < 0 else most
            raise ValueError(f"{name} must be in [0, {MOST_TOKENS}] (int32), got {wrong}")


def integer_loads(placement: Placement, counts: torch.Tensor, solution: Solution) -> torch.Tensor:
    """Rank loads in whole tokens when every source rank rounds its own quotas.

    Each source splits its own tokens of an expert by the cumulative shares of the expert's
    copies, with the rounding offset of its rank (docs/method.md, equations 12 and 13), exactly
    as `lplb_triton.Balancer` does.

    Parameters
    ----------
    placement
        With ``n_group`` groups of ``group_size`` ranks and ``ep_size`` ranks in all.
    counts
        int64 [batches, sources, n_logical] on the CPU, tokens that each source sends to each
        logical expert. Source s rounds as rank s.
    solution
        Of ``placement.problem(counts.sum(1))``, any device.

    Returns
    -------
    torch.Tensor
        int64 [batches, ep_size], tokens on each rank; every batch sums to its tokens.

    Raises
    ------
    TypeError, ValueError
        If ``counts`` holds anything but integers from 0 to `lplb_triton.traces.trace.MOST_TOKENS`.
    """
    check_tokens("counts", counts)
    s = placement.structure
    start, cell, index, multiplicity, slot = (
        torch.tensor(array, device="cpu")
        for array in (s.copy_start, s.copy_cell, s.copy_index, s.copy_multiplicity, s.copy_slot)
    )
    rank = slot.long() // placement.slots_per_rank
    shares = solution.shares.cpu().reshape(
        len(counts), placement.n_group, placement.group_size, placement.max_columns
    )
    loads = torch.zeros(len(counts), placement.ep_size, dtype=torch.int64, device="cpu")
    for batch, by_source in enumerate(counts):
        cumulative = reference.cumulative_shares(shares[batch], cell, index, multiplicity, start)
        for source, tokens in enumerate(by_source):
            quotas = reference.copy_quotas(tokens, cumulative, start, source)
            loads[batch].index_add_(0, rank, quotas)
    return loads


def run(
    trace: Trace, options: Options, progress: Callable[[], None] | None = None
) -> tuple[Cell, ...]:
    """Compare every combination on a trace.

    Parameters
    ----------
    trace
        Recorded counts.
    options
        What to compare. There is one `Cell` per combination; the placement ``"none"`` has no
        slots, so it counts once per EP size.
    progress
        Called once for each layer of each combination.

    Returns
    -------
    tuple of Cell
        EP sizes first, then placements, then slots. An impossible combination has a ``reason``.

    Raises
    ------
    ValueError
        If the history or a layer is out of range, or a placement's name is unknown.
    """
    parts = stretches(trace.steps, options.history)
    layers = tuple(range(trace.layers)) if options.layers is None else options.layers
    for layer in layers:
        if not 0 <= layer < trace.layers:
            raise ValueError(f"layers must be in [0, {trace.layers}), got {layer}")
    for name in options.placements:
        if name != "none" and name not in BY_HISTORY:
            named_topology(name)
    cells = []
    for ep, name, slots in combinations(options):
        try:
            cells.append(_cell(trace, options, parts, layers, (ep, name, slots), progress))
        except _ImpossibleError as error:
            cells.append(Cell(ep, slots, name, reason=str(error)))
            if progress is not None:
                for _ in layers:
                    progress()
    return tuple(cells)


def combinations(options: Options) -> tuple[tuple[int, str, int], ...]:
    """List what `run` compares, as (EP size, placement, slots per rank)."""
    return tuple(
        dict.fromkeys(
            (ep, name, 0 if name == "none" else slots)
            for ep in options.ep
            for name in options.placements
            for slots in options.slots
        )
    )


def _cell(
    trace: Trace,
    options: Options,
    parts: Sequence[Stretch],
    layers: Sequence[int],
    combination: tuple[int, str, int],
    progress: Callable[[], None] | None,
) -> Cell:
    ep, name, slots = combination
    # Sizes decide whether a placement exists, loads don't: ask before any work. What is made from
    # the history exists wherever EPLB's placement does.
    family = "eplb" if name in BY_HISTORY else name
    try:
        make_placement(family, torch.from_numpy(np.ones(trace.experts)), ep, slots)
    except ValueError as error:
        raise _ImpossibleError(str(error)) from error
    results: list[LayerResult] = []
    for layer in layers:
        counts = torch.from_numpy(trace.counts[:, layer].astype(np.int64))
        for part in parts:
            warm_up = not results
            results.append(_layer(counts, layer, part, options, combination, warm_up))
        if progress is not None:
            progress()
    return Cell(ep, slots, name, tuple(results))


def _layer(
    counts: torch.Tensor,
    layer: int,
    part: Stretch,
    options: Options,
    combination: tuple[int, str, int],
    warm_up: bool,
) -> LayerResult:
    ep, name, slots = combination
    history = counts[part.start : part.split].sum(1).double()
    by_source = fold_sources(counts[part.split : part.stop], ep)
    totals = by_source.sum(1)
    placement = make_placement(name, history, ep, slots)
    loads = {
        "none": make_placement("none", history, ep, 0).even_loads(totals).numpy(),
        "reordered": make_placement("eplb", history, ep, 0).even_loads(totals).numpy(),
        "even": placement.even_loads(totals).numpy(),
    }
    if placement.n_physical == placement.n_logical:
        # One copy each: there is nothing to choose.
        loads["lp"] = loads["integer"] = loads["even"]
        empty = np.zeros(0, dtype=np.int64)
        return LayerResult(
            layer, part, placement, loads, loads["even"].max(1), np.zeros(0), empty, empty, 0.0
        )
    on_device = totals.to(options.device)
    if warm_up:
        _timed_solve(placement, on_device, options)
    solution, seconds = _timed_solve(placement, on_device, options)
    loads["lp"] = placement.rank_loads(on_device, solution).cpu().numpy()
    loads["integer"] = integer_loads(placement, by_source, solution).numpy()
    bound = solution.lower_bound.cpu().double().reshape(len(totals), -1).amax(1)
    return LayerResult(
        layer=layer,
        stretch=part,
        placement=placement,
        loads=loads,
        bound=bound.numpy(),
        gap=solution.gap.cpu().double().numpy(),
        iterations=solution.iterations.cpu().long().numpy(),
        status=solution.status.cpu().long().numpy(),
        seconds=seconds,
    )


def _timed_solve(
    placement: Placement, totals: torch.Tensor, options: Options
) -> tuple[Solution, float]:
    problem = placement.problem(totals)
    if totals.is_cuda:
        torch.cuda.synchronize(totals.device)
    begin = time.perf_counter()
    solution = solve(
        problem,
        tolerance=options.tolerance,
        max_iterations=options.max_iterations,
        backend=options.backend,
    )
    if totals.is_cuda:
        torch.cuda.synchronize(totals.device)
    return solution, time.perf_counter() - begin
