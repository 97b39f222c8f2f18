"""Train a small MoE layer with live slots, on any number of ranks.

    torchrun --nproc-per-node 2 examples/live_slots.py            # --live 0: without live slots
    torchrun --nproc-per-node 2 examples/live_slots.py --live 1   # the same losses, even ranks

Every expert is at home, without static copies; the popular experts change in every batch. It runs
on CPUs over gloo, and on GPUs over NCCL.
"""

from __future__ import annotations

import argparse
import gc

import torch
import torch.distributed as dist
from moe.transports import Exchange

from lplb_triton import Balancer, LiveSlots, Placement

EXPERTS, TOP_K, HIDDEN, INNER, TOKENS = 16, 2, 32, 64, 512


def draw_batch(step: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens ``[TOKENS, HIDDEN]`` and the experts of each ``[TOKENS, TOP_K]``."""
    shared = torch.Generator().manual_seed(step)
    popularity = torch.rand(EXPERTS, generator=shared) ** 4 + 0.01
    own = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(TOKENS, HIDDEN, generator=own)
    ids = torch.multinomial(popularity.expand(TOKENS, -1), TOP_K, generator=own)
    return x.to(device), ids.to(device)


def compute(x: torch.Tensor, slot: torch.Tensor, w_in: list, w_out: list) -> torch.Tensor:
    """Apply to each row of ``x`` the expert in its slot."""
    y = torch.zeros_like(x)
    for number, (first, second) in enumerate(zip(w_in, w_out, strict=True)):
        rows = slot == number
        y[rows] = torch.relu(x[rows] @ first) @ second
    return y


def train(
    group: dist.ProcessGroup, device: torch.device, live: int, steps: int
) -> list[tuple[float, float]]:
    """Train with ``live`` live slots a rank; returns loss and imbalance of each step."""
    rank, ranks = dist.get_rank(group), group.size()
    placement = Placement.from_phy2log(torch.arange(EXPERTS), ranks).with_live_slots(live)
    balancer = Balancer(placement, group=group, device=device)
    # This rank's originals, in the order of its static slots.
    mine = placement.phy2log.view(ranks, -1)[rank, : placement.static_per_rank].long()
    torch.manual_seed(0)
    w_in = torch.nn.Parameter((torch.randn(EXPERTS, HIDDEN, INNER) / 6)[mine].to(device))
    w_out = torch.nn.Parameter((torch.randn(EXPERTS, INNER, HIDDEN) / 8)[mine].to(device))
    optimizer = torch.optim.SGD([w_in, w_out], lr=0.5)
    slots = layer = None
    if live:
        slots = LiveSlots(live, group=group, device=device)
        layer = slots.add(balancer, w_in, w_out)

    found = []
    for step in range(steps):
        x, logical_ids = draw_batch(step, rank, device)
        physical_ids = balancer.run(logical_ids).flatten().long()
        # Rows go to the rank of their slot, in the order of slots.
        order = physical_ids.argsort(stable=True)
        sent = torch.bincount(physical_ids, minlength=placement.n_physical).view(ranks, -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        out, into = sent.sum(1).tolist(), received.sum(1).tolist()
        rows = Exchange.apply(x[order // TOP_K], out, into, group)
        # Beside the tokens that are on their way now.
        pull = layer.pull(balancer.live) if layer else None
        slot = torch.arange(placement.slots_per_rank, device=device).repeat(ranks)
        slot = slot.repeat_interleave(received.flatten())

        if pull is None:
            y = compute(rows, slot, [*w_in], [*w_out])
        else:
            (own_in, live_in), (own_out, live_out) = pull.wait()
            y = compute(rows, slot, [*own_in, *live_in], [*own_out, *live_out])
            y = pull.attach(y)
        y = Exchange.apply(y, into, out, group)
        summed = torch.zeros_like(x).index_add(0, order // TOP_K, y)
        loss = (summed - x.roll(1, dims=1)).square().mean() / ranks

        optimizer.zero_grad()
        loss.backward()
        if slots is None:
            optimizer.step()
        else:
            with slots.update():
                optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total, group=group)
        loads = sent.sum(1)
        dist.all_reduce(loads, group=group)
        found.append((float(total), float(loads.max() / loads.double().mean())))
    if slots is not None:
        slots.close()
    balancer.close()
    return found


def main() -> None:
    """Train, and print the loss and the imbalance of each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--live", type=int, default=1, help="live slots of a rank, 0 to 2")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    dist.init_process_group()
    rank, device = dist.get_rank(), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    found = train(dist.group.WORLD, device, args.live, args.steps)
    if rank == 0:
        for step, (loss, imbalance) in enumerate(found):
            print(f"step {step}: loss {loss:.6f}, imbalance {imbalance:.3f}")
    # A process that still holds a process group when it ends may be aborted by torch.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
