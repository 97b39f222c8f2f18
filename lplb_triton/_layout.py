"""Numbers that the host and the kernels share; this module imports neither torch nor Triton.

Kernels wrap a number that they use as a compile-time constant, ``X = tl.constexpr(_layout.X)``.
"""

from __future__ import annotations

import enum

# Shares.

# Shares are multiples of 2**-24. float32 holds each of them exactly and so do their sums: a
# column's shares add up to exactly 1, and token quotas are computed from them in integers.
SHARE_BITS = 24
SHARE_ONE = 1 << SHARE_BITS
# Equation 13: odd multipliers near 2**24 over the golden and the plastic number.
OFFSET_BY_RANK = 10368889
OFFSET_BY_EXPERT = 12664745

# The outcome of a solve, the numbers of `lplb_triton.Status`.
STATUS_CERTIFIED = 0
STATUS_GAP = 1
STATUS_INVALID = 2

# Tables of a placement.


class Extent(enum.IntEnum):
    """Columns of the table ``extents``, which has a row for each group."""

    N_CELLS = 0
    """Cells of the group."""
    MOST_MEMBERS = 1
    """The most members of a column."""
    MOST_COPIES = 2
    """The most cells of a column."""
    MOST_CELLS = 3
    """The most cells of a rank."""
    MULTIPLICITY = 4
    """The most copies of an expert on a rank."""
    N_CLASSES = 5
    """Classes of edges."""
    MOST_SWEEPS = 6
    """Sweeps over the edges, at most, before steps by potentials take over."""
    IN_PAIRS = 7
    """1 if the table ``pairs`` holds the group's edges, else 0."""


N_EXTENTS = len(Extent)


class Metric(enum.IntEnum):
    """Sums over batches, for each of which a group counts; loads are over the mean load."""

    BATCHES = 0
    BEFORE = 1
    """Largest load with every token at its expert's home."""
    AFTER = 2
    """Largest load of the plan."""
    STATIC = 3
    """Largest load of the plan of static copies, which is the plan without live slots."""
    BOUND = 4
    """Load that no plan of static copies can beat."""
    GAP = 5
    STEPS = 6
    """Steps by potentials, or interior-point iterations."""
    FETCHED = 7
    """Experts fetched to live slots."""


N_METRICS = len(Metric)


class CellField(enum.IntEnum):
    """Rows of the table ``cells``, which has a column for each cell of a group."""

    RANK = 0
    COLUMN = 1
    FIRST = 2
    """The first cell of the column."""
    COPIES = 3
    """The number of cells of the column."""


N_CELL_FIELDS = len(CellField)

# Words of ``edges`` and of ``pairs`` have four fields of so many bits, field 0 lowest.
FIELD_BITS = 16
FIELD_MASK = (1 << FIELD_BITS) - 1
# The value of a field of ``pairs`` that is empty.
PAIR_FIELD = FIELD_MASK
# The most cells of a group: a field of ``edges`` holds the number of a cell.
MOST_CELLS = 1 << FIELD_BITS

# Cells of a rank that the kernels sum at once: ``rank_cells`` is padded to whole such blocks.
RANK_CELLS = 8
# Cells of a row, and words of the table ``rows`` for each row: the ranks of these cells, then four
# numbers.
ROW_CELLS = 8
ROW_WORDS = ROW_CELLS + 4
# Copies of a column whose ranks are loaded at once, from the table ``first_ranks``.
COPIES_AT_ONCE = 4
# Members of a column that are loaded at once, from the table ``first_members``; a power of two.
MEMBERS = 4

# Limits of levelling in registers, for placements whose columns are pairs: ranks of a group, ranks
# of a slice, and edges of a lane, since more of them don't stay in registers.
PAIR_RANKS = 64
PAIR_LANES = 32
PAIR_EDGES = 8

# A group's scratch memory has so many float32 words for each rank, column, cell and row, and one
# more for each thread.
SCRATCH_BY_RANK = 4
SCRATCH_BY_COLUMN = 1
SCRATCH_BY_CELL = 4
SCRATCH_BY_ROW = 2

