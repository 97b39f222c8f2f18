"""Compile every kernel for a GPU that need not be there; prints what each takes.

    python tests/compile_kernels.py [compute capability, 90] [all, or one size of each kernel]

Runs in a process of its own, without TRITON_INTERPRET.
"""

import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lplb_triton.bench import peers
from lplb_triton.kernels import driver
from lplb_triton.kernels.count import (
    COUNT_BLOCK,
    SUM_EXPERTS,
    SUM_ROWS,
    count_kernel,
    running_sum_kernel,
)
from lplb_triton.kernels.exchange import EXCHANGE_BLOCK, choose_block, sum_over_ranks_kernel
from lplb_triton.kernels.exchange_rows import WARPS
from lplb_triton.kernels.gathered import sum_gathered_kernel
from lplb_triton.kernels.lanes import cut_slices
from lplb_triton.kernels.loads import LOAD_BLOCK, record_loads_kernel
from lplb_triton.kernels.near import launch as near_launch
from lplb_triton.kernels.near.kernel import plan_near_kernel
from lplb_triton.kernels.pull.copy import COPY_BLOCK, COPY_RUNS, COPY_WARPS, pull_kernel
from lplb_triton.kernels.pull.gradients import (
    ADD_BYTES,
    GRADIENT_WARPS,
    WRITE_BYTES,
    add_gradients_kernel,
    exchange_returns_kernel,
    write_gradients_kernel,
)
from lplb_triton.kernels.pull.signals import WARPS as SIGNAL_WARPS
from lplb_triton.kernels.pull.signals import meet_kernel
from lplb_triton.kernels.quotas import divide_quotas_kernel
from lplb_triton.kernels.rows import ROW_BLOCK, add_rows_kernel, take_rows_kernel
from lplb_triton.kernels.select import SELECT_BLOCK, select_kernel
from lplb_triton.kernels.solve import launch as solve_launch
from lplb_triton.kernels.solve.counts_kernel import solve_counts_kernel
from lplb_triton.kernels.solve.dense_kernel import solve_dense_kernel
from lplb_triton.kernels.solve.expand_kernel import expand_kernel
from lplb_triton.kernels.time import launch as time_launch
from lplb_triton.kernels.time.kernel import plan_time_kernel

POINTERS = {"mask_ptr": "*i8", "idx_ptr": "*i64", "out_ptr": "*i64", "status_ptr": "*i64"}
POINTERS |= {"certified_ptr": "*i64", "solves_ptr": "*i64", "uncertified_ptr": "*i64"}
POINTERS |= {"addresses_ptr": "*i64", "traffic_ptr": "*i64", "edges_ptr": "*i64"}
POINTERS |= {"pairs_ptr": "*i64", "report_ptr": "*i64", "metrics_ptr": "*fp64"}
POINTERS |= {"load_ptr": "*i64", "by_home_ptr": "*i64", "by_rank_ptr": "*i64"}
POINTERS |= {"own_ptr": "*bf16", "arrived_ptr": "*bf16", "grads_ptr": "*bf16"}
POINTERS |= {"state_ptr": "*i64", "table_ptr": "*i64", "returned_ptr": "*i64"}
FLOATS = (
    "scratch_ptr",
    "weights_ptr",
    "fixed_ptr",
    "shares_ptr",
    "stats_ptr",
    "rank_parts_ptr",
    "copy_parts_ptr",
    "start_ptr",
    "cost_ptr",
    "slopes_ptr",
    "times_ptr",
    "near_ptr",
)
RATIOS = ("tolerance", "live_above", "slack_factor")


# Live slots by ranks and classes of pairs.
LIVE_CASES = {
    (8, 2): ({"slots": 1},),
    (16, 0): ({"slots": 2, "PRICED": 1, "DOMAINS": 1, "RESIDENT": 1},),
    (64, 0): ({"slots": 1},),
}


def signature(kernel, constants):
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = POINTERS.get(name, "*fp32" if name in FLOATS else "*i32")
        else:
            types[name] = "fp32" if name in RATIOS else "i32"
    return types


def exchange(gather):
    return {"CHANNELS": 64, "BLOCK": EXCHANGE_BLOCK, "GATHER": gather, "ON_GPU": 1}


