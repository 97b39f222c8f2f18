"""Section ``live``: check every form against ``none``, then time them in turns."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from lplb_triton import Placement
from lplb_triton.bench.ep.layer.exchange import Layer
from lplb_triton.bench.ep.layer.forms import Form, find_cost, make_forms
from lplb_triton.bench.ep.layer.routing import (
    Batch,
    draw_batches,
    draw_even_batch,
    draw_popularity,
    level_ranks,
)
from lplb_triton.bench.ep.layer.sizes import ROUTINGS, LayerSizes
from lplb_triton.bench.ep.worker import Worker
from lplb_triton.bench.measure.timer import WrongAnswerError, compute_statistics, make_event
from lplb_triton.bench.types import Row

__all__ = ["EVEN", "LEVEL", "measure_layer", "run_layer"]

EVEN = "even"
LEVEL = "even ranks"
# Relative difference from ``none``, by norm, that rounding may explain: of sums in another order,
# and of gradients that are rounded once more per copy.
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4, torch.float64: 1e-10}
WARM_UP = 3
REPEATS = 8
PARTS = ("forward", "backward")


def measure_layer(worker: Worker, variant: str) -> Row:
    """Check and time all forms under each of `ROUTINGS`."""
    found = {routing: _measure_routing(worker, routing) for routing in ROUTINGS}
    row: Row = {"routings": found}
    faults = [
        f"{routing}, {name} is wrong: {why}"
        for routing, figures in found.items()
        for name, why in figures["wrong"].items()
    ]
    if faults:
        row["failed"] = "; ".join(faults)
    return row


def _measure_routing(worker: Worker, routing: str) -> Row:
    """Check and time all forms under one routing."""
    sizes = worker.job.sizes.layer
    dtype = torch.bfloat16 if worker.on_gpu else torch.float32
    history = draw_popularity(sizes, routing)
    placement = Placement.from_history(
        history, worker.ranks, redundant_per_rank=sizes.redundant, keep_home=True
    )
    batches = draw_batches(sizes, routing, placement, worker.rank, dtype, worker.device)
    originals = _draw_weights(worker, sizes, dtype)
    expert_bytes = sum(one[0].numel() for one in originals) * originals[0].element_size()
    row: Row = {
        "sizes": {**dataclasses.asdict(sizes), "cost": find_cost(sizes)},
        "dtype": str(dtype).removeprefix("torch."),
        "expert_bytes": expert_bytes,
        "forms": {},
    }
    makers = make_forms(worker, sizes, placement, originals)
    forms = {name: make() for name, make in makers.items()}
    wrong = row["wrong"] = _check_forms(worker, forms, batches, row)
    even = draw_even_batch(sizes, worker.rank, dtype, worker.device)
    right: dict[str, tuple[Form, Sequence[Batch]]] = {
        name: (form, batches) for name, form in forms.items() if name not in wrong
    }
    none = forms["none"]
    level = [_level_batch(worker, batch, sizes.experts) for batch in batches]
    right[LEVEL], right[EVEN] = (none, level), (none, [even] * sizes.batches)
    row["forms"][LEVEL] = {"imbalance": [_find_imbalance(worker, none, one) for one in level]}
    row["forms"][EVEN] = {"imbalance": [_find_imbalance(worker, none, even)]}
    _time_forms(worker, sizes, right, row["forms"])
    _time_fetches(worker, right, row["forms"], expert_bytes)
    # After an error nothing is closed, since other ranks may have had none; the process ends then.
    for form in forms.values():
        form.close()
    return row


def _level_batch(worker: Worker, batch: Batch, experts: int) -> Batch:
    """Return the batch with its experts renumbered such that ranks are even."""
    counts = torch.bincount(batch.ids.flatten(), minlength=experts)
    dist.all_reduce(counts)
    number = level_ranks(counts.cpu(), worker.ranks)
    return batch._replace(ids=number.to(worker.device)[batch.ids])


def _draw_weights(worker: Worker, sizes: LayerSizes, dtype: torch.dtype) -> list[torch.Tensor]:
    """Draw this rank's experts, ``[n_local, ...]`` for both products."""
    generator = torch.Generator(worker.device).manual_seed(100 + worker.rank)
    n_local = sizes.experts // worker.ranks
    found = []
    for rows, columns in ((sizes.hidden, 2 * sizes.inner), (sizes.inner, sizes.hidden)):
        weight = torch.empty(n_local, rows, columns, dtype=dtype, device=worker.device)
        found.append(weight.normal_(std=rows**-0.5, generator=generator))
    return found


