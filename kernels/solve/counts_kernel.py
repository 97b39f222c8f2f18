"""The kernel that solves a batch straight from its counts by logical expert.

One program solves one group of ranks. Groups whose columns are pairs are solved by
pairs.py, in registers, all others by cells.py. Equation numbers refer to docs/method.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.count import await_counts, load_counts, sum_rows
from lplb_triton.kernels.exchange import exchange_counts
from lplb_triton.kernels.live.arguments import LiveOutcome, LiveRules, LiveSizes, LiveTables
from lplb_triton.kernels.live.plan import plan_live_slots
from lplb_triton.kernels.pdl import await_previous, start_dependents
from lplb_triton.kernels.report import BAD_COUNTS, REPORT_INPUT, write_report
from lplb_triton.kernels.solve.cells import (
    load_and_solve_by_cells,
    load_member_counts,
    solve_by_cells,
    sum_column_weights,
    sum_first_loads,
)
from lplb_triton.kernels.solve.certificate import (
    BOUND_ALLOWANCE,
    STATUS_CERTIFIED,
    STATUS_GAP,
    certify,
    store_certificate,
)
from lplb_triton.kernels.solve.group_tables import (
    IN_PAIRS,
    MOST_SWEEPS,
    Sizes,
    Tables,
    load_copy_parts,
    load_rank_experts,
    load_tables,
    prefetch_tables,
)
from lplb_triton.kernels.solve.levelling import COPIES_AT_ONCE, RANK_CELLS
from lplb_triton.kernels.solve.pairs import load_pair_counts, load_pairs, solve_pairs
from lplb_triton.kernels.solve.rows import ROW_WORDS

# More than any bound is times the mean; finite, since the mean may be 0.
NEVER_ENOUGH = tl.constexpr(1e20)
N_CELL_FIELDS = tl.constexpr(_layout.N_CELL_FIELDS)
N_EXTENTS = tl.constexpr(_layout.N_EXTENTS)
# Words of a group's scratch for each rank, column, cell and row.
SCRATCH_BY_RANK = tl.constexpr(_layout.SCRATCH_BY_RANK)
SCRATCH_BY_COLUMN = tl.constexpr(_layout.SCRATCH_BY_COLUMN)
SCRATCH_BY_CELL = tl.constexpr(_layout.SCRATCH_BY_CELL)
SCRATCH_BY_ROW = tl.constexpr(_layout.SCRATCH_BY_ROW)


@triton.jit
def _move_tables_to_group(tables, sizes, group, most_classes, MEMBERS: tl.constexpr):
    """Move the addresses of tables from the first group to ``group``; returns `Tables`.

    ``most_classes`` is the first size of a group's table of edges.
    """
    n_ranks, n_columns, n_slots = sizes.n_ranks, sizes.n_columns, sizes.n_slots
    n_shared = sizes.n_shared
    rank_experts = tables.rank_experts + group * n_ranks * n_slots
    rank_parts = tables.rank_parts + group * n_ranks * n_slots
    cells = tables.cells + group * N_CELL_FIELDS * n_shared
    cell_start = tables.cell_start + group * (n_columns + 1)
    rows = tables.rows + group * tl.maximum(n_shared // 2, 1) * ROW_WORDS
    # lplb_triton/_backends/cells.py sizes the table of each rank's cells likewise.
    most_cells = tl.maximum(tl.minimum(n_slots, n_columns), 1)
    rank_cells = tables.rank_cells + group * n_ranks * tl.cdiv(most_cells, RANK_CELLS) * RANK_CELLS
    first_members = tables.first_members + group * n_columns * MEMBERS
    first_ranks = tables.first_ranks + group * n_columns * COPIES_AT_ONCE
    column_start = tables.column_start + group * (n_columns + 1)
    shared_copies = tables.shared_copies + group * n_shared
    shared_cells = tables.shared_cells + group * n_shared
    edges = tables.edges + group * most_classes * sizes.width
    extents = tables.extents + group * N_EXTENTS
    copy_parts = tables.copy_parts + group * n_ranks * n_slots
    slot_cells = tables.slot_cells + group * n_ranks * n_slots
    return Tables(
        rank_experts, rank_parts, copy_parts, slot_cells, cells, cell_start, rows, rank_cells,
        first_members, first_ranks, column_start, tables.column_members, shared_copies,
        shared_cells, edges, extents, tables.copy_index, tables.copy_multiplicity,
    )  # fmt: skip


@triton.jit
def _solve_pairs_or_cells(
    words,  # by class and rank, from `load_pairs`
    partners,  # by class and rank, from `load_pairs`
    counts_ptr,  # [n_logical] int32
    counts,  # [G S] float32, counts of the experts of each rank's slots
    part,  # [G S] float32, from `load_rank_experts`
    total,  # float32, sum of the loads
    complete,  # bool, whether all counts are there
    in_pairs,  # whether the group's columns are pairs
    most_sweeps,
    tolerance,
    max_iterations,
    enough,  # float32, no plan needs improvement if its bound exceeds this many times the mean
    tables,
    cumulative_ptr,  # [n_copies] int32
    scratch_ptr,  # [solve_scratch] float32
    sizes,
    G: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    COPIES: tl.constexpr,
    MEMBERS: tl.constexpr,
    PAIRS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Solve a group as pairs, if its columns are pairs, or else by cells.

    A plan of pairs that isn't good enough is improved by cells.
    Returns the largest load, a bound, steps by potentials, and whether counts are invalid.
    """
    pair_counts = load_pair_counts(counts_ptr, words, PAIRS * ((G + 31) // 32))
    max_load = tl.full((), 0.0, tl.float32)
    bound = max_load
    invalid = tl.full((), 0, tl.int1)
    solved = invalid
    # Zero, as a Triton value: a branch may assign another one.
    steps = max_iterations * 0
    if in_pairs > 0:
        # A part of 1 means that no other rank holds the expert.
        fixed = tl.sum(tl.where(part == 1.0, counts, 0.0).reshape(G, S), 1)
        fixed = tl.where(complete, fixed, float("inf"))
        max_load, bound, invalid, solved = solve_pairs(
            words, partners, pair_counts, fixed, tolerance - BOUND_ALLOWANCE, sizes.n_ranks,
            most_sweeps, cumulative_ptr, G, PAIRS,
        )  # fmt: skip
    may_gain = bound * sizes.n_ranks <= enough * total
    if (solved == 0) & may_gain:
        # The cells start from the plan that `solve_pairs` has stored.
        tl.debug_barrier()
        max_load, bound, steps, invalid = load_and_solve_by_cells(
            counts_ptr, complete, in_pairs, bound, tolerance, max_iterations, enough, tables,
            cumulative_ptr, scratch_ptr, sizes, G, C, R, S, COPIES, MEMBERS, LANES,
        )  # fmt: skip
    return max_load, bound, steps, invalid


@triton.jit
def _solve_by_loaded_cells(
    loaded,
    counts_ptr,  # [n_logical] int32
    counts,  # [G S] float32, counts of the experts of each rank's slots
    part,  # [G S] float32, from `load_rank_experts`
    copy_part,  # [G S] float32, from `load_copy_parts`
    complete,  # bool, whether all counts are there
    tolerance,
    max_iterations,
    enough,  # as for `_solve_pairs_or_cells`
    tables,
    cumulative_ptr,  # [n_copies] int32
    scratch_ptr,  # [solve_scratch] float32
    n_scratch,  # words of scratch before the last LANES, which `prefetch_tables` takes
    sizes,
    G: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    COPIES: tl.constexpr,
    MEMBERS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Solve a group by cells, with tables that were loaded before the counts were there.

    Returns the largest load, a bound, steps by potentials, whether counts are invalid, and the sum
    of the loads.
    """
    first_counts = load_member_counts(counts_ptr, loaded.members, MEMBERS)
    extents = loaded.extents
    prefetch_tables(tables, extents, sizes, scratch_ptr, n_scratch, LANES)
    first = sum_first_loads(counts, part, copy_part, complete, sizes.n_ranks, G, S)
    weights = sum_column_weights(
        counts_ptr, first_counts, tables, extents.most_members, sizes.n_columns, first.invalid,
        C, MEMBERS,
    )  # fmt: skip
    max_load, bound, steps = solve_by_cells(
        tables, loaded, weights, first, 0, first.bound, tolerance, max_iterations, enough,
        counts_ptr, cumulative_ptr, scratch_ptr, sizes, G, C, R, COPIES, LANES,
    )  # fmt: skip
    return max_load, bound, steps, first.invalid, first.total


@triton.jit
def _await_all_counts(
    counts_ptr,  # as the arguments of `solve_counts_kernel`
    total_ptr,
    gathered_ptr,
    addresses_ptr,
    gates_ptr,
    epochs_ptr,
    version_ptr,
    status_ptr,
    own_rank,
    n_peers,
    capacity,
    timeout_ms,
    opening,
    channel,
    n_logical,
    n_sums,
    PDL: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
    ON_GPU: tl.constexpr,
    LANES: tl.constexpr,
):
    """Wait for this rank's counts, and sum them over the ranks if CHANNELS > 0.

    Returns the address of the counts to solve for, and whether all of them are there.
    """
    complete = tl.full((), 1, tl.int1)
    if n_sums > 0:
        complete = await_counts(counts_ptr, n_logical, BLOCK)
    if CHANNELS > 0:
        # Only this program waits for other ranks. The next kernel of the stream, which would wait
        # for this one, may start once the exchange has ended. Until then it occupies nothing of the
        # GPU, so that whatever another rank needs to reach the exchange can run (docs/sync.md).
        exchange_counts(
            counts_ptr, total_ptr, gathered_ptr,
            addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
            own_rank, n_peers, capacity, timeout_ms, opening, channel, n_logical, complete,
            CHANNELS, BLOCK, GATHER, ON_GPU, LANES,
        )  # fmt: skip
        start_dependents(PDL)
        tl.debug_barrier()
        counts_ptr = total_ptr
    return counts_ptr, complete


@triton.jit
def _count_solve(certified_ptr, solves_ptr, uncertified_ptr, status):
    """Add a group's status to the counters [1], int32 or int64."""
    certified = (status == STATUS_CERTIFIED).to(tl.int32)
    one = tl.full((), 1, solves_ptr.dtype.element_ty)
    # Relaxed order is enough, since counters are read after this launch; a fence takes time.
    tl.atomic_add(certified_ptr, certified.to(certified_ptr.dtype.element_ty), sem="relaxed")
    tl.atomic_add(solves_ptr, one, sem="relaxed")
    uncertified = (status == STATUS_GAP).to(uncertified_ptr.dtype.element_ty)
    tl.atomic_add(uncertified_ptr, uncertified, sem="relaxed")


@triton.jit
def _write_outcome(
    stats_ptr,  # as the arguments of `solve_counts_kernel`
    ints_ptr,
    report_ptr,
    certified_ptr,
    solves_ptr,
    uncertified_ptr,
    group,
    n_sums,
    tolerance,
    max_load,
    bound,
    steps,
    invalid,  # bool, whether counts are invalid
):
    """Certify a group's plan, write its certificate and reports, and add to the counters."""
    max_load, lower_bound, gap, status = certify(max_load, bound, tolerance, invalid)
    n_group = tl.num_programs(0) - n_sums
    store_certificate(
        stats_ptr, ints_ptr, group, n_group, max_load, lower_bound, gap, steps, status
    )
    write_report(report_ptr, REPORT_INPUT, BAD_COUNTS, invalid)
    _count_solve(certified_ptr, solves_ptr, uncertified_ptr, status)


@triton.jit(
    do_not_specialize=[
        "max_iterations", "n_ranks", "n_columns", "n_slots", "n_shared", "n_logical",
        "n_counts", "n_sums", "most_classes", "width",
        "live_above", "live_aim", "live_cost", "live_fanout", "live_domain",
        "own_rank", "n_peers", "capacity", "timeout_ms", "opening", "channel",
    ],
    do_not_specialize_on_alignment=["counts_ptr", "certified_ptr", "solves_ptr", "uncertified_ptr"],
)  # fmt: skip
def solve_counts_kernel(
    # What every solve reads and writes; its tables are those of `SolveTables`.
    running_ptr,  # [n_counts, n_logical] int32, counts by program, then running sums of them
    counts_ptr,  # [n_logical] int32, tokens of each expert
    rank_experts_ptr,  # [n_group, n_ranks, n_slots] int32, experts of each rank
    rank_parts_ptr,  # [n_group, n_ranks, n_slots] float32, their parts of the even split over ranks
    extents_ptr,  # [n_group, N_EXTENTS] int32, numbers of each group
    pairs_ptr,  # [n_group, PAIRS, n_ranks] int64, edges of each rank, as for `load_pairs`
    cumulative_ptr,  # [n_copies] int32, written for the copies of replicated experts
    stats_ptr,  # [3, n_group] float32, written: largest load, lower bound, gap
    ints_ptr,  # [2, n_group] int32, written: steps by potentials, status
    scratch_ptr,  # [n_group, solve_scratch] float32
    certified_ptr,  # [1] int32 or int64, rises by one for each certified group
    solves_ptr,  # [1] int32 or int64, rises by one for each group
    uncertified_ptr,  # [1] int32 or int64, rises by one for each group whose gap is too wide
    tolerance,  # float32, relative gap to reach
    max_iterations,  # most steps by potentials
    n_ranks,  # ranks of a group
    n_columns,  # columns of a group
    n_slots,  # slots of a rank
    n_shared,  # most copies of replicated experts in a group (twice its redundant slots), and cells
    n_logical,  # experts
    n_counts,  # rows of ``running``
    n_sums,  # programs that sum these rows; 0 if ``counts`` has been summed
    most_classes,  # classes in a group's table of edges
    width,  # edges of a class there
    # Tables that only some solves read.
    cells_ptr,  # [n_group, N_CELL_FIELDS, n_shared] int32, rank and column of each cell, and more
    cell_start_ptr,  # [n_group, n_columns + 1] int32, first cell of each column
    rows_ptr,  # [n_group, ROW_WORDS n_rows] int32, cells in rows of eight
    rank_cells_ptr,  # [n_group, n, n_ranks] int32, cells of each rank
    first_members_ptr,  # [n_group, MEMBERS, n_columns] int32, first experts of each column
    first_ranks_ptr,  # [n_group, COPIES_AT_ONCE, n_columns] int32, ranks of the first cells
    column_start_ptr,  # [n_group, n_columns + 1] int32, where experts of columns begin in the next
    column_members_ptr,  # int32, experts of all columns
    shared_copies_ptr,  # [n_group, n_shared] int32, copies of replicated experts
    shared_cells_ptr,  # [n_group, n_shared] int32, cells of these copies
    copy_index_ptr,  # [n_copies] int32, position among the copies of an expert on one rank
    copy_multiplicity_ptr,  # [n_copies] int32, number of these copies
    # [n_group, most_classes, width] int64, as for `levelling.level_edges`; a group's last class is
    # empty.
    edges_ptr,
    copy_parts_ptr,  # [n_group, n_ranks, n_slots] float32, parts of the even split over copies
    slot_cells_ptr,  # [n_group, n_ranks, n_slots] int32, cells of the experts of each rank
    report_ptr,  # [2] int64, written if counts are invalid, see report.py
    # Live slots, read only if LIVE > 0; the tables are those of `live.launch.LiveTables`.
    slot_words_ptr,  # [n_slots, n_ranks] int32
    slot_experts_ptr,  # [n_slots, n_ranks] int32
    slot_holders_ptr,  # [n_slots, n_ranks, LIVE_SLICES] int32
    slot_homes_ptr,  # [n_slots, n_ranks] int32
    copy_start_ptr,  # [n_logical + 1] int32
    copy_slot_ptr,  # [n_copies] int32
    live_index_ptr,  # [n_copies] int32, as ``copy_index``
    most_copies_ptr,  # [1] int32
    resident_ptr,  # [n_ranks, LIVE] int32, read and written with RESIDENT
    live_scratch_ptr,  # [live_scratch_words] int32
    live_versions_ptr,  # [CHANNELS] int32, takes the place of ``version``
    live_base_ptr,  # [1] int32, the checksum of the placement
    live_above,  # float32, plans are made if the largest load exceeds this many times the mean
    live_aim,  # how much above the mean plans may end, in units of 2**-AIM_BITS
    live_cost,  # tokens that a fetched expert costs
    live_fanout,  # the most copies that leave one home rank
    live_domain,  # ranks of a domain
    live_out_ptr,  # [n_ranks LIVE + 3] int32, written
    # An exchange with other ranks, as for `exchange_counts`; read only if CHANNELS > 0.
    total_ptr,  # [n_logical] int32, written: counts of all ranks
    gathered_ptr,  # [n_peers, n_logical] int32, written if GATHER: counts of each rank
    addresses_ptr,  # [n_peers] int64, addresses of each rank's buffer
    gates_ptr,  # [CHANNELS] int32
    epochs_ptr,  # [CHANNELS] int32
    version_ptr,  # [1] int32
    status_ptr,  # [status_words] int64, in memory that the host can read
    own_rank,  # this rank among those that exchange counts
    n_peers,  # how many these are
    capacity,  # most counts that the buffers hold
    timeout_ms,
    opening,  # how the channel was opened
    channel,
    # Sizes that the kernel is compiled for.
    G: tl.constexpr,  # ranks, padded
    C: tl.constexpr,  # columns, padded
    R: tl.constexpr,  # rows, padded
    S: tl.constexpr,  # slots of a rank, padded
    COPIES: tl.constexpr,  # n_shared, padded
    MEMBERS: tl.constexpr,  # experts of a column that are loaded at once
    ROWS: tl.constexpr,  # rows of ``running`` that a program sums at once
    EXPERTS: tl.constexpr,  # experts whose counts a program sums
    PAIRS: tl.constexpr,  # classes of edges in ``pairs``, 0 for a kernel that solves no pairs
    LANES: tl.constexpr,  # threads
    PDL: tl.constexpr,  # whether kernels may start before the one ahead of them has ended
    CHANNELS: tl.constexpr,  # channels of the exchange, 0 if there is none
    BLOCK: tl.constexpr,  # counts that are awaited or exchanged at once
    GATHER: tl.constexpr,  # whether the exchange writes ``gathered``
    ON_GPU: tl.constexpr,  # False under the interpreter
    LIVE: tl.constexpr,  # live slots of a rank, 0 for none; only for one group
    LIVE_SLICES: tl.constexpr,  # slices of ranks
    OFFERS: tl.constexpr,  # offers of a rank in registers
    MORE_OFFERS: tl.constexpr,  # whether a rank may have more of them
    LIVE_EXPERTS: tl.constexpr,  # experts that the bound handles at once
    LIVE_SLOTS: tl.constexpr,  # live slots of all ranks, padded
    SHARED: tl.constexpr,  # whether experts may have several static copies
    PRICED: tl.constexpr,  # whether fetching has a cost or a limit
    DOMAINS: tl.constexpr,  # whether there are several domains
    RESIDENT: tl.constexpr,  # whether live slots hold something already
):
    """Solve the groups of one batch (equations 11, 12 and 18 to 23). Grid (n_sums + n_group,).

    Programs 0 .. n_sums - 1 turn counts by program into running sums and totals, as
    `running_sum_kernel` does, while the others load tables. Program ``n_sums + group`` waits for
    the totals, solves the group and writes the cumulative share of every copy (equation 12).
    Programs that sum wait for no other program, so this wait ends whatever else is on the GPU.

    With CHANNELS > 0, for one group and n_sums > 0, the counts are those of this rank, and the
    group's program sums them over the ranks before it solves. With LIVE > 0 it then plans what live
    slots hold.

    The function is long because of its parameters: it does little but hand them on.
    """
    if CHANNELS == 0:
        start_dependents(PDL)
    program = tl.program_id(0)
    if program < n_sums:
        await_previous(PDL)
        sum_rows(running_ptr, counts_ptr, program, n_counts, n_logical, ROWS, EXPERTS)
    else:
        group = (program - n_sums).to(tl.int64)
        sizes = Sizes(n_ranks, n_columns, n_slots, n_shared, width)
        tables = Tables(
            rank_experts_ptr, rank_parts_ptr, copy_parts_ptr, slot_cells_ptr, cells_ptr,
            cell_start_ptr, rows_ptr, rank_cells_ptr, first_members_ptr, first_ranks_ptr,
            column_start_ptr, column_members_ptr, shared_copies_ptr, shared_cells_ptr, edges_ptr,
            extents_ptr, copy_index_ptr, copy_multiplicity_ptr,
        )  # fmt: skip
        tables = _move_tables_to_group(tables, sizes, group, most_classes, MEMBERS)
        # The launcher's `solve_scratch` computes this size too.
        n_scratch = (
            SCRATCH_BY_RANK * n_ranks
            + SCRATCH_BY_COLUMN * n_columns
            + SCRATCH_BY_CELL * n_shared
            + SCRATCH_BY_ROW * R
        )
        scratch_ptr += group * (n_scratch + LANES)
        expert, part = load_rank_experts(tables, sizes, G, S)
        if PAIRS > 0:
            in_pairs = tl.load(tables.extents + IN_PAIRS)
            most_sweeps = tl.load(tables.extents + MOST_SWEEPS)
            pairs_ptr += group * PAIRS * n_ranks
            words, partners = load_pairs(pairs_ptr, n_ranks, G, PAIRS)
        else:
            loaded = load_tables(tables, sizes, G, C, COPIES, MEMBERS)
            copy_part = load_copy_parts(tables, sizes, G, S)
        if LIVE > 0:
            live_base, most_copies = tl.load(live_base_ptr), tl.load(most_copies_ptr)
        await_previous(PDL)
        live_versions_ptr += channel
        counts_ptr, complete = _await_all_counts(
            counts_ptr, total_ptr, gathered_ptr, addresses_ptr, gates_ptr, epochs_ptr,
            live_versions_ptr if LIVE > 0 else version_ptr, status_ptr,
            own_rank, n_peers, capacity, timeout_ms, opening, channel, n_logical, n_sums,
            PDL, CHANNELS, BLOCK, GATHER, ON_GPU, LANES,
        )  # fmt: skip
        counts = load_counts(counts_ptr, expert)
        # How many times the mean a bound may be, above which a better plan gains nothing.
        enough = tl.full((), NEVER_ENOUGH, tl.float32)
        if LIVE > 0 and not PRICED and not DOMAINS:
            # A bound at the mean is no reason to stop, whatever its round-off.
            enough = live_above * (1.0 + 2.0**-20)
        if PAIRS > 0:
            total = tl.sum(counts * part, 0)
            max_load, bound, steps, invalid = _solve_pairs_or_cells(
                words, partners, counts_ptr, counts, part, total, complete, in_pairs, most_sweeps,
                tolerance, max_iterations, enough, tables, cumulative_ptr, scratch_ptr, sizes,
                G, C, R, S, COPIES, MEMBERS, PAIRS, LANES,
            )  # fmt: skip
        else:
            max_load, bound, steps, invalid, total = _solve_by_loaded_cells(
                loaded, counts_ptr, counts, part, copy_part, complete, tolerance, max_iterations,
                enough, tables, cumulative_ptr, scratch_ptr, n_scratch, sizes,
                G, C, R, S, COPIES, MEMBERS, LANES,
            )  # fmt: skip
        if LIVE > 0:
            plan_live_slots(
                counts_ptr, cumulative_ptr, max_load, total / n_ranks, invalid, live_scratch_ptr,
                LiveOutcome(live_out_ptr, live_versions_ptr, live_base),
                LiveTables(
                    slot_words_ptr, slot_experts_ptr, slot_holders_ptr, slot_homes_ptr,
                    copy_start_ptr, copy_slot_ptr, live_index_ptr, resident_ptr,
                ),
                LiveRules(live_above, live_aim, live_cost, live_fanout, live_domain),
                LiveSizes(n_ranks, n_slots, n_logical, most_copies, n_slots + LIVE),
                G, LIVE_SLICES, OFFERS, MORE_OFFERS, LIVE_EXPERTS, LIVE_SLOTS, LIVE,
                SHARED, PRICED, DOMAINS, RESIDENT,
            )  # fmt: skip
        _write_outcome(
            stats_ptr, ints_ptr, report_ptr, certified_ptr, solves_ptr, uncertified_ptr,
            group, n_sums, tolerance, max_load, bound, steps, invalid,
        )  # fmt: skip
