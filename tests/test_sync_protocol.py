"""The protocol of docs/sync.md under random interleavings, at the level of loads and stores.

A model, not the kernel: every rank is a program of two threads with barriers; stores to other
ranks' memory arrive one by one in any order. A word, number and epoch, arrives whole.
"""

import random
from dataclasses import dataclass, field

import pytest

BARRIER = object()
THREADS = 2


@dataclass
class Rules:
    """The protocol, and what can be taken away from it."""

    every_word_has_its_epoch: bool = True
    """If not, those of thread 0 speak for all of the row."""
    slots: int = 2
    poison: bool = True
    patience: int = 1 << 30


@dataclass
class Rank:
    rows: list
    """[slot][sender] = [word of thread 0, word of thread 1], a word being (epoch, number)"""
    epoch: int = 0
    poisoned: bool = False
    missing: list = field(default_factory=lambda: [0] * THREADS)
    """By thread: words that had not come at its last look."""
    pending: list = field(default_factory=list)
    """Stores on their way: (target, place, value)."""
    results: list = field(default_factory=list)


def counts(rank, call, thread):
    return (rank + 1) * 1_000_003 + call * 101 + thread


class World:
    def __init__(self, n_ranks, calls, rules, rng, dead=None):
        self.rules, self.rng, self.calls = rules, rng, calls
        self.ranks = [
            Rank([[[(0, 0)] * THREADS for _ in range(n_ranks)] for _ in range(rules.slots)])
            for _ in range(n_ranks)
        ]
        self.dead = dead or {}
        self.threads = {(r, t): self.thread(r, t) for r in range(n_ranks) for t in range(THREADS)}
        self.at_barrier = {r: set() for r in range(n_ranks)}
        self.sums = {}

    def deliver(self, r):
        """Let one of a rank's stores arrive."""
        pending = self.ranks[r].pending
        target, place, value = pending.pop(self.rng.randrange(len(pending)))
        slot, word = place
        self.ranks[target].rows[slot][r][word] = value

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
                me.pending.append((peer, (slot, t), (epoch, counts(r, call, t))))
                yield
            looks = 0
            while True:
                words = []
                for sender in everyone:
                    words.append(me.rows[slot][sender][t])
                    yield
                believed = t > 0 and not rules.every_word_has_its_epoch
                me.missing[t] = 0 if believed else sum(word[0] != epoch for word in words)
                yield BARRIER
                missing = sum(me.missing)
                yield BARRIER
                if not missing or looks >= rules.patience:
                    break
                looks += 1
            if missing:
                if t == 0:
                    me.results.append(None)
                    me.poisoned = rules.poison
                    me.epoch = epoch
                yield BARRIER
                continue
            self.sums[r, t] = sum(word[1] for word in words)
            yield BARRIER
            if t == 0:
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
    """Count right sums, failed calls and wrong sums."""
    ranks = range(len(world.ranks))
    right = failed = wrong = 0
    for rank in world.ranks:
        for call, result in enumerate(rank.results, 1):
            expected = tuple(sum(counts(r, call, t) for r in ranks) for t in range(THREADS))
            right += result == expected
            failed += result is None
            wrong += result not in (expected, None)
    return right, failed, wrong


def simulate(n_ranks, calls, seed, dead=None, **rules):
    world = World(n_ranks, calls, Rules(**rules), random.Random(seed), dead)
    world.run()
    return verdict(world)


@pytest.mark.parametrize(
    ("n_ranks", "calls", "seeds"), [(2, 400, 8), (3, 200, 4), (5, 100, 3), (8, 60, 3)]
)
def test_no_count_is_lost_mixed_or_stale(n_ranks, calls, seeds):
    """Under random interleavings all sums are right and no call fails."""
    for seed in range(seeds):
        assert simulate(n_ranks, calls, seed) == (n_ranks * calls, 0, 0)


@pytest.mark.parametrize("poison", [True, False])
@pytest.mark.parametrize("n_ranks", [2, 3, 5])
def test_late_and_dead_ranks_give_errors_but_no_wrong_sum(n_ranks, poison):
    """Late and dead ranks make calls fail, and no sum is wrong."""
    timed_out = went_well = 0
    for seed in range(40):
        rng = random.Random(1000 + seed)
        patience = rng.choice((5, 15, 50, 250))
        dead = {rng.randrange(n_ranks): rng.randrange(2, 12)} if seed % 2 else {}
        right, failed, wrong = simulate(n_ranks, 12, seed, dead, patience=patience, poison=poison)
        assert wrong == 0
        timed_out += failed
        went_well += right
        if dead:
            assert failed
    assert timed_out > 50 and went_well > 50


def test_every_word_needs_its_epoch():
    """Some sums are wrong if only one thread's words have their epoch."""
    outcomes = [simulate(2, 100, seed, every_word_has_its_epoch=False) for seed in range(4)]
    assert sum(wrong for _, _, wrong in outcomes) > 0


def test_the_second_slot_is_needed():
    """With one slot a count can be gone before it was read."""
    for slots in (1, 2):
        outcomes = [simulate(2, 100, seed, slots=slots, patience=3000) for seed in range(4)]
        assert (sum(failed for _, failed, _ in outcomes) > 0) == (slots == 1)
