"""The transport of the examples over DeepEP 1's buffer, with a stand-in over gloo."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from helpers.deep_ep import LegacyStandIn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from moe.deep_ep_buffer import LegacyBuffer, make_buffer
from moe.transports import AllToAll, DeepEP

RANKS, SLOTS, TOKENS, HIDDEN, TOP_K = 2, 6, 20, 16, 3


def draw(rank):
    """Draw small whole numbers, whose sums bfloat16 holds exactly; and the slots of each token."""
    torch.manual_seed(rank)
    x = torch.randint(-2, 3, (TOKENS, HIDDEN)).float().requires_grad_()
    weights = (2.0 ** torch.randint(-1, 2, (TOKENS, TOP_K))).requires_grad_()
    slots = torch.stack([torch.randperm(SLOTS)[:TOP_K] for _ in range(TOKENS)])
    # Rank 1 sends nothing to itself.
    return x, weights, slots % 3 if rank == 1 else slots


def run_transport(transport, rank):
    """Send a batch to slots that scale it, bring it back, and return outputs and gradients."""
    x, weights, slots = draw(rank)
    rows, ends, route = transport.dispatch(x, slots, weights)
    parts = rows.tensor_split(ends[:-1].tolist())
    first = rank * len(parts)
    y = torch.cat([part * (first + i) for i, part in enumerate(parts, 1)])
    y = transport.combine(y, route)
    (y * torch.randint(-2, 3, (TOKENS, HIDDEN))).sum().backward()
    return ends, y.detach(), x.grad, weights.grad


def check_equal(rank, group):
    """Both transports give the same rows, outputs and gradients, to the bit."""
    stand_in = LegacyStandIn(group)
    buffer = LegacyBuffer(group, HIDDEN, stand_in)
    sizes = dict(tokens=TOKENS, hidden=HIDDEN, top_k=TOP_K)
    found = run_transport(DeepEP(group, SLOTS, buffer=buffer, **sizes), rank)
    # The combine's gradient travels by the handle of the dispatch, whose gradient is a combine.
    assert stand_in.calls == ["layout", "dispatch", "combine", "dispatch again", "combine"]
    expected = run_transport(AllToAll(group, SLOTS), rank)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert found[0].dtype == torch.int32 and found[3].abs().sum() > 0
    too_many = DeepEP(group, 129 * RANKS, buffer=buffer, **sizes)
    with pytest.raises(ValueError, match="at most 128 experts .* got 258 on 2 ranks"):
        too_many.dispatch(*(draw(rank)[i] for i in (0, 2, 1)))
    dist.barrier()


def test_the_legacy_buffer_gives_what_all_to_all_gives(tmp_path):
    """On two ranks rows, outputs and gradients equal those of torch's all-to-all."""
    run_ranks(check_equal, RANKS, tmp_path)


class Config:
    """The size hints of ``deep_ep.Config``."""

    def __init__(self, size):
        self.size = size

    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        return self.size * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        return 0


class InstalledBuffer:
    """What the constructor of ``deep_ep.Buffer`` and its configurations are called with."""

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0, *, explicitly_destroy=False):
        self.given = num_nvl_bytes, num_rdma_bytes, explicitly_destroy
        self.alive = True

    def destroy(self):
        self.alive = False

    get_dispatch_config = staticmethod(lambda num_ranks: Config(3))
    get_combine_config = staticmethod(lambda num_ranks: Config(5))


def test_the_installed_release_decides(monkeypatch):
    """DeepEP 1 gets a buffer of the recommended size that `close` frees, DeepEP 2 its own kind."""
    group, sizes = SimpleNamespace(size=lambda: 2), dict(tokens=4, hidden=HIDDEN, top_k=1)
    monkeypatch.setitem(sys.modules, "deep_ep", SimpleNamespace(Buffer=InstalledBuffer))
    transport = DeepEP(group, SLOTS, **sizes)
    inner = transport.buffer.buffer
    assert inner.given == (5 * 2 * HIDDEN * 2, 0, True)
    transport.close()
    assert not inner.alive
    both = SimpleNamespace(Buffer=InstalledBuffer, ElasticBuffer=lambda group, **given: given)
    monkeypatch.setitem(sys.modules, "deep_ep", both)
    expected = {"num_max_tokens_per_rank": 4, "hidden": HIDDEN, "num_topk": 1}
    assert make_buffer(group, **sizes) == expected


def test_one_rank_is_refused():
    """DeepEP 1 has no configuration for a single rank, and the error names the other transport."""
    with pytest.raises(ValueError, match="two ranks or more; use the transport torch"):
        LegacyBuffer(SimpleNamespace(size=lambda: 1), HIDDEN, object())
