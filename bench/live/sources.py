"""Loads to compare live slots on: drawn workloads and recorded traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lplb_triton.bench.placement import Case, trace_cases
from lplb_triton.bench.workloads import Settings, draw
from lplb_triton.traces.trace import Trace

__all__ = ["Source", "draw_workloads", "take_trace"]


class Source(NamedTuple):
    """A workload, or a trace with a case for each layer and stretch."""

    name: str
    cases: tuple[Case, ...]

    @property
    def experts(self) -> int:
        """Logical experts of a layer."""
        return int(self.cases[0].history.shape[1])


def draw_workloads(names: Sequence[str], settings: Settings) -> list[Source]:
    """Draw workloads.

    Parameters
    ----------
    names
        Keys of `lplb_triton.bench.workloads.WORKLOADS`, without the adversarial one.
    settings
        Sizes and seed.

    Returns
    -------
    list of Source
        One case each.

    Raises
    ------
    ValueError
        If a name or a size is wrong.
    """
    return [Source(name, (draw(name, settings),)) for name in names]


def take_trace(
    trace: Trace,
    name: str,
    history: float | int,
    layers: Sequence[int] | None = None,
    batches: int | None = None,
) -> Source:
    """Cut a trace into history and test batches, and keep some of these.

    Parameters
    ----------
    trace
        Recorded counts.
    name
        Of the trace.
    history
        Batches to place by: a part in (0, 1) or a number.
    layers
        Indices; ``None`` for all.
    batches
        Test batches of each case at most, evenly spread; ``None`` for all.

    Returns
    -------
    Source

    Raises
    ------
    IndexError, ValueError
        As `lplb_triton.bench.placement.trace_cases` does.
    """
    cases = []
    for case in trace_cases(trace, history, layers):
        n = len(case.test)
        kept = torch.linspace(0, n - 1, min(n, batches or n), device="cpu").round().long()
        cases.append(replace(case, test=case.test[kept]))
    return Source(name, tuple(cases))
