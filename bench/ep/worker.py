"""Rank of a section: its device, its process group, and its timers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from lplb_triton import sync
from lplb_triton.bench.ep.sizes import N_COUNTS, TIMEOUT, Job
from lplb_triton.bench.measure.pipeline import host_seconds
from lplb_triton.bench.measure.timer import compute_statistics, make_event
from lplb_triton.bench.types import Row

__all__ = ["Worker"]


class Worker:
    """One rank of a section, in a process of its own.

    Parameters
    ----------
    job
        Description of the section.
    rank
        Of this process; on ``cuda`` also the number of its GPU.
    """

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank, self.ranks = job, rank, job.ranks
        self.on_gpu = job.device == "cuda"
        self.device = torch.device("cuda", rank) if self.on_gpu else torch.device("cpu")
        if self.on_gpu:
            torch.cuda.set_device(self.device)
        torch.set_num_threads(1 if not self.on_gpu else 4)
        dist.init_process_group(
            "nccl" if self.on_gpu else "gloo",
            init_method=f"file://{job.folder}/store",
            rank=rank,
            world_size=job.ranks,
            timeout=timedelta(seconds=TIMEOUT),
            device_id=self.device if self.on_gpu else None,
        )
        world = dist.group.WORLD
        if world is None:
            raise RuntimeError("torch.distributed has no default group")
        self.group: dist.ProcessGroup = world
        self.rng = np.random.default_rng(1000 + rank)
        self.start = torch.zeros(1, dtype=torch.float32, device=self.device)

    def connect(self, kind: str) -> sync.Communicator:
        """Make a communicator of that kind for 256 counts, and compile its kernels."""
        made = sync.connect(
            self.group, kind, device=self.device, capacity=N_COUNTS,
            timeout=None if kind == "distributed" else TIMEOUT,
            domain_size=self.ranks // 2 if kind == "hierarchical" else None,
        )  # fmt: skip
        made.prepare(N_COUNTS)
        dist.barrier()
        return made

    def delay(self) -> None:
        """Wait for a short random time, in one call of a hundred."""
        if self.rng.random() < 0.01:
            if self.on_gpu:
                torch.cuda._sleep(int(self.rng.integers(200_000)))  # type: ignore[no-untyped-call]
            else:
                time.sleep(1e-3 * self.rng.random())

    def make_repeatable(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """Return a function that makes all calls: on a GPU the replay of a CUDA graph."""

        def eager() -> None:
            for call in calls:
                call()

        if not self.on_gpu:
            return eager
        eager()
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            eager()
        torch.cuda.synchronize()
        dist.barrier()
        return graph.replay

    def time_replays(self, calls: Sequence[Callable[[], object]]) -> Row:
        """Time many replays of the calls, and return the time of one call."""
        replay = self.make_repeatable(calls)
        times = []
        for _ in range(self.job.sizes.replays):
            # Wait for all ranks, so that no time includes the delay of another rank.
            dist.all_reduce(self.start)
            if self.on_gpu:
                begin, end = make_event(), make_event()
                begin.record()
                replay()
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end) * 1e3 / len(calls))
            else:
                begun = time.perf_counter()
                replay()
                times.append((time.perf_counter() - begun) * 1e6 / len(calls))
        return self.summarize(times[len(times) // 10 :])

    def time_on_host(self, calls: Sequence[Callable[[], object]]) -> Row:
        """Time an eager call on the host, without waiting for the device."""
        dist.barrier()
        seconds, _ = host_seconds(calls, self.device)
        return self.summarize([1e6 * value for value in seconds])

    def summarize(self, microseconds: list[float]) -> Row:
        """Return statistics of this rank's times, and of the slowest rank's."""
        slowest = self.slowest(microseconds)
        return {"rank 0": compute_statistics(microseconds), "slowest": compute_statistics(slowest)}

    def slowest(self, times: list[float]) -> list[float]:
        """Return the largest of every entry over the ranks."""
        most = torch.tensor(times, dtype=torch.float64, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return [float(value) for value in most.tolist()]

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks on the CPU, in order of ranks."""
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(parts, mine)
        return torch.stack(parts).cpu()

    def sum_over_ranks(self, value: int) -> int:
        """Return the sum of a value over the ranks."""
        summed = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(summed)
        return int(summed)