def run_layer(layer: Layer, form: Form, batch: Batch) -> torch.Tensor:
    """Run the layer's forward pass, given the router's choice.

    Parameters
    ----------
    layer
        Way of the tokens.
    form
        How they are balanced.
    batch
        Tokens and ids.

    Returns
    -------
    torch.Tensor
        ``[tokens, hidden]``.
    """
    slots = form.choose_slots(batch.ids)
    per_rank = form.placement.slots_per_rank
    # The host is ahead of the device once tokens are on their way, so a pull costs it nothing then.
    parts, route = layer.dispatch(batch.x, slots, per_rank, form.static, form.start)
    outputs = layer.compute(parts, form.finish(), route)
    return layer.combine(outputs, batch.gates, route, form.attach)


def _train(layer: Layer, form: Form, batch: Batch) -> torch.Tensor:
    """Run both passes, and return the output."""
    y = run_layer(layer, form, batch)
    y.backward(batch.upstream)  # type: ignore[no-untyped-call]
    return y.detach()


def _forget(form: Form, batch: Batch) -> None:
    """Drop all gradients."""
    form.drop_gradients()
    batch.x.grad = batch.gates.grad = None


def _check_forms(
    worker: Worker, forms: dict[str, Form], batches: Sequence[Batch], row: Row
) -> dict[str, str]:
    """Hold the outputs and gradients of all forms against those of ``none``; say which are wrong.

    The same difference of ``none`` with its sums in the opposite order is noted beside them.
    """
    layer, backwards = Layer(worker.group), Layer(worker.group, reverse=True)
    wrong: dict[str, str] = {}
    errors: dict[str, dict[str, float]] = {name: {} for name in (*forms, "reversed")}
    imbalance: dict[str, list[float]] = {name: [] for name in forms}
    for batch in batches:
        expected = _collect_results(layer, forms["none"], batch)
        runs = {"reversed": (backwards, forms["none"])}
        runs |= {name: (layer, form) for name, form in forms.items()}
        for name, (way, form) in runs.items():
            found = _collect_results(way, form, batch)
            for part, value in found.items():
                error = _measure_error(worker, value, expected[part])
                errors[name][part] = max(error, errors[name].get(part, 0.0))
        for name, form in forms.items():
            imbalance[name].append(_find_imbalance(worker, form, batch))
    for name in forms:
        limit = TOLERANCE[batches[0].x.dtype]
        over = {part: error for part, error in errors[name].items() if not error <= limit}
        if over:
            wrong[name] = ", ".join(f"{part} is {error:.1e} off" for part, error in over.items())
        row["forms"][name] = {
            "imbalance": imbalance[name], "errors": errors[name]
        }  # fmt: skip
    row["reversed_errors"] = errors["reversed"]
    return wrong


