"""Verify and time load sync, the whole run and training on the GPUs of one host, in one go.

    lplb-bench ep                             or: python -m lplb_triton.bench.run_ep
    lplb-bench ep --json ep.json --markdown ep.md

Every section runs in processes of its own, one per GPU, and within a bound: a section that fails
or hangs is reported as such, and the others still run. No answer is timed before it has passed its
gate. On the CPU the same runs over gloo with small sizes, which tests the script, not the speed.

============  ==================================================================================
``verify``    sums of many epochs with random delays, eagerly and under graph replay
``time``      an exchange of 256 counts beside a plain all-reduce
``pipeline``  whole runs with sync: a fixed topology, EPLB with one and two slots per rank
``kill``      a rank dies between two batches
``train``     examples/train_moe_ep.py: losses, step and MoE-layer times
============  ==================================================================================
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lplb_triton import Balancer, Placement, solve, sync, topologies
from lplb_triton.bench.measure.pipeline import host_seconds
from lplb_triton.bench.measure.timer import WrongAnswerError, record_event, statistics
from lplb_triton.solution import SHARE_BITS

__all__ = ["KINDS", "N_COUNTS", "SECTIONS", "SIZES", "Sizes", "main", "placements", "run"]

N_COUNTS = 256
TOP_K = 8
# Exchanges in one CUDA graph.
PER_GRAPH = 100
# Batches of the whole run, and how often a CUDA graph holds each: ranks never start a replay at
# the same time, and the more calls share the difference the less it counts.
N_BATCHES, ROUNDS = 8, 5
# Bound on waits of the exchange, and of NCCL, in seconds.
TIMEOUT = 60.0
# The same where one rank is killed.
KILL_TIMEOUT = 3.0
# Difference of losses, in nats, that no order of sums excuses.
MOST_NOISE = 0.1
# Skewed routing means at least this imbalance where experts lie in order.
SKEWED = 1.4
KINDS = ("symmetric", "nvshmem", "distributed", "hierarchical")
# Nothing here needs NVLink multicast, which not every host allows.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much every section does.

    Attributes
    ----------
    epochs : int
        Sums to verify, eagerly and again under graph replay.
    tokens : int
        Tokens per rank in a batch of the whole run, each with eight experts of 256.
    replays : int
        Timed replays of each graph; the first tenth is left out.
    training : dict
        Settings of examples/train_moe_ep.py.
    router_bias : float
        Its router's preference for experts with low numbers, for skewed routing.
    parity : float
        Difference of two loss curves (root of the mean square over the steps) that is always
        allowed.
    noise : float
        And this times what another order of sums makes: by a rounding error a token near the
        border of two experts goes to the other one, and curves part.
    """

    epochs: int
    tokens: int
    replays: int
    training: Row
    router_bias: float
    parity: float
    noise: float = 3.0