def live(ranks, columns, slots, **more):
    """Return constants of a kernel with live slots; without any if ``slots`` is 0."""
    constants = {"LIVE": slots, "LIVE_SLICES": -(-ranks // 32), "OFFERS": 8, "MORE_OFFERS": 1}
    constants |= {"LIVE_EXPERTS": 256, "LIVE_SLOTS": max(16, ranks * slots)}
    return {**constants, "SHARED": 1, "PRICED": 0, "DOMAINS": 0, "RESIDENT": 0, **more}


def pull_jobs():
    """Yield the kernels that move live experts' weights and gradients."""
    one, many = {"num_warps": SIGNAL_WARPS}, {"num_warps": GRADIENT_WARPS}
    sent = {"SEND": 1, "WAIT": 1, "ON_GPU": 1}
    yield meet_kernel, sent, one
    for copy, resident in ((1, 0), (1, 1), (0, 1)):
        constants = {"SLOTS": 2, "RESIDENT": resident, "COMPARE": 1, "COPY": copy}
        constants |= {"RUNS": COPY_RUNS, "BLOCK": COPY_BLOCK, "ON_GPU": 1}
        yield pull_kernel, constants, {"num_warps": COPY_WARPS} if copy else one
    constants = {"SLOTS": 2, "UNIT": 8, "BLOCK": WRITE_BYTES // 2, "ON_GPU": 1}
    yield write_gradients_kernel, constants, many
    yield exchange_returns_kernel, {"SLOTS": 2, "ENTRIES": 256, **sent}, one
    sums = {"SLOTS": 2, "ENTRIES": 256, "UNIT": 8, "DOUBLE": 0, "BLOCK": ADD_BYTES // 2}
    yield add_gradients_kernel, {**sums, "LAST": 1, "ON_GPU": 1}, many


def check_pull_words(name, ptx, copies=1):
    """Kernels that copy rows move 16 bytes at a time, and signals are released and acquired."""
    wide = {"write_gradients": (12, 4), "add_gradients": (14, 2)}
    wide["pull"] = (12 * copies, 4 * copies)
    if name in wide:
        loads = len(re.findall(r"ld\.global\S*\.v4", ptx))
        stores = len(re.findall(r"st\.global\S*\.v4", ptx))
        least_loads, least_stores = wide[name]
        assert loads >= least_loads and stores >= least_stores, (name, loads, stores)
    if name in ("meet", "pull", "exchange_returns"):
        assert "st.release.sys.global.b64" in ptx and "ld.acquire.sys.global.b64" in ptx


def time_jobs(capability):
    """Yield the kernel that plans by time: one and two slices of ranks, and many ranks."""
    for ranks, steps in ((32, 12), (64, 8), (512, 8)):
        slices, lanes = cut_slices(ranks)
        constants = {"MOST_STEPS": steps, "SLICES": slices, "LANES": lanes}
        constants |= {"BLOCK": 512, "MARGIN": 4, "NARROW": 7, "WIDE": 8, "ACTIVE": 11}
        constants |= {"TILES": 256, "PDL": capability >= 90}
        yield plan_time_kernel, constants, time_launch.make_options(ranks)


def near_jobs(capability):
    """Yield the kernel that keeps tokens near: one and two slices of ranks, and many cells."""
    for ranks, steps, block in ((32, 24, 128), (64, 24, 256), (512, 24, 2048)):
        slices, lanes = cut_slices(ranks)
        constants = {"MOST_STEPS": steps, "SLICES": slices, "LANES": lanes, "BLOCK": block}
        constants |= {"PDL": capability >= 90}
        yield plan_near_kernel, constants, near_launch.make_options(ranks)


def jobs(capability):
    yield from pull_jobs()
    yield from time_jobs(capability)
    yield from near_jobs(capability)
    # And classes of pairs, 0 for a kernel without them.
    sizes = ((8, 32, 0), (8, 32, 2), (16, 32, 0), (32, 64, 0), (32, 64, 3))
    large = (64, 32, 0), (64, 128, 0), (64, 128, 4), (128, 128, 0)
    for ranks, columns, classes in sizes + large:
        if classes == 0 and ranks <= 64:
            options = solve_launch.make_options(solve_launch.choose_dense_warps(ranks, columns))
            tile = {"G": ranks, "C": columns, "HAS_START": ranks == 8}
            yield solve_dense_kernel, tile, options
        options = solve_launch.make_options(solve_launch.choose_counts_warps(ranks, 2 * columns))
        constants = {"G": ranks, "C": columns, "R": columns, "S": 8, "COPIES": 64, "MEMBERS": 4}
        constants |= {
            "ROWS": SUM_ROWS,
            "EXPERTS": SUM_EXPERTS,
            "PAIRS": classes,
            "LANES": 32 * options["num_warps"],
            "PDL": capability >= 90,
        }
        none = {"CHANNELS": 0, "BLOCK": EXCHANGE_BLOCK, "GATHER": 0, "ON_GPU": 0}
        constants |= live(ranks, columns, 0)
        yield solve_counts_kernel, {**constants, **none}, options
        for extra in LIVE_CASES.get((ranks, classes), ()):
            yield (
                solve_counts_kernel,
                {**constants, **none, **live(ranks, columns, **extra)},
                options,
            )
        gathers = {(8, 0): (0, 1), (8, 2): (0,), (32, 0): (0,)}
        for gather in gathers.get((ranks, classes), ()):
            yield solve_counts_kernel, {**constants, **exchange(gather)}, options
    yield expand_kernel, {"BLOCK": solve_launch.EXPAND_BLOCK}, {"num_warps": 4}
    for in_place in (0, 1):
        constants = {"UNIT": 8, "IN_PLACE": in_place, "DOUBLE": 0, "BLOCK": ROW_BLOCK}
        yield add_rows_kernel, constants, {"num_warps": 8}
    yield take_rows_kernel, {"UNIT": 8, "BLOCK": ROW_BLOCK}, {"num_warps": 8}
    constants = {"N_ROWS": 9, "EXPERT_BINS": 512, "RANK_BINS": 128, "BLOCK": LOAD_BLOCK}
    yield record_loads_kernel, constants, {"num_warps": 8}
    bins = {"BINS": 256, "PDL": capability >= 90}
    yield count_kernel, {**bins, "BLOCK": COUNT_BLOCK}, {"num_warps": 2}
    rows = {"ROWS": SUM_ROWS, "EXPERTS": SUM_EXPERTS}
    yield running_sum_kernel, rows, {"num_warps": 1}
    for check in (False, True):
        for slots in (0, 1):
            constants = {**bins, "BLOCK": SELECT_BLOCK, "CHECK": check, "LIVE": slots}
            constants |= {"G": 0 if check else 8, "S": 8}
            yield select_kernel, constants, {"num_warps": 8}
    lanes, warps = {"LANES": 32 * WARPS}, {"num_warps": WARPS}
    for gather in (0, 1):
        yield sum_over_ranks_kernel, {**exchange(gather), **lanes}, warps
    # The smallest tile, with the most threads that a solving kernel has.
    few = {**exchange(0), "BLOCK": choose_block(1), "LANES": 512}
    yield sum_over_ranks_kernel, few, {"num_warps": 16}
    constants = {"BLOCK": EXCHANGE_BLOCK, "GATHER": 1, **lanes}
    yield sum_gathered_kernel, constants, warps
    for slots in (0, 1):
        constants = {"RANKS": 64, "COPIES": 128, "LIVE": slots}
        yield divide_quotas_kernel, constants, {"num_warps": 1}


def check_words(ptx, words, threads):
    """Words between ranks travel in one piece each way, and every word is in one thread.

    Per thread: a load for each of its words of a tile, and of the two words of a header; a store
    for its words of a tile, and one for a header.
    """
    mine = words // threads
    loads = len(re.findall(r"ld\.volatile\.global\.b64", ptx))
    # One more where nothing else is left to do than to find out who is absent.
    assert loads == mine + 2 + 1, loads
    stores = ptx.count("st.relaxed.sys.global.b64")
    assert stores == mine + 1, stores


def check_barriers(name, constants, ptx):
    """Warps search for plans each on its own: few barriers are left, outside of the steps."""
    if name in ("plan_time", "plan_near") and constants["LANES"] == 32:
        assert ptx.count("bar.sync") <= 60, (name, ptx.count("bar.sync"))


def find_negated(ptx):
    """Find smallest (or largest) numbers of three, the first two of which include a negated one.

    ptxas 12.8 and 13.1 drop the minus sign of ``min(c, min(a, -b))`` and ``max(c, max(a, -b))``
    of signed 32-bit integers on GPUs that do both at once (compute capabilities 9.0 and 10.0). They
    keep that of ``min(-b, a)``, but which operand comes first is up to the compiler, so this finds
    both.
    """
    # Every function has registers of its own.
    bodies = re.split(r"^(?:\.\w+\s+)*\.(?:func|entry)\b", ptx, flags=re.MULTILINE)
    return [register for body in bodies for register in _find_negated_in_function(body)]


def _find_negated_in_function(ptx):
    negated = set(re.findall(r"neg\.s32\s+(%r\d+),", ptx))
    negated |= set(re.findall(r"sub\.s32\s+(%r\d+), 0,", ptx))
    negated |= set(re.findall(r"mul\.lo\.s32\s+(%r\d+), %r\d+, -1;", ptx))
    found = re.findall(r"(min|max)\.s32\s+(%r\d+), (%r\d+|-?\d+), (%r\d+|-?\d+);", ptx)
    moves = re.findall(r"mov\.[bsu]32\s+(%r\d+), (%r\d+);", ptx)
    negated = _follow(negated, moves)
    results = {}
    for op, to, *operands in found:
        if negated & set(operands):
            results[op] = results.get(op, set()) | {to}
    inner = {op: _follow(of, moves) for op, of in results.items()}
    return [of for op, _, *operands in found for of in operands if of in inner.get(op, ())]


def _follow(registers, moves):
    """Return registers, and all that their values are moved to."""
    reached, before = set(registers), -1
    while len(reached) > before:
        before = len(reached)
        reached |= {to for to, of in moves if of in reached}
    return reached


def check_parameters(compiled, types):
    """`DriverLaunch` takes every kernel."""
    wanted = [8 if kind.startswith("*") else 4 for kind in types if kind != "constexpr"]
    meta = compiled.metadata
    sizes = driver.parameter_sizes(compiled.asm["ptx"], meta.name)
    assert sizes[: len(wanted)] == wanted and set(sizes[len(wanted) :]) <= {8}, sizes
    assert (meta.global_scratch_size, meta.profile_scratch_size, meta.num_ctas) == (0, 0, 1)


def compile_job(capability, number):
    """Compile one of the jobs and check it; returns a line about it."""
    kernel, constants, options = list(jobs(capability))[number]
    begun = time.monotonic()
    source = ASTSource(kernel, signature(kernel, constants), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = len(compiled.asm["cubin"])
    assert cubin > 1000
    if constants.get("CHANNELS"):
        check_words(compiled.asm["ptx"], 8 * constants["BLOCK"], constants["LANES"])
    check_parameters(compiled, signature(kernel, constants).values())
    name = re.sub(r"^_|_kernel$", "", kernel.__name__)
    check_pull_words(name, compiled.asm["ptx"], constants.get("COPY", 1))
    check_barriers(name, constants, compiled.asm["ptx"])
    assert not find_negated(compiled.asm["ptx"]), (name, find_negated(compiled.asm["ptx"]))
    return f"{name} {constants} {options}: {cubin} bytes, {time.monotonic() - begun:.1f} s"


def choose_jobs(capability, sizes):
    """Choose the numbers of all jobs, or of one for each kernel and kind of constants."""
    features = ("PAIRS", "CHANNELS", "GATHER", "CHECK", "LIVE", "IN_PLACE", "COPY")
    chosen = {}
    for number, (kernel, constants, _) in enumerate(jobs(capability)):
        kind = kernel.__name__, *(bool(constants.get(feature)) for feature in features)
        chosen.setdefault(number if sizes == "all" else kind, number)
    return list(chosen.values())


def main(capability, sizes="all"):
    assert peers  # imported for its kernels' decorators: they must parse without a GPU
    chosen = choose_jobs(capability, sizes)
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for line in pool.map(partial(compile_job, capability), chosen):
            print(line, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 90, *sys.argv[2:])
    print("compiled")
