"""Ranks of a torchrun: their device, their group, and what they tell one another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lplb_triton.bench.ep.processes import NO_MULTICAST
from lplb_triton.bench.options import UsageError

__all__ = ["Ranks", "join_ranks", "read_ranks"]

# Limit on a single wait of the ranks for each other, in seconds.
TIMEOUT = 300.0
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """Place of this process among the ranks.

    Attributes
    ----------
    rank, local_rank, size : int
        Number among all ranks and among those of the host, and how many ranks there are.
    device : torch.device
        Where this rank's model is.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait for the device, and for the other ranks."""
        if self.on_gpu:
            torch.cuda.synchronize()
        dist.barrier()

    def slowest(self, times: Sequence[float]) -> list[float]:
        """Return the largest of every entry over the ranks."""
        most = torch.tensor(times, dtype=torch.float64, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return [float(value) for value in most.tolist()]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks, float64 on the CPU."""
        summed = values.to(self.device, torch.float64, copy=True)
        dist.all_reduce(summed)
        return summed.cpu()


def read_ranks(device: str) -> Ranks:
    """Read from the environment which rank this process is.

    Parameters
    ----------
    device
        ``"cuda"`` or ``"cpu"``.

    Raises
    ------
    UsageError
        If torchrun didn't start the process, if it is the only one, or if there is no GPU for it.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} not set: start a process for each rank, by "
            "torchrun --nproc-per-node 2 -m lplb_triton.bench frameworks ..."
        )
    try:
        rank, local, size = (int(os.environ[name]) for name in VARIABLES[:3])
    except ValueError as error:
        raise UsageError(f"RANK, LOCAL_RANK and WORLD_SIZE must be integers: {error}") from error
    if size < 2:
        raise UsageError(f"experts are spread over at least 2 ranks, torchrun started {size}")
    if device == "cpu":
        return Ranks(rank, local, size, torch.device("cpu"))
    found = torch.cuda.device_count()
    if local >= found:
        raise UsageError(f"rank {local} of this host has no GPU: torch finds {found}")
    return Ranks(rank, local, size, torch.device("cuda", local))


@contextmanager
def join_ranks(ranks: Ranks) -> Iterator[None]:
    """Have a process group of all ranks within the context.

    After an error it stays, since others may wait in it for this rank, and to let go of it could
    wait for them; torchrun ends them once this process has ended.
    """
    for name, value in NO_MULTICAST.items():
        os.environ.setdefault(name, value)
    if ranks.on_gpu:
        torch.cuda.set_device(ranks.device)
    dist.init_process_group(
        "nccl" if ranks.on_gpu else "gloo",
        timeout=timedelta(seconds=TIMEOUT),
        device_id=ranks.device if ranks.on_gpu else None,
    )
    yield
    dist.destroy_process_group()
