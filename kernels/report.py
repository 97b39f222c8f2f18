"""What kernels report to the host of bad input.

A report is two int64 words in memory that the host can read. The first one holds two int32:
whether an id was bad, and which other input was; the second one holds the bad id.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# Places in the first word, in int32.
REPORT_ID = tl.constexpr(0)
REPORT_INPUT = tl.constexpr(1)
# What REPORT_INPUT may say.
BAD_COUNTS = tl.constexpr(1)
BAD_RUNNING = tl.constexpr(2)
BAD_CUMULATIVE = tl.constexpr(3)

# The names of these inputs.
REPORTED_INPUTS = {
    int(BAD_COUNTS.value): "counts",
    int(BAD_RUNNING.value): "running",
    int(BAD_CUMULATIVE.value): "cumulative",
}


@triton.jit
def write_report(report_ptr, at, what, mask):
    """Write ``what`` to place ``at`` of the first word of a report, where ``mask`` says so."""
    flag_ptr = report_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + at
    # The mask is usually empty. If it is not, any of the threads that write will do.
    tl.store(flag_ptr + mask.to(tl.int32) * 0, what, mask=mask)


def read_report(report: Any) -> str | None:
    """Take one report out of the words that kernels write to, and clear it.

    ``report`` [2] int64 is a numpy array. Returns which input was bad: ``"idx"``, of which the
    second word is an example, ``"counts"``, ``"running"`` or ``"cumulative"``; None if none was.
    """
    flags = report[:1].view("int32")
    at = REPORT_ID.value if flags[REPORT_ID.value] else REPORT_INPUT.value
    what = int(flags[at])
    flags[at] = 0
    if at == REPORT_ID.value:
        return "idx"
    return REPORTED_INPUTS.get(what)
