"""Run one section in processes of its own, within a time limit."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

import torch.multiprocessing as mp

from lplb_triton.bench.ep.sections import SECTIONS
from lplb_triton.bench.ep.sizes import Job
from lplb_triton.bench.ep.worker import Worker
from lplb_triton.bench.types import Row

__all__ = ["blocked_interrupts", "run_section"]

# Nothing here needs NVLink multicast, which not every host allows.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


def _run_rank(rank: int, job: Job) -> None:
    """Run one rank of a section in this process, and leave its result in a file."""
    # The libraries read these when they are initialised, which happens below.
    os.environ.update(NO_MULTICAST)
    try:
        result = SECTIONS[job.section].work(Worker(job, rank), job.variant)
    except Exception as error:
        traceback.print_exc()
        result = {"failed": f"rank {rank}: {type(error).__name__}: {error}"}
    path = Path(job.folder, str(rank))
    path.write_text(json.dumps(result))
    # The rename is atomic: this process may be killed at any time.
    path.rename(path.with_suffix(".json"))
    sys.stderr.flush()
    # The interpreter's teardown would wait for the other ranks, of which one may be dead.
    os._exit("failed" in result)


@contextmanager
def blocked_interrupts() -> Iterator[None]:
    """Let a process that is started here never see Ctrl-C: the one that starts it ends it.

    A process inherits the blocked signals of the thread that starts it. One that comes meanwhile
    is delivered at the end.
    """
    # It unblocks signals if it has to start a process of its own, which `Process.start` asks for.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_section(job: Job, seconds: float) -> Row:
    """Run one section in processes of its own, for at most ``seconds``."""
    context = mp.get_context("spawn")
    victim = job.ranks - 1 if job.section == "kill" else None
    workers = [context.Process(target=_run_rank, args=(rank, job)) for rank in range(job.ranks)]
    begun = time.monotonic()
    failed = over = done = False
    try:
        for worker in workers:
            with blocked_interrupts():
                worker.start()
        while not (done or failed):
            time.sleep(0.05)
            codes = [worker.exitcode for worker in workers]
            done = None not in codes
            over = not done and time.monotonic() - begun > seconds
            failed = over or any(
                code not in (None, 0) and rank != victim for rank, code in enumerate(codes)
            )
        if failed and not done:
            # Others may be about to say why they fail too.
            time.sleep(2.0)
    finally:
        for worker in workers:
            if worker.exitcode is None and worker.pid is not None:
                worker.kill()
                worker.join(10)
    paths = [Path(job.folder, f"{rank}.json") for rank in range(job.ranks)]
    left = [
        # JSON knows no infinity: what diverged has no figure.
        json.loads(path.read_text(), parse_constant=lambda name: None) if path.exists() else {}
        for path in paths
    ]
    result: Row = left[0]
    if failed:
        said = [row["failed"] for row in left if "failed" in row]
        if over:
            said.append(f"not done within {seconds:.3g} s")
        result["failed"] = "; ".join(dict.fromkeys(said)) or f"exit codes by rank {codes}"
    result["seconds"] = time.monotonic() - begun
    return result
