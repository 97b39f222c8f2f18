"""The kernel that sums counts over ranks, one launch for each rank."""

import pytest
import torch
from helpers.layout import CALL_WORD, GATHERED_VERSION, VERSION_WORD, gathered_rows, message_word
from helpers.peers import DEVICE, FAILED, Ranks, Sync, error_of

from lplb_triton import kernels
from lplb_triton._layout import HEADER_WORDS, MAX_COUNT
from lplb_triton.kernels.exchange import BUSY, POISONED
from lplb_triton.sync import SyncError
from lplb_triton.sync._channels import CHANNELS
from lplb_triton.sync._faults import fault_error


@pytest.mark.parametrize(("n_ranks", "n"), [(1, 5), (2, 16), (3, 20), (9, 300)])
def test_sums_and_what_is_sent(n_ranks, n):
    """Every rank gets exact sums and rows, and sends just the words that are expected."""
    torch.manual_seed(n)
    ranks = Ranks(n_ranks, 4 * -(-n // 4), timeout=0.05)
    epochs = 4 if n_ranks < 9 else 2
    for epoch in range(1, epochs + 1):
        counts = torch.randint(0, 1000, (n_ranks, n), dtype=torch.int32)
        if epoch == 2:
            counts[-1] = 0
        for channel in (0, CHANNELS - 1):
            for rank in range(n_ranks):
                ranks.publish(rank, counts[rank], epoch, channel)
            image = ranks.memory.clone()
            for rank in range(n_ranks):
                gather = rank % 2 == 0
                # Everything this rank sends is wiped out first.
                for at in range(n_ranks):
                    ranks.row(at, rank, epoch, channel)[: HEADER_WORDS + n] = -1
                total, gathered = ranks.exchange(rank, counts[rank], channel, gather)
                assert torch.equal(total.cpu(), counts.sum(0, dtype=torch.int32))
                if gather:
                    assert torch.equal(gathered.cpu(), counts)
                assert torch.equal(ranks.memory, image)
    assert not any(endpoint.failed() for endpoint in ranks.endpoints)


def test_sums_that_int32_does_not_hold():
    """No sum wraps around, and what one rank has no count for has no sum."""
    most = MAX_COUNT
    counts = torch.tensor([[most, most, -1, -1, 5], [0, 1, 100, -1, 6], [0, most, 7, 1, 7]])
    ranks = Ranks(3, 8, timeout=0.05)
    for rank in (1, 2):
        ranks.publish(rank, counts[rank], 1)
    total, gathered = ranks.exchange(0, counts[0].int())
    assert total.tolist() == [most, FAILED, FAILED, FAILED, 18]
    assert torch.equal(gathered.cpu().long(), counts)
    rows = gathered_rows(int(ranks.version), counts).to(DEVICE)
    status = torch.zeros(kernels.status_words(3), dtype=torch.int64)
    status = status.pin_memory() if DEVICE.type == "cuda" else status
    total = torch.empty(5, dtype=torch.int32, device=DEVICE)
    own = counts[0].int().to(DEVICE)
    kernels.sum_gathered(own, total, None, rows, ranks.version, status, 0)
    assert total.tolist() == [most, FAILED, FAILED, FAILED, 18] and not status.any()


def test_a_rank_may_be_one_epoch_ahead_but_not_two():
    """A rank one epoch ahead is summed, and one further ahead counts as missing."""
    ranks = Ranks(2, 8, timeout=0.02)
    counts = torch.arange(8, dtype=torch.int32).reshape(2, 4)
    ranks.publish(1, counts[1], 1)
    ranks.publish(1, counts[1] * 10, 2)
    total, _ = ranks.exchange(0, counts[0])
    assert torch.equal(total.cpu(), counts.sum(0, dtype=torch.int32))
    total, _ = ranks.exchange(0, counts[0])
    assert torch.equal(total.cpu(), counts[0] + counts[1] * 10)
    # A rank that went on after others gave up on it would look like this.
    ranks.publish(1, counts[1], 5)
    total, _ = ranks.exchange(0, counts[0])
    assert (total == FAILED).all()
    assert error_of(ranks, 0).ranks == (1,)


def test_missing_ranks_are_named_and_the_endpoint_is_poisoned():
    """After a timeout missing ranks are named, and nothing is sent again."""
    ranks = Ranks(4, 8, timeout=0.05)
    counts = torch.arange(1, 9, dtype=torch.int32)
    for rank in range(4):
        ranks.publish(rank, counts, 1)
    ranks.exchange(0, counts)
    ranks.publish(2, counts, 2)
    total, gathered = ranks.exchange(0, counts)
    assert (total == FAILED).all()
    assert torch.equal(gathered[0].cpu(), counts) and (gathered[1:] == 0).all()
    error = error_of(ranks, 0)
    assert isinstance(error, SyncError) and error.ranks == (1, 3) and error.epoch == 2
    assert "epoch 2" in str(error) and "ranks [1, 3]" in str(error) and "0.05 s" in str(error)
    # The others come after all: nothing is sent any more, and nothing is believed.
    ranks.publish(1, counts, 2)
    ranks.publish(3, counts, 2)
    image = ranks.memory.clone()
    for channel in (0, 1):
        total, gathered = ranks.exchange(0, counts, channel)
        assert (total == FAILED).all()
        assert torch.equal(gathered[0].cpu(), counts) and (gathered[1:] == 0).all()
    assert torch.equal(ranks.memory, image)
    assert error_of(ranks, 0).ranks == (1, 3)


@pytest.mark.parametrize("what", ["version", "size"])
def test_another_call_is_no_part_of_the_sum(what):
    """A rank with another version or size is named, and its counts are not summed."""
    ranks = Ranks(3, 8, timeout=0.05)
    counts = torch.arange(1, 9, dtype=torch.int32)
    for rank in range(3):
        ranks.publish(rank, counts, 1)
    word = VERSION_WORD if what == "version" else CALL_WORD
    ranks.row(0, 2, epoch=1)[word] = message_word(1, 6)
    total, _ = ranks.exchange(0, counts)
    assert (total == FAILED).all()
    error = error_of(ranks, 0)
    assert error.ranks == (2,) and "rank 2 came with placement version" in str(error)
    if what == "size":
        assert "6 counts" in str(error)
    if what == "version":
        assert "00000006" in str(error)
    total, _ = ranks.exchange(1, counts)
    assert torch.equal(total.cpu(), 3 * counts)


@pytest.mark.parametrize(
    ("n", "n_ranks", "rank", "word"),
    [
        # Of the header, of the first and the last tile of counts, of the last tile of ranks.
        (8, 3, 2, VERSION_WORD),
        (8, 3, 2, CALL_WORD),
        (300, 3, 2, HEADER_WORDS + 5),
        (300, 3, 2, HEADER_WORDS + 299),
        (20, 9, 3, HEADER_WORDS + 4),
        (20, 9, 8, HEADER_WORDS),
    ],
)
def test_one_word_that_is_missing_is_missed(n, n_ranks, rank, word):
    """One word of an old epoch makes its rank count as missing."""
    ranks = Ranks(n_ranks, n, timeout=0.01)
    counts = torch.arange(n, dtype=torch.int32)
    for sender in range(n_ranks):
        ranks.publish(sender, counts, 3, to=[0])
    # It is of the epoch before last, in the same slot.
    ranks.row(0, rank, epoch=3)[word] -= message_word(2, 0)
    ranks.endpoints[0]._epochs.fill_(2)
    total, _ = ranks.exchange(0, counts, gather=False)
    assert (total == FAILED).all()
    assert error_of(ranks, 0).ranks == (rank,)


def test_another_call_ends_the_wait_for_those_who_are_late():
    """A mismatched call fails at once instead of waiting for others."""
    ranks = Ranks(3, 8, timeout=60.0)
    counts = torch.arange(8, dtype=torch.int32)
    ranks.publish(1, counts, 1, version=78)
    total, _ = ranks.exchange(0, counts)
    assert (total == FAILED).all()
    error = error_of(ranks, 0)
    assert error.ranks == (1,) and "came with placement version" in str(error)


def test_two_calls_at_once_on_one_channel_are_found():
    """A channel that is in use by another call fails, and the error says so."""
    ranks = Ranks(1, 8, timeout=0.05)
    counts = torch.ones(8, dtype=torch.int32)
    ranks.endpoints[0]._gates[3] = BUSY.value
    total, _ = ranks.exchange(0, counts, channel=3)
    assert (total == FAILED).all() and "on different streams" in str(error_of(ranks, 0))


def test_the_first_fault_is_the_one_that_is_told():
    """Calls of other channels that are under way fail for want of a rank that was sent away."""
    ranks = Ranks(2, 8, timeout=0.05)
    counts = torch.ones(8, dtype=torch.int32)
    ranks.publish(1, counts, 1, version=78)
    ranks.exchange(0, counts)
    said = str(error_of(ranks, 0))
    assert "came with placement version" in said
    # Another call that had begun before finds its channel otherwise than it left it.
    ranks.endpoints[0]._gates[5] = BUSY.value
    total, _ = ranks.exchange(0, counts, channel=5)
    assert (total == FAILED).all() and str(error_of(ranks, 0)) == said
    assert (ranks.endpoints[0]._gates == POISONED.value).all()


def test_epochs_may_wrap_around():
    """Sums stay right when the epoch passes the largest int32."""
    ranks = Ranks(2, 8, timeout=0.05)
    last = 2**31 - 1
    for endpoint in ranks.endpoints:
        endpoint._epochs.fill_(last - 1)
    counts = torch.arange(8, dtype=torch.int32)
    for epoch in (last, -(2**31), -(2**31) + 1):
        ranks.publish(1, counts, epoch)
        total, _ = ranks.exchange(0, counts)
        assert torch.equal(total.cpu(), 2 * counts)


@pytest.mark.parametrize("gather", [False, True])
def test_rows_gathered_elsewhere(gather):
    """Rows gathered by another library are summed, and one of another version is named."""
    n_ranks, n = 130, 20
    status = torch.zeros(kernels.status_words(n_ranks), dtype=torch.int64)
    if DEVICE.type == "cuda":
        status = status.pin_memory()
    version = torch.full((1,), 5, dtype=torch.int32, device=DEVICE)
    counts = torch.randint(0, 9, (n_ranks, n), dtype=torch.int32)
    rows = gathered_rows(5, counts).to(DEVICE)
    for bad in (None, 129):
        total = torch.full((n,), -9, dtype=torch.int32, device=DEVICE)
        gathered = torch.full((n_ranks, n), -9, dtype=torch.int32, device=DEVICE)
        if bad is not None:
            rows[bad, GATHERED_VERSION] = 4
        own = counts[1].to(DEVICE)
        kernels.sum_gathered(own, total, gathered if gather else None, rows, version, status, 1)
        if bad is None:
            assert torch.equal(total.cpu(), counts.sum(0, dtype=torch.int32))
            assert not gather or torch.equal(gathered.cpu(), counts)
            assert not status.any()
        else:
            assert (total == FAILED).all()
            assert not gather or torch.equal(gathered[1], own) and (gathered[bad] == 0).all()
            assert fault_error(Sync(1, 1.0), status.numpy()).ranks == (bad,)
            # In a domain whose first rank is the EP group's 8.
            error = fault_error(Sync(1, 1.0, first=8), status.numpy())
            assert error.ranks == (8 + bad,) and "failed on rank 9: " in str(error)
            assert f"rank {8 + bad} came" in str(error)
