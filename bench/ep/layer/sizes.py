"""Sizes of the layer that the section ``live`` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lplb_triton._layout import MAX_COUNT
from lplb_triton.live import LEAST_ABOVE, MOST_ABOVE
from lplb_triton.placement.arguments import MOST_LIVE
from lplb_triton.training.live_rows import DEFAULT_SMS

__all__ = ["LAYER_SIZES", "ROUTINGS", "TRANSPORTS", "LayerSizes", "check_layer", "read_fields"]

ROUTINGS = ("changing", "steady")
TRANSPORTS = ("symmetric", "messages", "spread")


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of the layer, its routing and its live slots.

    Attributes
    ----------
    tokens : int
        Of a rank in a batch.
    hidden, inner : int
        Width of the model, and inner width of an expert.
    experts, top_k : int
        Experts of the layer, and of a token.
    redundant : int
        Static redundant slots of a rank, of every form but ``none`` and ``even``.
    live : int
        Live slots of a rank, 1 or 2.
    hot : int
        Experts of one rank that are hot in a batch of changing routing.
    share : float
        Part of the tokens that choose each of them.
    batches : int
        Different batches.
    rounds : int
        Timed runs of every form.
    above : float
        ``live_above``.
    cost : int or None
        ``live_cost``; None for `lplb_triton.bench.advise.suggest_live_cost`.
    transports : tuple of str
        Ways to move live weights, each a form of its own: those of `lplb_triton.LiveSlots`, and
        `lplb_triton.spread`, which sends the static copies' weights in each pass too.
    n_sms : int
        Of a pull.
    backward : str
        ``"pull"`` or ``"keep"``, of the symmetric transport.
    """

    tokens: int = 8192
    hidden: int = 2048
    inner: int = 768
    experts: int = 256
    top_k: int = 8
    redundant: int = 1
    live: int = 2
    hot: int = 3
    share: float = 0.7
    batches: int = 8
    rounds: int = 100
    above: float = 1.02
    cost: int | None = None
    transports: tuple[str, ...] = ("symmetric", "spread")
    n_sms: int = DEFAULT_SMS
    backward: str = "pull"


LAYER_SIZES = {
    "cuda": LayerSizes(),
    "cpu": LayerSizes(
        tokens=64, hidden=16, inner=16, experts=32, top_k=4, hot=2, share=0.8, batches=2, rounds=2,
        cost=0, transports=("messages", "spread"),
    ),
}  # fmt: skip

COUNTS = (
    *("tokens", "hidden", "inner", "experts", "top_k", "redundant", "live", "hot", "batches"),
    *("rounds", "n_sms"),
)
BACKWARDS = ("pull", "keep")


def read_fields() -> dict[str, Callable[[str], Any]]:
    """Return how each size is read from text; to read raises a ValueError."""
    return {
        **dict.fromkeys(COUNTS, _read_count),
        "share": float,
        "above": float,
        "cost": int,
        "backward": _read_backward,
    }


def _read_count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"expected an integer from 1 on, got {text!r}")
    return value


def _read_backward(text: str) -> str:
    if text not in BACKWARDS:
        raise ValueError(f"expected one of {', '.join(BACKWARDS)}, got {text!r}")
    return text


def check_layer(sizes: LayerSizes, ranks: int) -> None:
    """Raise a ValueError if sizes don't fit each other or the number of ranks."""
    if sizes.experts % ranks:
        raise ValueError(f"{ranks} ranks don't divide {sizes.experts} experts")
    per_rank = sizes.experts // ranks
    if not sizes.hot <= min(per_rank, sizes.top_k):
        raise ValueError(f"hot must be at most {min(per_rank, sizes.top_k)}, got {sizes.hot}")
    if not sizes.top_k <= sizes.experts - sizes.hot:
        raise ValueError(f"top_k must be at most {sizes.experts - sizes.hot}, got {sizes.top_k}")
    if not 0 < sizes.share <= 1:
        raise ValueError(f"share must be in (0, 1], got {sizes.share}")
    if not LEAST_ABOVE <= sizes.above <= MOST_ABOVE:
        raise ValueError(f"above must be in [{LEAST_ABOVE}, {MOST_ABOVE}], got {sizes.above}")
    if sizes.cost is not None and not 0 <= sizes.cost <= MAX_COUNT:
        raise ValueError(f"cost must be in [0, {MAX_COUNT}], got {sizes.cost}")
    if sizes.live > MOST_LIVE:
        raise ValueError(f"live must be at most {MOST_LIVE}, got {sizes.live}")
    if sizes.redundant > sizes.experts - per_rank:
        raise ValueError(
            f"redundant must be at most {sizes.experts - per_rank}, got {sizes.redundant}"
        )
    if sizes.hidden % 16 or sizes.inner % 16:
        raise ValueError(
            f"hidden and inner must be multiples of 16, got {sizes.hidden} and {sizes.inner}"
        )
