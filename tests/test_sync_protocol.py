"""The protocol of docs/sync.md under random interleavings, at the level of loads and stores.

A model, not the kernel: every rank is a program of two threads with barriers; stores to other
ranks' memory arrive one by one in any order, except that a release arrives after what it covers
(all stores of its thread, and those of other threads that a barrier has put before it) and that
two stores of one thread to one place keep their order.
"""

import random
from dataclasses import dataclass, field

import pytest

BARRIER = object()
THREADS = 2


@dataclass
class Rules:
    """The protocol, and what can be taken away from it."""

    barrier_before_release: bool = True
    slots: int = 2
    poison: bool = True
    patience: int = 1 << 30


@dataclass
class Rank:
    flags: list
    rows: list
    """[slot][sender] = [epoch, word of thread 0, word of thread 1]"""
    epoch: int = 0
    poisoned: bool = False
    late: bool = False
    wrong_call: bool = False
    pending: list = field(default_factory=list)
    """Stores on their way: (number, thread, target, place, value, covers)."""
    issued: int = 0
    results: list = field(default_factory=list)


def counts(rank, call, thread):
    return (rank + 1) * 1_000_003 + call * 101 + thread


class World:
    def __init__(self, n_ranks, calls, rules, rng, dead=None):
        self.rules, self.rng, self.calls = rules, rng, calls
        self.ranks = [
            Rank([0] * n_ranks, [[[0, 0, 0] for _ in range(n_ranks)] for _ in range(rules.slots)])
            for _ in range(n_ranks)
        ]
        self.dead = dead or {}
        self.threads = {(r, t): self.thread(r, t) for r in range(n_ranks) for t in range(THREADS)}
        self.at_barrier = {r: set() for r in range(n_ranks)}
        self.sums = {}

    def send(self, r, thread, target, place, value, covers=None):
        me = self.ranks[r]
        me.pending.append((me.issued, thread, target, place, value, covers))
        me.issued += 1

    def deliver(self, r):
        """Let one of a rank's stores arrive, if the one drawn may."""
        pending = self.ranks[r].pending
        i = self.rng.randrange(len(pending))
        number, thread, target, place, value, covers = pending[i]
        for other in pending[:i]:
            same_place = other[1:4] == (thread, target, place)
            if same_place or (covers is not None and other[1] in covers):
                return
        del pending[i]
        there = self.ranks[target]
        if place[0] == "flag":
            there.flags[r] = value
        else:
            _, slot, word = place
            there.rows[slot][r][word] = value

    def thread(self, r, t):
        """One thread of one rank: the kernel, call after call."""
        me, rules, everyone = self.ranks[r], self.rules, range(len(self.ranks))
        for call in range(1, self.calls + 1):
            if self.dead.get(r) == call:
                return
            yield BARRIER
            if me.poisoned:
                if t == 0:
                    me.results.append(None)
                continue
            epoch = me.epoch + 1
            slot = epoch % rules.slots
            for peer in everyone:
                if t == 0:
                    self.send(r, t, peer, ("row", slot, 0), epoch)
                    yield
                self.send(r, t, peer, ("row", slot, 1 + t), counts(r, call, t))
                yield
            covers = {t}
            if rules.barrier_before_release:
                yield BARRIER
                covers = set(range(THREADS))
            if t == 0:
                for peer in everyone:
                    self.send(r, t, peer, ("flag",), epoch, covers)
                    yield
                looks = 0
                me.late = True
                while me.late and looks < rules.patience:
                    yield
                    looks += 1
                    ahead = [flag - epoch for flag in me.flags]
                    me.late = any(a < 0 or (rules.poison and a > 1) for a in ahead)
            yield BARRIER
            if me.late:
                if rules.poison:
                    me.poisoned = True
                else:
                    me.epoch = epoch
                if t == 0:
                    me.results.append(None)
                continue
            if t == 0:
                me.wrong_call = False
            total = 0
            for sender in everyone:
                yield
                row = me.rows[slot][sender]
                if t == 0 and rules.poison and row[0] != epoch:
                    me.wrong_call = True
                yield
                total += row[1 + t]
            self.sums[r, t] = total
            yield BARRIER
            if t == 0:
                if me.wrong_call:
                    me.poisoned = True
                    me.results.append("wrong call")
                else:
                    me.results.append((self.sums[r, 0], self.sums[r, 1]))
                    me.epoch = epoch
            yield BARRIER

    def run(self):
        """Interleave until everybody is done; returns the number of steps."""
        rng, steps = self.rng, 0
        names, speed, store_speed = list(self.threads), {}, 0.5
        while self.threads:
            if steps % 400 == 0:
                # Now and then other ranks, and other ranks' stores, are the slow ones.
                names = [name for name in names if name in self.threads]
                speed = {r: rng.choice((0.01, 0.3, 1.0)) for r in range(len(self.ranks))}
                store_speed = rng.choice((0.05, 0.5, 0.9))
            steps += 1
            assert steps < 20_000_000, "somebody waits for ever"
            if rng.random() < store_speed:
                r = rng.randrange(len(self.ranks))
                if self.ranks[r].pending:
                    self.deliver(r)
                continue
            r, t = name = names[rng.randrange(len(names))]
            if name not in self.threads or rng.random() > speed[r] or t in self.at_barrier[r]:
                continue
            try:
                if next(self.threads[name]) is BARRIER:
                    self.at_barrier[r].add(t)
                    if len(self.at_barrier[r]) == THREADS:
                        self.at_barrier[r].clear()
            except StopIteration:
                del self.threads[name]
        return steps


