"""Adding rows that other ranks sent to rows of this rank, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lplb_triton.kernels.launch import KernelCall, launch_call

# Elements that one program adds.
ROW_BLOCK = 2048
# A row of a multiple of so many elements, of 16 bits or more, ends at a multiple of 16 bytes.
ALIGNED_UNIT = 8


@triton.jit
def _align(pointer, UNIT: tl.constexpr):
    """Tell the compiler that a row begins at a multiple of 16 bytes, if UNIT says that it does."""
    if UNIT > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["units", "blocks"])
def add_rows_kernel(
    own_ptr,  # [n, width], read and written at `rows` if IN_PLACE, else unused
    total_ptr,  # [n_summed, width], written unless IN_PLACE
    arrived_ptr,  # [n_arrived, width]
    starts_ptr,  # [n_summed + 1] int32, where each row's part of `sources` begins
    sources_ptr,  # [n_arrived] int32, rows of `arrived` in the order in which they are added
    rows_ptr,  # [n_summed] int64, rows of `own`
    units,  # width / UNIT
    blocks,
    UNIT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    DOUBLE: tl.constexpr,  # whether sums are made in float64, else in float32
    BLOCK: tl.constexpr,
):
    """Add up the rows that arrived for each row, one block of a row per program.

    Grid (n_summed blocks,), where blocks = cdiv(width, BLOCK).
    """
    width = units * UNIT
    number = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    kind = tl.float64 if DOUBLE else tl.float32
    total = tl.zeros([BLOCK], dtype=kind)
    own = _align(own_ptr + tl.load(rows_ptr + number) * width, UNIT)
    if IN_PLACE:
        total = tl.load(own + column, mask=inside, other=0).to(kind)
    for k in range(tl.load(starts_ptr + number), tl.load(starts_ptr + number + 1)):
        source = tl.load(sources_ptr + k).to(tl.int64)
        arrived = _align(arrived_ptr + source * width, UNIT)
        total += tl.load(arrived + column, mask=inside, other=0).to(kind)
    if IN_PLACE:
        tl.store(own + column, total.to(own_ptr.dtype.element_ty), mask=inside)
    else:
        to = _align(total_ptr + number.to(tl.int64) * width, UNIT)
        tl.store(to + column, total.to(total_ptr.dtype.element_ty), mask=inside)


def add_rows(
    target: torch.Tensor,
    arrived: torch.Tensor,
    starts: torch.Tensor,
    sources: torch.Tensor,
    rows: torch.Tensor,
    *,
    in_place: bool,
) -> None:
    """Add rows of ``arrived`` ``[n_arrived, ...]`` up, in float32 or, for float64, in that.

    With ``in_place`` they are added to the given rows of ``target`` ``[n, ...]``, else the sums are
    written to ``target`` ``[len(rows), ...]``. Both are contiguous. See `add_rows_kernel`.
    """
    width = arrived.shape[1:].numel()
    blocks = triton.cdiv(width, ROW_BLOCK)
    if not blocks or not len(rows):
        return
    aligned = all(
        one.data_ptr() % 16 == 0 and width % ALIGNED_UNIT == 0 for one in (target, arrived)
    )
    unit = ALIGNED_UNIT if aligned else 1
    args = (target, target, arrived, starts, sources, rows, width // unit, blocks)
    constants = (unit, in_place, arrived.dtype == torch.float64, ROW_BLOCK)
    grid = len(rows) * blocks
    launch_call(KernelCall(add_rows_kernel, grid, args, constants, {"num_warps": 8}))
