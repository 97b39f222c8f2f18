"""Times of launches by replays of CUDA graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch

from lplb_triton import Solution
from lplb_triton.bench.types import Floats

__all__ = [
    "Launch",
    "Timer",
    "WrongAnswerError",
    "copy_to_cpu",
    "make_event",
    "compute_statistics",
    "time_in_rounds",
]


Launch = Callable[[], object]

T = TypeVar("T")

# Rounds through all launches: a short disturbance of the GPU affects each launch in one round only.
ROUNDS = 3


class WrongAnswerError(RuntimeError):
    """An answer failed its check, so it is not timed."""


class Timer(Protocol):
    """Measures launches that take microseconds."""

    def time_batches(
        self, launch: Launch, counts: torch.Tensor, batches: torch.Tensor
    ) -> list[float]:
        """Return the median microseconds of a launch for each batch, copied to ``counts`` first."""
        ...

    def time_rotation(self, launches: Sequence[Launch]) -> float:
        """Return the mean microseconds of a launch when all run one after the other."""
        ...

    def time_call(self, launch: Launch, about_us: float) -> float:
        """Return the median microseconds of a repeated launch; ``about_us`` is an estimate."""
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

    # Least and most launches in a graph that repeats one, and the time that it should take.
    MIN_CALLS, MAX_CALLS, GRAPH_US = 4, 10, 500.0
    # Timed replays of a graph in each of the rounds through all batches.
    BATCH_REPLAYS = 7

    def __init__(self, device: torch.device, replays: int = 6) -> None:
        self._replays = replays
        # Graphs share one memory pool, as they are made and used one after the other. The pool is
        # freed with the last graph that uses it, so one graph is kept.
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._anchor = self._capture([partial(torch.zeros, 1, device=device)])

    def time_rotation(self, launches: Sequence[Launch]) -> float:
        """Time a graph that holds every launch once, and return the mean time of a launch.

        Parameters
        ----------
        launches : sequence of callable
            Each has run before, so that nothing is compiled here.

        Returns
        -------
        float
            Microseconds per launch, the median over the replays.
        """
        return self._replay(launches) / len(launches)

    def time_call(self, launch: Launch, about_us: float) -> float:
        """Time a graph that repeats one launch.

        Parameters
        ----------
        launch : callable
            Has run before.
        about_us : float
            About how long it takes, which decides how often the graph repeats it.

        Returns
        -------
        float
            Microseconds per launch, the median over the replays.
        """
        wanted = round(self.GRAPH_US / max(about_us, 1e-3))
        calls = min(max(wanted, self.MIN_CALLS), self.MAX_CALLS)
        return self._replay([launch] * calls) / calls

    def time_batches(
        self, launch: Launch, counts: torch.Tensor, batches: torch.Tensor
    ) -> list[float]:
        """Time a launch on each of many batches, without a graph for each.

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
            Microseconds of each batch: the median of 21 replays, seven in each of three rounds
            through all batches.
        """
        once = self._capture([launch])
        often = self._capture([launch] * self.MAX_CALLS)
        about = self._time_batch_round([once] * len(batches), counts, batches, 1)[:, 0]
        calls = np.where(about * self.MAX_CALLS > self.GRAPH_US, 1, self.MAX_CALLS)
        graphs = [once if n == 1 else often for n in calls]
        rounds = [
            self._time_batch_round(graphs, counts, batches, self.BATCH_REPLAYS)
            for _ in range(ROUNDS)
        ]
        times: list[float] = (np.median(np.concatenate(rounds, axis=1), axis=1) / calls).tolist()
        return times

    def _time_batch_round(
        self,
        graphs: Sequence[torch.cuda.CUDAGraph],
        counts: torch.Tensor,
        batches: torch.Tensor,
        replays: int,
    ) -> Floats:
        """Return the microseconds of each replay ``[B, replays]`` of each batch's graph."""
        marks = [[make_event() for _ in range(replays + 1)] for _ in graphs]
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
            marks = [make_event() for _ in range(self._replays + 1)]
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


def make_event() -> torch.cuda.Event:
    """Make a CUDA event that takes the time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def compute_statistics(times: Sequence[float]) -> dict[str, float]:
    """Compute median, 95th and 99th percentile, maximum and mean.

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
    """Return microseconds per call of each launch, the median of rounds through all of them.

    A disturbance of a few milliseconds has ended by the next round, and the median drops it.
    ``progress`` is called once per launch, in the first round.
    """
    times = np.empty((ROUNDS, len(launches)))
    for at, row in enumerate(times):
        for index, launch in enumerate(launches):
            row[index] = timer.time_call(launch, about_us)
            if at == 0 and progress is not None:
                progress()
    found: list[float] = np.median(times, axis=0).tolist()
    return found


def copy_to_cpu(solution: Solution) -> Solution:
    """Copy a solution to the CPU, so that its numbers are not copied one by one."""
    return Solution(
        solution.shares.cpu(),
        solution.max_load.cpu(),
        solution.lower_bound.cpu(),
        solution.gap.cpu(),
        solution.iterations.cpu(),
        solution.status.cpu(),
        solution.tolerance,
    )
