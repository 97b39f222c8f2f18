"""Times of launches by replays of CUDA graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import Solution

__all__ = [
    "Floats",
    "Launch",
    "Row",
    "Timer",
    "WrongAnswerError",
    "on_cpu",
    "statistics",
    "time_in_rounds",
]


Floats = NDArray[np.float64]

Launch = Callable[[], object]

Row = dict[str, Any]

T = TypeVar("T")

# Times through all launches, so that a disturbance meets each only once.
ROUNDS = 3


class WrongAnswerError(RuntimeError):
    """An answer failed its gate, so there is no time for it."""


class Timer(Protocol):
    """Measures launches that take microseconds."""

    def by_batch(self, launch: Launch, counts: torch.Tensor, batches: torch.Tensor) -> list[float]:
        """Median microseconds of a launch for each row, which it finds in ``counts``."""
        ...

    def rotation(self, launches: Sequence[Launch]) -> float:
        """Mean microseconds of one launch, all of them one after the other."""
        ...

    def per_call(self, launch: Launch, about_us: float) -> float:
        """Median microseconds of one launch, repeated; ``about_us`` is a guess."""
        ...


class GraphTimer:
    """Times launches by CUDA-graph replay.

    Parameters
    ----------
    device : torch.device
        The GPU.
    replays : int
        Timed replays of each graph.
    """

    # Launches in a graph that repeats one of them: fewer where one takes long.
    MIN_CALLS, MAX_CALLS, GRAPH_US = 4, 10, 500.0
    # Timed replays of a graph in each of the rounds through all batches: at least 20 in all.
    BATCH_REPLAYS = 7

    def __init__(self, device: torch.device, replays: int = 6) -> None:
        self._replays = replays
        # Graphs share one pool: they are made and used one after the other. A pool only lives as
        # long as some graph that uses it, so one is kept.
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._anchor = self._capture([partial(torch.zeros, 1, device=device)])

    def rotation(self, launches: Sequence[Launch]) -> float:
        """Mean microseconds per launch of a graph that holds all of them once.

        Parameters
        ----------
        launches : sequence of callable
            Each has run before, so that nothing is compiled here.

        Returns
        -------
        float
            Median over the replays.
        """
        return self._replay(launches) / len(launches)

    def per_call(self, launch: Launch, about_us: float) -> float:
        """Microseconds per launch of a graph that repeats one.

        Parameters
        ----------
        launch : callable
            Has run before.
        about_us : float
            About how long it takes, which decides how often the graph repeats it.

        Returns
        -------
        float
            Median over the replays.
        """
        wanted = round(self.GRAPH_US / max(about_us, 1e-3))
        calls = min(max(wanted, self.MIN_CALLS), self.MAX_CALLS)
        return self._replay([launch] * calls) / calls

    def by_batch(self, launch: Launch, counts: torch.Tensor, batches: torch.Tensor) -> list[float]:
        """Microseconds of a launch on each of many batches, without a graph for each.

        A graph reads its counts from where they were at its capture, so each batch is copied there
        before its replays; the copy and one replay after it are not timed. A launch that is short
        is repeated within the graph, since a replay of a single one takes some microseconds more.

        Parameters
        ----------
        launch : callable
            Reads ``counts`` and leaves them alone. Has run before.
        counts : torch.Tensor
            Overwritten.
        batches : torch.Tensor
            ``[B, ...]``, on the device, rows like ``counts``.

        Returns
        -------
        list of float
            Of each batch, the median of 21 replays, seven in each of three rounds through all.
        """
        once = self._capture([launch])
        often = self._capture([launch] * self.MAX_CALLS)
        about = self._batch_round([once] * len(batches), counts, batches, 1)[:, 0]
        calls = np.where(about * self.MAX_CALLS > self.GRAPH_US, 1, self.MAX_CALLS)
        graphs = [once if n == 1 else often for n in calls]
        rounds = [
            self._batch_round(graphs, counts, batches, self.BATCH_REPLAYS) for _ in range(ROUNDS)
        ]
        times: list[float] = (np.median(np.concatenate(rounds, axis=1), axis=1) / calls).tolist()
        return times

    def _batch_round(
        self,
        graphs: Sequence[torch.cuda.CUDAGraph],
        counts: torch.Tensor,
        batches: torch.Tensor,
        replays: int,
    ) -> Floats:
        """Microseconds of each replay ``[B, replays]`` of each batch's graph."""
        marks = [[record_event() for _ in range(replays + 1)] for _ in graphs]
        with torch.cuda.stream(self._stream):
            for graph, batch, (first, *others) in zip(graphs, batches, marks, strict=True):
                counts.copy_(batch)
                graph.replay()
                first.record()
                for mark in others:
                    graph.replay()
                    mark.record()
        torch.cuda.synchronize()
        return 1e3 * np.array(
            [[a.elapsed_time(b) for a, b in itertools.pairwise(row)] for row in marks]
        )

    def _replay(self, launches: Sequence[Launch]) -> float:
        graph = self._capture(launches)
        with torch.cuda.stream(self._stream):
            graph.replay()
            marks = [record_event() for _ in range(self._replays + 1)]
            marks[0].record()
            for mark in marks[1:]:
                graph.replay()
                mark.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]
        return 1e3 * float(np.median(times))

    def _capture(self, launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # torch.cuda.graph() would also empty the allocator's cache, which costs milliseconds.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            try:
                for launch in launches:
                    launch()
            finally:
                graph.capture_end()
        return graph


def record_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def statistics(times: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile, maximum and mean.

    Parameters
    ----------
    times : sequence of float
        At least one.

    Returns
    -------
    dict
        ``median``, ``p95``, ``p99``, ``max``, ``mean``.
    """
    values = np.asarray(times, dtype=np.float64)
    return {
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "p99": float(np.percentile(values, 99)),
        "max": float(values.max()),
        "mean": float(values.mean()),
    }


def time_in_rounds(
    timer: Timer,
    launches: Sequence[Launch],
    about_us: float,
    progress: Callable[[], None] | None = None,
) -> list[float]:
    """Microseconds per call of each launch, the median of rounds through all of them.

    What disturbs a GPU for a few milliseconds is over when a launch's turn comes again.
    ``progress`` is called once per launch, in the first round.
    """
    times = np.empty((ROUNDS, len(launches)))
    for at, row in enumerate(times):
        for index, launch in enumerate(launches):
            row[index] = timer.per_call(launch, about_us)
            if at == 0 and progress is not None:
                progress()
    found: list[float] = np.median(times, axis=0).tolist()
    return found


def on_cpu(solution: Solution) -> Solution:
    """Copy all of a solution to the CPU at once, rather than number by number."""
    return Solution(
        solution.shares.cpu(),
        solution.max_load.cpu(),
        solution.lower_bound.cpu(),
        solution.gap.cpu(),
        solution.iterations.cpu(),
        solution.status.cpu(),
        solution.tolerance,
    )
