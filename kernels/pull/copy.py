"""Copies of experts' weights from other ranks' memory, by a set number of programs.

The work is cut into chunks of equal size over all tensors of all copies, and the programs take them
in turn. A program reads two chunks ahead of the one that it writes: a read over NVLink takes about
a microsecond, in which a link delivers hundreds of kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lplb_triton.kernels.launch import KernelCall, launch_call

# Bytes of a unit: rows begin at multiples of it, and lanes read so much at a time.
UNIT_BYTES = 16
WORDS = tl.constexpr(UNIT_BYTES // 4)
# 32-bit words of a chunk, and warps of a program.
COPY_BLOCK = 8192
COPY_WARPS = 16
# Numbers of a tensor in the table, before the addresses of its first row on each rank.
TABLE_FIELDS = tl.constexpr(3)


@triton.jit
def load_chunk(
    chunk, n_chunks, copies_ptr, table_ptr, per_copy, n_tensors, n_ranks, BLOCK: tl.constexpr
):
    """Read a chunk; returns it with the unit where it belongs, and how many units are left there.

    Nothing is read of a chunk from ``n_chunks`` on.
    """
    there = chunk < n_chunks
    copy = chunk // per_copy
    place = chunk - copy * per_copy
    line = TABLE_FIELDS + n_ranks
    tensor = n_tensors * 0
    for other in range(1, n_tensors):
        tensor += (tl.load(table_ptr + other * line + 1) <= place).to(tl.int32)
    entry_ptr = table_ptr + tensor * line
    copy_ptr = copies_ptr + 1 + copy * 3
    slot = tl.load(copy_ptr, mask=there, other=0).to(tl.int64)
    rank = tl.load(copy_ptr + 1, mask=there, other=0)
    row = tl.load(copy_ptr + 2, mask=there, other=0).to(tl.int64)
    units = tl.load(entry_ptr)
    first = (place - tl.load(entry_ptr + 1)) * (BLOCK // WORDS)
    left = tl.where(there, units - first, 0)
    base = tl.load(entry_ptr + TABLE_FIELDS + rank) + (row * units + first) * 16
    from_ptr = tl.multiple_of(base.to(tl.pointer_type(tl.int32)), 16)
    at = tl.arange(0, BLOCK)
    # Nothing of this is read twice, and another rank may write it later: it stays out of L1.
    words = tl.load(from_ptr + at, mask=at < left * WORDS, other=0, cache_modifier=".cg")
    return words, tl.load(entry_ptr + 2) + slot * units + first, left


@triton.jit(
    do_not_specialize=["per_copy", "n_tensors", "n_ranks"],
    do_not_specialize_on_alignment=["copies_ptr", "table_ptr", "live_ptr"],
)
def copy_rows_kernel(
    copies_ptr,  # [1 + 3 slots] int32: number of copies; slot, rank and row of each
    table_ptr,  # [n_tensors, TABLE_FIELDS + n_ranks] int64, see `make_copy_table`
    live_ptr,  # int32, is written: for each tensor, a row for each slot
    per_copy,  # chunks of a copy, over all tensors
    n_tensors,
    n_ranks,
    BLOCK: tl.constexpr,  # 32-bit words of a chunk
):
    """Copy rows of every tensor to slots. Any grid."""
    n_chunks = tl.load(copies_ptr) * per_copy
    step = tl.num_programs(0)
    chunk = tl.program_id(0)
    if chunk < n_chunks:
        words, to, left = load_chunk(
            chunk, n_chunks, copies_ptr, table_ptr, per_copy, n_tensors, n_ranks, BLOCK
        )
        next_words, next_to, next_left = load_chunk(
            chunk + step, n_chunks, copies_ptr, table_ptr, per_copy, n_tensors, n_ranks, BLOCK
        )
        at = tl.arange(0, BLOCK)
        while chunk < n_chunks:
            later_words, later_to, later_left = load_chunk(
                chunk + 2 * step, n_chunks, copies_ptr, table_ptr, per_copy, n_tensors, n_ranks,
                BLOCK,
            )  # fmt: skip
            to_ptr = tl.multiple_of(live_ptr + to * WORDS, 16)
            tl.store(to_ptr + at, words, mask=at < left * WORDS)
            words, to, left = next_words, next_to, next_left
            next_words, next_to, next_left = later_words, later_to, later_left
            chunk += step


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
    """Make the table of `copy_rows` for one layer.

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


def copy_rows(copies: torch.Tensor, table: CopyTable, live: torch.Tensor, n_sms: int) -> None:
    """Copy rows to the slots ``live``, int32 memory at a multiple of 16 bytes.

    ``copies`` is the list that `begin_pull` has made; ``n_sms`` the number of programs.
    """
    n_tensors, line = table.table.shape
    args = (copies, table.table, live, table.per_copy, n_tensors, line - int(TABLE_FIELDS))
    launch_call(KernelCall(copy_rows_kernel, n_sms, args, (COPY_BLOCK,), {"num_warps": COPY_WARPS}))
