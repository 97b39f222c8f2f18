"""Compare placements by the optimum of the program on unseen batches; no printing, no plotting."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lplb_triton import Placement, chain, place, plan_moves, rebalance_experts, solve
from lplb_triton.bench.balance import BY_HISTORY, compute_token_loads, find_stretches, merge_sources
from lplb_triton.testing.verify import solve_counts
from lplb_triton.traces.trace import Trace

__all__ = [
    "EXPERT_BYTES",
    "METHODS",
    "MOVES_EXPERTS",
    "SEEDS",
    "Case",
    "PublishedError",
    "count_moved",
    "count_remote",
    "explain_impossible",
    "judge",
    "make_by_history",
    "measure",
    "measure_moves",
    "time_published",
    "run",
    "synthetic_cases",
    "trace_cases",
]

# Methods that leave every expert on its home rank, by the method that they are a form of.
_AT_HOME = {"home": "eplb", "home-chain": "chain", "home-place": "place"}
METHODS = (*BY_HISTORY, *_AT_HOME)
# Weights of an expert of DeepSeek-V3 in bfloat16: three matrices of 7168 x 2048.
EXPERT_BYTES = 3 * 7168 * 2048 * 2
# Synthetic loads: seeds, batches of history and of test, spread of the means, jitter by batch.
SEEDS = tuple(range(10))
SYNTHETIC_HISTORY, SYNTHETIC_TEST = 512, 256
SPREAD, JITTER = 1.0, 0.3
# Tokens of a synthetic batch, large enough for whole tokens to approximate the loads.
SYNTHETIC_TOKENS = 1_000_000
# Drift between two placements: standard deviation of the logarithm of each expert's mean.
DRIFT, DRIFT_STEPS = 0.1, 4
# Experts of the drifting loads.
MOVES_EXPERTS = 256


class PublishedError(ValueError):
    """The published file can't be run, or has no such function."""


@dataclass(frozen=True)
class Case:
    """Loads of one layer.

    Attributes
    ----------
    name
        Layer, or seed.
    history
        int64 [batches, experts] that placements are made from.
    test
        int64 [batches, sources, experts] that they are judged by.
    by_source
        int64 [batches, sources, experts], the history by source; None where that isn't known.
    """

    name: str
    history: torch.Tensor
    test: torch.Tensor
    by_source: torch.Tensor | None = None


def trace_cases(
    trace: Trace, history: float | int, layers: Sequence[int] | None = None
) -> tuple[Case, ...]:
    """Cut every layer of a trace into history and test, each stretch without a gap separately.

    Parameters
    ----------
    trace
        Recorded counts.
    history
        Batches to place by: a part in (0, 1) or a number.
    layers
        Indices; ``None`` for all.

    Returns
    -------
    tuple of Case
        Layers first.

    Raises
    ------
    IndexError
        If a layer isn't there.
    ValueError
        If the history is out of range, or no test batch of a case has tokens.
    """
    counts = torch.from_numpy(trace.counts.astype(np.int64))
    found = []
    for layer in range(trace.layers) if layers is None else layers:
        for part in find_stretches(trace.steps, history):
            by_source = counts[part.start : part.split, layer]
            name = f"layer {layer}, batches {part.start}-{part.stop - 1}"
            test = counts[part.split : part.stop, layer]
            if not bool(test.any()):
                raise ValueError(f"{name}: no test batch has tokens")
            found.append(Case(name, by_source.sum(1), test, by_source))
    return tuple(found)


def synthetic_cases(experts: int = 256, seeds: Sequence[int] = SEEDS) -> tuple[Case, ...]:
    """Draw lognormal(0, 1) mean loads with lognormal(0, 0.3) jitter from batch to batch.

    Parameters
    ----------
    experts
        Logical experts.
    seeds
        One case each.

    Returns
    -------
    tuple of Case
        512 batches of history and 256 of test.
    """
    found = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        mean = rng.lognormal(0, SPREAD, experts)
        size = (SYNTHETIC_HISTORY + SYNTHETIC_TEST, experts)
        loads = _tokens(mean * rng.lognormal(0, JITTER, size))
        test = loads[SYNTHETIC_HISTORY:].unsqueeze(1)
        found.append(Case(f"seed {seed}", loads[:SYNTHETIC_HISTORY], test))
    return tuple(found)


def _tokens(load: np.ndarray[Any, np.dtype[np.float64]]) -> torch.Tensor:
    """Scale each batch to the same number of tokens, and round to whole tokens."""
    return torch.from_numpy((load / load.sum(1, keepdims=True) * SYNTHETIC_TOKENS).round()).long()


