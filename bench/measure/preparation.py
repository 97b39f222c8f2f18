"""Make the placements of cases and solve their batches with HiGHS, in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from lplb_triton import Placement, place
from lplb_triton._threads import one_thread
from lplb_triton.bench.balance import make_placement
from lplb_triton.bench.measure.cases import TRIALS, Case
from lplb_triton.bench.measure.loads import Loads
from lplb_triton.bench.types import Floats
from lplb_triton.testing.verify import optima_of

__all__ = [
    "Prepared",
]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A load set under a case, with its optima.

    Attributes
    ----------
    case, loads
        As given.
    placement
        Made from the history.
    optima
        ``[B, n_group]`` by HiGHS.
    """

    case: Case
    loads: Loads
    placement: Placement
    optima: Floats


def prepare(case: Case, loads: Loads, trials: int = TRIALS) -> Prepared:
    """Place by the history, and solve every batch with HiGHS, in one thread.

    Parameters
    ----------
    case, loads
        With the same number of experts.
    trials
        Effort of `lplb_triton.place`.

    Returns
    -------
    Prepared
    """
    with one_thread():
        if case.placement == "place":
            placement = place(
                loads.history, case.ep, redundant_per_rank=case.slots, trials=trials, device="cpu"
            )
        else:
            placement = make_placement(case.placement, loads.history, case.ep, case.slots)
        optima = optima_of(placement.problem(loads.batches))
    return Prepared(case, loads, placement, optima.reshape(len(loads.batches), -1))


def count_cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def prepare_all(
    jobs: Sequence[tuple[Case, Loads]], trials: int, processes: int
) -> Iterator[Iterator[Prepared]]:
    """Prepare load sets in processes of one thread each, while the body consumes them in order.

    Parameters
    ----------
    jobs
        Cases with their load sets.
    trials
        As for `prepare`.
    processes
        Number of processes; with 1, the calling process does the work.

    Yields
    ------
    iterator of Prepared
        In the order of the jobs. What the body has not consumed when it ends is cancelled.
    """
    if processes == 1:
        yield (prepare(case, loads, trials) for case, loads in jobs)
        return
    # CUDA does not work in a forked process if the parent has initialised it.
    pool = ProcessPoolExecutor(
        min(processes, max(1, len(jobs))),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_leave_interrupts,
    )
    try:
        futures = [pool.submit(prepare, case, loads, trials) for case, loads in jobs]
        yield (future.result() for future in futures)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_interrupts() -> None:
    """Ignore Ctrl-C, which the parent process handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
