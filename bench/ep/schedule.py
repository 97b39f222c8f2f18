"""Run the sections one after the other, within a limit on their total time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence

from lplb_triton.bench.ep.processes import run_section
from lplb_triton.bench.ep.sections import SECTIONS, reason_to_skip
from lplb_triton.bench.ep.sizes import KINDS, Job, Sizes
from lplb_triton.bench.types import Row

__all__ = ["describe_outcome", "run_sections"]


def run_sections(
    ranks: int,
    device: str,
    sizes: Sizes,
    *,
    sections: Sequence[str] = tuple(SECTIONS),
    kinds: Sequence[str] = KINDS,
    seconds: float = 570.0,
    after: Callable[[str, Row], object] = lambda name, result: None,
) -> dict[str, Row]:
    """Run sections one after the other.

    Parameters
    ----------
    ranks : int
        Processes, each with a GPU of its own on ``cuda``; divides 256.
    device : {"cuda", "cpu"}
        Device of the processes.
    sizes : Sizes
        How much the sections do.
    sections : sequence of str
        Names in `SECTIONS`.
    kinds : sequence of str
        Back ends in `KINDS`; hierarchical runs as two domains.
    seconds : float
        Limit on the total time; each section has a limit of its own too.
    after : callable
        Called with the name and the figures of each section when it ends.

    Returns
    -------
    dict
        Figures by ``section:variant``. ``failed`` in them says what went wrong, ``skipped`` why
        there are none.
    """
    end = time.monotonic() + seconds
    found: dict[str, Row] = {}
    for name in sections:
        for variant in SECTIONS[name].variants:
            if variant in KINDS and variant not in kinds:
                continue
            left = end - time.monotonic()
            reason = reason_to_skip(name, variant, ranks, device)
            if reason is not None:
                result: Row = {"skipped": reason}
            elif left < 20:
                result = {"failed": "no time left"}
            else:
                with tempfile.TemporaryDirectory() as folder:
                    job = Job(name, variant, ranks, device, sizes, folder)
                    result = run_section(job, min(left, SECTIONS[name].seconds))
            found[f"{name}:{variant}"] = result
            after(f"{name}:{variant}", result)
    return found


def describe_outcome(result: Row) -> str:
    """Describe in a few words how a section ended."""
    for word in ("failed", "skipped"):
        if word in result:
            return f"{word}: {result[word]}"
    return f"done in {result['seconds']:.0f} s"