def verdict(world):
    """Count right sums, failed calls, wrong sums, and calls found to be mixed up."""
    ranks = range(len(world.ranks))
    right = failed = wrong = mixed = 0
    for rank in world.ranks:
        for call, result in enumerate(rank.results, 1):
            expected = tuple(sum(counts(r, call, t) for r in ranks) for t in range(THREADS))
            right += result == expected
            failed += result is None
            mixed += result == "wrong call"
            wrong += result not in (expected, None, "wrong call")
    return right, failed, wrong, mixed


def simulate(n_ranks, calls, seed, dead=None, **rules):
    world = World(n_ranks, calls, Rules(**rules), random.Random(seed), dead)
    world.run()
    return verdict(world)


@pytest.mark.parametrize(
    ("n_ranks", "calls", "seeds"), [(2, 400, 8), (3, 200, 4), (5, 100, 3), (8, 60, 3)]
)
def test_no_count_is_lost_mixed_or_stale(n_ranks, calls, seeds):
    for seed in range(seeds):
        assert simulate(n_ranks, calls, seed) == (n_ranks * calls, 0, 0, 0)


@pytest.mark.parametrize("n_ranks", [2, 3, 5])
def test_late_and_dead_ranks_give_errors_but_no_wrong_sum(n_ranks):
    timed_out = went_well = 0
    for seed in range(40):
        rng = random.Random(1000 + seed)
        patience = rng.choice((20, 60, 200, 1000))
        dead = {rng.randrange(n_ranks): rng.randrange(2, 12)} if seed % 2 else {}
        right, failed, wrong, mixed = simulate(n_ranks, 12, seed, dead, patience=patience)
        assert wrong == mixed == 0
        timed_out += failed
        went_well += right
        if dead:
            assert failed
    assert timed_out > 50 and went_well > 50


def found(n_ranks, calls, seeds, **rules):
    """Seeds under which something other than right sums and errors came out."""
    outcomes = [simulate(n_ranks, calls, seed, **rules) for seed in range(seeds)]
    return [seed for seed, (_, _, wrong, mixed) in enumerate(outcomes) if wrong or mixed]


def test_the_barrier_before_the_release_is_needed():
    assert found(2, 100, 4, barrier_before_release=False)


def test_the_second_slot_is_needed():
    assert found(2, 100, 4, slots=1, patience=3000)


def test_a_rank_must_not_go_on_after_a_time_out():
    assert found(2, 30, 30, poison=False, patience=15)
