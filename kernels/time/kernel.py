"""The plan of a batch by time, on top of the token plan: one program for each group.

Equation numbers refer to docs/method.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.lanes import number_ranks
from lplb_triton.kernels.pdl import await_previous, start_dependents
from lplb_triton.kernels.time.cost import find_times
from lplb_triton.kernels.time.moves import count_ranks, improve_cells
from lplb_triton.kernels.time.starts import load_cells, write_closed, write_shares, write_starts

CANDIDATES = tl.constexpr(_layout.TIME_CANDIDATES)
JUDGED = tl.constexpr(_layout.TIME_JUDGED)
PLANS = tl.constexpr(_layout.TIME_PLANS)
REPORTED = tl.constexpr(_layout.TIME_REPORTED)
N_FIELDS = tl.constexpr(_layout.N_TIME_FIELDS)
N_EXTENTS = tl.constexpr(_layout.N_TIME_EXTENTS)
N_STEPS = tl.constexpr(int(_layout.TimeExtent.N_STEPS))
MOST_CELLS = tl.constexpr(int(_layout.TimeExtent.MOST_CELLS))
MULTIPLICITY = tl.constexpr(int(_layout.TimeExtent.MULTIPLICITY))
INVALID = tl.constexpr(_layout.STATUS_INVALID)
# No plan is taken whose time is above this many times the least of the plans judged as they are.
MOST_SLOWER = tl.constexpr(1.01)
# Candidates before this one are improved by the smoothed table, and go through classes backward.
N_SMOOTHED = tl.constexpr(2)


@triton.jit
def _find_slowest(
    active, narrow, wide, total, table, slopes, wide_rows, n_ranks, SLICES: tl.constexpr,
    LANES: tl.constexpr, ACTIVE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Return the time of the slowest rank of every candidate, [CANDIDATES]."""
    slowest = tl.zeros((CANDIDATES, LANES), tl.float32)
    for h in tl.static_range(SLICES):
        t = find_times(
            active[h], narrow[h], wide[h], total[h], table, slopes, wide_rows, CANDIDATES, LANES,
            ACTIVE, TILES,
        )  # fmt: skip
        inside = number_ranks(h, LANES, CANDIDATES) < n_ranks
        slowest = tl.maximum(slowest, tl.where(inside, t, 0.0))
    return tl.max(slowest, 1)


@triton.jit
def _pick(values, k, chosen):
    """Return the value of candidate ``chosen``."""
    return tl.sum(tl.where(k == chosen, values, 0.0), 0)


@triton.jit
def _choose(before, before_exact, after, after_exact):
    """Choose the plan with the smallest smoothed time, the first of equal ones (equation 31).

    Plans whose exact time is too far above that of simple ones are left out. Returns the number of
    the plan, and the times of the token plan and of this one, exact and smoothed.
    """
    k = tl.arange(0, CANDIDATES)
    limit = tl.min(tl.where(k < JUDGED, before_exact, float("inf")), 0) * MOST_SLOWER
    judged = tl.where((k < JUDGED) & (before_exact <= limit), before, float("inf"))
    improved = tl.where(after_exact <= limit, after, float("inf"))
    best_before, best_after = tl.min(judged, 0), tl.min(improved, 0)
    from_before = tl.min(tl.where(judged == best_before, k, CANDIDATES), 0)
    from_after = tl.min(tl.where(improved == best_after, k, CANDIDATES), 0)
    as_it_was = best_before <= best_after
    choice = tl.where(as_it_was, from_before, from_after + JUDGED)
    exact = tl.where(
        as_it_was, _pick(before_exact, k, from_before), _pick(after_exact, k, from_after)
    )
    smoothed = tl.where(as_it_was, best_before, best_after)
    return choice, _pick(before_exact, k, 0), exact, _pick(before, k, 0), smoothed


