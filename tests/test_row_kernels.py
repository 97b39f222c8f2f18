"""The kernels that add up rows, and count loads, against torch."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("width", [1, 24, 4100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_are_added_in_order(width, dtype, in_place):
    """Sums are those of float32 or float64, added one after the other, and rounded once."""
    from lplb_triton.kernels import add_rows

    torch.manual_seed(0)
    own = torch.randn(5, width, device=DEVICE).to(dtype)
    arrived = torch.randn(6, width + 8, device=DEVICE).to(dtype)[:, :width]
    sources = {3: [4, 0, 2], 0: [1], 4: [3, 5]}
    rows = torch.tensor(list(sources), device=DEVICE)
    starts = torch.tensor([0, 3, 4, 6], dtype=torch.int32, device=DEVICE)
    order = torch.tensor(sum(sources.values(), []), dtype=torch.int32, device=DEVICE)
    wide = torch.promote_types(dtype, torch.float32)
    expected = own.clone() if in_place else torch.empty(3, width, dtype=wide, device=DEVICE)
    for i, (row, several) in enumerate(sources.items()):
        total = own[row].to(wide) if in_place else torch.zeros(width, dtype=wide, device=DEVICE)
        for source in several:
            total = total + arrived[source].to(wide)
        expected[row if in_place else i] = total.to(expected.dtype)
    target = own if in_place else torch.full_like(expected, torch.nan)
    add_rows(target, arrived, starts, order, rows, in_place=in_place)
    # The interpreter rounds towards zero to bfloat16.
    inexact = DEVICE == "cpu" and target.dtype == torch.bfloat16
    torch.testing.assert_close(target, expected, rtol=2**-7 * inexact, atol=0)


@pytest.mark.parametrize("width", [1, 24, 4100])
@pytest.mark.parametrize("n_one", [0, 3, 5])
def test_rows_are_taken_from_two_tensors(width, n_one):
    """Rows of two tensors are those of both one after the other."""
    from lplb_triton.kernels import take_rows

    both = torch.arange(5 * width, device=DEVICE).view(5, width).to(torch.float16)
    index = torch.tensor([4, 0, 3, 3, 1, 2], device=DEVICE)
    taken = take_rows(both[:n_one], both[n_one:], index)
    assert torch.equal(taken, both[index])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (60, 4), (512, 64)])
def test_loads_are_counted(dtype, experts, ranks):
    """Loads add up over batches, and rows by rank are of one batch each."""
    from lplb_triton.kernels import record_loads

    torch.manual_seed(0)
    n_slots = experts // ranks + 1
    load = torch.zeros(experts, dtype=torch.int64, device=DEVICE)
    by_home, by_rank = (torch.zeros(3, ranks, dtype=torch.int64, device=DEVICE) for _ in range(2))
    expected = torch.zeros_like(load)
    for batch, n_ids in enumerate((5000, 3, 0, 2049, 7)):
        ids = torch.randint(-1, experts, (n_ids,), device=DEVICE, dtype=dtype)
        slots = torch.randint(0, ranks * n_slots, (n_ids,), device=DEVICE, dtype=dtype)
        slots = slots.masked_fill(ids < 0, -1)
        record_loads(ids, slots, load, by_home, by_rank, batch, n_slots)
        kept = ids >= 0
        expected += torch.bincount(ids[kept], minlength=experts)
        assert torch.equal(load, expected)
        home = torch.bincount(ids[kept] // (experts // ranks), minlength=ranks)
        assert torch.equal(by_home[batch % 3], home)
        assert torch.equal(
            by_rank[batch % 3], torch.bincount(slots[kept] // n_slots, minlength=ranks)
        )
        assert not by_home[(batch + 1) % 3].any() and not by_rank[(batch + 1) % 3].any()