def make_by_history(
    method: str,
    history: torch.Tensor,
    ep: int,
    slots: int,
    device: torch.device,
    trials: int | None,
    previous: Placement | None = None,
    nodes: Mapping[str, Any] | None = None,
) -> Placement:
    """Make a placement from history by one of `METHODS`; `place` starts from ``previous``.

    ``nodes`` are ``ranks_per_node`` and ``traffic_price`` of the chain and of `place`, whose
    history may be by source then, ``[batches, sources, experts]``.
    """
    keep_home, method = method in _AT_HOME, _AT_HOME.get(method, method)
    nodes = {} if nodes is None else nodes
    if method == "place":
        return place(
            history.to(device),
            ep,
            redundant_per_rank=slots,
            trials=trials,
            previous=previous,
            keep_home=keep_home,
            **nodes,
        )
    if nodes and method == "chain":
        return chain(history, ep, redundant_per_rank=slots, keep_home=keep_home, **nodes)
    load = history.double()
    load = (load / load.sum(1, keepdim=True).clamp(min=1)).mean(0)
    if method == "chain":
        return chain(load, ep, redundant_per_rank=slots, keep_home=keep_home)
    return Placement.from_history(load, ep, redundant_per_rank=slots, keep_home=keep_home)


def count_remote(placement: Placement) -> int:
    """Count the slots, on all ranks, whose expert has its home on another rank."""
    home = placement.phy2log.long() // (placement.n_logical // placement.ep_size)
    rank = torch.arange(placement.ep_size, device=home.device)
    return int((home.reshape(placement.ep_size, -1) != rank[:, None]).sum())


def count_moved(before: Placement, after: Placement) -> int:
    """Count the expert weights that ranks receive when one placement replaces another."""
    return plan_moves(before, after).moved


def judge(placement: Placement, test: torch.Tensor, device: torch.device) -> dict[str, float]:
    """Compute the mean excess over a perfect balance: even split, LP, and LP in whole tokens."""
    counts = test.sum(1)
    some = counts.sum(1) > 0
    counts, test = counts[some], test[some]
    if not len(counts):
        raise ValueError("test has no batch with tokens")
    if device.type == "cuda":
        solution = solve_counts(placement, counts, device)
    else:
        solution = solve(placement.problem(counts))
    solution.check()
    mean = counts.sum(1).double() / placement.ep_size
    whole = compute_token_loads(placement, merge_sources(test, placement.ep_size), solution)
    return {
        "even": float((placement.even_loads(counts).amax(1) / mean).mean()) - 1,
        "lp": float((solution.max_load.double().cpu() / mean).mean()) - 1,
        "integer": float((whole.amax(1) / mean).mean()) - 1,
    }


def explain_impossible(experts: int, ep: int, slots: int) -> str | None:
    """Say why experts can't be placed with so many copies, or return None where they can."""
    if experts % ep:
        return f"EP size {ep} does not divide the {experts} experts"
    most = experts - experts // ep
    if slots > most:
        return f"{slots} redundant slots on {ep} ranks are more than copies can fill ({most})"
    return None


def measure(
    case: Case,
    ep: int,
    slots: int,
    method: str,
    device: torch.device,
    trials: int | None = None,
) -> dict[str, float]:
    """Place by a case's history, judge by its test batches, and take the time.

    Parameters
    ----------
    case
        Loads.
    ep, slots
        Ranks, and redundant slots on each.
    method
        One of `METHODS`.
    device
        Where `place` searches and programs are solved.
    trials
        Of `lplb_triton.place`; ``None`` for its default.

    Returns
    -------
    dict
        ``even``, ``lp`` and ``integer``, mean largest over mean rank load, minus 1; ``seconds``,
        wall time, and ``cpu_seconds``, of all threads, to make the placement; ``remote``, slots a
        rank whose expert has its home elsewhere; ``moved``, expert weights that all ranks together
        receive when the placement made from the test batches replaces this one.
    """
    begin, cpu = time.perf_counter(), time.process_time()
    placement = make_by_history(method, case.history, ep, slots, device, trials)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    after = make_by_history(method, case.test.sum(1), ep, slots, device, trials, placement)
    return {
        **judge(placement, case.test, device),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "remote": count_remote(placement) / ep,
        "moved": float(count_moved(placement, after)),
    }


