"""Workloads for comparing balancing methods, each with its exact optimum.

A workload is a history that placements are made from and a few test batches of token counts by
source rank and expert. Everything is drawn from a seed. The last workload has no batches of its
own: a small search finds those that are worst for the placement under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from lplb_triton import Placement, solve
from lplb_triton.bench.balance import compute_token_loads, find_stretches, imbalance, make_placement
from lplb_triton.bench.placement import METHODS, Case, make_by_history
from lplb_triton.bench.types import Floats
from lplb_triton.testing.instances import FAMILIES
from lplb_triton.testing.verify import SLACK, highs_optimum
from lplb_triton.traces import trace as traces
from lplb_triton.traces.trace import MOST_TOKENS

__all__ = [
    "ADVERSARIAL",
    "PLACEMENTS",
    "WORKLOADS",
    "Settings",
    "adversary",
    "draw",
    "judge",
    "passed",
    "run",
]

PLACEMENTS = (
    *("none", "eplb", "chain", "place"),
    *("ring:8", "cube", "hypercube", "torus:4x8", "torus:8x8"),
)
ADVERSARIAL = "adversarial"
HISTORY = 32
ZIPF_TARGET = 2.0
# Factor of the tokens of a burst over those of a usual batch.
BURST = 8
# Hot experts of a burst, and so the least number of experts.
FEWEST_EXPERTS = 8
# The adversary may give half of all tokens to as many experts as there are ranks; it tries
# TRIES exchanges at once, ROUNDS times.
HOT_PART, TRIES, ROUNDS = 0.5, 16, 12


@dataclass(frozen=True)
class Settings:
    """Sizes of the workloads.

    Parameters
    ----------
    ranks
        EP size, and source ranks.
    experts
        Logical experts, a multiple of the ranks.
    batches
        Test batches.
    tokens
        Assignments (tokens times top-k) that a source sends in a batch, on average.
    seed
        Of everything drawn.
    """

    ranks: int
    experts: int = 256
    batches: int = 4
    tokens: int = 32768
    seed: int = 0


class _Rates(NamedTuple):
    """Rates of the batches: loads by expert in any unit, and the weight of each source."""

    history: Floats
    test: Floats
    sources: Floats | None = None
    scale: Floats | None = None


def _steady(rng: np.random.Generator, s: Settings, popularity: Floats, jitter: float) -> _Rates:
    size = (HISTORY + s.batches, s.experts)
    rates = popularity * rng.lognormal(0, jitter, size)
    return _Rates(rates[:HISTORY], rates[HISTORY:])


def _uniform(rng: np.random.Generator, s: Settings) -> _Rates:
    return _steady(rng, s, np.ones(s.experts), 0.0)


def _zipf(rng: np.random.Generator, s: Settings) -> _Rates:
    order = rng.permutation(s.experts)
    low, high = 0.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        popularity = np.asarray((order + 1.0) ** -middle, dtype=np.float64)
        by_rank = popularity.reshape(1, s.ranks, -1).sum(2)
        low, high = (middle, high) if imbalance(by_rank)[0] < ZIPF_TARGET else (low, middle)
    return _steady(rng, s, popularity, 0.1)


def _hot_experts(rng: np.random.Generator, s: Settings) -> _Rates:
    popularity = FAMILIES["normal"](rng, s.experts)
    popularity[rng.choice(s.experts, 4, replace=False)] *= 16
    return _steady(rng, s, popularity, 0.3)


def _hot_rank(rng: np.random.Generator, s: Settings) -> _Rates:
    rates = _steady(rng, s, FAMILIES["normal"](rng, s.experts), 0.3)
    rates.test[:, : s.experts // s.ranks] *= 4
    return rates


def _idle_source(rng: np.random.Generator, s: Settings) -> _Rates:
    rates = _steady(rng, s, FAMILIES["lognormal"](rng, s.experts), 0.3)
    weights = np.ones((s.batches, s.ranks))
    weights[:, 0] = 0
    return rates._replace(sources=weights)


def _ragged_sources(rng: np.random.Generator, s: Settings) -> _Rates:
    rates = _steady(rng, s, FAMILIES["lognormal"](rng, s.experts), 0.3)
    return rates._replace(sources=rng.lognormal(0, 1.5, (s.batches, s.ranks)))


def _rotating(rng: np.random.Generator, s: Settings) -> _Rates:
    rates = _steady(rng, s, FAMILIES["normal"](rng, s.experts), 0.1)
    width = max(1, s.experts // 32)
    for number, row in enumerate([*rates.history, *rates.test]):
        row[(number * width + np.arange(width)) % s.experts] *= 8
    return rates


def _burst(rng: np.random.Generator, s: Settings) -> _Rates:
    rates = _steady(rng, s, FAMILIES["lognormal"](rng, s.experts), 0.3)
    scale = np.ones(s.batches)
    scale[-1] = BURST
    few = rng.choice(s.experts, FEWEST_EXPERTS, replace=False)
    last = rates.test[-1]
    last[few] += last.sum() / len(few)
    return rates._replace(scale=scale)


def _replay(rng: np.random.Generator, s: Settings) -> _Rates:
    recorded = traces.packaged()
    if recorded.experts % s.experts:
        raise ValueError(f"experts must divide the {recorded.experts} that the trace has")
    available = find_stretches(recorded.steps, 0.5)[0].stop
    if HISTORY + s.batches > available:
        raise ValueError(
            f"batches must be at most {available - HISTORY} for the workload replay, which has no "
            f"more recorded, got {s.batches}"
        )
    # The first stretch of recorded batches; for fewer experts, several recorded ones are summed.
    shares = recorded.totals()[: HISTORY + s.batches, 0].reshape(-1, s.experts, 1).astype(float)
    if recorded.experts != s.experts:
        shares = shares.reshape(HISTORY + s.batches, s.experts, -1).sum(2, keepdims=True)
    rates = shares[..., 0]
    # Every count is multiplied by a gamma variable of mean 1 and variance 1/4, which varies it far
    # more than sampling does.
    return _Rates(rates[:HISTORY], rates[HISTORY:] * rng.gamma(4.0, 0.25, rates[HISTORY:].shape))


class _Workload(NamedTuple):
    about: str
    rates: Callable[[np.random.Generator, Settings], _Rates]


WORKLOADS: dict[str, _Workload] = {
    "uniform": _Workload("every expert as likely", _uniform),
    "zipf": _Workload(
        f"Zipf, exponent such that experts in order have imbalance {ZIPF_TARGET:g}", _zipf
    ),
    "hot experts": _Workload("four experts 16 times as hot, known from the history", _hot_experts),
    "hot rank": _Workload(
        "the experts that the first rank has in order 4 times as hot, unknown to the history",
        _hot_rank,
    ),
    "idle source": _Workload("lognormal popularity; source rank 0 has no tokens", _idle_source),
    "ragged sources": _Workload(
        "lognormal popularity; sources' tokens lognormal(0, 1.5)", _ragged_sources
    ),
    "rotating": _Workload("a 32nd of the experts 8 times as hot, others in every batch", _rotating),
    "burst": _Workload(
        "lognormal popularity; the last batch is 8 times as large, half of it to 8 experts", _burst
    ),
    "replay": _Workload("the packaged trace, counts times a gamma of variance 1/4", _replay),
    ADVERSARIAL: _Workload(
        "half of all tokens to as many experts as ranks, which ones by a search for the worst "
        "optimum of the placement",
        _uniform,
    ),
}


def draw(name: str, settings: Settings) -> Case:
    """Draw a workload.

    Parameters
    ----------
    name
        A key of `WORKLOADS`.
    settings
        Sizes and seed.

    Returns
    -------
    Case
        ``history`` ``[32, experts]`` and ``test`` ``[batches, ranks, experts]``, int64 tokens. Of
        the adversarial workload only the history counts; see `adversary`.

    Raises
    ------
    ValueError
        If the name is unknown, the ranks don't divide the experts, or another size is out of
        range.
    """
    if name not in WORKLOADS:
        raise ValueError(f"name must be one of {', '.join(WORKLOADS)}; got {name!r}")
    if settings.experts < FEWEST_EXPERTS:
        raise ValueError(f"experts must be at least {FEWEST_EXPERTS}, got {settings.experts}")
    if settings.ranks < 1 or settings.experts % settings.ranks:
        raise ValueError(f"ranks must divide the {settings.experts} experts, got {settings.ranks}")
    if settings.batches < 1:
        raise ValueError(f"batches must be at least 1, got {settings.batches}")
    most = MOST_TOKENS // (BURST * settings.ranks)
    if not 1 <= settings.tokens <= most:
        raise ValueError(
            f"tokens must be in [1, {most}] for {settings.ranks} ranks, so that an expert's fit "
            f"in int32 in every batch, got {settings.tokens}"
        )
    rng = np.random.default_rng([settings.seed, list(WORKLOADS).index(name), settings.ranks])
    rates = WORKLOADS[name].rates(rng, settings)
    total = settings.tokens * settings.ranks
    history = rates.history / rates.history.sum(1, keepdims=True)
    sources = np.ones((settings.batches, settings.ranks))
    if rates.sources is not None:
        sources = rates.sources
    sources = sources / sources.sum(1, keepdims=True) * total
    if rates.scale is not None:
        sources = sources * rates.scale[:, None]
    test = rates.test / rates.test.sum(1, keepdims=True)
    counts = rng.multinomial(np.floor(sources).astype(np.int64), test[:, None])
    return Case(
        name,
        torch.from_numpy(rng.multinomial(total, history)),
        torch.from_numpy(counts.astype(np.int64)),
    )


def adversary(placement: Placement, settings: Settings) -> torch.Tensor:
    """Search for batches that a placement balances worst.

    The optimum is a convex function of the loads, so the worst ones within bounds lie at
    corners: some experts as hot as allowed, the others cold. From random corners, a hot and a cold
    expert change places as long as the optimum grows.

    Parameters
    ----------
    placement
        Under test.
    settings
        Sizes and seed; as many batches as there are starts.

    Returns
    -------
    torch.Tensor
        ``[batches, ranks, experts]`` int64 tokens.
    """
    rng = np.random.default_rng([settings.seed, len(WORKLOADS), settings.ranks])
    n, hot = placement.n_logical, min(settings.ranks, placement.n_logical // 2)
    total = settings.tokens * settings.ranks
    found = []
    for _ in range(settings.batches):
        best, chosen = -1.0, rng.permutation(n)
        for _ in range(ROUNDS):
            orders = np.stack([chosen] * TRIES)
            for order in orders[1:]:
                a, b = rng.integers(hot), rng.integers(hot, n)
                order[[a, b]] = order[[b, a]]
            loads = np.full((TRIES, n), total * (1 - HOT_PART) / (n - hot))
            np.put_along_axis(loads, orders[:, :hot], total * HOT_PART / hot, axis=1)
            worst = _lp_loads(placement, torch.from_numpy(loads)).amax(1)
            at = int(worst.argmax())
            if float(worst[at]) > best:
                best, chosen, batch = float(worst[at]), orders[at], loads[at]
        found.append(batch)
    by_source = np.floor(np.stack(found) / settings.ranks).astype(np.int64)
    return torch.from_numpy(by_source).unsqueeze(1).repeat(1, settings.ranks, 1)


def _lp_loads(placement: Placement, counts: torch.Tensor) -> torch.Tensor:
    """Compute rank loads under the LP, ``[batches, ranks]``; without any copies, the even ones."""
    if placement.n_copies == placement.n_logical:
        return placement.even_loads(counts)
    return placement.rank_loads(counts, solve(placement.problem(counts)))


def judge(placement: Placement, test: torch.Tensor, tolerance: float) -> dict[str, Any]:
    """Compare the even split, the LP and HiGHS on every batch.

    Parameters
    ----------
    placement
        Where experts are.
    test
        ``[batches, sources, experts]`` int64 tokens.
    tolerance
        Certified gap asked of the LP.

    Returns
    -------
    dict
        Means over the batches of largest over mean rank load: ``even``, ``lp``, ``tokens`` (the
        LP in whole tokens) and ``highs``; ``distance``, the largest relative distance of the LP
        from HiGHS's optimum, negative if below; ``worse_than_even``, batches where the LP lost.
    """
    counts = test.sum(1)
    even = placement.even_loads(counts)
    mean = counts.sum(1).double() / placement.ep_size
    if placement.n_copies == placement.n_logical:
        lp, tokens, optimum = even, even, even.amax(1)
    else:
        problem = placement.problem(counts)
        solution = solve(problem, tolerance=tolerance, backend="torch")
        lp = placement.rank_loads(counts, solution)
        tokens = compute_token_loads(placement, test, solution).double()
        masks = problem.mask.expand(problem.n_instances, -1, -1).numpy()
        jobs = zip(problem.weights.numpy(), problem.fixed.numpy(), masks, strict=True)
        optima = np.array([highs_optimum(*job) for job in jobs], dtype=np.float64)
        optimum = torch.from_numpy(optima).reshape(len(counts), -1).amax(1)
    largest, evenly = lp.amax(1), even.amax(1)
    distance = (largest - optimum) / largest.clamp(min=1e-300)

    def ratio(loads: torch.Tensor) -> float:
        # A batch without tokens is balanced.
        return float(torch.where(mean > 0, loads / mean, 1.0).mean())

    return {
        "even": ratio(evenly),
        "lp": ratio(largest),
        "tokens": ratio(tokens.amax(1)),
        "highs": ratio(optimum),
        "distance": float(distance[distance.abs().argmax()]),
        "worse_than_even": int((largest > evenly * (1 + SLACK)).sum()),
    }


def passed(found: dict[str, Any], tolerance: float) -> bool:
    """Say whether the LP was never worse than the even split and always near HiGHS's optimum."""
    near = -SLACK <= found["distance"] <= tolerance + SLACK
    return bool(near and found["worse_than_even"] == 0)


