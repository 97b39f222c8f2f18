"""Channels of streams: who gets which, when there are none left, and how disorder is found."""

import pytest
import torch

# `Ranks` and `error_of` stand for several ranks in one process.
from helpers.peers import FAILED, Ranks, error_of

from lplb_triton.sync._channels import CHANNELS, Channels, Stream, describe_mismatch

pytestmark = pytest.mark.both


class Streams:
    """A rank's streams by name, and its calls from them."""

    def __init__(self, **numbers):
        self._streams = {name: Stream(100 + n, n) for name, n in numbers.items()}
        self._now = None
        self.channels = Channels("p2p(test)", lambda: self._now)

    def call(self, name):
        self._now = self._streams[name]
        return self.channels.of(self._now.handle)

    def bind(self, name, number):
        self.channels.bind(self._streams[name].handle, number)


def of_torch(index, priority=0):
    """Torch's number of a stream of its pool."""
    return index << 5 | (1 + priority) << 1 | 1


def two_ranks(**numbers):
    return Streams(main=0, **numbers), Streams(main=0, **numbers)


def test_a_stream_has_a_channel_of_its_own():
    """Each stream gets a channel of its own, in the order of first calls."""
    one = Streams(main=0, side=of_torch(3), capture=of_torch(4), outside=0x7F00)
    order = ["main", "side", "main", "capture", "outside", "side"]
    assert [one.call(name).number for name in order] == [0, 1, 0, 2, 3, 1]
    openings = [one.call(name).opening for name in ("main", "side", "capture", "outside")]
    assert len(set(openings)) == 4 and all(0 < opening < 1 << 15 for opening in openings)


def test_later_calls_may_interleave():
    """After their first calls, streams may call in a different order on each rank."""
    a, b = two_ranks(side=of_torch(3))
    for rank in (a, b):
        rank.call("main")
        rank.call("side")
    for name in ("main", "side", "side"):
        a.call(name)
    for name in ("side", "main"):
        b.call(name)
    assert a.call("side") == b.call("side") and a.call("main") == b.call("main")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # Two streams of the pool, or the default stream and one of the pool, the other way round.
        (["side", "other"], ["other", "side"]),
        (["main", "side"], ["side", "main"]),
        # The same streams in the same order, but one rank has made a call that the other hasn't.
        (["main", "main", "side"], ["main", "side"]),
        (["side", "outside"], ["outside", "side"]),
    ],
)
def test_first_calls_in_another_order_open_channels_otherwise(first, second):
    """First calls in different orders on two ranks give channels different openings."""
    a, b = two_ranks(side=of_torch(3), other=of_torch(7), outside=0x7F00)
    for rank, order in ((a, first), (b, second)):
        for name in order:
            rank.call(name)
    assert a.channels.openings != b.channels.openings
    assert a.channels.openings.keys() == b.channels.openings.keys()


def test_streams_that_one_rank_made_beside_change_nothing():
    """Streams that one rank makes and does not use leave the openings equal."""
    a = Streams(main=0, side=of_torch(3), other=of_torch(4), high=of_torch(0, priority=1))
    b = Streams(main=0, side=of_torch(9), other=of_torch(17), high=of_torch(30, priority=1))
    for rank in (a, b):
        for name in ("high", "side", "main", "other"):
            rank.call(name)
    assert a.channels.openings == b.channels.openings


def test_binding():
    """A stream can be bound to a new or an open channel, and bad numbers are refused."""
    one = Streams(main=0, side=of_torch(1), other=of_torch(2))
    one.bind("side", 5)
    assert one.call("side") == (5, 0)
    assert one.call("main").number == 0
    # A channel that has been opened stays what it is, whoever joins it.
    one.bind("other", 0)
    assert one.call("other") == one.call("main")
    for bad, error in (
        (-1, ValueError),
        (CHANNELS, ValueError),
        (1.0, TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match="^channel"):
            one.bind("other", bad)


def test_no_channel_left():
    """A stream without a free channel is refused, and can be bound to a taken one."""
    one = Streams(**{f"s{i}": of_torch(i) for i in range(CHANNELS + 1)})
    for i in range(CHANNELS):
        one.call(f"s{i}")
    with pytest.raises(RuntimeError, match=r"^all 64 channels of p2p\(test\) are taken.*bind"):
        one.call(f"s{CHANNELS}")
    # The others go on, and the stream may share a channel.
    assert one.call("s0").number == 0
    one.bind(f"s{CHANNELS}", 3)
    assert one.call(f"s{CHANNELS}").number == 3


def test_the_kernel_finds_disorder_on_every_rank():
    """The kernel fails on each rank whose peer opened the channel with another call."""
    a, b = two_ranks(side=of_torch(3), other=of_torch(7))
    for rank, order in ((a, ["side", "other"]), (b, ["other", "side"])):
        for name in order:
            rank.call(name)
    openings = [a.channels.openings, b.channels.openings]
    channel = next(n for n in openings[0] if openings[0][n] != openings[1][n])
    ranks = Ranks(2, 8, timeout=60.0)
    counts = torch.arange(1, 9, dtype=torch.int32)
    for rank in (0, 1):
        other = 1 - rank
        ranks.publish(other, counts, 1, channel, opening=openings[other][channel], to=[rank])
        total, _ = ranks.exchange(rank, counts, channel, opening=openings[rank][channel])
        assert (total == FAILED).all()
        error = error_of(ranks, rank, openings[rank])
        assert error.ranks == (other,)
        assert f"rank {other} opened the channel with call" in str(error)
        assert "The first call of a stream must be the same" in str(error)


def test_what_is_said_of_disorder():
    """The message names how each rank opened the channel."""
    a = Streams(main=0, side=of_torch(3))
    a.call("main")
    mine = a.call("side").opening
    a.bind("main", 9)
    text = describe_mismatch(mine, {4: a.call("main").opening})
    assert text.startswith("rank 4 opened the channel by bind, and this rank opened the channel")
    assert "with call 2 on a stream of torch's pool, behind 0 older ones" in text
