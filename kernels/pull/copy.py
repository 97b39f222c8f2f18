"""Copies of experts' weights from other ranks' memory, by a set number of programs.

Each program finds in the plan what this rank reads, and waits by itself until the homes have
published their weights. The work is cut into chunks of equal size over all tensors of all copies. A
program reads two chunks ahead of the one that it writes: a read over NVLink takes about a
microsecond, in which a link delivers hundreds of kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.launch import KernelCall, launch_call
from lplb_triton.kernels.pull.begin import compare_plans, find_rows
from lplb_triton.kernels.pull.signals import LANES, WARPS, Signals, await_or_report, on_gpu

STEP = tl.constexpr(_layout.LIVE_STEP)
ENDED = tl.constexpr(_layout.LIVE_ENDED)
PUBLISHED = tl.constexpr(_layout.LIVE_PUBLISHED)
# Bytes of a unit: rows begin at multiples of it, and lanes read so much at a time.
UNIT_BYTES = 16
WORDS = tl.constexpr(UNIT_BYTES // 4)
# 32-bit words of a chunk, and warps of a program.
COPY_BLOCK = 8192
COPY_WARPS = 16
# Whether each program copies chunks that follow one another; else programs take chunks in turn.
COPY_RUNS = 0
# Numbers of a tensor in the table, before the addresses of its first row on each rank.
TABLE_FIELDS = tl.constexpr(3)
# Live slots of a rank, at most: a program keeps what it reads for them in registers.
MOST_SLOTS = 2


@triton.jit
def load_chunk(
    chunk, end, first, home, row, second_home, second_row, table_ptr, per_copy, n_tensors, n_ranks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Read a chunk; returns it with the unit where it belongs, and how many units are left there.

    Nothing is read of a chunk from ``end`` on. ``first`` is the slot of the first copy.
    """
    there = chunk < end
    copy = chunk // per_copy
    place = chunk - copy * per_copy
    line = TABLE_FIELDS + n_ranks
    tensor = n_tensors * 0
    for other in range(1, n_tensors):
        tensor += (tl.load(table_ptr + other * line + 1) <= place).to(tl.int32)
    entry_ptr = table_ptr + tensor * line
    slot = (first + copy).to(tl.int64)
    rank = tl.where(there, tl.where(slot == 0, home, second_home), 0)
    source = tl.where(there, tl.where(slot == 0, row, second_row), 0).to(tl.int64)
    units = tl.load(entry_ptr)
    begin = (place - tl.load(entry_ptr + 1)) * (BLOCK // WORDS)
    left = tl.where(there, units - begin, 0)
    base = tl.load(entry_ptr + TABLE_FIELDS + rank) + (source * units + begin) * 16
    from_ptr = tl.multiple_of(base.to(tl.pointer_type(tl.int32)), 16)
    at = tl.arange(0, BLOCK)
    # Nothing of this is read twice, and another rank may write it later: it stays out of L1.
    words = tl.load(from_ptr + at, mask=at < left * WORDS, other=0, cache_modifier=".cg")
    return words, tl.load(entry_ptr + 2) + slot * units + begin, left


@triton.jit
def copy_chunks(
    program, programs, count, first, home, row, second_home, second_row, table_ptr, live_ptr,
    per_copy, n_tensors, n_ranks, RUNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy one program's part of the chunks of ``count`` copies."""
    n_chunks = count * per_copy
    if RUNS:
        chunk = program * n_chunks // programs
        end = (program + 1) * n_chunks // programs
        step = programs * 0 + 1
    else:
        chunk = program
        end = n_chunks
        step = programs
    if chunk < end:
        words, to, left = load_chunk(
            chunk, end, first, home, row, second_home, second_row, table_ptr, per_copy, n_tensors,
            n_ranks, BLOCK,
        )  # fmt: skip
        next_words, next_to, next_left = load_chunk(
            chunk + step, end, first, home, row, second_home, second_row, table_ptr, per_copy,
            n_tensors, n_ranks, BLOCK,
        )  # fmt: skip
        at = tl.arange(0, BLOCK)
        while chunk < end:
            later_words, later_to, later_left = load_chunk(
                chunk + 2 * step, end, first, home, row, second_home, second_row, table_ptr,
                per_copy, n_tensors, n_ranks, BLOCK,
            )  # fmt: skip
            to_ptr = tl.multiple_of(live_ptr + to * WORDS, 16)
            tl.store(to_ptr + at, words, mask=at < left * WORDS)
            words, to, left = next_words, next_to, next_left
            next_words, next_to, next_left = later_words, later_to, later_left
            chunk += step


@triton.jit
def note_held(state_ptr, plan_ptr, held_ptr, rank, programs, ready, SLOTS: tl.constexpr):
    """Note what slots hold, in the last program that comes here: all have read the old note."""
    one = tl.full((), 1, tl.int64)
    earlier = tl.atomic_add(state_ptr + ENDED, one, sem="acq_rel", scope="gpu")
    if earlier == programs - 1:
        tl.store(state_ptr + ENDED, one * 0)
        for slot in tl.static_range(SLOTS):
            expert = tl.load(plan_ptr + rank * SLOTS + slot)
            tl.store(held_ptr + slot, expert, mask=ready & (expert >= 0))


@triton.jit(
    do_not_specialize=["rank", "n_ranks", "timeout_ms", "layer", "per_copy", "n_tensors"],
    do_not_specialize_on_alignment=["plan_ptr", "homes_ptr", "held_ptr", "table_ptr", "live_ptr"],
)
def pull_kernel(
    addresses_ptr,  # [n_ranks] int64: where each rank's signals are
    state_ptr,  # [LIVE_STATE_WORDS] int64, this rank's own
    status_ptr,  # [STATUS_FIRST + 3 n_ranks] int64 in pinned host memory, see _layout.py
    rank,  # this rank's number
    n_ranks,
    timeout_ms,
    plan_ptr,  # [n_ranks, SLOTS] int32: expert of each live slot, -1 for none
    homes_ptr,  # [n_logical, 2] int32: rank and static slot of each expert's original
    held_ptr,  # [SLOTS] int32, with RESIDENT: experts in the slots before, is written
    layer,  # number of the layer
    table_ptr,  # [n_tensors, TABLE_FIELDS + n_ranks] int64, see `make_copy_table`
    live_ptr,  # int32, is written: for each tensor, a row for each slot
    per_copy,  # chunks of a copy, over all tensors
    n_tensors,
    SLOTS: tl.constexpr,  # at most MOST_SLOTS
    RESIDENT: tl.constexpr,  # whether what a slot holds already isn't read again
    COMPARE: tl.constexpr,  # whether to compare plans, as in a forward pass
    COPY: tl.constexpr,  # whether to copy, or only to wait until copies can begin
    RUNS: tl.constexpr,  # see COPY_RUNS
    BLOCK: tl.constexpr,  # 32-bit words of a chunk
    ON_GPU: tl.constexpr,  # whether this runs on a GPU, not in the interpreter
):
    """Copy rows of live experts to slots once the ranks that it reads have published them.

    Nothing is copied if one of them doesn't in time, or if anything failed before. Any grid with
    COPY, of which the first program only compares plans with COMPARE; else (1,).
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if COMPARE:
        if program == 0:
            compare_plans(
                plan_ptr, n_ranks * SLOTS, layer, addresses_ptr, state_ptr, status_ptr, rank,
                n_ranks, ON_GPU,
            )  # fmt: skip
        if COPY:
            program -= 1
            programs -= 1
    if program >= 0:
        count, first, home, row, second_home, second_row = find_rows(
            plan_ptr, homes_ptr, held_ptr, rank, SLOTS, RESIDENT
        )
        if count > 0:
            lane = tl.arange(0, LANES)
            needed = (lane == home) | (lane == second_home)
            step = tl.load(state_ptr + STEP)
            # Each program that waits in vain may report it; the first one is heard.
            ready = await_or_report(
                addresses_ptr, state_ptr, status_ptr, PUBLISHED, rank, n_ranks, needed, step, step,
                timeout_ms, ON_GPU,
            )  # fmt: skip
            # What one thread has acquired holds for all threads behind this barrier.
            tl.debug_barrier()
            if COPY:
                copy_chunks(
                    program, programs, tl.where(ready, count, 0), first, home, row, second_home,
                    second_row, table_ptr, live_ptr, per_copy, n_tensors, n_ranks, RUNS, BLOCK,
                )  # fmt: skip
            if RESIDENT:
                note_held(state_ptr, plan_ptr, held_ptr, rank, programs, ready, SLOTS)


class CopyTable(NamedTuple):
    """Where the rows of each tensor are, on every rank and in this rank's slots."""

    table: torch.Tensor
    """[n_tensors, TABLE_FIELDS + n_ranks] int64."""
    per_copy: int
    """Chunks of a copy, over all tensors."""


def make_copy_table(
    row_units: Sequence[int],
    offsets: Sequence[int],
    addresses: Sequence[Sequence[int]],
    device: torch.device,
) -> CopyTable:
    """Make the table of `pull_rows` for one layer.

    Parameters
    ----------
    row_units
        Units of 16 bytes of a row, by tensor.
    offsets
        Units before the tensor's slot 0 in the memory of the slots, by tensor.
    addresses
        By tensor, the address of its first row on every rank, a multiple of 16.
    device
        Of the table.
    """
    lines, first = [], 0
    for units, offset, bases in zip(row_units, offsets, addresses, strict=True):
        lines.append([units, first, offset, *bases])
        first += -(-units * UNIT_BYTES // (4 * COPY_BLOCK))
    return CopyTable(torch.tensor(lines, dtype=torch.int64, device=device), first)


def pull_rows(
    signals: Signals,
    plan: torch.Tensor,
    homes: torch.Tensor,
    held: torch.Tensor | None,
    layer: int,
    table: CopyTable,
    live: torch.Tensor,
    n_sms: int,
    *,
    compare: bool,
    stream: int | None = None,
) -> None:
    """Copy what ``plan`` names to the slots ``live``, int32 memory at a multiple of 16 bytes.

    ``n_sms`` programs copy; with 0 the kernel ends once copies can begin. See `pull_kernel`, and
    `launch_call` about ``stream``.
    """
    slots = plan.shape[1]
    if slots > MOST_SLOTS:
        raise ValueError(f"plan must have at most {MOST_SLOTS} live slots a rank, got {slots}")
    args = (
        *signals.args(), plan, homes, homes if held is None else held, layer, table.table, live,
        table.per_copy, len(table.table),
    )  # fmt: skip
    constants = (
        slots, int(held is not None), int(compare), int(n_sms > 0), COPY_RUNS, COPY_BLOCK, on_gpu()
    )  # fmt: skip
    grid = n_sms + int(compare) if n_sms else 1
    options = {"num_warps": COPY_WARPS if n_sms else WARPS}
    launch_call(KernelCall(pull_kernel, grid, args, constants, options), stream)