# Live slots.

# A rank's load is planned in so many bits; loads of more tokens are counted in larger units.
LIVE_UNIT_BITS = 20
# Bits of a static slot's place on its rank, and of a rank's number, in words that are compared.
LIVE_PLACE_BITS = 10
LIVE_RANK_BITS = 9
# Ranks of a slice, one in each lane of a warp.
LIVE_LANES = 32
# The fraction of the mean load that a plan may end above it has so many bits.
LIVE_AIM_BITS = 20
# Sixteenths of the room that is left for tokens that are expected to fit into it.
LIVE_ROOM_SHARE = 13
# Passes that look for pieces, at most, and the part of its aim, 2**-7, by which a pass may miss it.
LIVE_PASSES = 4
LIVE_MISS_BITS = 7
# Sets of ranks that the bound is found from, and halvings that find the level of each.
LIVE_CUTS = 8
LIVE_HALVINGS = 12

# Plans by time.

# The most ranks of a group and slots of a rank: fields of the words of ``time_steps`` and of
# ``time_cells``.
TIME_MOST_RANKS = 512
TIME_MOST_SLOTS = 1023
TIME_RANK_BITS = 10
TIME_RANK_MASK = (1 << TIME_RANK_BITS) - 1
# Plans that are judged as they are, plans that are improved, and numbers that are reported.
TIME_JUDGED = 3
TIME_CANDIDATES = 4
TIME_PLANS = TIME_JUDGED + TIME_CANDIDATES
TIME_REPORTED = 5


class TimeField(enum.IntEnum):
    """Rows of the table ``time_cells``, which has a column for each slot of a group's ranks."""

    EXPERT = 0
    """The expert, -1 if the slot is no cell's first one."""
    FIRST = 1
    """The first copy of the cell."""
    LAST = 2
    """The last one."""
    AT = 3
    """The place in ``time_lists`` of the expert's first cell."""
    WORD = 4
    """From the lowest bit: whether the cell is the expert's home, whether it is its balanced home,
    the cell's number among those of the expert, and how many these are, ten bits each."""
    BEFORE = 5
    """The cumulative share of the copies before the cell's, if copies take even shares."""
    END = 6
    """That of the cell's last copy."""


N_TIME_FIELDS = len(TimeField)


class TimeExtent(enum.IntEnum):
    """Columns of the table ``time_extents``, which has a row for each group."""

    N_STEPS = 0
    """Steps of classes."""
    MOST_CELLS = 1
    """The most cells of an expert."""
    MULTIPLICITY = 2
    """The most copies of an expert on a rank."""


N_TIME_EXTENTS = len(TimeExtent)

# Plans that keep tokens near.

# The most ranks of a group and slots of a rank: fields of the words of ``near_steps``, which hold,
# from the lowest, the other rank, the own place, whether both ranks are on one node, whether moves
# are relaxed, and the shift of the price.
NEAR_MOST_RANKS = 512
NEAR_MOST_SLOTS = 1023
NEAR_RANK_BITS = 10
NEAR_RANK_MASK = (1 << NEAR_RANK_BITS) - 1
NEAR_WITHIN_AT = 2 * NEAR_RANK_BITS
NEAR_RELAXED_AT = NEAR_WITHIN_AT + 1
NEAR_SHIFT_AT = NEAR_WITHIN_AT + 2
# The tokens of a group are so many bits of units, or one more.
NEAR_UNIT_BITS = 28
# The price of a token that leaves its node ends at the mean load over 2 to this power.
NEAR_LAST_SHIFT = 9
# Parts that plans are blended in, and the allowance for rounding: the mean load over 2 to this
# power.
NEAR_BLEND_BITS = 11
NEAR_BLEND = 1 << NEAR_BLEND_BITS
NEAR_ALLOWANCE_BITS = 14
# Plans that are compared beside the token plan, rows of scratch, and numbers that are reported.
NEAR_CANDIDATES = 4
NEAR_ROWS = 2 * NEAR_CANDIDATES + 1
NEAR_REPORTED = 7


