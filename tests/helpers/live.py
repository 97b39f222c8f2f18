"""Plans of live slots by the kernel and by its twin, from the same shares; checks of both."""

from typing import NamedTuple

import numpy as np
import torch

from lplb_triton import Balancer, Placement, chain, kernels
from lplb_triton.reference.live import (
    Copies,
    LiveCase,
    choose_unit_shift,
    count_running,
    list_copies,
    plan_live,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Plan(NamedTuple):
    """A plan, as the kernel and as the twin write it; on the host."""

    words: torch.Tensor
    """[G L + 3] int32, experts of live slots and bits of the numbers."""
    copies: Copies
    cumulative: np.ndarray
    """[n] shares of ``copies``."""
    shift: int
    """The plan is made in units of 2**shift tokens."""

    @property
    def numbers(self):
        """Largest load and bound in tokens, and the gap."""
        return self.words[-3:].view(torch.float32).tolist()

    @property
    def max_load(self):
        """Largest load, in tokens."""
        return self.numbers[0]

    @property
    def n_live(self):
        """Number of live slots that hold an expert, whether tokens come or not."""
        return int((self.words[:-3] >= 0).sum())


def make_placement(ranks, experts, live, redundant=0, seed=0):
    """Place experts with a chain of copies, or once each, and add live slots."""
    load = torch.from_numpy(np.random.default_rng(seed).random(experts) ** 4 + 0.01)
    if redundant:
        placement = chain(load, ranks, redundant_per_rank=redundant)
    else:
        placement = Placement.from_phy2log(torch.arange(experts), ranks)
    return placement.with_live_slots(live)


def draw_ids(placement, n, power=3.0, seed=0, dtype=torch.int64, device=DEVICE):
    """Draw ``[n / 4, 4]`` ids; the larger the power, the more uneven."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(placement.n_logical, generator=generator) ** power + 1e-3
    ids = torch.multinomial(weights, n, replacement=True, generator=generator)
    return ids.reshape(-1, 4).to(dtype).to(device)


def count_by_rank(placement, out):
    """Count the tokens of each rank."""
    slots = out[out >= 0].long().cpu()
    counts = torch.bincount(slots, minlength=placement.n_physical)
    return counts.reshape(placement.ep_size, -1).sum(1)


def check_ids(balancer, idx, out):
    """Every id is a slot that holds its expert, for good or in this batch."""
    placement, idx, out = balancer.placement, idx.cpu(), out.cpu()
    held = placement.phy2log.reshape(placement.ep_size, -1)
    held[:, placement.static_per_rank :] = balancer.live.experts.cpu()
    assert out.shape == idx.shape and out.dtype == idx.dtype
    assert torch.equal(out < 0, idx < 0)
    assert torch.equal(held.reshape(-1)[out[out >= 0].long()].long(), idx[idx >= 0].long())


def words_of(plan):
    """Return a plan's experts and the bits of its numbers on the host."""
    numbers = [number.cpu().reshape(1).view(torch.int32) for number in plan[1:]]
    return torch.cat([plan.experts.cpu().reshape(-1), *numbers])


def static_copies(placement):
    """Return the static copies as the twin takes them."""
    return list_copies(placement)


def plan_both(placement, counts, cumulative=None, max_load=None, resident=None, **rules):
    """Plan by kernel and twin; by default from the certified plan of the static copies.

    ``counts`` are [n_logical] over all ranks. Returns both plans and what lies in live slots
    after the kernel.
    """
    counts = torch.as_tensor(counts).cpu()
    if cumulative is None:
        solver = Balancer(placement, device="cpu", backend="torch", rank=0)
        solution = solver.solve(counts.int())
        cumulative = solver.cumulative_shares(solution.shares).numpy()
        max_load = float(solution.max_load)
    # The kernel takes the load in float32.
    max_load = float(np.float32(max_load))
    given = counts, np.asarray(cumulative, dtype=np.int64), max_load
    case_rules = {name.removeprefix("live_"): value for name, value in rules.items()}
    case = LiveCase(placement.ep_size, placement.live_per_rank, **{"above": 1.02, **case_rules})
    twin = _plan_by_twin(placement, case, *given, resident)
    kernel, after = _plan_by_kernel(placement, rules, *given, resident)
    return kernel, twin, after


def _plan_by_twin(placement, case, counts, cumulative, max_load, resident):
    copies = static_copies(placement)
    held = None if resident is None else resident.numpy().astype(np.int64)
    found = plan_live(case, counts.numpy().astype(np.int64), cumulative, copies, max_load, held)
    numbers = np.array([found.max_load, found.bound, found.gap], dtype=np.float32)
    experts = torch.from_numpy(found.experts.astype(np.int32).reshape(-1))
    words = torch.cat([experts, torch.from_numpy(numbers).view(torch.int32)])
    shift = choose_unit_shift(max_load, placement.static_per_rank, placement.ep_size)
    return Plan(words, found.copies, found.cumulative, shift)


def _plan_by_kernel(placement, rules, counts, cumulative, max_load, resident):
    given = {**rules, "live_resident": resident is not None}
    balancer = Balancer(placement, device=DEVICE, backend="triton", rank=0, **given)
    p, backend = placement, balancer._backend
    sizes = p.n_logical, p.ep_size, p.static_per_rank, p.live_per_rank
    # What memory held doesn't matter.
    scratch = torch.full((kernels.live_scratch_words(*sizes),), -77, dtype=torch.int32)
    live = backend.make_live(scratch.to(DEVICE), None)
    if resident is not None:
        live.resident.copy_(resident)
    shares = torch.full((2 * p.n_copies + p.ep_size * p.live_per_rank,), -5, dtype=torch.int32)
    shares[: p.n_copies] = torch.from_numpy(cumulative)
    shares = shares.to(DEVICE)
    load = torch.tensor([max_load], dtype=torch.float32, device=DEVICE)
    kernels.plan_live(counts.int().to(DEVICE), shares, load, live)
    copies, found = _read_copies(placement, live, shares.cpu().numpy().astype(np.int64))
    after = None if resident is None else live.resident.cpu()
    shift = choose_unit_shift(max_load, placement.static_per_rank, placement.ep_size)
    return Plan(live.out[:-1].cpu(), copies, found, shift), after


def _read_copies(placement, live, shares):
    """Return the copies of all experts that the kernel has written, and their shares."""
    static, n_static = static_copies(placement), placement.n_copies
    flag, first, last, slot, _ = (tensor.cpu().numpy().astype(np.int64) for tensor in live.copies)
    lengths, ranks, places, found = [], [], [], []
    for expert in range(placement.n_logical):
        if flag[0] > 0 and first[expert] > 0:
            own = slice(first[expert], last[expert] + 1)
            moved = slot[first[expert] - n_static : last[expert] + 1 - n_static]
            rank, place = np.divmod(moved, placement.slots_per_rank)
        else:
            own = slice(static.start[expert], static.start[expert + 1])
            rank, place = static.rank[own], static.place[own]
        lengths.append(len(rank))
        # Halvings for as many copies as this expert has.
        assert flag[0] == 0 or first[expert] == 0 or (1 << (flag[0] - 1)) >= len(rank)
        ranks.append(rank), places.append(place), found.append(shares[own])
    start = np.append(0, np.cumsum(lengths))
    return Copies(start, np.concatenate(ranks), np.concatenate(places)), np.concatenate(found)


def loads_of(placement, counts, plan):
    """Return the tokens of each rank by a plan's shares, over all ranks."""
    running = count_running(np.asarray(counts, dtype=np.int64), plan.cumulative, plan.copies)
    tokens = np.diff(running, prepend=0)
    tokens[plan.copies.start[:-1]] = running[plan.copies.start[:-1]]
    assert (tokens >= 0).all()
    return np.bincount(plan.copies.rank, tokens, placement.ep_size).astype(np.int64)


def assert_same_plan(placement, counts, kernel, twin):
    """Kernel and twin give the same experts, loads, copies and shares, bit for bit.

    The bound and the gap are in float32 in one and in float64 in the other.
    """
    assert kernel.words[:-2].tolist() == twin.words[:-2].tolist()
    for mine, other in zip(kernel.numbers[1:], twin.numbers[1:], strict=True):
        assert abs(mine - other) <= 2e-7 * max(1.0, kernel.max_load)
    for mine, other in zip(kernel.copies, twin.copies, strict=True):
        assert np.array_equal(mine, other)
    # A last copy takes all that is left; nobody reads its share.
    inner = np.ones(len(twin.cumulative), dtype=np.bool_)
    inner[twin.copies.start[1:] - 1] = False
    assert np.array_equal(kernel.cumulative[inner], twin.cumulative[inner])
    assert loads_of(placement, counts, kernel).max() <= kernel.max_load + slack_of(
        placement, kernel
    )


def slack_of(placement, plan):
    """Return by how many tokens a rank's load may exceed the plan's.

    Without live copies it is what rounding adds to a rank's share of replicated experts, and with
    them what units of several tokens leave out.
    """
    if len(plan.copies.rank) > placement.n_copies and plan.shift == 0:
        return 0
    return placement.slots_per_rank << plan.shift