def run(
    names: Sequence[str],
    placements: Sequence[str],
    ep: Sequence[int],
    *,
    slots: Sequence[int] = (1, 2),
    experts: int = 256,
    batches: int = 4,
    trials: int = 10,
    seed: int = 0,
    tolerance: float = 1e-3,
    progress: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Judge every workload under every placement.

    Parameters
    ----------
    names
        Keys of `WORKLOADS`.
    placements
        ``"none"``, one of ``lplb_triton.bench.placement.METHODS``, or a topology's name.
    ep
        EP sizes.
    slots
        Numbers of redundant slots per rank (``"none"`` has none, and comes once).
    experts, batches, seed
        As in `Settings`.
    trials
        Of `lplb_triton.place`.
    tolerance
        Certified gap asked of every LP.
    progress
        Called after each workload of each EP size.

    Returns
    -------
    list of dict
        ``ep``, ``workload``, ``placement``, ``slots``, ``unbalanced`` (mean imbalance of experts
        in order), ``passed`` and what `judge` returns; or ``reason`` where the placement can't be
        laid out.

    Raises
    ------
    ValueError
        If a name or a size is wrong.
    """
    rows = []
    for ranks in ep:
        settings = Settings(ranks, experts, batches, seed=seed)
        for name in names:
            case = draw(name, settings)
            kinds = dict.fromkeys(
                (kind, 0 if kind == "none" else spare) for kind in placements for spare in slots
            )
            for kind, spare in kinds:
                head = {"ep": ranks, "workload": name, "placement": kind, "slots": spare}
                try:
                    # Sizes decide whether it exists; METHODS can be laid out wherever EPLB can.
                    family = "eplb" if kind in METHODS else kind
                    placement = make_placement(family, case.history.sum(0), ranks, spare)
                except ValueError as error:
                    rows.append({**head, "reason": str(error)})
                    continue
                if kind in METHODS:
                    cpu = torch.device("cpu")
                    placement = make_by_history(kind, case.history, ranks, spare, cpu, trials)
                test = adversary(placement, settings) if name == ADVERSARIAL else case.test
                found = judge(placement, test, tolerance)
                in_order = test.sum(1).reshape(len(test), ranks, -1).sum(2).numpy()
                found["unbalanced"] = float(imbalance(in_order).mean())
                rows.append({**head, **found, "passed": passed(found, tolerance)})
            if progress is not None:
                progress()
    return rows
