"""Buffers of DeepEP 1 and 2, with the calls of version 2 that `moe.transports.DeepEP` makes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# One thread of DeepEP 1's kernel counts the rows of one expert, and it has as many threads.
MOST_EXPERTS_PER_RANK = 128
# NVLink joins as many ranks for DeepEP 1; more are taken for several nodes.
RANKS_PER_NODE = 8


class LegacyBuffer:
    """``deep_ep.Buffer`` (DeepEP 1) with the calls of ``deep_ep.ElasticBuffer`` (DeepEP 2).

    Version 1 wants the layout of a batch to be computed before its tokens are sent, and returns how
    many rows each expert of this rank gets as a list on the host.

    Parameters
    ----------
    group
        The EP group, NCCL; two ranks or more.
    hidden
        Length of a row.
    buffer
        A ``deep_ep.Buffer`` to use; by default a new one, as large as DeepEP recommends.

    Raises
    ------
    ModuleNotFoundError
        If there is no ``deep_ep``.
    ValueError
        If the group has one rank only.
    """

    def __init__(self, group: dist.ProcessGroup, hidden: int, buffer: Any = None) -> None:
        self.ranks = group.size()
        if self.ranks < 2:
            raise ValueError("DeepEP 1 sends between two ranks or more; use the transport torch")
        self.buffer = make_legacy(group, hidden) if buffer is None else buffer

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        handle: Any = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Any, list[int] | None]:
        """Send each token to every rank of its experts once.

        Parameters
        ----------
        x
            bfloat16 [tokens, hidden].
        topk_idx, topk_weights, num_experts
            Experts [tokens, top_k] of each token, their weights, and experts over all ranks; not
            with a ``handle``.
        handle
            Of a batch that was sent before, to send other rows the same way.

        Returns
        -------
        rows : Tensor
            bfloat16 [received, hidden].
        local : Tensor or None
            int64 [received, top_k], experts of this rank from 0, -1 elsewhere; None with a handle.
        factors : Tensor or None
            float32 [received, top_k]; None with a handle.
        handle
            For `combine`, and to send the same way again.
        sizes : list of int or None
            Rows of each expert of this rank; None with a handle.

        Raises
        ------
        ValueError
            If a rank has more experts than DeepEP 1 can count.
        """
        if handle is not None:
            rows = self.buffer.dispatch(x.contiguous(), handle=handle)[0]
            return rows, None, None, handle, None
        assert topk_idx is not None and topk_weights is not None and num_experts is not None
        if num_experts // self.ranks > MOST_EXPERTS_PER_RANK:
            raise ValueError(
                f"DeepEP 1 takes at most {MOST_EXPERTS_PER_RANK} experts (slots) a rank, got "
                f"{num_experts} on {self.ranks} ranks; use the transport torch, or more ranks"
            )
        experts = topk_idx.to(torch.int64).contiguous()
        per_rank, per_rdma_rank, per_expert, inside, _ = self.buffer.get_dispatch_layout(
            experts, num_experts
        )
        rows, local, factors, sizes, handle, _ = self.buffer.dispatch(
            x.contiguous(),
            topk_idx=experts,
            topk_weights=topk_weights.float().contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=inside,
            num_tokens_per_expert=per_expert,
        )
        return rows, local, factors, handle, sizes

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Add up, for each token, the rows that its ranks hold, and the weights beside them.

        Parameters
        ----------
        x
            bfloat16 [received, hidden].
        handle
            Of `dispatch`.
        topk_weights
            float32 [received, top_k].

        Returns
        -------
        tuple
            bfloat16 [tokens, hidden], float32 [tokens, top_k] or None, and DeepEP's event.
        """
        if topk_weights is not None:
            topk_weights = topk_weights.float().contiguous()
        total, weights, event = self.buffer.combine(x.contiguous(), handle, topk_weights)
        return total, weights, event

    def destroy(self) -> None:
        """Free the memory; collective."""
        self.buffer.destroy()


def make_legacy(group: dist.ProcessGroup, hidden: int) -> Any:
    """Make a ``deep_ep.Buffer`` of the size that DeepEP recommends for bfloat16 rows."""
    import deep_ep

    ranks, row_bytes = group.size(), hidden * torch.bfloat16.itemsize
    dispatch = deep_ep.Buffer.get_dispatch_config(ranks)
    combine = deep_ep.Buffer.get_combine_config(ranks)
    both = (dispatch, combine)
    rdma_bytes = 0
    # A build without NVSHMEM, which suffices within a node, refuses to be asked.
    if ranks > RANKS_PER_NODE:
        rdma_bytes = max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in both)
    return deep_ep.Buffer(
        group,
        max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in both),
        rdma_bytes,
        explicitly_destroy=True,
    )


def make_buffer(group: dist.ProcessGroup, *, tokens: int, hidden: int, top_k: int) -> Any:
    """Make the buffer of the release of DeepEP that is installed.

    Parameters
    ----------
    group
        The EP group, NCCL.
    tokens, hidden, top_k
        Largest batch of a rank, and the layer's sizes.

    Returns
    -------
    ElasticBuffer or LegacyBuffer

    Raises
    ------
    ModuleNotFoundError
        If there is no ``deep_ep``.
    """
    import deep_ep

    if hasattr(deep_ep, "ElasticBuffer"):
        return deep_ep.ElasticBuffer(
            group, num_max_tokens_per_rank=tokens, hidden=hidden, num_topk=top_k
        )
    return LegacyBuffer(group, hidden)
