"""The plan of a batch that keeps tokens near: one program for each group.

Equation numbers refer to docs/method.md.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.lanes import number_ranks
from lplb_triton.kernels.near.cells import (
    SURPLUS,
    UNITS,
    load_batch,
    load_cells,
    scale,
    scale_batch,
    sum_far,
    write_near_shares,
    write_starts,
)
from lplb_triton.kernels.near.moves import (
    add_cells,
    load_lone,
    load_words,
    move_units,
    sum_lone,
)
from lplb_triton.kernels.pdl import await_previous, start_dependents

CANDIDATES = tl.constexpr(_layout.NEAR_CANDIDATES)
REPORTED = tl.constexpr(_layout.NEAR_REPORTED)
ROWS = tl.constexpr(_layout.NEAR_ROWS)
N_FIELDS = tl.constexpr(_layout.N_NEAR_FIELDS)
N_EXTENTS = tl.constexpr(_layout.N_NEAR_EXTENTS)
N_STEPS = tl.constexpr(int(_layout.NearExtent.N_STEPS))
MULTIPLICITY = tl.constexpr(int(_layout.NearExtent.MULTIPLICITY))
MOST_CELLS = tl.constexpr(int(_layout.NearExtent.MOST_CELLS))
MOST_LONE = tl.constexpr(int(_layout.NearExtent.MOST_LONE))
MOST_ON_NODE = tl.constexpr(int(_layout.NearExtent.MOST_ON_NODE))
UNIT_BITS = tl.constexpr(_layout.NEAR_UNIT_BITS)
BLEND = tl.constexpr(_layout.NEAR_BLEND)
BLEND_BITS = tl.constexpr(_layout.NEAR_BLEND_BITS)
ALLOWANCE_BITS = tl.constexpr(_layout.NEAR_ALLOWANCE_BITS)
INVALID = tl.constexpr(_layout.STATUS_INVALID)
# The mantissa of a float32 has so many bits, and its exponent is counted from here.
MANTISSA_BITS, NO_EXPONENT = tl.constexpr(23), tl.constexpr(127)
# The candidate whose price stays, and the first that goes through classes backward.
STEADY, FIRST_BACKWARD = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _find_shift(total):
    """Return how many bits tokens are shifted by to become units (equation 33)."""
    exponent = total.to(tl.float32).to(tl.int32, bitcast=True) >> MANTISSA_BITS
    return tl.where(total > 0, NO_EXPONENT - exponent + UNIT_BITS, 0)


@triton.jit
def _raise_two(exponent):
    """Return 2 to a power, as float32."""
    return ((exponent + NO_EXPONENT) << MANTISSA_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _pick_rows(values, chosen):
    """Return the row ``chosen`` of [CANDIDATES, LANES] numbers, [1, LANES]."""
    k = tl.arange(0, CANDIDATES)[:, None]
    return tl.sum(tl.where(k == chosen, values, 0), 0)[None, :]


@triton.jit
def _pick(values, chosen):
    """Return number ``chosen`` of [CANDIDATES] numbers."""
    k = tl.arange(0, CANDIDATES)
    return tl.sum(tl.where(k == chosen, values, 0), 0)


@triton.jit
def _sum_one(numbers, SLICES: tl.constexpr):
    """Return the sum over ranks of numbers that are the same for all candidates, int64."""
    total = numbers[0].to(tl.int64)
    for h in tl.static_range(1, SLICES):
        total += numbers[h].to(tl.int64)
    return tl.max(tl.sum(total, 1), 0)


@triton.jit
def _find_largest(loads, SLICES: tl.constexpr):
    """Return the largest of numbers by rank, for each row."""
    largest = loads[0]
    for h in tl.static_range(1, SLICES):
        largest = tl.maximum(largest, loads[h])
    return tl.max(largest, 1)


@triton.jit
def _find_parts(loads, token_loads, aim, SLICES: tl.constexpr):
    """Return how much of the token plan brings loads within the aim (equation 37), [CANDIDATES]."""
    parts = ()
    for h in tl.static_range(SLICES):
        over, gained = loads[h] - aim, loads[h] - token_loads[h]
        part = over.to(tl.float64) * BLEND / tl.maximum(gained, 1).to(tl.float64)
        is_part = (over > 0) & (gained > over)
        # What is not a part might be too large a number.
        part = tl.where(is_part, part, 0.0).to(tl.int32) + 1
        part = tl.where(is_part, tl.minimum(part, BLEND), BLEND)
        parts += (tl.where(over > 0, part, 0),)
    return _find_largest(parts, SLICES)


@triton.jit
def _blend_loads(loads, token_loads, parts, SLICES: tl.constexpr):
    """Return the largest load of every candidate with its part of the token plan, [CANDIDATES]."""
    blends = ()
    part = parts.to(tl.int64)[:, None]
    for h in tl.static_range(SLICES):
        blend = loads[h].to(tl.int64) * (BLEND - part) + token_loads[h].to(tl.int64) * part
        blends += ((blend >> BLEND_BITS).to(tl.int32),)
    return _find_largest(blends, SLICES)


@triton.jit
def _choose(far, token_far):
    """Return the first candidate with the least traffic, this, and that of the token plan."""
    best = tl.min(far, 0)
    candidate = tl.min(tl.where(far == best, tl.arange(0, CANDIDATES), CANDIDATES), 0)
    return candidate, best, tl.max(token_far, 0)


@triton.jit
def _find_loads(
    fixed,
    shift,
    x_ptr,
    on_rank_ptr,
    n_ranks,
    most_on_rank,
    SLICES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Return the loads of all candidates, and those of the token plan in each row."""
    loads, token_loads = (), ()
    for h in tl.static_range(SLICES):
        loads += (scale(fixed[h], shift),)
    loads = add_cells(loads, x_ptr, on_rank_ptr, n_ranks, most_on_rank, SLICES, LANES)
    for h in tl.static_range(SLICES):
        # The steady candidate begins with the token plan.
        token_loads += (_pick_rows(loads[h], STEADY) + number_ranks(h, LANES, CANDIDATES) * 0,)
    return loads, token_loads