SIZES = {
    "cuda": Sizes(
        epochs=100_000,
        tokens=4096,
        replays=200,
        training={
            "experts": 256, "top_k": 8, "layers": 2, "hidden": 2048, "expert_hidden": 768,
            "vocab": 4096, "seq_len": 512, "tokens": 8192, "redundant": 4, "dtype": "bfloat16",
            "steps": 100, "skip": 40, "replace_every": 20, "log_every": 20,
            "text_bytes": 4_000_000, "transport": "torch", "lr": 3e-4,
        },
        router_bias=0.25,
        parity=0.01,
    ),
    "cpu": Sizes(
        epochs=500,
        tokens=64,
        replays=3,
        training={
            "experts": 16, "top_k": 2, "layers": 1, "hidden": 32, "expert_hidden": 16,
            "vocab": 512, "seq_len": 32, "tokens": 64, "redundant": 1, "dtype": "float64",
            "steps": 12, "skip": 4, "replace_every": 4, "log_every": 12,
            "text_bytes": 200_000, "transport": "torch",
        },
        router_bias=0.4,
        parity=1e-8,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a section's processes are told: section, back end or routing, and how much to do."""

    section: str
    variant: str
    ranks: int
    device: str
    sizes: Sizes
    folder: str


class Place:
    """One rank of a section: its device, group and way of timing."""

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank, self.ranks = job, rank, job.ranks
        self.on_gpu = job.device == "cuda"
        self.device = torch.device("cuda", rank) if self.on_gpu else torch.device("cpu")
        if self.on_gpu:
            torch.cuda.set_device(self.device)
        torch.set_num_threads(1 if not self.on_gpu else 4)
        dist.init_process_group(
            "nccl" if self.on_gpu else "gloo",
            init_method=f"file://{job.folder}/store",
            rank=rank,
            world_size=job.ranks,
            timeout=timedelta(seconds=TIMEOUT),
            device_id=self.device if self.on_gpu else None,
        )
        world = dist.group.WORLD
        if world is None:
            raise RuntimeError("torch.distributed has no default group")
        self.group: dist.ProcessGroup = world
        self.rng = np.random.default_rng(1000 + rank)
        self.start = torch.zeros(1, dtype=torch.float32, device=self.device)

    def connect(self, kind: str) -> sync.Communicator:
        """Communicator of that kind for 256 counts, with nothing left to compile."""
        made = sync.connect(
            self.group, kind, device=self.device, capacity=N_COUNTS,
            timeout=None if kind == "distributed" else TIMEOUT,
            domain_size=self.ranks // 2 if kind == "hierarchical" else None,
        )  # fmt: skip
        made.prepare(N_COUNTS)
        dist.barrier()
        return made

    def idle(self) -> None:
        """Be late now and then."""
        if self.rng.random() < 0.01:
            if self.on_gpu:
                torch.cuda._sleep(int(self.rng.integers(200_000)))  # type: ignore[no-untyped-call]
            else:
                time.sleep(1e-3 * self.rng.random())

    def repeatable(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """All calls in a row: a CUDA graph on a GPU."""

        def eager() -> None:
            for call in calls:
                call()

        if not self.on_gpu:
            return eager
        eager()
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            eager()
        torch.cuda.synchronize()
        dist.barrier()
        return graph.replay

    def replayed(self, calls: Sequence[Callable[[], object]]) -> Row:
        """Time of one call in many replays."""
        replay = self.repeatable(calls)
        times = []
        for _ in range(self.job.sizes.replays):
            # No rank's clock starts before every rank has come this far.
            dist.all_reduce(self.start)
            if self.on_gpu:
                begin, end = record_event(), record_event()
                begin.record()
                replay()
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end) * 1e3 / len(calls))
            else:
                begun = time.perf_counter()
                replay()
                times.append((time.perf_counter() - begun) * 1e6 / len(calls))
        return self.spread(times[len(times) // 10 :])

    def eager(self, calls: Sequence[Callable[[], object]]) -> Row:
        """Host's time of an eager call that isn't waited for."""
        dist.barrier()
        seconds, _ = host_seconds(calls, self.device)
        return self.spread([1e6 * value for value in seconds])

    def spread(self, microseconds: list[float]) -> Row:
        """Sum up this rank's times, and of each time the slowest rank's."""
        slowest = self.slowest(microseconds)
        return {"rank 0": statistics(microseconds), "slowest": statistics(slowest)}

    def slowest(self, times: list[float]) -> list[float]:
        """Largest of every entry over the ranks."""
        most = torch.tensor(times, dtype=torch.float64, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return [float(value) for value in most.tolist()]

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor, by rank, on the CPU."""
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(parts, mine)
        return torch.stack(parts).cpu()

    def total(self, value: int) -> int:
        """Sum over the ranks."""
        summed = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(summed)
        return int(summed)


def verify_sync(place: Place, kind: str) -> Row:
    """Compare every sum of many epochs with what it must be, eagerly and under graph replay."""
    batches = 500
    draw = torch.Generator("cpu").manual_seed(0)
    counts = torch.randint(
        0, 4096, (batches, place.ranks, N_COUNTS), generator=draw, dtype=torch.int32, device="cpu"
    ).to(place.device)
    expected = counts.sum(1, dtype=torch.int32)
    totals = torch.empty_like(expected)
    version = torch.zeros(1, dtype=torch.int32, device=place.device)
    wrong = torch.zeros((), dtype=torch.int64, device=place.device)
    row: Row = {}
    with place.connect(kind) as communicator:
        row["sync"] = repr(communicator)

        def exchange(i: int) -> None:
            communicator.exchange(counts[i, place.rank], version, totals[i])

        for mode in ("eager", "graph"):
            done = 0
            begun = time.monotonic()
            per_round = batches if mode == "eager" else min(PER_GRAPH, batches)
            replay: Callable[[], object] | None = None
            if mode == "graph":

                def late(i: int) -> None:
                    place.idle()
                    exchange(i)

                replay = place.repeatable([partial(late, i) for i in range(per_round)])
            while done < place.job.sizes.epochs:
                totals.fill_(-9)
                if replay is None:
                    for i in range(per_round):
                        place.idle()
                        exchange(i)
                else:
                    place.idle()
                    replay()
                wrong += (totals[:per_round] != expected[:per_round]).any(1).sum()
                done += per_round
            communicator.check()
            row[f"{mode}_epochs"] = done
            row[f"{mode}_seconds"] = round(time.monotonic() - begun, 1)
            row[f"{mode}_wrong"] = place.total(int(wrong))
            wrong.zero_()
    if row["eager_wrong"] or row["graph_wrong"]:
        raise WrongAnswerError(f"sums were wrong: {row}")
    return row


def time_sync(place: Place, kind: str) -> Row:
    """Time an exchange of 256 counts, with and without everybody's, beside a plain all-reduce."""
    counts = torch.arange(N_COUNTS, dtype=torch.int32, device=place.device)
    version = torch.zeros(1, dtype=torch.int32, device=place.device)
    total = torch.empty_like(counts)
    gathered = torch.empty(place.ranks, N_COUNTS, dtype=torch.int32, device=place.device)
    row: Row = {}
    with place.connect(kind) as communicator:
        for name, rows in (("sum", None), ("sum and gather", gathered)):
            calls = [partial(communicator.exchange, counts, version, total, rows)] * PER_GRAPH
            row[name] = place.replayed(calls)
            if not torch.equal(total, counts * place.ranks):
                raise WrongAnswerError(f"{name} is wrong")
        communicator.check()
    plain = torch.zeros_like(counts)
    row["calls_per_replay"] = PER_GRAPH
    row["all-reduce"] = place.replayed([partial(dist.all_reduce, plain)] * PER_GRAPH)
    return row


def placements(ranks: int) -> dict[str, Placement]:
    """Make the fixed topology of that many ranks, and EPLB with one and two slots per rank."""
    load = torch.from_numpy(np.random.default_rng(0).lognormal(0, 1, N_COUNTS))
    fixed = {4: "torus:2x2", 8: "cube"}.get(ranks, f"ring:{ranks}")
    r2o = topologies.from_name(fixed)
    slots = N_COUNTS + r2o.shape[1] * ranks
    made = {fixed: Placement.from_topology(r2o, slots, N_COUNTS, ranks, workload=load)}
    for redundant in (1, 2):
        made[f"eplb:{ranks}:{redundant}"] = Placement.from_history(
            load, ranks, redundant_per_rank=redundant
        )
    return made


def routed(place: Place) -> list[torch.Tensor]:
    """Batches of this rank's logical ids, ``[tokens, 8]``, near the placements' history."""
    popularity = np.random.default_rng(0).lognormal(0, 1, N_COUNTS)
    popularity = popularity * np.random.default_rng(1).lognormal(0, 0.3, N_COUNTS)
    scores = np.log(popularity) + place.rng.gumbel(
        size=(N_BATCHES, place.job.sizes.tokens, N_COUNTS)
    )
    chosen = np.argpartition(-scores, TOP_K, axis=2)[:, :, :TOP_K]
    return list(torch.from_numpy(chosen.copy()).to(place.device))


def time_pipeline(place: Place, kind: str) -> Row:
    """Time whole runs with sync, after a look at the loads that come out of them."""
    batches, rounds = routed(place), ROUNDS if place.on_gpu else 1
    communicator = place.connect(kind)
    row: Row = {"sync": repr(communicator), "placements": {}}
    row["calls_per_replay"] = rounds * len(batches)
    for name, placement in placements(place.ranks).items():
        found: Row = {}
        for quotas in ("local", "global"):
            balancer = Balancer(placement, device=place.device, sync=communicator, quotas=quotas)
            calls = [partial(balancer.run, idx) for idx in batches]
            found[quotas] = {
                **check_loads(place, balancer, batches),
                "same_again": _same_again(place, balancer, batches),
                "run_us": place.replayed(calls * rounds),
                "host_us": place.eager(calls),
            }
            balancer.check()
        alone = Balancer(placement, device=place.device, rank=place.rank)
        alone.warmup()
        calls = [partial(alone.run, idx) for idx in batches]
        found["without_sync_us"] = place.replayed(calls * rounds)
        row["placements"][name] = found
    communicator.close()
    return row


def _same_again(place: Place, balancer: Balancer, batches: Sequence[torch.Tensor]) -> int:
    """Run the batches over and over, with late ranks: ids never change; returns how many runs."""
    first = [balancer.run(idx) for idx in batches]
    wrong = torch.zeros((), dtype=torch.int64, device=place.device)
    outs: list[torch.Tensor] = []

    def run_all() -> None:
        outs[:] = [balancer.run(idx) for idx in batches]

    replay = place.repeatable([run_all])
    rounds = max(1, place.job.sizes.epochs // 100)
    for _ in range(rounds):
        place.idle()
        replay()
        for want, out, idx in zip(first, outs, batches, strict=True):
            wrong += (out != want).any()
            place.idle()
            wrong += (balancer.run(idx) != want).any()
    changed = place.total(int(wrong))
    if changed:
        raise WrongAnswerError(f"ids of {changed} runs changed, on all ranks together")
    return 2 * rounds * len(batches)


def check_loads(place: Place, balancer: Balancer, batches: Sequence[torch.Tensor]) -> Row:
    """Hold the physical ids of all ranks against the LP, before anything is timed.

    Every id must map back, every copy's quota must be met, and the most loaded rank must lie
    between the LP's lower bound and its certified load plus what rounding may add.
    """
    placement, exact = balancer.placement, balancer.quotas == "global"
    rank_of_slot = placement.rank_of_slot.long()
    # A copy is off its share by less than a token: over all ranks, or on each of them.
    replicated = placement.logcnt[placement.phy2log.long()] > 1
    slack = int(replicated.view(place.ranks, -1).sum(1).max()) * (1 if exact else place.ranks)
    imbalance, over_bound, kept, everything = [], [], 0, 0
    for idx in batches:
        logical, physical = place.gather(idx), place.gather(balancer.run(idx))
        if not torch.equal(placement.phy2log[physical].long(), logical):
            raise WrongAnswerError("physical ids don't map back")
        counts = _count_rows(logical, N_COUNTS)
        loads = _count_rows(physical, placement.n_physical)
        total = counts.sum(0)
        solution = balancer.solve(total.int().to(balancer.device))
        solution.check()
        cumulative = balancer.cumulative_shares(solution.shares).cpu().long()
        if exact:
            _check_quotas(placement, total[None], loads.sum(0, keepdim=True), cumulative)
        else:
            _check_quotas(placement, counts, loads, cumulative)
        best = solve(placement.problem(total))
        best.check()
        by_rank = loads.sum(0).view(place.ranks, -1).sum(1).double()
        largest, bound = float(by_rank.max()), float(best.lower_bound.max())
        most = float(best.max_load.max()) / (1 - balancer.tolerance) + slack
        if not bound * (1 - 1e-6) <= largest <= most * (1 + 1e-6):
            raise WrongAnswerError(
                f"largest load {largest:.0f}, expected from {bound:.1f} to {most:.1f}"
            )
        imbalance.append(largest / float(by_rank.mean()))
        over_bound.append(largest / bound)
        sender = torch.arange(place.ranks, device="cpu").view(-1, 1, 1)
        kept += int((rank_of_slot[physical] == sender).sum())
        everything += physical.numel()
    if exact:
        told = [place.total(int(tokens)) for tokens in balancer.traffic]
        if told[0] != kept or told[2] != everything:
            raise WrongAnswerError(f"traffic says {told}, {kept} of {everything} were kept")
    return {
        "batches": len(batches),
        "imbalance": statistics(imbalance),
        "over_bound": max(over_bound),
        "kept_on_rank": kept / everything,
    }


def _count_rows(ids: torch.Tensor, n: int) -> torch.Tensor:
    """Count how often each id occurs in each row: ``[rows, n]``."""
    return torch.stack([torch.bincount(row.reshape(-1), minlength=n) for row in ids])


def _check_quotas(
    placement: Placement, counts: torch.Tensor, loads: torch.Tensor, cumulative: torch.Tensor
) -> None:
    """Refuse a copy whose load is a token or more off its share of its expert's count.

    ``counts`` ``[rows, n_logical]`` and ``loads`` ``[rows, n_physical]``, each row by itself;
    ``cumulative`` ``[n_physical]`` as of `Balancer.cumulative_shares`.
    """
    structure = placement.structure
    start = torch.tensor(structure.copy_start).long()
    before = cumulative.roll(1)
    before[start[:-1]] = 0
    total = counts.repeat_interleave(start.diff(), 1)
    off = loads[:, torch.tensor(structure.copy_slot).long()] << SHARE_BITS
    off -= (cumulative - before) * total
    if int(off.abs().max()) >= 1 << SHARE_BITS:
        raise WrongAnswerError("a copy's load is a token or more off its share")


def kill_one(place: Place, kind: str) -> Row:
    """Kill the last rank between two batches: the others name it within the bound."""
    victim = place.ranks - 1
    bound = None if place.on_gpu and kind == "distributed" else KILL_TIMEOUT
    communicator = sync.connect(
        place.group, kind, device=place.device, timeout=bound, capacity=N_COUNTS
    )
    communicator.prepare(N_COUNTS)
    counts = torch.ones(N_COUNTS, dtype=torch.int32, device=place.device)
    version = torch.zeros(1, dtype=torch.int32, device=place.device)
    total = torch.empty_like(counts)
    dist.barrier()
    for _ in range(100):
        communicator.exchange(counts, version, total)
    communicator.check()
    dist.barrier()
    if place.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    try:
        communicator.exchange(counts, version, total)
        communicator.check()
    except sync.SyncError as error:
        took = time.monotonic() - begun
        communicator.close()
        if error.ranks != (victim,) or error.epoch != 101 or took > KILL_TIMEOUT + 6:
            raise WrongAnswerError(f"after {took:.2f} s: {error}") from error
        return {"took_seconds": round(took, 2), "error": str(error)}
    raise WrongAnswerError("a dead rank was not missed")


def train(place: Place, routing: str) -> Row:
    """Train with every balance and compare; ``routing`` is skewed, learned or even.

    Even routing gives every expert the same number of tokens: what a perfect balance costs.
    """
    sys.path.append(str(EXAMPLES))
    script = importlib.import_module("train_moe_ep")
    sizes = place.job.sizes
    settings = script.Settings(
        **sizes.training,
        balance="none,lplb" if routing == "even" else "none,eplb,lplb",
        router_bias=sizes.router_bias if routing == "skewed" else 0.0,
        even_routing=routing == "even",
    )

    def trained(settings: Any) -> Any:
        return script.train(settings, place.device, place.group, lambda line: None)

    runs = trained(settings)
    (backwards,) = trained(replace(settings, balance="none", reverse_sums=True))
    for made in runs:
        made.step_ms, made.moe_ms = place.slowest(made.step_ms), place.slowest(made.moe_ms)
    rows = script.report(settings, runs, place.ranks, place.device)["medians"]
    noise = _apart(backwards.losses, runs[0].losses)
    for summary, made in zip(rows, runs, strict=True):
        difference = _apart(made.losses, runs[0].losses)
        summary.update(certified=made.certified, loss_difference=difference)
    row = {
        "settings": sizes.training,
        "router_bias": settings.router_bias,
        "runs": rows,
        "reversed_difference": noise,
    }
    allowed = sizes.parity + min(sizes.noise * noise, MOST_NOISE)
    faults = [
        f"losses of {summary['balance']} and none differ by {summary['loss_difference']:.1e}, "
        f"more than {allowed:.1e}"
        for summary in rows
        if not summary["loss_difference"] <= allowed
    ]
    if rows[-1]["certified"] != 1.0:
        faults.append(f"the part of LPs that were certified is {rows[-1]['certified']}")
    if routing == "skewed" and rows[0]["unbalanced"] < SKEWED:
        faults.append(f"routing is not skewed: imbalance {rows[0]['unbalanced']:.3f} in order")
    if faults:
        row["failed"] = "; ".join(faults)
    return row


def _apart(losses: Sequence[float], others: Sequence[float]) -> float:
    """Root of the mean square of two curves' difference."""
    return float(np.sqrt(np.mean(np.square(np.subtract(losses, others)))))


@dataclass(frozen=True)
class Section:
    """Code of a section, what it is run for (back ends or routings), and seconds at most."""

    work: Callable[[Place, str], Row]
    variants: tuple[str, ...]
    seconds: float


SECTIONS = {
    "verify": Section(verify_sync, KINDS, 150.0),
    "time": Section(time_sync, KINDS, 90.0),
    "pipeline": Section(time_pipeline, KINDS, 150.0),
    "kill": Section(kill_one, KINDS, 60.0),
    "train": Section(train, ("skewed", "learned", "even"), 150.0),
}


def _work(rank: int, job: Job) -> None:
    """One process of a section; leaves its result in a file."""
    # Libraries read these when they start, which is later.
    os.environ.update(NO_MULTICAST)
    try:
        result = SECTIONS[job.section].work(Place(job, rank), job.variant)
    except Exception as error:
        traceback.print_exc()
        result = {"failed": f"rank {rank}: {type(error).__name__}: {error}"}
    path = Path(job.folder, str(rank))
    path.write_text(json.dumps(result))
    # Whole or not at all, as this process may be killed at any time.
    path.rename(path.with_suffix(".json"))
    sys.stderr.flush()
    # Without a farewell: a rank may be dead, and teardown would wait for it.
    os._exit("failed" in result)


@contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """Let a process that is started here never see Ctrl-C: the one that starts it ends it.

    A process inherits the blocked signals of the thread that starts it. One that comes meanwhile
    is delivered at the end.
    """
    # It unblocks signals if it has to start a process of its own, which `Process.start` asks for.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_section(job: Job, seconds: float) -> Row:
    """Run one section in processes of its own, for at most ``seconds``."""
    context = mp.get_context("spawn")
    victim = job.ranks - 1 if job.section == "kill" else None
    workers = [context.Process(target=_work, args=(rank, job)) for rank in range(job.ranks)]
    begun = time.monotonic()
    failed = over = done = False
    try:
        for worker in workers:
            with _blocked_interrupts():
                worker.start()
        while not (done or failed):
            time.sleep(0.05)
            codes = [worker.exitcode for worker in workers]
            done = None not in codes
            over = not done and time.monotonic() - begun > seconds
            failed = over or any(
                code not in (None, 0) and rank != victim for rank, code in enumerate(codes)
            )
        if failed and not done:
            # Others may be about to say why they fail too.
            time.sleep(2.0)
    finally:
        for worker in workers:
            if worker.exitcode is None and worker.pid is not None:
                worker.kill()
                worker.join(10)
    paths = [Path(job.folder, f"{rank}.json") for rank in range(job.ranks)]
    left = [
        # JSON knows no infinity: what diverged has no figure.
        json.loads(path.read_text(), parse_constant=lambda name: None) if path.exists() else {}
        for path in paths
    ]
    result: Row = left[0]
    if failed:
        said = [row["failed"] for row in left if "failed" in row]
        if over:
            said.append(f"not done within {seconds:.3g} s")
        result["failed"] = "; ".join(dict.fromkeys(said)) or f"exit codes by rank {codes}"
    result["seconds"] = time.monotonic() - begun
    return result


def _reason(section: str, variant: str, ranks: int, device: str) -> str | None:
    """Why a section can't run here, or None."""
    if section == "train":
        if (EXAMPLES / "train_moe_ep.py").is_file():
            return None
        return "needs the examples folder of a checkout, which an installed package lacks"
    if device == "cpu" and variant != "distributed":
        return "needs GPUs"
    if variant == "nvshmem" and importlib.util.find_spec("nvshmem") is None:
        return "nvshmem4py is not installed"
    if variant == "hierarchical" and (ranks < 4 or ranks % 2):
        return "needs two domains of several ranks"
    if section == "kill" and device == "cuda" and variant in ("distributed", "hierarchical"):
        return "NCCL itself decides what becomes of a dead rank"
    return None


def run(
    ranks: int,
    device: str,
    sizes: Sizes,
    *,
    sections: Sequence[str] = tuple(SECTIONS),
    kinds: Sequence[str] = KINDS,
    seconds: float = 570.0,
    after: Callable[[str, Row], object] = lambda name, result: None,
) -> dict[str, Row]:
    """Run sections, one after the other.

    Parameters
    ----------
    ranks : int
        Processes, each with a GPU of its own on ``cuda``; divides 256.
    device : {"cuda", "cpu"}
        Where.
    sizes : Sizes
        How much.
    sections : sequence of str
        Of `SECTIONS`.
    kinds : sequence of str
        Back ends, of `KINDS`; hierarchical runs as two domains.
    seconds : float
        Bound on the whole; each section has its own too.
    after : callable
        Called with the name and the figures of every section when it is over.

    Returns
    -------
    dict
        Figures by ``section:variant``. ``failed`` in them says what went wrong, ``skipped`` why
        there are none.
    """
    end = time.monotonic() + seconds
    found: dict[str, Row] = {}
    for name in sections:
        for variant in SECTIONS[name].variants:
            if variant in KINDS and variant not in kinds:
                continue
            left = end - time.monotonic()
            reason = _reason(name, variant, ranks, device)
            if reason is not None:
                result: Row = {"skipped": reason}
            elif left < 20:
                result = {"failed": "no time left"}
            else:
                with tempfile.TemporaryDirectory() as folder:
                    job = Job(name, variant, ranks, device, sizes, folder)
                    result = run_section(job, min(left, SECTIONS[name].seconds))
            found[f"{name}:{variant}"] = result
            after(f"{name}:{variant}", result)
    return found


def outcome(result: Row) -> str:
    """How a section ended, in a few words."""
    for word in ("failed", "skipped"):
        if word in result:
            return f"{word}: {result[word]}"
    return f"done in {result['seconds']:.0f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Do what ``lplb-bench ep`` does; returns the exit code."""
    from lplb_triton.bench import cli

    return cli.main(["ep", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
