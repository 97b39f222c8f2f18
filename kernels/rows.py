"""Adding rows that other ranks sent to rows of this rank, and taking rows from two tensors."""

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


@triton.jit(do_not_specialize=["units", "stride_units", "blocks"])
def add_rows_kernel(
    own_ptr,  # [n, width], read and written at `rows` if IN_PLACE, else unused
    total_ptr,  # [n_summed, width], written unless IN_PLACE
    arrived_ptr,  # [n_arrived, width], rows `stride_units` times UNIT apart
    starts_ptr,  # [n_summed + 1] int32, where each row's part of `sources` begins
    sources_ptr,  # [n_arrived] int32, rows of `arrived` in the order in which they are added
    rows_ptr,  # [n_summed] int64, rows of `own`
    units,  # width / UNIT
    stride_units,
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
        arrived = _align(arrived_ptr + source * (stride_units * UNIT), UNIT)
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
    written to ``target`` ``[len(rows), ...]``. It is contiguous, and so is each row of ``arrived``.
    See `add_rows_kernel`.
    """
    width = arrived.shape[1:].numel()
    blocks = triton.cdiv(width, ROW_BLOCK)
    if not blocks or not len(rows):
        return
    stride = arrived.stride(0)
    aligned = not (target.data_ptr() % 16 or arrived.data_ptr() % 16)
    unit = ALIGNED_UNIT if aligned and not (width | stride) % ALIGNED_UNIT else 1
    units = width // unit, stride // unit
    args = (target, target, arrived, starts, sources, rows, *units, blocks)
    constants = (unit, in_place, arrived.dtype == torch.float64, ROW_BLOCK)
    grid = len(rows) * blocks
    launch_call(KernelCall(add_rows_kernel, grid, args, constants, {"num_warps": 8}))


@triton.jit(do_not_specialize=["n_one", "units"])
def take_rows_kernel(
    out_ptr,  # [n, width], is written
    one_ptr,  # [n_one, width]
    other_ptr,  # [n - n_one, width]
    index_ptr,  # [n] int64, rows of both, those of `other` counted from n_one on
    n_one,
    units,  # width / UNIT
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the rows that ``index`` names, one per program. Grid (n,)."""
    row = tl.program_id(0).to(tl.int64)
    width = units * UNIT
    source = tl.load(index_ptr + row)
    is_one = source < n_one
    from_one = _align(one_ptr + source * width, UNIT)
    from_other = _align(other_ptr + (source - n_one) * width, UNIT)
    to = _align(out_ptr + row * width, UNIT)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        # Masks of whole vectors, since a row ends at a multiple of UNIT.
        inside = column < width
        values = tl.load(from_one + column, mask=inside & is_one, other=0)
        values = tl.where(
            is_one, values, tl.load(from_other + column, mask=inside & (source >= n_one), other=0)
        )
        tl.store(to + column, values, mask=inside)


def take_rows(one: torch.Tensor, other: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return rows of two tensors as if ``other`` followed ``one``.

    Parameters
    ----------
    one, other : torch.Tensor
        ``[n_one, width]`` and ``[n_other, width]``, contiguous, of the same dtype.
    index : torch.Tensor
        ``[n]`` int64 in ``[0, n_one + n_other)``.

    Returns
    -------
    torch.Tensor
        ``[n, width]``.
    """
    width = one.shape[1]
    out = one.new_empty((len(index), width))
    if not out.numel():
        return out
    aligned = not (one.data_ptr() | other.data_ptr() | out.data_ptr()) % 16
    unit = ALIGNED_UNIT if aligned and not width % ALIGNED_UNIT else 1
    args = (out, one, other, index, len(one), width // unit)
    launch_call(KernelCall(take_rows_kernel, len(index), args, (unit, ROW_BLOCK), {"num_warps": 8}))
    return out
