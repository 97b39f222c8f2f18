"""Section ``kill``: check that the other ranks notice when one dies between two batches."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from lplb_triton import sync
from lplb_triton.bench.ep.sizes import N_COUNTS
from lplb_triton.bench.ep.worker import Worker
from lplb_triton.bench.measure.timer import WrongAnswerError
from lplb_triton.bench.types import Row

__all__ = ["kill_one"]

# Time limit of the exchange in this section, in seconds.
KILL_TIMEOUT = 3.0


def kill_one(worker: Worker, kind: str) -> Row:
    """Kill the last rank between two batches; the others must name it within the time limit."""
    victim = worker.ranks - 1
    bound = None if worker.on_gpu and kind == "distributed" else KILL_TIMEOUT
    communicator = sync.connect(
        worker.group, kind, device=worker.device, timeout=bound, capacity=N_COUNTS
    )
    communicator.prepare(N_COUNTS)
    counts = torch.ones(N_COUNTS, dtype=torch.int32, device=worker.device)
    version = torch.zeros(1, dtype=torch.int32, device=worker.device)
    total = torch.empty_like(counts)
    dist.barrier()
    for _ in range(100):
        communicator.exchange(counts, version, total)
    communicator.check()
    dist.barrier()
    if worker.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    try:
        communicator.exchange(counts, version, total)
        communicator.check()
    except sync.SyncError as error:
        took = time.monotonic() - begun
        communicator.close()
        if error.ranks != (victim,) or error.epoch != 101 or took > KILL_TIMEOUT + 6:
            raise WrongAnswerError(f"after {took:.2f} s: {error}") from error
        return {"took_seconds": round(took, 2), "error": str(error)}
    raise WrongAnswerError("a dead rank was not missed")
