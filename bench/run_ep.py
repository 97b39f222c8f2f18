"""Verify and time load sync on the GPUs of one host, in one go.

    python -m lplb_triton.bench.run_ep [--ranks N] [--json FILE]

Every section runs in processes of its own, one per GPU, and within a bound: a section that fails
or hangs is reported as such, and the others still run. Exit code 1 if any failed. With
``--device cpu`` the same runs over gloo, which tests the script, not the speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lplb_triton import Balancer, Placement, solve, sync, topologies
from lplb_triton.bench import timing

N_COUNTS = 256
TOP_K = 8
# Exchanges in one CUDA graph.
PER_GRAPH = 100
# Bound on waits of the exchange, and of NCCL, in seconds.
TIMEOUT = 60.0
# The same where one rank is killed.
KILL_TIMEOUT = 3.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a section's processes are told."""

    section: str
    ranks: int
    device: str
    epochs: int
    tokens: int
    replays: int
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
        )
        world = dist.group.WORLD
        if world is None:
            raise RuntimeError("torch.distributed has no default group")
        self.group: dist.ProcessGroup = world
        self.rng = np.random.default_rng(1000 + rank)

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

    def microseconds(self, calls: Sequence[Callable[[], object]]) -> Row:
        """Time of one call in many replays; of each replay the slowest rank's."""
        replay = self.repeatable(calls)
        times = []
        for _ in range(self.job.replays):
            dist.barrier()
            if self.on_gpu:
                begin, end = timing._event(), timing._event()
                begin.record()
                replay()
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end) * 1e3 / len(calls))
            else:
                begun = time.perf_counter()
                replay()
                times.append((time.perf_counter() - begun) * 1e6 / len(calls))
        slowest = torch.tensor(times, dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        found = timing.statistics(slowest.tolist()[len(times) // 10 :])
        return {f"{name}_us": round(value, 2) for name, value in found.items()}

    def total(self, value: int) -> int:
        """Sum over the ranks."""
        summed = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(summed)
        return int(summed)


def verify_sync(place: Place, kind: str) -> Row:
    """Compare every sum of many epochs with what it must be, eagerly and under graph replay."""
    batches = 500
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(
        0, 4096, (batches, place.ranks, N_COUNTS), generator=draw, dtype=torch.int32
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
            while done < place.job.epochs:
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
    if row["eager_wrong"] or row["graph_wrong"]:
        raise timing.WrongAnswerError(f"sums were wrong: {row}")
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
            row[name] = place.microseconds(calls)
            if not torch.equal(total, counts * place.ranks):
                raise timing.WrongAnswerError(f"{name} is wrong")
        communicator.check()
    plain = torch.zeros_like(counts)
    row["all-reduce"] = place.microseconds([partial(dist.all_reduce, plain)] * PER_GRAPH)
    row["speed-up"] = round(row["all-reduce"]["median_us"] / row["sum"]["median_us"], 2)
    return row


def placements(ranks: int) -> dict[str, Placement]:
    """Make the fixed topology of that many ranks, and EPLB with one and two slots per rank."""
    load = torch.from_numpy(np.random.default_rng(0).lognormal(0, 1, N_COUNTS))
    fixed = {4: "torus:2x2", 8: "cube"}.get(ranks, f"ring:{ranks}")
    r2o = topologies.from_name(fixed)
    slots = N_COUNTS + r2o.shape[1] * ranks
    made = {fixed: Placement.from_topology(r2o, slots, N_COUNTS, ranks, workload=load)}
    for redundant in (1, 2):
        made[f"eplb, {redundant} per rank"] = Placement.from_history(
            load, ranks, redundant_per_rank=redundant
        )
    return made


def routed(place: Place, batches: int) -> list[torch.Tensor]:
    """Batches of this rank's logical ids, ``[tokens, 8]``, near the placements' history."""
    popularity = np.random.default_rng(0).lognormal(0, 1, N_COUNTS)
    popularity = popularity * np.random.default_rng(1).lognormal(0, 0.3, N_COUNTS)
    scores = np.log(popularity) + place.rng.gumbel(size=(batches, place.job.tokens, N_COUNTS))
    chosen = np.argpartition(-scores, TOP_K, axis=2)[:, :, :TOP_K]
    return list(torch.from_numpy(chosen.copy()).to(place.device))


def time_pipeline(place: Place, kind: str) -> Row:
    """Time whole runs with sync, after a look at the loads that come out."""
    batches = routed(place, 8)
    row: Row = {}
    communicator = place.connect(kind)
    for name, placement in placements(place.ranks).items():
        found: Row = {}
        for quotas in ("local", "global"):
            balancer = Balancer(placement, device=place.device, sync=communicator, quotas=quotas)
            out = balancer.run(batches[0])
            found.update(_loads(place, balancer, batches[0], out))
            found[quotas] = place.microseconds([partial(balancer.run, idx) for idx in batches])
            found[f"ids compared, {quotas}"] = _same_again(place, balancer, batches)
            balancer.check()
            if quotas == "global":
                own, node, everything = (place.total(int(t)) for t in balancer.traffic)
                found["kept on rank, global"] = round(own / everything, 4)
                found["kept on node, global"] = round(node / everything, 4)
        alone = Balancer(placement, device=place.device, rank=place.rank)
        alone.warmup()
        found["without sync"] = place.microseconds([partial(alone.run, i) for i in batches])
        row[name] = found
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
    rounds = max(1, place.job.epochs // 100)
    for _ in range(rounds):
        place.idle()
        replay()
        for want, out, idx in zip(first, outs, batches, strict=True):
            wrong += (out != want).any()
            place.idle()
            wrong += (balancer.run(idx) != want).any()
    if place.total(int(wrong)):
        raise timing.WrongAnswerError(f"ids of {int(wrong)} runs changed on rank {place.rank}")
    return 2 * rounds * len(batches)


def _loads(place: Place, balancer: Balancer, idx: torch.Tensor, out: torch.Tensor) -> Row:
    """Check one batch's loads over all ranks; imbalance, and the part kept on its own rank."""
    placement = balancer.placement
    flat = out.reshape(-1)
    loads = torch.bincount(flat, minlength=placement.n_physical)
    kept = place.total(int((flat // placement.slots_per_rank == place.rank).sum()))
    counts = torch.bincount(idx.reshape(-1), minlength=N_COUNTS)
    dist.all_reduce(loads)
    dist.all_reduce(counts)
    counts, loads = counts.cpu(), loads.cpu()
    by_expert = torch.zeros(N_COUNTS, dtype=torch.long)
    by_expert.index_add_(0, placement.phy2log.long(), loads)
    if not torch.equal(by_expert, counts):
        raise timing.WrongAnswerError("physical ids don't map back")
    by_rank = loads.reshape(place.ranks, -1).sum(1)
    best = solve(placement.problem(counts))
    most = float(best.max_load.max())
    slack = placement.slots_per_rank * (1 if balancer.quotas == "global" else place.ranks)
    if float(by_rank.max()) > most * 1.002 + slack:
        raise timing.WrongAnswerError(f"largest load {int(by_rank.max())}, the LP's is {most}")
    if balancer.quotas == "global":
        _check_quotas(balancer, counts, loads)
    imbalance = float(by_rank.max()) / float(by_rank.double().mean())
    return {
        f"imbalance, {balancer.quotas}": round(imbalance, 5),
        f"first batch kept on rank, {balancer.quotas}": round(kept / int(counts.sum()), 4),
    }


def _check_quotas(balancer: Balancer, counts: torch.Tensor, loads: torch.Tensor) -> None:
    """Every copy's load over all ranks within one token of its share, exactly."""
    solution = balancer.solve(counts.int().to(balancer.device))
    cumulative = balancer.cumulative_shares(solution.shares).cpu().long()
    structure = balancer.placement.structure
    start = torch.from_numpy(structure.copy_start).long()
    before = cumulative.roll(1)
    before[start[:-1]] = 0
    total = counts.repeat_interleave(start.diff())
    off = loads[torch.from_numpy(structure.copy_slot).long()] * (1 << 24)
    off -= (cumulative - before) * total
    if int(off.abs().max()) >= 1 << 24:
        raise timing.WrongAnswerError("a copy's load is a token or more off its share")


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
            raise timing.WrongAnswerError(f"after {took:.2f} s: {error}") from error
        return {"seconds": round(took, 2), "error": str(error)}
    raise timing.WrongAnswerError("a dead rank was not missed")


SECTIONS: dict[str, Callable[[Place, str], Row]] = {
    "verify": verify_sync,
    "time": time_sync,
    "pipeline": time_pipeline,
    "kill": kill_one,
}


def _work(rank: int, job: Job) -> None:
    """One process of a section; leaves its result in a file."""
    name, kind = job.section.split(":")
    place = Place(job, rank)
    result = SECTIONS[name](place, kind)
    path = Path(job.folder, f"{rank}.json")
    path.write_text(json.dumps(result))
    # Without a farewell: a rank may be dead, and teardown would wait for it.
    os._exit(0)


def run_section(job: Job, seconds: float) -> Row:
    """Run one section in processes of its own, for at most ``seconds``."""
    context = mp.get_context("spawn")
    victim = job.ranks - 1 if job.section.startswith("kill") else None
    workers = [context.Process(target=_work, args=(rank, job)) for rank in range(job.ranks)]
    end = time.monotonic() + seconds
    for worker in workers:
        worker.start()
    failed = False
    while any(worker.exitcode is None for worker in workers) and not failed:
        time.sleep(0.05)
        over = time.monotonic() > end
        failed = over or any(
            worker.exitcode not in (None, 0) and rank != victim
            for rank, worker in enumerate(workers)
        )
    if failed:
        # Others may be about to say why they fail too.
        time.sleep(2.0)
    for worker in workers:
        if worker.exitcode is None:
            worker.kill()
    for worker in workers:
        worker.join()
    if failed:
        codes = [worker.exitcode for worker in workers]
        return {"failed": f"exit codes by rank {codes}, bound {seconds:.0f} s"}
    result: Row = json.loads(Path(job.folder, "0.json").read_text())
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run all sections; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lplb_triton.bench.run_ep",
        description="Verify and time load sync on the GPUs of one host.",
    )
    parser.add_argument("--ranks", type=int, help="GPUs to use (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--kinds",
        default="symmetric,nvshmem,distributed,hierarchical",
        help="back ends; hierarchical runs as two domains, from 4 ranks on",
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="parts to run")
    parser.add_argument("--epochs", type=int, default=100_000, help="sums to verify in each mode")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per rank and batch")
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=570.0, help="bound on the whole run")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu runs the same over gloo")
    ranks = args.ranks or (torch.cuda.device_count() if args.device == "cuda" else 2)
    if ranks < 2:
        parser.error(f"at least 2 ranks are needed, got {ranks}")
    kinds = ["distributed"] if args.device == "cpu" else args.kinds.split(",")
    on_gpu = args.device == "cuda"
    # Where the host takes no part, NCCL itself decides what becomes of a dead rank.
    jobs = [
        f"{section}:{kind}"
        for section in args.sections.split(",")
        for kind in kinds
        if not (section == "kill" and kind in ("distributed", "hierarchical") and on_gpu)
        if kind != "hierarchical" or (ranks >= 4 and ranks % 2 == 0)
    ]
    report: Row = {"ranks": ranks, "torch": torch.__version__, "sections": {}}
    if args.device == "cuda":
        report["gpu"] = torch.cuda.get_device_name(0)
    end = time.monotonic() + args.seconds
    bad = False
    for name in jobs:
        left = end - time.monotonic()
        if name.endswith(":nvshmem") and importlib.util.find_spec("nvshmem") is None:
            result: Row = {"skipped": "nvshmem4py is not installed"}
        elif left < 20:
            result = {"failed": "no time left"}
        else:
            with tempfile.TemporaryDirectory() as folder:
                job = Job(name, ranks, args.device, args.epochs, args.tokens, args.replays, folder)
                result = run_section(job, min(left, 180.0))
        report["sections"][name] = result
        bad |= "failed" in result
        print(f"{name}: {json.dumps(result)}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
