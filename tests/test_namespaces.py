"""Counts summed over ranks on several nodes, which are network namespaces of one machine."""

import os
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers.batches import EXPERTS, count, ids_of, placement_of
from helpers.forwarder import LONGEST_QUEUE, Forwarder
from helpers.nodes import Network, NetworkError, Ranks

from lplb_triton import Balancer, sync
from lplb_triton.sync._reports import GRACE

# Seconds that a call waits for other ranks in the checks of failures, and what a busy machine adds.
BOUND, SLACK = 1.5, 3.0
RANKS, NODE_OF_RANK = range(6), (0, 0, 1, 1, 2, 2)
WIDE = 4096

# What a rank keeps from one order to the next: communicators by the name of their group.
communicators = {}


def obey(rank, order, *given):
    """Do in a rank what the test orders."""
    return {"join": join, "balance": balance, "sum": sum_counts, "meet": meet}[order](rank, *given)


def join(rank, address):
    """Enter the process group, and make a communicator for each check of a failure."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}:29511", rank=rank, world_size=len(RANKS),
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    groups = {
        "all": dist.group.WORLD,
        "stalled": dist.new_group(list(RANKS)),
        "killed": dist.new_group([0, 1, 2, 3]),
        "died": dist.new_group([0, 2]),
        "unmet": dist.new_group([0, 4]),
    }
    communicators["groups"] = groups
    for name, kind in (("stalled", "hierarchical"), ("killed", "hierarchical"), ("died", "auto")):
        if dist.get_rank(groups[name]) >= 0:
            communicators[name] = sync.connect(groups[name], kind, device="cpu", timeout=BOUND)
    for name in ("hierarchical", "distributed"):
        communicators[name] = sync.connect(groups["all"], name, device="cpu", timeout=30)
    return [repr(communicators["hierarchical"]), communicators["hierarchical"].ranks_per_node]


def balance(rank):
    """Balance batches on two nodes with hierarchical sums; return this rank's loads of each."""
    found, group = [], communicators["groups"]["killed"]
    for quotas in ("local", "global"):
        with Balancer(
            placement_of(group.size()), group=group, device="cpu", timeout=30, sync="hierarchical",
            quotas=quotas,
        ) as balancer:  # fmt: skip
            for batch in (1, 2):
                out = balancer.run(ids_of(rank, batch))
                found.append(count(out, balancer.placement.n_physical).tolist())
    return found


def sum_counts(rank, name, n, calls=1):
    """Sum counts in some calls; return whether sums and rows are right and the time of a call."""
    communicator = communicators[name]
    mine = communicator.rank
    version = torch.zeros(1, dtype=torch.int32)
    begun = time.monotonic()
    try:
        right = True
        for step in range(calls):
            rows = torch.empty(communicator.n_ranks, n, dtype=torch.int32)
            total, alone = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
            expected = torch.stack([_counts(r, step, n) for r in range(communicator.n_ranks)])
            communicator.exchange(expected[mine].clone(), version, total, rows)
            communicator.exchange(expected[mine].clone(), version, alone)
            invalid = (expected < 0).any(0)
            sums = torch.where(invalid, -2, expected.sum(0, dtype=torch.int32))
            right &= torch.equal(total, sums) and torch.equal(alone, sums)
            right &= torch.equal(rows, expected)
    except sync.SyncError as error:
        took = time.monotonic() - begun
        begun = time.monotonic()
        for again in (communicator.check, lambda: communicator.exchange(total, version, alone)):
            with pytest.raises(sync.SyncError) as info:
                again()
            assert info.value is error
        communicator.close()
        quick = time.monotonic() - begun
        return {"ranks": error.ranks, "text": str(error), "seconds": took, "again": quick}
    return {"right": right, "seconds": (time.monotonic() - begun) / (2 * calls)}


def _counts(rank, step, n):
    """A rank's counts in a call; rank 1 has none for the second expert."""
    counts = torch.arange(n, dtype=torch.int32) * (rank + 1) + step
    counts[1] = -1 if rank == 1 else counts[1]
    return counts


def meet(rank):
    """Meet a rank that can't be reached, outside of a batch."""
    begun = time.monotonic()
    with pytest.raises(sync.SyncError) as info:
        sync.connect(communicators["groups"]["unmet"], device="cpu", timeout=0.3)
    took = time.monotonic() - begun
    return {"ranks": info.value.ranks, "text": str(info.value), "seconds": took}


@pytest.fixture
def network():
    """Three nodes, or a skipped test where they can't be made."""
    try:
        made = Network(3)
    except NetworkError as reason:
        pytest.skip(f"no network namespaces here: {reason}")
    inside = [os.readlink(f"/proc/{pid}/ns/net") for pid in made.nodes]
    with made:
        yield made
    held = [p for p in os.listdir("/proc") if p.isdigit() and _network_of(p) in inside]
    assert not held, f"processes {held} are still in the namespaces"