@triton.jit
def _report(near_ptr, group, is_valid, choice, amounts, shift):
    """Write the numbers of a plan in tokens, and its choice; 0 for a group without tokens."""
    near_ptr += group * REPORTED
    for i in tl.static_range(REPORTED - 1):
        tokens = amounts[i].to(tl.float32) * _raise_two(-shift)
        tl.store(near_ptr + i, tl.where(is_valid, tokens, 0.0))
    tl.store(near_ptr + REPORTED - 1, tl.where(is_valid, choice, 0).to(tl.float32))


@triton.jit
def _write_plan(
    rows_ptr, cumulative_ptr, stats_ptr, near_ptr, cells, batch, far, token_far, parts, peaks,
    most, limit, bound, is_valid, shift, group, n_group, n_slots, multiplicity,
):  # fmt: skip
    """Write the shares, the largest load and the gap of the best plan, and report on it."""
    candidate, best, token_far = _choose(far, token_far)
    is_nearer = best < token_far
    peak = tl.where(is_nearer, _pick(peaks, candidate), most)
    if is_valid & is_nearer:
        part = _pick(parts, candidate)
        write_near_shares(
            rows_ptr, cumulative_ptr, cells, batch, candidate, part, n_slots, multiplicity
        )
        max_load = peak.to(tl.float32) * _raise_two(-shift)
        tl.store(stats_ptr + group, max_load)
        tl.store(stats_ptr + 2 * n_group + group, (max_load - bound) / max_load)
    least, after = batch.least, batch.least + tl.minimum(best, token_far)
    amounts = least + token_far, after, least, batch.every, peak, limit
    choice = tl.where(is_nearer, candidate + 1, 0)
    _report(near_ptr, group, is_valid, choice, amounts, shift)


