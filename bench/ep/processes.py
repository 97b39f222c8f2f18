"""Run a section in one process per rank, within a time limit."""

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

__all__ = ["NO_MULTICAST", "blocked_interrupts", "run_section"]

# No section needs NVLink multicast, which some hosts do not allow.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


def _run_rank(rank: int, job: Job) -> None:
    """Run one rank of a section in this process, and write its result to a file."""
    # Set before the libraries are initialised below, as they read the variables then.
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
    # A normal exit would wait for the other ranks, of which one may be dead.
    os._exit("failed" in result)


@contextmanager
def blocked_interrupts() -> Iterator[None]:
    """Start processes in this context that never receive Ctrl-C, as their parent ends them.

    A process inherits the blocked signals of the thread that starts it. A Ctrl-C that arrives in
    the meantime is delivered at the end of the context.
    """
    # `Process.start` starts the resource tracker if there is none, which would unblock signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_section(job: Job, seconds: float) -> Row:
    """Run one section in one process per rank, for at most ``seconds``."""
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
            # Give the other ranks time to report their errors too.
            time.sleep(2.0)
    finally:
        for worker in workers:
            if worker.exitcode is None and worker.pid is not None:
                worker.kill()
                worker.join(10)
    paths = [Path(job.folder, f"{rank}.json") for rank in range(job.ranks)]
    left = [
        # JSON has no infinity, so a value that diverged becomes None.
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
