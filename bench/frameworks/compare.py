"""Train one model for each method in turns, on the same batches, and compare."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from lplb_triton.bench.frameworks.even import split_evenly
from lplb_triton.bench.frameworks.model import Framework, Trained
from lplb_triton.bench.frameworks.ranks import Ranks
from lplb_triton.bench.frameworks.routing import average_imbalance, count_loads, find_biases
from lplb_triton.bench.frameworks.sizes import METHODS, Sizes
from lplb_triton.bench.frameworks.timing import LayerTimer, Mark
from lplb_triton.bench.measure.timer import compute_statistics
from lplb_triton.bench.types import Row
from lplb_triton.integrations.layers import measure_imbalance, rebalance_layers

__all__ = ["compare_routings", "find_faults", "make_framework"]

_CLASSES = {"megatron": "MegatronCore", "transformers": "Transformers"}
# Batches that imbalances are averaged over, which is what the integrations keep.
WINDOW = 8


def make_framework(name: str, sizes: Sizes, ranks: Ranks) -> Framework:
    """Import a framework and set it up; collective.

    Raises
    ------
    ImportError
        If it isn't installed.
    """
    module = importlib.import_module(f"lplb_triton.bench.frameworks.{name}")
    made: Framework = getattr(module, _CLASSES[name])(sizes, ranks)
    return made


class _Run:
    """Training by one method.

    Parameters
    ----------
    method
        One of `METHODS`.
    framework
        Builds the model.
    biases
        ``[layers, experts]``, of the routers.
    """

    def __init__(self, method: str, framework: Framework, biases: torch.Tensor) -> None:
        self.method, self._framework = method, framework
        self.model: Trained = framework.build(method)
        self.model.set_biases(biases)
        self._timer = LayerTimer(self.model.moe_layers)
        self.losses: list[torch.Tensor] = []
        self.step_ms: list[float] = []
        self.moe_ms: list[float] = []

    def train_step(self, number: int) -> None:
        """Train on a batch, with a time for the step and one for its MoE layers."""
        ranks = self._framework.ranks
        batch = self._framework.make_batch(number)
        # No time includes the delay of another rank.
        ranks.wait()
        begin = Mark(ranks.on_gpu)
        loss = self.model.compute_loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.model.update()
        end = Mark(ranks.on_gpu)
        ranks.wait()
        self.losses.append(loss.detach().double())
        self.step_ms.append(begin.measure_ms(end))
        self.moe_ms.append(self._timer.read_ms())

    def warm_up(self, steps: int) -> None:
        """Train on the batches before those that count, and place copies by half of them."""
        for number in range(steps):
            self.train_step(number)
            if number == 0 and self.method == "even":
                for balance in self.model.balances:
                    split_evenly(balance)
            if number + 1 == steps // 2:
                rebalance_layers(self.model.balances)
        self.step_ms.clear()
        self.moe_ms.clear()

    def report(self, last: int) -> Row:
        """Return what was found; ``last`` is the number of the batch after the last one."""
        ranks = self._framework.ranks
        if self.method == "none":
            batches = range(max(0, last - WINDOW), last)
            loads = count_loads(self.model, self._framework, batches)
            before = after = average_imbalance(loads, ranks.size).tolist()
        else:
            measured = measure_imbalance(self.model.balances)
            before, after = ([getattr(m, k) for m in measured] for k in ("before", "after"))
        losses = ranks.sum(torch.stack(self.losses)) / ranks.size
        return {
            "imbalance_before": float(np.mean(before)),
            "imbalance_after": float(np.mean(after)),
            "by_layer": {"before": before, "after": after},
            "idle_layers": sum(balance.idle for balance in self.model.balances),
            "step_ms": compute_statistics(ranks.slowest(self.step_ms)),
            "moe_ms": compute_statistics(ranks.slowest(self.moe_ms)),
            "losses": losses.tolist(),
        }


def compare_routings(
    framework: Framework,
    routings: Sequence[str],
    imbalance: float,
    after: Callable[[str, Row], None],
) -> None:
    """Compare the methods under each routing; collective.

    Parameters
    ----------
    framework
        Builds the models.
    routings
        Some of `lplb_triton.bench.frameworks.sizes.ROUTINGS`.
    imbalance
        What skewed routing has at least without balancing.
    after
        Called with each routing and its figures by method.

    Raises
    ------
    UsageError
        If the imbalance can't be reached.
    """
    wanted = imbalance if "skewed" in routings else None
    biases = find_biases(framework.build("none"), framework, wanted)
    _free_memory(framework.ranks)
    for routing in routings:
        after(routing, _compare_methods(framework, biases[routing]))
        _free_memory(framework.ranks)


def _free_memory(ranks: Ranks) -> None:
    """Free the memory of models that are not used any more, many of whose parts are in cycles."""
    gc.collect()
    if ranks.on_gpu:
        torch.cuda.empty_cache()


def _compare_methods(framework: Framework, biases: torch.Tensor) -> Row:
    """Train by every method in turns, and return the figures by method."""
    sizes = framework.sizes
    runs = [_Run(method, framework, biases) for method in METHODS]
    for run in runs:
        run.warm_up(sizes.warm_up)
    last = sizes.warm_up + sizes.steps
    for number in range(sizes.warm_up, last):
        # Each method comes first equally often.
        first = number % len(runs)
        for run in runs[first:] + runs[:first]:
            run.train_step(number)
    rows = {run.method: run.report(last) for run in runs}
    for row in rows.values():
        row["loss_difference"] = _distance(row["losses"], rows["none"]["losses"])
    return rows


def _distance(losses: Sequence[float], others: Sequence[float]) -> float:
    """Return the root mean square of the difference of two curves."""
    return float(np.sqrt(np.mean(np.square(np.subtract(losses, others)))))


def find_faults(routing: str, rows: Row, parity: float, imbalance: float) -> list[str]:
    """Say what is wrong with the figures of a routing.

    Parameters
    ----------
    routing
        Which one.
    rows
        Figures by method.
    parity
        Difference of loss curves that is allowed.
    imbalance
        What skewed routing was to have at least.

    Returns
    -------
    list of str
        A line for each fault.
    """
    faults = [
        f"{routing}: losses of {method} and none differ by {row['loss_difference']:.1e}, more than "
        f"{parity:.1e}"
        for method, row in rows.items()
        # A loss that isn't a number fails too.
        if not row["loss_difference"] <= parity
    ]
    found = rows["none"]["imbalance_before"]
    if routing == "skewed" and found < imbalance:
        faults.append(f"skewed: the imbalance without balancing is {found:.3f}, not {imbalance:g}")
    return faults
