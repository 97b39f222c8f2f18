"""A stand-in for ``deep_ep.Buffer`` of DeepEP 1.2.1 over gloo."""

import torch
import torch.distributed as dist


class LegacyStandIn:
    """The three calls of DeepEP 1.2.1's ``Buffer`` that training makes, and what it refuses.

    Names, order and meaning of arguments and results are those of deep_ep/buffer.py: received rows
    in order of source rank and token, expert ids local, -1 elsewhere. So are the checks of dtypes,
    contiguity and sizes of csrc/deep_ep.cpp and csrc/kernels/intranode.cu.
    """

    def __init__(self, group):
        self.group, self.ranks, self.rank = group, group.size(), dist.get_rank(group)
        self.calls = []

    def exchange(self, parts):
        """Send part r to rank r; return what the ranks sent to this one, in their order."""
        found = [None] * self.ranks
        dist.all_gather_object(found, parts, group=self.group)
        return [sent[self.rank] for sent in found]

    def get_dispatch_layout(
        self,
        topk_idx,
        num_experts,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        self.calls.append("layout")
        assert topk_idx.dtype == torch.int64 and topk_idx.ndim == 2 and topk_idx.is_contiguous()
        local = num_experts // self.ranks
        inside = torch.stack([(topk_idx // local == r).any(1) for r in range(self.ranks)], 1)
        per_expert = topk_idx.flatten().bincount(minlength=num_experts).int()
        return inside.sum(0).int(), None, per_expert, inside.contiguous(), None

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        expert_alignment=1,
        num_worst_tokens=0,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        self.calls.append("dispatch" if handle is None else "dispatch again")
        assert x.dtype == torch.bfloat16 and x.ndim == 2 and x.is_contiguous()
        assert x.shape[1] * 2 % 16 == 0
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            inside = handle[4]
            rows = self.exchange([x[inside[:, r]] for r in range(self.ranks)])
            return torch.cat(rows), None, None, None, None, None
        assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
        assert is_token_in_rank.dtype == torch.bool
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
        local = len(num_tokens_per_expert) // self.ranks
        assert local <= 128
        own = [is_token_in_rank[:, r] for r in range(self.ranks)]
        assert torch.equal(torch.stack(own).sum(1).int(), num_tokens_per_rank)
        parts = [(x[i], topk_idx[i], topk_weights[i], i.nonzero()[:, 0]) for i in own]
        rows, idx, weights, source = zip(*self.exchange(parts), strict=True)
        idx, weights = torch.cat(idx), torch.cat(weights)
        here = idx // local == self.rank
        idx = torch.where(here, idx - self.rank * local, -1)
        sizes = idx[here].bincount(minlength=local).tolist()
        ends = torch.tensor([len(part) for part in rows]).cumsum(0).int()
        unused = torch.zeros(0, dtype=torch.int32)
        handle = (ends, unused, unused, torch.cat(source).int(), is_token_in_rank, unused)
        return torch.cat(rows), idx, torch.where(here, weights, 0), sizes, handle, None

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        self.calls.append("combine")
        ends, _, _, source, inside, _ = handle
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and len(x) == len(source)
        total = torch.zeros(len(inside), x.shape[1])
        cuts = ends[:-1].tolist()
        for r, rows in enumerate(self.exchange(list(x.tensor_split(cuts)))):
            total[inside[:, r]] += rows.float()
        weights = None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
            weights = torch.zeros(len(inside), topk_weights.shape[1])
            for r, part in enumerate(self.exchange(list(topk_weights.tensor_split(cuts)))):
                weights[inside[:, r]] += part
        return total.bfloat16(), weights, None