def _network_of(pid):
    """Name of the network namespace of a process; None if it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None


def check_sums(network, ranks):
    """Sums are exact over the nodes, and so are whole runs."""
    ranks.order(RANKS, "join", network.address(0))
    for kind, size in ranks.results(RANKS, 60).values():
        assert size == 2 and kind.startswith("hierarchical(torch.distributed(gloo) x 2, "), kind
    for name in ("hierarchical", "distributed"):
        ranks.order(RANKS, "sum", name, WIDE, 5)
        found = ranks.results(RANKS, 60)
        assert all(each["right"] for each in found.values()), name
        slowest = max(each["seconds"] for each in found.values())
        print(f"{name}: {1e3 * slowest:.1f} ms a call")
        # At the limit, the rows that leave a node take 10 ms and more.
        assert network.limits == {None} or slowest > 0.005
    first_two = range(4)
    ranks.order(first_two, "balance")
    loads = torch.tensor(list(ranks.results(first_two, 60).values())).sum(0)
    placement = placement_of(len(first_two))
    for case, (quotas, batch) in enumerate((q, b) for q in ("local", "global") for b in (1, 2)):
        expected = count(torch.cat([ids_of(rank, batch) for rank in first_two]), EXPERTS)
        by_expert = torch.zeros(EXPERTS, dtype=torch.int64)
        by_expert.index_add_(0, placement.phy2log.long(), loads[case])
        assert torch.equal(by_expert, expected), (quotas, batch)
        best = Balancer(placement, device="cpu", rank=0).solve(expected.int())
        most = int(loads[case].reshape(len(first_two), -1).sum(1).max())
        assert most <= float(best.max_load) + placement.slots_per_rank, (quotas, batch)


def check_failure(found, expected, phrase, bound):
    """Every rank of ``expected`` ended in time, with an error that names those ranks."""
    for rank, blamed in expected.items():
        print(f"rank {rank}, {found[rank]['seconds']:.1f} s: {found[rank]['text']}")
        assert found[rank]["ranks"] == blamed, found[rank]
        assert phrase in found[rank]["text"]
        assert f"failed on rank {rank}:" in found[rank]["text"] or len(expected) == 1
        assert found[rank]["seconds"] < bound + SLACK
        assert found[rank].get("again", 0) < 1, found[rank]


def make_packet(number, target, size=1000):
    """A packet of IPv4 for a node, as far as a forwarder reads it."""
    head = bytes([0x45]) + bytes(15) + bytes([10, 77, 0, target + 1]) + bytes([number])
    return head + bytes(size - len(head))


def test_the_forwarder_delays_limits_and_drops():
    """Packets come late by delay and rate, in order, and not where the queue or the link drops."""
    delay, rate = 0.05, 100_000
    forwarder = Forwarder(delay, rate)
    ends = []
    for node in range(2):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        forwarder.add_device(theirs.detach(), f"10.77.0.{node + 1}")
        ours.settimeout(5)
        ends.append(ours)
    forwarder.start()
    try:
        begun = time.monotonic()
        ends[0].send(bytes([0x60]) + bytes(99))
        for number in range(10):
            ends[0].send(make_packet(number, 1))
        seen = []
        for number in range(10):
            assert ends[1].recv(2000) == make_packet(number, 1)
            seen.append(time.monotonic() - begun)
        # Each takes 10 ms on the way out, and the last one as long on the way in.
        assert seen[0] >= delay + 0.02 and seen[-1] >= delay + 10 * 0.01 + 0.01
        # More than the queue holds.
        most = int(LONGEST_QUEUE * rate / 1000)
        for number in range(most + 20):
            ends[1].send(make_packet(number, 0))
        ends[0].settimeout(2 * delay)
        time.sleep(LONGEST_QUEUE + 2 * delay)
        arrived = 0
        with pytest.raises(TimeoutError):
            while ends[0].recv(2000):
                arrived += 1
        assert 0.5 * most < arrived <= most + 19
        forwarder.dropped.add(0)
        ends[1].send(make_packet(0, 0))
        with pytest.raises(TimeoutError):
            ends[0].recv(2000)
    finally:
        forwarder.close()
        for end in ends:
            end.close()


@pytest.mark.slow
def test_nodes(network):
    """Sums over nodes are exact; what stalls, dies or is cut off ends in time, with names."""
    print(f"links limited by {network.limits}")
    with Ranks(network, NODE_OF_RANK, obey) as ranks:
        check_sums(network, ranks)

        # A link that stalls for less than the bound.
        network.stall(2)
        ranks.order(RANKS, "sum", "hierarchical", WIDE)
        time.sleep(0.3)
        network.resume(2)
        found = ranks.results(RANKS, 40)
        assert all(each["right"] and each["seconds"] > 0.1 for each in found.values()), found
        print(f"a stall of 0.3 s: {2 * found[0]['seconds']:.1f} s")

        # A link that stalls for good. The store of the process group is on node 0.
        network.stall(2)
        ranks.order(RANKS, "sum", "stalled", 8)
        found = ranks.results([0, 1, 2, 3], 30)
        check_failure(found, dict.fromkeys(range(4), (4, 5)), "ranks [4, 5] did", BOUND + GRACE)

        # A process that is killed while its node lives: the other node's ranks name it too.
        ranks.kill([3])
        ranks.order([0, 1, 2], "sum", "killed", 8)
        found = ranks.results([0, 1, 2], 30)
        check_failure(found, dict.fromkeys(range(3), (3,)), "ranks [3] did", 2 * BOUND + GRACE)

        # The node with the store dies, and nothing tells the others.
        network.unplug(0)
        ranks.kill([0, 1])
        ranks.order([2], "sum", "died", 8)

        # What the node that is cut off has seen. Its ranks reach each other, and nobody else.
        found = ranks.results([4, 5], 30)
        words = "the store of the process group can't be reached"
        nobody = dict.fromkeys((4, 5), (0, 1, 2, 3))
        check_failure(found, nobody, f"{words} from here; ranks [0, 1, 2, 3]", BOUND + 3 * GRACE)
        ranks.order([4], "meet")

        found = ranks.results([2, 4], 30)
        check_failure(found, {2: (0,)}, f"{words} from here; ranks [0]", BOUND + 2 * GRACE)
        check_failure(found, {4: ()}, words, 2 * GRACE)