@triton.jit(
    do_not_specialize=["n_ranks", "n_places", "wide_from"],
    do_not_specialize_on_alignment=[
        "counts_ptr", "cumulative_ptr", "status_ptr", "time_cells_ptr",
        "time_lists_ptr", "time_steps_ptr", "time_extents_ptr", "cost_ptr", "slopes_ptr",
        "plans_ptr", "times_ptr",
    ],
)  # fmt: skip
def plan_time_kernel(
    counts_ptr,  # [n_logical] int32: tokens of each expert over all ranks
    cumulative_ptr,  # [n_copies] int32: cumulative shares of the token plan; gets this plan's
    status_ptr,  # [n_group] int32: status of the solve
    time_cells_ptr,  # [n_group, N_TIME_FIELDS, n_places, n_ranks] int32, see `TimeField`
    time_lists_ptr,  # [n_group, n_places n_ranks] int32: cells of each expert, as slots
    time_steps_ptr,  # [n_group, 2, MOST_STEPS, n_ranks] int32: partner, and above it the place
    time_extents_ptr,  # [n_group, N_TIME_EXTENTS] int32, see `TimeExtent`
    cost_ptr,  # [2, 2, ACTIVE, TILES] float32: the table of times, and the smoothed one
    slopes_ptr,  # [3] float32: what a further narrow tile, wide tile, and a row add
    plans_ptr,  # [n_group, TIME_PLANS, n_places n_ranks] int32: scratch
    times_ptr,  # [n_group, TIME_REPORTED] float32
    n_ranks,  # ranks of a group
    n_places,  # slots of a rank
    wide_from,  # average rows of a rank's slots from which tiles are wide
    MOST_STEPS: tl.constexpr,
    SLICES: tl.constexpr,  # slices that ranks are handled in
    LANES: tl.constexpr,  # ranks of a slice
    BLOCK: tl.constexpr,  # slots that are handled at once
    MARGIN: tl.constexpr,  # rows by which tiles end early
    NARROW: tl.constexpr,  # a narrow tile has 2**NARROW rows
    WIDE: tl.constexpr,
    ACTIVE: tl.constexpr,  # slots of a rank and one
    TILES: tl.constexpr,  # entries of the table by tiles
    PDL: tl.constexpr,  # whether kernels may start before the one ahead of them has ended
):
    """Plan one group of a batch by time (equations 28 to 31). Grid (n_group,)."""
    start_dependents(PDL)
    group = tl.program_id(0).to(tl.int64)
    n_slots = n_places * n_ranks
    time_cells_ptr += group * N_FIELDS * n_slots
    time_lists_ptr += group * n_slots
    time_steps_ptr += group * 2 * MOST_STEPS * n_ranks
    time_extents_ptr += group * N_EXTENTS
    plans_ptr += group * PLANS * n_slots
    n_steps = tl.load(time_extents_ptr + N_STEPS)
    most_cells = tl.load(time_extents_ptr + MOST_CELLS)
    multiplicity = tl.load(time_extents_ptr + MULTIPLICITY)
    slopes = tl.load(slopes_ptr), tl.load(slopes_ptr + 1), tl.load(slopes_ptr + 2)
    wide_rows = wide_from * n_places
    k = tl.arange(0, CANDIDATES)[:, None]
    exact = cost_ptr + k * 0
    smoothed = exact + 2 * ACTIVE * TILES
    is_smoothed = k < N_SMOOTHED
    table = tl.where(is_smoothed, smoothed, exact)
    words_ptr = time_steps_ptr + tl.where(is_smoothed, MOST_STEPS * n_ranks, 0)
    before_ptr = plans_ptr + k * n_slots
    cells = load_cells(time_cells_ptr, 0, n_slots, BLOCK)
    await_previous(PDL)

    total = write_starts(
        counts_ptr, cumulative_ptr, time_cells_ptr, plans_ptr, cells, n_slots, BLOCK
    )
    is_wide = total >= wide_rows.to(tl.int64) * n_ranks
    least = (n_slots * 0 + 1) << (tl.where(is_wide, WIDE, NARROW) - 1)
    # From here on threads read what others have written.
    tl.debug_barrier()
    write_closed(time_cells_ptr, time_lists_ptr, plans_ptr, n_slots, most_cells, least, BLOCK)
    tl.debug_barrier()
    after_ptr = before_ptr + JUDGED * n_slots
    judged, improved = count_ranks(
        before_ptr, after_ptr, n_ranks, n_places, SLICES, LANES, CANDIDATES, NARROW, WIDE
    )
    active, narrow, wide, rows = judged
    before = _find_slowest(
        active, narrow, wide, rows, smoothed, slopes, wide_rows, n_ranks,
        SLICES, LANES, ACTIVE, TILES,
    )  # fmt: skip
    before_exact = _find_slowest(
        active, narrow, wide, rows, exact, slopes, wide_rows, n_ranks,
        SLICES, LANES, ACTIVE, TILES,
    )  # fmt: skip
    active, narrow, wide, rows = improved
    active, narrow, wide, rows = improve_cells(
        after_ptr, words_ptr, active, narrow, wide, rows, table, slopes, wide_rows,
        n_ranks, n_steps, SLICES, LANES, CANDIDATES, MARGIN, NARROW, WIDE, ACTIVE, TILES,
    )  # fmt: skip
    after = _find_slowest(
        active, narrow, wide, rows, smoothed, slopes, wide_rows, n_ranks,
        SLICES, LANES, ACTIVE, TILES,
    )  # fmt: skip
    after_exact = _find_slowest(
        active, narrow, wide, rows, exact, slopes, wide_rows, n_ranks,
        SLICES, LANES, ACTIVE, TILES,
    )  # fmt: skip

    choice, token_time, time, token_smoothed, time_smoothed = _choose(
        before, before_exact, after, after_exact
    )
    # Invalid counts keep the even split of the solve.
    is_valid = tl.load(status_ptr + group) != INVALID
    if is_valid & ((choice > 0) | (multiplicity > 1)):
        tl.debug_barrier()
        write_shares(
            counts_ptr, cumulative_ptr, time_cells_ptr, time_lists_ptr,
            plans_ptr + choice * n_slots, n_slots, most_cells, multiplicity, BLOCK,
        )  # fmt: skip
    times_ptr += group * REPORTED
    tl.store(times_ptr, token_time)
    tl.store(times_ptr + 1, time)
    tl.store(times_ptr + 2, token_smoothed)
    tl.store(times_ptr + 3, time_smoothed)
    tl.store(times_ptr + 4, choice.to(tl.float32))
