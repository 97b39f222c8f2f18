"""Replay a trace through every combination of EP size, placement and redundant slots."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lplb_triton import Placement, Solution, solve
from lplb_triton.bench.balance.history import Stretch, find_stretches
from lplb_triton.bench.balance.placements import BY_HISTORY, make_placement
from lplb_triton.bench.balance.results import Cell, LayerResult
from lplb_triton.bench.balance.whole_tokens import compute_token_loads, merge_sources
from lplb_triton.solver import DEFAULT_MAX_ITERATIONS, DEFAULT_TOLERANCE
from lplb_triton.testing.instances import named_topology
from lplb_triton.traces.trace import Trace

__all__ = ["Options", "combinations", "run"]


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


class _ImpossibleError(ValueError):
    """A combination that cannot be laid out."""


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
    parts = find_stretches(trace.steps, options.history)
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
            cells.append(_replay_cell(trace, options, parts, layers, (ep, name, slots), progress))
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


def _replay_cell(
    trace: Trace,
    options: Options,
    parts: Sequence[Stretch],
    layers: Sequence[int],
    combination: tuple[int, str, int],
    progress: Callable[[], None] | None,
) -> Cell:
    ep, name, slots = combination
    # Only the sizes decide whether a placement exists, so check that before any work. Placements
    # made from the history exist wherever EPLB's does.
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
            results.append(_replay_layer(counts, layer, part, options, combination, warm_up))
        if progress is not None:
            progress()
    return Cell(ep, slots, name, tuple(results))


def _replay_layer(
    counts: torch.Tensor,
    layer: int,
    part: Stretch,
    options: Options,
    combination: tuple[int, str, int],
    warm_up: bool,
) -> LayerResult:
    ep, name, slots = combination
    history = counts[part.start : part.split].sum(1).double()
    by_source = merge_sources(counts[part.split : part.stop], ep)
    totals = by_source.sum(1)
    placement = make_placement(name, history, ep, slots)
    loads = {
        "none": make_placement("none", history, ep, 0).even_loads(totals).numpy(),
        "reordered": make_placement("eplb", history, ep, 0).even_loads(totals).numpy(),
        "even": placement.even_loads(totals).numpy(),
    }
    loads["eplb"] = loads["even"]
    if name != "eplb":
        loads["eplb"] = make_placement("eplb", history, ep, slots).even_loads(totals).numpy()
    if placement.n_copies == placement.n_logical:
        # Every expert has one copy, so that the LP has nothing to decide.
        loads["lp"] = loads["integer"] = loads["even"]
        empty = np.zeros(0, dtype=np.int64)
        return LayerResult(
            layer, part, placement, loads, loads["even"].max(1), np.zeros(0), empty, empty, 0.0
        )
    on_device = totals.to(options.device)
    if warm_up:
        _time_solve(placement, on_device, options)
    solution, seconds = _time_solve(placement, on_device, options)
    loads["lp"] = placement.rank_loads(on_device, solution).cpu().numpy()
    loads["integer"] = compute_token_loads(placement, by_source, solution).numpy()
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


def _time_solve(
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
