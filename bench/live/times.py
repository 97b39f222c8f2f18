"""Time runs with and without live slots, and the plan of live slots alone, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lplb_triton import Balancer, Placement
from lplb_triton._layout import CHANNELS
from lplb_triton.bench.live.compare import Options
from lplb_triton.bench.live.plans import (
    Base,
    BatchPlan,
    StaticPlan,
    place_base,
    plan_batch,
    read_copies,
)
from lplb_triton.bench.live.sources import Source
from lplb_triton.bench.measure.loads import TOP_K
from lplb_triton.bench.measure.pipeline import check_ids
from lplb_triton.bench.measure.timer import Timer, WrongAnswerError, compute_statistics
from lplb_triton.bench.placement import explain_impossible
from lplb_triton.bench.types import Row
from lplb_triton.live import MOST_SLOTS_PER_RANK, LivePlan, read_plan
from lplb_triton.reference.live import LiveCase

if TYPE_CHECKING:
    from lplb_triton import kernels
    from lplb_triton._backends.levelling import LevellingBackend

__all__ = ["RUNS", "Timing", "check_batches", "draw_ids", "time_runs"]

# In the order of timing: the last one is the first one again, which shows whether the GPU's speed
# has changed in between.
RUNS = ("without", "with", "again")

# Fields of the tensor that a plan reads start on multiples of this many int32.
FIELD_WORDS = 64


@dataclass(frozen=True)
class Timing:
    """How to time.

    Parameters
    ----------
    timer
        `lplb_triton.bench.measure.timer.GraphTimer` on a GPU.
    device
        Where runs take place.
    tokens
        Tokens of a batch of this rank, with `TOP_K` ids each.
    seed
        Of the ids.
    """

    timer: Timer
    device: torch.device
    tokens: int = 4096
    seed: int = 0


def _get_backend(live: Balancer) -> LevellingBackend:
    """Return the back end of a balancer, which must be Triton's."""
    # The comparison on a CPU does without Triton, which this module imports.
    from lplb_triton._backends.levelling import LevellingBackend

    if not isinstance(live._backend, LevellingBackend):
        raise TypeError(f"live slots are timed by the Triton back end, got {live!r}")
    return live._backend


