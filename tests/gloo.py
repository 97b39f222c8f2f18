"""Ranks of a gloo group, each a process of its own."""

import gc
import os
import weakref

import torch
import torch.distributed as dist

# Its functions have the default group as a default argument and keep it; there is none yet.
import torch.distributed.nn
import torch.multiprocessing as mp


def context():
    """How processes of tests start: as copies of one that has imported what takes long to import.

    That one starts no threads, knows no GPU and does nothing else; it ends with the tests.
    """
    made = mp.get_context("forkserver")
    made.set_forkserver_preload(["torch.distributed.nn", "lplb_triton"])
    return made


def run_ranks(check, ranks, folder, *args):
    """Call ``check(rank, group, *args)`` in a process for each rank; raise if one of them fails."""
    context()
    given = dict(os.environ), check, ranks, folder / f"store{ranks}", args
    mp.start_processes(_be_a_rank, given, nprocs=ranks, start_method="forkserver")


def _be_a_rank(rank, environment, check, ranks, store, args):
    # The process that this is a copy of has that of when it started.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    check(rank, dist.group.WORLD, *args)
    gc.collect()
    world = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    # The group's threads end with it. If something kept it, they would let tensors go while the
    # interpreter ends, which aborts the process now and then (pytorch/pytorch issue 190489).
    assert world() is None, "something still holds the process group"