def run(
    cases: Sequence[Case],
    ep: Sequence[int],
    slots: Sequence[int],
    device: torch.device,
    trials: int | None = None,
    progress: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Compare all methods on all cases.

    Parameters
    ----------
    cases
        Loads.
    ep, slots
        Ranks, and redundant slots on each; combinations that EPLB can't lay out are left out.
    device
        Where `place` searches and programs are solved.
    trials
        Of `lplb_triton.place`; ``None`` for its default.
    progress
        Called once for each case of each combination.

    Returns
    -------
    list of dict
        ``ep``, ``slots``, ``cases`` (names) and ``methods``: by method, what `measure` returns,
        one value for each case.
    """
    rows: list[dict[str, Any]] = []
    for n_ranks in ep:
        for spare in slots:
            if explain_impossible(cases[0].history.shape[1], n_ranks, spare) is not None:
                continue
            if device.type != "cpu" and not rows:
                # Kernels are compiled by the first search.
                measure(cases[0], n_ranks, spare, "place", device, trials)
            found: dict[str, dict[str, list[float]]] = {}
            for case in cases:
                for method in METHODS:
                    values = measure(case, n_ranks, spare, method, device, trials)
                    for name, value in values.items():
                        found.setdefault(method, {}).setdefault(name, []).append(value)
                if progress is not None:
                    progress()
            names = [case.name for case in cases]
            rows.append({"ep": n_ranks, "slots": spare, "cases": names, "methods": found})
    return rows


def measure_moves(
    ep: int,
    slots: int,
    penalty: float,
    device: torch.device,
    trials: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Follow drifting synthetic loads, and count the weights that each re-placement moves.

    Parameters
    ----------
    ep, slots
        Ranks, and redundant slots on each of them, for 256 experts.
    penalty
        `move_penalty` of `lplb_triton.place`.
    device
        Where the search runs.
    trials
        Of `lplb_triton.place`; ``None`` for its default.
    seed
        Of the loads.

    Returns
    -------
    dict
        By ``eplb``, ``free`` (no penalty) and ``priced``: ``moved``, weights that change rank, and
        ``lp``, mean excess on unseen batches, both means over the re-placements.
    """
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(0, SPREAD, MOVES_EXPERTS)
    last: dict[str, Placement] = {}
    found: dict[str, dict[str, list[float]]] = {}
    for step in range(DRIFT_STEPS + 1):
        size = (SYNTHETIC_HISTORY + SYNTHETIC_TEST, MOVES_EXPERTS)
        loads = _tokens(mean * rng.lognormal(0, JITTER, size))
        history, test = loads[:SYNTHETIC_HISTORY], loads[SYNTHETIC_HISTORY:].unsqueeze(1)
        now = {"eplb": make_by_history("eplb", history, ep, slots, device, None)}
        for name, price in (("free", 0.0), ("priced", penalty)):
            now[name] = place(
                history.to(device),
                ep,
                redundant_per_rank=slots,
                previous=last.get(name),
                move_penalty=price if step else 0.0,
                trials=trials,
            )
        for name, placement in now.items():
            if step:
                values = found.setdefault(name, {"moved": [], "lp": []})
                values["moved"].append(plan_moves(last[name], placement).moved)
                values["lp"].append(judge(placement, test, device)["lp"])
        last = now
        mean = mean * rng.lognormal(0, DRIFT, MOVES_EXPERTS)
    means = {
        name: {key: float(np.mean(value)) for key, value in values.items()}
        for name, values in found.items()
    }
    return {"ep": ep, "slots": slots, "penalty": penalty, "methods": means}


def time_published(
    path: Path, layers: int = 58, experts: int = 256, repeats: int = 5
) -> dict[str, Any]:
    """Time `lplb_triton.rebalance_experts` against the file it follows, and compare results.

    Parameters
    ----------
    path
        A copy of ``eplb.py`` of https://github.com/deepseek-ai/EPLB. It is executed.
    layers, experts
        Sizes; 288 replicas, 8 groups, 4 nodes, 32 GPUs.
    repeats
        Runs; the median counts.

    Returns
    -------
    dict
        ``seconds`` and ``published_seconds``; ``same``, whether every table is equal.

    Raises
    ------
    PublishedError
        If the file can't be run, has no ``rebalance_experts``, or that fails.
    """
    published = _published_function(path)
    load = torch.from_numpy(np.random.default_rng(0).lognormal(0, SPREAD, (layers, experts)))
    arguments = (load.float() * 1000, experts + 32, 8, 4, 32)
    seconds: dict[str, list[float]] = {"own": [], "published": []}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, function in (
            ("own", rebalance_experts),
            ("published", published),
        ):
            begin = time.perf_counter()
            results[name] = function(*arguments)
            seconds[name].append(time.perf_counter() - begin)
    theirs = results["published"]
    if not isinstance(theirs, (tuple, list)) or not all(torch.is_tensor(t) for t in theirs):
        raise PublishedError(f"{path}: rebalance_experts doesn't return tensors")
    same = len(theirs) == len(results["own"]) and all(map(torch.equal, results["own"], theirs))
    return {
        "layers": layers,
        "experts": experts,
        "seconds": statistics.median(seconds["own"]),
        "published_seconds": statistics.median(seconds["published"]),
        "same": same,
    }


def _published_function(path: Path) -> Callable[..., Any]:
    """``rebalance_experts`` of a file, as a function whose own errors become `PublishedError`."""
    spec = importlib.util.spec_from_file_location("published_eplb", path)
    if not os.path.isfile(path) or spec is None or spec.loader is None:
        raise PublishedError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)

    def guarded(function: Callable[..., Any], *arguments: Any) -> Any:
        # The published program may raise any error.
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:
            raise PublishedError(f"{path}: {type(error).__name__}: {error}") from error

    guarded(spec.loader.exec_module, module)
    return partial(guarded, guarded(getattr, module, "rebalance_experts"))
