"""Router ids of the batches, and the history that copies are placed by."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lplb_triton import Placement
from lplb_triton.bench.ep.layer.sizes import LayerSizes

__all__ = [
    "Batch",
    "draw_batches",
    "draw_even_batch",
    "draw_popularity",
    "find_hot_experts",
    "level_ranks",
]

# Standard deviations of the logarithm of the experts' popularity: of the history, and of a batch
# around it.
SPREAD = {"changing": 0.25, "steady": 1.0}
JITTER = 0.1
SEED = 24


class Batch(NamedTuple):
    """What one rank's layer is given."""

    ids: torch.Tensor
    """``[tokens, top_k]`` int64, logical experts."""
    gates: torch.Tensor
    """``[tokens, top_k]``, weights of the experts' outputs, whose gradient is wanted."""
    x: torch.Tensor
    """``[tokens, hidden]``, whose gradient is wanted."""
    upstream: torch.Tensor
    """``[tokens, hidden]``, gradient of the layer's output."""


def draw_popularity(sizes: LayerSizes, routing: str) -> torch.Tensor:
    """Draw the popularity ``[experts]`` that the history shows, float64 on the CPU."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    normal = torch.randn(sizes.experts, generator=generator, dtype=torch.float64, device="cpu")
    return (SPREAD[routing] * normal).exp()


def find_hot_experts(placement: Placement, sizes: LayerSizes, number: int) -> torch.Tensor:
    """Choose the hot experts of a batch: on one home rank, without static copies where possible.

    Batches take the ranks in turn, and other experts each time as long as there are some.

    Parameters
    ----------
    placement
        With the static copies.
    sizes
        How many are hot.
    number
        Of the batch.

    Returns
    -------
    torch.Tensor
        ``[hot]`` int64 on the CPU.
    """
    per_rank = sizes.experts // placement.ep_size
    turn, rank = divmod(number, placement.ep_size)
    own = torch.arange(rank * per_rank, (rank + 1) * per_rank, device="cpu")
    order = placement.logcnt[own].argsort(stable=True)
    single = int((placement.logcnt[own] == 1).sum())
    choices = own[order][: max(single, sizes.hot)]
    places = torch.arange(turn * sizes.hot, (turn + 1) * sizes.hot, device="cpu") % len(choices)
    return choices[places]


def draw_batches(
    sizes: LayerSizes,
    routing: str,
    placement: Placement,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Batch]:
    """Draw this rank's batches; every form gets the same ones.

    Parameters
    ----------
    sizes
        Of the layer.
    routing
        ``"changing"`` or ``"steady"``.
    placement
        Whose static copies the hot experts avoid.
    rank
        Of this process.
    dtype, device
        Of tokens and gradients.

    Returns
    -------
    list of Batch
    """
    popularity = draw_popularity(sizes, routing).to(device, torch.float32)
    found = []
    for number in range(sizes.batches):
        generator = torch.Generator(device).manual_seed(SEED + 1 + number * 1024 + rank)
        # The same on all ranks: the batch's own popularity.
        shared = torch.Generator("cpu").manual_seed(SEED + number)
        jitter = torch.randn(sizes.experts, generator=shared, dtype=torch.float32, device="cpu")
        scores = (popularity * (JITTER * jitter).exp().to(device)).log() + _draw_gumbel(
            (sizes.tokens, sizes.experts), generator, device
        )
        if routing == "changing":
            hot = find_hot_experts(placement, sizes, number).to(device)
            chosen = torch.rand(
                sizes.tokens, len(hot), generator=generator, dtype=torch.float32, device=device
            )
            # A token takes a hot expert before all others, or not at all.
            scores[:, hot] = torch.where(chosen < sizes.share, 1e9, -1e9)
        ids = scores.topk(sizes.top_k, dim=1).indices
        found.append(_make_batch(ids, sizes, generator, dtype, device))
    return found


def draw_even_batch(
    sizes: LayerSizes, rank: int, dtype: torch.dtype, device: torch.device
) -> Batch:
    """Draw a batch in which every expert gets as many tokens of each rank, or one more."""
    generator = torch.Generator(device).manual_seed(SEED + rank)
    choices = torch.arange(sizes.tokens * sizes.top_k, device=device)
    ids = (choices % sizes.experts).view(sizes.tokens, sizes.top_k)
    return _make_batch(ids, sizes, generator, dtype, device)


def level_ranks(counts: torch.Tensor, ranks: int) -> torch.Tensor:
    """Renumber experts such that ranks are as even as whole experts allow.

    Parameters
    ----------
    counts
        ``[experts]``, the tokens of a batch over all ranks.
    ranks
        Of the group; each gets as many experts, in order of their new numbers.

    Returns
    -------
    torch.Tensor
        ``[experts]`` int64 on the CPU, the new number of each expert.
    """
    per_rank = len(counts) // ranks
    loads, held = [0.0] * ranks, [0] * ranks
    number = torch.empty(len(counts), dtype=torch.int64, device="cpu")
    # The largest first, each to the least loaded rank that has room.
    for expert in counts.argsort(descending=True, stable=True).tolist():
        rank = min((r for r in range(ranks) if held[r] < per_rank), key=lambda r: loads[r])
        number[expert] = rank * per_rank + held[rank]
        loads[rank] += float(counts[expert])
        held[rank] += 1
    return number


def _draw_gumbel(
    shape: tuple[int, int], generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.float32, device=device)
    return -(-uniform.clamp(1e-7, 1 - 1e-7).log()).log()


def _make_batch(
    ids: torch.Tensor,
    sizes: LayerSizes,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> Batch:
    """Draw what belongs to the ids."""
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)

    gates = draw(sizes.tokens, sizes.top_k).softmax(1).to(wide).requires_grad_()
    x = draw(sizes.tokens, sizes.hidden).to(dtype).requires_grad_()
    return Batch(ids, gates, x, draw(sizes.tokens, sizes.hidden).to(dtype))