class PlanAlone:
    """Plans live slots in a launch of its own, on memory of its own.

    Parameters
    ----------
    live : Balancer
        With live slots, by the Triton back end.
    """

    def __init__(self, live: Balancer) -> None:
        backend, p = _get_backend(live), live.placement
        sizes = p.n_logical, backend.count_shares(), 1
        starts = np.cumsum([0, *(-(-size // FIELD_WORDS) * FIELD_WORDS for size in sizes)])
        self._places = [
            slice(int(start), int(start) + size)
            for start, size in zip(starts[:-1], sizes, strict=True)
        ]
        # A timer copies one tensor per batch, so all that a plan reads is in one.
        self.words = torch.zeros(int(starts[-1]), dtype=torch.int32, device=live.device)
        versions = torch.zeros(CHANNELS, dtype=torch.int32, device=live.device)
        self._live: kernels.Live = backend.make_live(versions=versions)
        self._shape = p.ep_size, p.live_per_rank

    def launch(self) -> None:
        """Plan on what ``words`` holds."""
        # The comparison on a CPU does without Triton, which this module imports.
        from lplb_triton import kernels

        counts, cumulative, max_load = (self.words[place] for place in self._places)
        kernels.plan_live(counts, cumulative, max_load.view(torch.float32), self._live)

    def write(
        self,
        row: torch.Tensor,
        counts: torch.Tensor,
        cumulative: torch.Tensor,
        max_load: torch.Tensor,
    ) -> None:
        """Write what a plan reads to ``row``, which is like ``words``."""
        for place, given in zip(
            self._places, (counts, cumulative, max_load.view(torch.int32)), strict=True
        ):
            row[place][: len(given)] = given

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return experts and largest load of the last plan, on the CPU."""
        plan = read_plan(self._live.out, *self._shape)
        return plan.experts.cpu(), plan.max_load.cpu()


class Checked(NamedTuple):
    """Batches whose outcome has passed its check."""

    fetching: list[bool]
    """Whether a live slot is filled, by batch."""
    alone: PlanAlone
    words: torch.Tensor
    """[batches, n] int32, what a plan alone reads of each batch."""


class _Outcome(NamedTuple):
    """What a run with live slots has found for one batch."""

    counts: torch.Tensor
    """[n_logical] int32 on the device."""
    cumulative: torch.Tensor
    """[n_copies] int32 on the device, shares of the static copies."""
    max_load: torch.Tensor
    """[1] float32 on the device, largest load by these shares."""
    out: torch.Tensor
    """[tokens, TOP_K] physical ids, on the CPU."""
    plan: LivePlan
    """On the CPU."""


@dataclass
class Times:
    """Microseconds by batch, of all sources."""

    fetching: list[bool] = field(default_factory=list)
    runs: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in RUNS})
    plan: list[float] = field(default_factory=list)
    """Of the batches that fetch."""


def time_runs(
    sources: Callable[[int], Sequence[Source]],
    options: Options,
    timing: Timing,
    progress: Callable[[], None] | None = None,
) -> tuple[list[Row], list[Row]]:
    """Check and time every batch of all sources.

    Parameters
    ----------
    sources, options, progress
        As `lplb_triton.bench.live.run` takes them.
    timing
        How to time.

    Returns
    -------
    rows : list of dict
        ``ep``, ``live``, ``base``, ``batches`` and ``fetching`` (how many fetch); ``run_us``, of
        batches that fetch (``fetch``) and of others (``level``), by `RUNS` the statistics of
        `Balancer.run` in microseconds over the batches, or None where there are none; ``plan_us``,
        the same of the plan alone over the batches that fetch.
    left_out : list of dict
        ``ep``, ``live``, ``base``, ``source`` and ``reason`` of what can't be laid out.

    Raises
    ------
    WrongAnswerError
        If a batch's outcome is wrong; its source is not timed then.
    """
    rows: list[Row] = []
    left_out: list[Row] = []
    for ep in options.ep:
        here = sources(ep)
        for base in options.bases:
            for n_live in options.live:
                head = {"ep": ep, "live": n_live, "base": str(base)}
                times = Times()
                for number, source in enumerate(here):
                    reason = _explain_impossible(source.experts, ep, base)
                    if reason is not None:
                        left_out.append({**head, "source": source.name, "reason": reason})
                    else:
                        case = LiveCase(
                            ep, n_live, options.above, options.cost, options.fanout, options.domain
                        )
                        _time_source(number, source, case, base, timing, times)
                    if progress is not None:
                        progress()
                if times.fetching:
                    rows.append({**head, **summarize(times)})
    return rows, left_out


def _explain_impossible(experts: int, ep: int, base: Base) -> str | None:
    """Say why sizes can't be laid out or balanced with live slots; None if they can."""
    reason = explain_impossible(experts, ep, base.slots)
    if reason is None and experts // ep + base.slots > MOST_SLOTS_PER_RANK:
        reason = f"EP size {ep} gives a rank more than {MOST_SLOTS_PER_RANK} slots"
    return reason


def _time_source(
    number: int, source: Source, case: LiveCase, base: Base, timing: Timing, times: Times
) -> None:
    """Check and time all batches of a source, and add their times."""
    for at, one in enumerate(source.cases):
        counts = one.test.sum(1).numpy()
        counts = counts[counts.sum(1) > 0]
        if not len(counts):
            continue
        # Every base and number of live slots gets the same ids.
        rng = np.random.default_rng((timing.seed, number, at))
        ids = draw_ids(counts, timing.tokens, rng).to(timing.device)
        static, live = _make_balancers(place_base(base, one.history, case.ep_size), case, timing)
        name = f"{source.name}, EP {case.ep_size}, {case.live_per_rank} live slots on {base}"
        checked = check_batches(static, live, case, ids, name)
        _time_batches(static, live, ids, checked, timing.timer, times)


def draw_ids(
    counts: np.typing.NDArray[np.int64], tokens: int, rng: np.random.Generator
) -> torch.Tensor:
    """Draw the ids of this rank's batches, each in proportion to the batch's counts.

    Parameters
    ----------
    counts
        ``[batches, n_logical]`` tokens, some in each batch.
    tokens
        Tokens of this rank.
    rng
        Source of the draws.

    Returns
    -------
    torch.Tensor
        ``[batches, tokens, TOP_K]`` int64.
    """
    drawn = [
        rng.choice(len(row), size=(tokens, TOP_K), p=row / row.sum()).astype(np.int64)
        for row in counts
    ]
    return torch.from_numpy(np.stack(drawn))


def _make_balancers(
    placement: Placement, case: LiveCase, timing: Timing
) -> tuple[Balancer, Balancer]:
    """Make a balancer without live slots and one with them."""
    static = Balancer(placement, device=timing.device, backend="triton", rank=0)
    live = Balancer(
        placement.with_live_slots(case.live_per_rank),
        device=timing.device,
        backend="triton",
        rank=0,
        live_above=case.above,
        live_cost=case.cost,
        live_fanout=case.fanout or None,
        live_domain=case.domain or None,
    )
    return static, live


def check_batches(
    static: Balancer, live: Balancer, case: LiveCase, ids: torch.Tensor, name: str
) -> Checked:
    """Hold the outcome of every batch against the twin of the plan in numpy.

    Parameters
    ----------
    static, live
        On the same placement without and with live slots, by the Triton back end.
    case
        Sizes and rules of ``live``.
    ids
        ``[batches, tokens, TOP_K]`` logical ids on their device.
    name
        What is checked, for messages.

    Returns
    -------
    Checked

    Raises
    ------
    WrongAnswerError
        If the experts or the largest load differ from those of the twin, if an id is no copy of its
        logical one, if rank loads miss the plan by more than rounding, or if a launch of the plan
        alone finds something else.
    """
    placement = static.placement
    found = []
    for idx in ids:
        counts = torch.bincount(idx.reshape(-1), minlength=placement.n_logical).int()
        check_ids(placement, idx, static.run(idx), static.solve(counts))
        out = live.run(idx)
        plan = LivePlan(*(tensor.cpu() for tensor in live.live))
        cumulative, max_load = _get_backend(live).read_static_plan()
        found.append(_Outcome(counts, cumulative, max_load, out.cpu(), plan))
    static_plan = StaticPlan(
        case.ep_size,
        torch.stack([one.counts for one in found]).cpu().numpy().astype(np.int64),
        *read_copies(placement),
        torch.stack([one.cumulative for one in found]).cpu().numpy().astype(np.int64),
        torch.cat([one.max_load for one in found]).cpu().numpy().astype(np.float64),
    )
    alone = PlanAlone(live)
    words = alone.words.repeat(len(found), 1)
    for batch, (idx, one, row) in enumerate(zip(ids, found, words, strict=True)):
        where = f"{name}, batch {batch}"
        twin = plan_batch(case, static_plan, batch)
        _check_plan(one.plan.experts, one.plan.max_load, twin, where)
        _check_live_ids(live.placement, idx.cpu(), one, twin, where)
        alone.write(row, one.counts, one.cumulative, one.max_load)
        alone.words.copy_(row)
        alone.launch()
        _check_plan(*alone.read(), twin, f"{where}, the plan alone")
    fetching = [bool((one.plan.experts >= 0).any()) for one in found]
    return Checked(fetching, alone, words)


def _check_plan(experts: torch.Tensor, max_load: torch.Tensor, twin: BatchPlan, name: str) -> None:
    """Refuse a plan that is not the twin's."""
    if not np.array_equal(experts.numpy(), twin.experts):
        raise WrongAnswerError(f"{name}: live slots hold other experts than by the twin")
    largest = np.float32(twin.max_load)
    if max_load.item() != largest:
        raise WrongAnswerError(
            f"{name}: the largest load is {max_load.item()}, and {largest} by the twin"
        )


def _check_live_ids(
    placement: Placement, idx: torch.Tensor, one: _Outcome, twin: BatchPlan, name: str
) -> None:
    """Refuse ids that are no copies of the logical ones, or rank loads unlike the twin's."""
    held = placement.phy2log.reshape(placement.ep_size, -1).clone()
    held[:, placement.static_per_rank :] = one.plan.experts
    out = one.out.long()
    if bool((out < 0).any()) or not torch.equal(held.reshape(-1)[out].long(), idx.long()):
        raise WrongAnswerError(f"{name}: a physical id is no copy of its logical id")
    ranks = placement.rank_of_slot[out.reshape(-1)].long()
    loads = torch.bincount(ranks, minlength=placement.ep_size).numpy()
    if bool((np.abs(loads - twin.loads) >= placement.slots_per_rank).any()):
        raise WrongAnswerError(f"{name}: rank loads miss the plan by more than rounding")


def _time_batches(
    static: Balancer,
    live: Balancer,
    ids: torch.Tensor,
    checked: Checked,
    timer: Timer,
    times: Times,
) -> None:
    """Time checked batches, and add their times."""
    times.fetching += checked.fetching
    for name, balancer in zip(RUNS, (static, live, static), strict=True):
        idx = ids[0].clone()
        times.runs[name] += timer.time_batches(partial(balancer.run, idx), idx, ids)
    if any(checked.fetching):
        alone = checked.alone
        fetching = torch.tensor(checked.fetching, device=ids.device)
        times.plan += timer.time_batches(alone.launch, alone.words, checked.words[fetching])


def summarize(times: Times) -> Row:
    """Make a row of the JSON file."""
    fetching = np.array(times.fetching)
    return {
        "batches": len(fetching),
        "fetching": int(fetching.sum()),
        "run_us": {
            kind: _summarize_runs(times.runs, which)
            for kind, which in (("fetch", fetching), ("level", ~fetching))
        },
        "plan_us": compute_statistics(times.plan) if times.plan else None,
    }


def _summarize_runs(runs: dict[str, list[float]], which: np.typing.NDArray[np.bool_]) -> Row | None:
    """Compute statistics of each run over some batches; None without any."""
    if not which.any():
        return None
    return {
        name: compute_statistics(np.array(values)[which].tolist()) for name, values in runs.items()
    }
