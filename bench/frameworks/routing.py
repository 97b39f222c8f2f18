"""Biases of the routers that make the ranks' loads even, or as uneven as is asked for.

A bias is added to the scores by which a token chooses its experts, so it doesn't matter which
directions the hidden states have. (A router weight along one direction does not give a skew that
can be relied on: attention's output drowns it.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lplb_triton.bench.frameworks.model import Framework, Trained
from lplb_triton.bench.options import UsageError

__all__ = ["average_imbalance", "count_loads", "find_biases"]

# Batches that biases are found with; training has others.
BATCHES = 4
FIRST_BATCH = 10**6
# Updates of the biases that make loads even: the first is this large, and each smaller than the
# one before. Scores are sigmoids, so that a difference of 1 decides every choice.
EVEN_UPDATES, FIRST_UPDATE, SHRINK = 25, 0.1, 0.85
# Halvings of the interval in which the strength of the skew lies, and its largest upper end.
HALVINGS, MOST_STRENGTH = 10, 32.0
# The loads of other batches, and of a model that learns, differ by a little.
MARGIN = 1.03


def count_loads(model: Trained, framework: Framework, batches: Sequence[int]) -> torch.Tensor:
    """Return the choices of all ranks in forward passes, ``[batches, layers, experts]`` float64.

    Parameters
    ----------
    model
        Its weights stay as they are.
    framework
        Makes the batches.
    batches
        Numbers of them.
    """
    shape = (len(batches), len(model.routers), framework.sizes.experts)
    loads = torch.zeros(shape, dtype=torch.int64, device=framework.ranks.device)
    seen: list[torch.Tensor] = []

    def count(module: torch.nn.Module, args: object, output: object) -> None:
        seen.append(model.count_choices(output))

    hooks = [router.register_forward_hook(count) for router in model.routers]
    try:
        with torch.no_grad():
            for row, number in enumerate(batches):
                seen.clear()
                model.compute_loss(framework.make_batch(number))
                loads[row] = torch.stack(seen)
    finally:
        for hook in hooks:
            hook.remove()
    return framework.ranks.sum(loads)


def average_imbalance(loads: torch.Tensor, ranks: int) -> torch.Tensor:
    """Return each layer's imbalance, averaged over batches: largest rank load over the mean.

    Parameters
    ----------
    loads
        ``[batches, layers, experts]``, not zero.
    ranks
        Each has as many experts, in order.

    Returns
    -------
    torch.Tensor
        ``[layers]``.
    """
    by_rank = loads.view(*loads.shape[:2], ranks, -1).sum(3)
    return (by_rank.amax(2) / by_rank.mean(2)).mean(0)


def find_biases(
    model: Trained, framework: Framework, imbalance: float | None
) -> dict[str, torch.Tensor]:
    """Find the biases of both routings; the model keeps neither.

    Parameters
    ----------
    model
        One without balancing.
    framework
        Makes the batches.
    imbalance
        What skewed routing has at least in every layer; None for balanced routing only.

    Returns
    -------
    dict
        ``[layers, experts]`` float32 for ``"balanced"`` and ``"skewed"``.

    Raises
    ------
    UsageError
        If the imbalance can't be reached.
    """
    found = {"balanced": _find_even(model, framework)}
    if imbalance is not None:
        found["skewed"] = _find_skewed(model, framework, found["balanced"], imbalance)
    model.set_biases(torch.zeros_like(found["balanced"]))
    return found


def _count(model: Trained, framework: Framework, biases: torch.Tensor) -> torch.Tensor:
    model.set_biases(biases)
    return count_loads(model, framework, range(FIRST_BATCH, FIRST_BATCH + BATCHES))


def _find_even(model: Trained, framework: Framework) -> torch.Tensor:
    """Lower the biases of experts with more than the mean load, and raise the others."""
    shape = (len(model.routers), framework.sizes.experts)
    biases = torch.zeros(shape, dtype=torch.float32, device="cpu")
    update = FIRST_UPDATE
    for _ in range(EVEN_UPDATES):
        loads = _count(model, framework, biases).sum(0)
        biases += update * (loads.mean(1, keepdim=True) - loads).sign().float()
        update *= SHRINK
    return biases


def _find_skewed(
    model: Trained, framework: Framework, even: torch.Tensor, imbalance: float
) -> torch.Tensor:
    """Prefer the first top-k experts of rank 0, the first the most, as much as is needed."""
    sizes, ranks = framework.sizes, framework.ranks.size
    hot = min(sizes.top_k, sizes.experts // ranks)
    skew = torch.zeros_like(even)
    skew[:, :hot] = torch.linspace(1, 0, hot + 1, dtype=torch.float32, device="cpu")[:-1]
    wanted = min(imbalance * MARGIN, (imbalance + ranks) / 2)

    def measure(strength: torch.Tensor) -> torch.Tensor:
        loads = _count(model, framework, even + strength[:, None] * skew)
        return average_imbalance(loads, ranks)

    low = torch.zeros(len(even), dtype=torch.float32, device="cpu")
    high = torch.ones_like(low)
    reached = measure(high)
    while (reached < wanted).any():
        if high.max() >= MOST_STRENGTH:
            raise UsageError(
                f"argument --imbalance: {imbalance:g} can't be reached with top-{sizes.top_k} of "
                f"{sizes.experts} experts on {ranks} ranks: {float(reached.min()):.3f} at most"
            )
        high = torch.where(reached < wanted, 2 * high, high)
        reached = measure(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = measure(middle) >= wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return even + high[:, None] * skew