def _collect_results(layer: Layer, form: Form, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the output, a loss of this rank, and all gradients.

    The loss is the mean square of the output's distance from the upstream gradient.
    """
    _forget(form, batch)
    y = _train(layer, form, batch)
    found = {"output": y, "loss": (y.float() - batch.upstream.float()).square().mean()}
    grads = {"x": batch.x.grad, "gates": batch.gates.grad}
    grads |= dict(zip(("w_in", "w_out"), form.collect_gradients(), strict=True))
    for name, grad in grads.items():
        if grad is None:
            raise WrongAnswerError(f"no gradient of {name} came back")
        found[name] = grad
    _forget(form, batch)
    return found


def _measure_error(worker: Worker, found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative difference by norm, the largest of all ranks and of the tensor's rows.

    Weights are compared expert by expert, so that one expert's gradient can't hide behind others.
    """
    by_expert = found.dim() == 3
    pairs = list(zip(found, expected, strict=True)) if by_expert else [(found, expected)]
    # One expert at a time is made wider, since the gradients of all may take half of the memory.
    norms = torch.stack([other.float().norm() for _, other in pairs])
    # An expert without tokens has no gradient, and those of few tokens are small beside the mean.
    least = 0.1 * norms.square().mean().sqrt() + 1e-30
    errors = [
        (one.float() - other.float()).norm() / norm.clamp(min=least)
        for (one, other), norm in zip(pairs, norms, strict=True)
    ]
    return worker.slowest([float(torch.stack(errors).max())])[0]


def _find_imbalance(worker: Worker, form: Form, batch: Batch) -> float:
    """Return the largest over the mean rank load of a batch."""
    slots = form.choose_slots(batch.ids)
    loads = torch.bincount(
        (slots // form.placement.slots_per_rank).flatten(), minlength=worker.ranks
    )
    dist.all_reduce(loads)
    return float(loads.max() / loads.double().mean())


def _time_forms(
    worker: Worker,
    sizes: LayerSizes,
    forms: dict[str, tuple[Form, Sequence[Batch]]],
    rows: Row,
) -> None:
    """Run all forms in turns on the same batches, and add their times to the rows."""
    layer = Layer(worker.group)
    names = list(forms)
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    warm_up = WARM_UP if worker.on_gpu else 1
    for number in range(sizes.rounds + warm_up):
        # Each form comes first equally often.
        first = number % len(names)
        for name in names[first:] + names[:first]:
            form, batches = forms[name]
            batch = batches[number % len(batches)]
            _forget(form, batch)
            took = _time_passes(worker, layer, form, batch)
            if number >= warm_up:
                times[name].append(took)
    slowest = {name: worker.slowest([sum(one) for one in found]) for name, found in times.items()}
    for name, found in slowest.items():
        for part, values in zip(PARTS, zip(*times[name], strict=True), strict=True):
            rows[name][f"{part}_us"] = compute_statistics(worker.slowest(list(values)))
        rows[name]["us"] = compute_statistics(found)
        for other in (EVEN, LEVEL, "lplb"):
            if other in slowest:
                pairs = zip(found, slowest[other], strict=True)
                rows[name][f"over_{other}"] = compute_statistics([a / b for a, b in pairs])


def _time_passes(worker: Worker, layer: Layer, form: Form, batch: Batch) -> list[float]:
    """Return microseconds of both passes."""
    found: list[torch.Tensor] = []

    def forward() -> None:
        found.append(run_layer(layer, form, batch))

    def backward() -> None:
        found[0].backward(batch.upstream)  # type: ignore[no-untyped-call]

    return _time_on_device(worker, forward, backward)


def _time_on_device(worker: Worker, *works: Callable[[], object]) -> list[float]:
    """Return microseconds of works that follow one another and begin on all ranks at once."""
    dist.all_reduce(worker.start)
    if not worker.on_gpu:
        marks = [time.perf_counter()]
        for work in works:
            work()
            marks.append(time.perf_counter())
        return [1e6 * (b - a) for a, b in itertools.pairwise(marks)]
    # Every rank's host has arrived before the clock starts.
    torch.cuda.synchronize()
    events = [make_event() for _ in range(len(works) + 1)]
    events[0].record()
    for work, event in zip(works, events[1:], strict=True):
        work()
        event.record()
    torch.cuda.synchronize()
    return [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def _time_fetches(
    worker: Worker,
    forms: dict[str, tuple[Form, Sequence[Batch]]],
    rows: Row,
    expert_bytes: int,
) -> None:
    """Time the ids alone, and the weights alone of forms with live slots, nothing beside them."""
    # Several fetches follow one another, so that a launch on the host costs nothing.
    repeats, warm_up = (REPEATS, WARM_UP) if worker.on_gpu else (1, 1)
    for name, (form, batches) in forms.items():
        times, rates, pieces, chosen = [], [], [], []
        for number in range(warm_up + max(len(batches), worker.job.sizes.layer.rounds // 4)):
            ids = batches[number % len(batches)].ids
            chosen += _time_on_device(worker, partial(form.choose_slots, ids))
            if not form.placement.live_per_rank:
                continue
            # The plan is known before the clock starts.
            busiest = form.count_port_rows()
            with torch.no_grad():
                took = worker.slowest(_time_on_device(worker, partial(_fetch, form, repeats)))[0]
            if number >= warm_up:
                times.append(took / repeats)
                pieces.append(form.count_pieces())
                rates += [repeats * busiest * expert_bytes / took / 1e3] if busiest else []
        rows[name]["ids_us"] = compute_statistics(worker.slowest(chosen[warm_up:]))
        if not times:
            continue
        rows[name]["bytes"] = form.count_bytes()
        rows[name]["pieces"] = sum(pieces) / len(pieces)
        rows[name]["fetch_us"] = compute_statistics(times)
        rows[name]["fetch_gb_s"] = compute_statistics(rates) if rates else None


def _fetch(form: Form, repeats: int) -> None:
    for _ in range(repeats):
        form.start()
        form.finish()
