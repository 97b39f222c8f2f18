"""Ranks of a gloo group, each a process of its own."""

import gc
import weakref

import torch
import torch.distributed as dist

# Its functions have the default group as a default argument and keep it; there is none yet.
import torch.distributed.nn
import torch.multiprocessing as mp


def run_ranks(check, ranks, folder, *args):
    """Call ``check(rank, group, *args)`` in a process for each rank; raise if one of them fails."""
    mp.spawn(_be_a_rank, args=(check, ranks, folder / f"store{ranks}", args), nprocs=ranks)


def _be_a_rank(rank, check, ranks, store, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    check(rank, dist.group.WORLD, *args)
    gc.collect()
    world = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    # The group's threads end with it. If something kept it, they would let tensors go while the
    # interpreter ends, which aborts the process now and then (pytorch/pytorch issue 190489).
    assert world() is None, "something still holds the process group"
