"""Times of the kernels by CUDA-graph replay: `python -m lplb_triton.bench.timing`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from lplb_triton.balancer import Balancer
from lplb_triton.bench.instances import FAMILIES, draw_loads, shape_placement

__all__ = ["main", "pipeline_rows", "replay_us", "solve_rows"]

SOLVE_SHAPES = (
    "ring:8",
    "cube",
    "hypercube",
    "torus:4x8",
    "eplb:32:1",
    "eplb:32:2",
    "torus:8x8",
    "eplb:64:1",
    "eplb:64:2",
)
PIPELINE_SHAPES = ("cube", "eplb:32:1", "eplb:64:1", "eplb:64:2")
PUBLISHED_FAMILIES = tuple(FAMILIES)[:6]
SEED = 20


def replay_us(launch: Callable[[], object], *, calls: int = 20, replays: int = 20) -> float:
    """Median time of one call, from replays of a CUDA graph that holds several.

    Parameters
    ----------
    launch : callable
        Launches the work on the current stream; called once before the capture.
    calls : int
        Calls per graph.
    replays : int
        Timed replays.

    Returns
    -------
    float
        Microseconds.
    """
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            launch()
    graph.replay()
    times = []
    for _ in range(replays):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return float(np.median(times))


def solve_rows(per_family: int = 4) -> list[dict[str, Any]]:
    """Time the solve kernel on every shape over the six load families; certified first.

    Parameters
    ----------
    per_family : int
        Instances of each family and shape.

    Returns
    -------
    list of dict
        One per shape: sizes, median, p99 and maximum in microseconds, iterations.

    Raises
    ------
    lplb_triton.SolveError
        If an instance isn't certified: no time is reported for a wrong answer.
    """
    rows = []
    for shape in SOLVE_SHAPES:
        rng = np.random.default_rng(SEED)
        placement = shape_placement(shape, rng)
        balancer = Balancer(placement, device="cuda")
        times, iterations = [], []
        for family in PUBLISHED_FAMILIES:
            for _ in range(per_family):
                counts = draw_loads(family, rng, placement.n_logical).cuda()
                solution = balancer.solve(counts)
                solution.check()
                iterations.append(int(solution.iterations.max()))
                times.append(replay_us(partial(balancer.solve, counts), calls=10, replays=10))
        rows.append(
            {
                "shape": shape,
                "ranks": placement.group_size,
                "columns": placement.max_columns,
                "instances": len(times),
                "median_us": float(np.median(times)),
                "p99_us": float(np.percentile(times, 99)),
                "max_us": max(times),
                "mean_iterations": float(np.mean(iterations)),
                "max_iterations": max(iterations),
            }
        )
    return rows


def pipeline_rows() -> list[dict[str, Any]]:
    """Time `Balancer.run` and its parts on lognormal routing, without load sync.

    Returns
    -------
    list of dict
        One per shape and batch size (tokens x top-8), in microseconds.
    """
    rows = []
    for shape in PIPELINE_SHAPES:
        rng = np.random.default_rng(SEED)
        placement = shape_placement(shape, rng)
        balancer = Balancer(placement, device="cuda")
        balancer.warmup()
        popularity = rng.lognormal(0.0, 1.0, placement.n_logical)
        popularity /= popularity.sum()
        for tokens in (128, 4096, 16384):
            ids = rng.choice(placement.n_logical, size=(tokens, 8), p=popularity)
            idx = torch.from_numpy(ids).cuda()
            out = balancer.run(idx)
            if not torch.equal(placement.phy2log[out.cpu()].long(), idx.cpu()):
                raise RuntimeError(f"wrong physical ids on {shape}")
            counts, running = balancer.count(idx)
            solution = balancer.solve(counts)
            solution.check()
            cumulative = balancer.cumulative_shares(solution.shares)
            rows.append(
                {
                    "shape": shape,
                    "tokens": tokens,
                    "run_us": replay_us(partial(balancer.run, idx)),
                    "count_us": replay_us(partial(balancer.count, idx)),
                    "solve_us": replay_us(partial(balancer.solve, counts)),
                    "select_us": replay_us(partial(balancer.select, idx, cumulative, running)),
                }
            )
    return rows


def _markdown(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    cells = [
        [f"{row[n]:.1f}" if isinstance(row[n], float) else str(row[n]) for n in names]
        for row in rows
    ]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-family", type=int, default=4, help="instances per load family")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("timing needs a GPU", file=sys.stderr)
        return 1
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    solve, pipeline = solve_rows(options.per_family), pipeline_rows()
    print(_markdown(solve), _markdown(pipeline), sep="\n\n")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"solve": solve, "pipeline": pipeline}, file, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