@triton.jit(
    do_not_specialize=[
        "n_ranks", "n_places", "most_cells", "n_sources", "n_logical", "ranks_per_node",
    ],
    do_not_specialize_on_alignment=[
        "gathered_ptr", "counts_ptr", "cumulative_ptr", "stats_ptr", "status_ptr",
        "near_cells_ptr", "near_lone_ptr", "near_ranks_ptr", "near_steps_ptr", "near_extents_ptr",
        "rows_ptr", "near_ptr",
    ],
)  # fmt: skip
def plan_near_kernel(
    gathered_ptr,  # [n_sources, n_logical] int32: every rank's counts
    counts_ptr,  # [n_logical] int32: tokens of each expert over all ranks
    cumulative_ptr,  # [n_copies] int32: cumulative shares of the token plan; gets this plan's
    stats_ptr,  # [3, n_group] float32: largest load, lower bound, gap; gets this plan's
    status_ptr,  # [n_group] int32: status of the solve
    near_cells_ptr,  # [n_group, N_NEAR_FIELDS, most_cells] int32, see `NearField`
    near_lone_ptr,  # [n_group, n_places, n_ranks] int32: experts on one rank only, -1 for none
    near_ranks_ptr,  # [n_group, n_ranks] int32: cells of each rank
    near_steps_ptr,  # [n_group, 2, MOST_STEPS, n_ranks] int32: words, see `_layout`
    near_extents_ptr,  # [n_group, N_NEAR_EXTENTS] int32, see `NearExtent`
    rows_ptr,  # [n_group, NEAR_ROWS, n_places n_ranks] int32: scratch
    near_ptr,  # [n_group, NEAR_REPORTED] float32
    slack_factor,  # what a plan's largest load may be, over the bound
    n_ranks,  # ranks of a group
    n_places,  # static slots of a rank
    most_cells,  # columns of the table of cells
    n_sources,  # ranks of all groups
    n_logical,
    ranks_per_node,
    MOST_STEPS: tl.constexpr,
    SLICES: tl.constexpr,  # slices that ranks are handled in
    LANES: tl.constexpr,  # ranks of a slice
    BLOCK: tl.constexpr,  # most_cells or more, a power of two
    PDL: tl.constexpr,  # whether kernels may start before the one ahead of them has ended
):
    """Plan one group of a batch near its tokens (equations 33 to 38). Grid (n_group,)."""
    start_dependents(PDL)
    group = tl.program_id(0).to(tl.int64)
    n_group = tl.num_programs(0)
    n_slots = n_places * n_ranks
    near_cells_ptr += group * N_FIELDS * most_cells
    near_lone_ptr += group * n_slots
    near_ranks_ptr += group * n_ranks
    near_steps_ptr += group * 2 * MOST_STEPS * n_ranks
    near_extents_ptr += group * N_EXTENTS
    rows_ptr += group * ROWS * n_slots
    n_steps = tl.load(near_extents_ptr + N_STEPS)
    multiplicity = tl.load(near_extents_ptr + MULTIPLICITY)
    most_on_rank = tl.load(near_extents_ptr + MOST_CELLS)
    most_lone = tl.load(near_extents_ptr + MOST_LONE)
    most_on_node = tl.load(near_extents_ptr + MOST_ON_NODE)
    cells = load_cells(near_cells_ptr, most_cells, BLOCK)
    k = tl.arange(0, CANDIDATES)[:, None]
    words_ptr = near_steps_ptr + tl.where(k >= FIRST_BACKWARD, MOST_STEPS * n_ranks, 0)
    words = load_words(words_ptr, 0, n_steps, n_ranks, SLICES, LANES)
    ahead = load_words(words_ptr, 1, n_steps, n_ranks, SLICES, LANES)
    lone = load_lone(near_lone_ptr, 0, n_ranks, most_lone, SLICES, LANES)
    await_previous(PDL)

    loaded = load_batch(
        gathered_ptr, counts_ptr, cumulative_ptr, cells, n_sources, n_logical, ranks_per_node
    )
    bound = tl.load(stats_ptr + n_group + group)
    status = tl.load(status_ptr + group)
    fixed = sum_lone(counts_ptr, near_lone_ptr, lone, n_ranks, most_lone, SLICES, LANES)
    firsts = tl.where(cells.is_cell & (cells.number == cells.begin), loaded[0], 0)
    every = tl.sum(firsts.to(tl.int64), 0) + _sum_one(fixed, SLICES)
    is_valid = (status != INVALID) & (every > 0)
    shift = _find_shift(every)
    mean = scale(every, shift).to(tl.int32) // n_ranks
    batch = scale_batch(loaded, cells, shift)
    write_starts(rows_ptr, cells, batch, n_slots)
    # From here on threads read what others have written.
    tl.debug_barrier()

    x_ptr = rows_ptr + (UNITS + k) * n_slots
    loads, token_loads = _find_loads(
        fixed, shift, x_ptr, near_ranks_ptr, n_ranks, most_on_rank, SLICES, LANES
    )
    most = tl.max(_find_largest(token_loads, SLICES), 0)
    allowed = (bound * slack_factor) * _raise_two(shift)
    limit = tl.maximum(most, allowed.to(tl.int32))
    aim = limit - (mean >> ALLOWANCE_BITS) - n_places
    loads = move_units(
        x_ptr, rows_ptr + (SURPLUS + k) * n_slots, words_ptr, words, ahead, loads, aim, mean,
        k != STEADY, n_ranks, n_steps, SLICES, LANES,
    )  # fmt: skip
    tl.debug_barrier()
    parts = _find_parts(loads, token_loads, aim, SLICES)
    peaks = _blend_loads(loads, token_loads, parts, SLICES)
    far, token_far = sum_far(
        near_cells_ptr, rows_ptr, parts, most_cells, most_on_node, n_slots, BLOCK
    )
    _write_plan(
        rows_ptr, cumulative_ptr, stats_ptr, near_ptr, cells, batch, far, token_far, parts, peaks,
        most, limit, bound, is_valid, shift, group, n_group, n_slots, multiplicity,
    )  # fmt: skip
