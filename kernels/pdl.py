"""Programmatic dependent launch, as kernels see it: start the next one, await the one before."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def start_dependents(PDL: tl.constexpr):
    """Let the next kernel of the stream start; it waits by itself for what it needs of this one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Wait until the kernel before has ended and its writes can be read.

    Every program has to wait: if a kernel ended before the one ahead of it did, a third one could
    overtake both.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