class NearField(enum.IntEnum):
    """Rows of the table ``near_cells``, which has a column for each cell of a group."""

    EXPERT = 0
    """The expert, -1 where no cell is."""
    SLOT = 1
    """Where its numbers are in a row of scratch: first cells of all ranks, then second ones."""
    FIRST = 2
    """The first copy of the cell."""
    LAST = 3
    """The last one."""
    BEGIN = 4
    """The expert's first cell."""
    END = 5
    """The expert's last cell."""
    NODE_BEGIN = 6
    """The expert's first cell on the same node."""
    NODE_CELLS = 7
    """How many these are."""
    SOURCE = 8
    """The first rank of the node, over all ranks."""


N_NEAR_FIELDS = len(NearField)


class NearExtent(enum.IntEnum):
    """Columns of the table ``near_extents``, which has a row for each group."""

    N_STEPS = 0
    """Steps of classes."""
    MULTIPLICITY = 1
    """The most copies of an expert on a rank."""
    MOST_CELLS = 2
    """The most cells of a rank."""
    MOST_LONE = 3
    """The most experts of a rank that are there only."""
    MOST_ON_NODE = 4
    """The most cells of an expert on one node."""


N_NEAR_EXTENTS = len(NearExtent)

# Exchange of counts between ranks.

# The largest count, and the largest sum of counts: they are int32.
MAX_COUNT = (1 << 31) - 1
# Negative numbers stand in the place of counts that are not there. No solver takes them for tokens,
# and a sum over ranks to which one of them belongs is NO_COUNT.
# A count that the caller gave outside [0, MAX_COUNT].
INVALID_COUNT = -1
# A total that the kernels have still to add up; programs of the same launch wait for it.
PENDING_COUNT = -1
# The sum of a failed exchange, or a sum over ranks above MAX_COUNT.
NO_COUNT = -2
# Calls on different channels are independent.
CHANNELS = 64
# An exchange through peer memory takes at most so many ranks.
MAX_RANKS = 128
# Words of a row before its counts: 64-bit words in peer memory, int32 in rows that another library
# has gathered.
HEADER_WORDS = 2
GATHERED_HEADER_WORDS = 4
# The second word of a header: the number of counts in so many bits, and above it how the channel
# was opened.
COUNT_BITS = 16

# int64 words of the status in memory that the host can read. From STATUS_FIRST on there are
# STATUS_FIELDS words for each rank: whether it is to blame, its version, and the second word of its
# header, each for all ranks before the next.
STATUS_FAULT = 0
STATUS_EPOCH = 1
STATUS_CHANNEL = 2
STATUS_FIRST = 8
STATUS_FIELDS = 3

# What the first word of the status says.
FAULT_ABSENT = 1
FAULT_MISMATCH = 2
FAULT_OVERLAP = 3

# Moving the weights of live slots.

# int64 words of a rank's own memory: the number of the optimizer step whose weights are current,
# of this rank's pulls and returns of gradients so far, whether a wait has failed, and how many
# programs of a pull have ended, where that matters.
LIVE_STEP = 0
LIVE_PULLS = 1
LIVE_RETURNS = 2
LIVE_GATE = 3
LIVE_ENDED = 4
LIVE_STATE_WORDS = 5
# Words in memory that all ranks can write, in rows of MAX_RANKS, one word for each sender: the step
# whose weights it has published, the step whose weights it no longer reads, the return whose
# gradients it has written, and the return whose gradients it has added up. Then LIVE_PLANS rows of
# plans.
LIVE_PUBLISHED = 0
LIVE_FINISHED = 1
LIVE_GRADED = 2
LIVE_TAKEN = 3
LIVE_PLANNED = 4
# Pulls of which a plan's checksum is kept.
LIVE_PLANS = 8
LIVE_SIGNAL_ROWS = LIVE_PLANNED + LIVE_PLANS
