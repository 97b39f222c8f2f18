"""The pipeline as users call it: run, placement updates, bad ids, compile, graphs, streams."""

import gc
import warnings

import numpy as np
import pytest
import torch
from helpers.balancers import DEVICE, check_answer, placement_of, random_ids

import lplb_triton
from lplb_triton import Balancer
from lplb_triton.testing.instances import shape_placement


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", ["cube", "torus:2x2", "eplb:16:2", "random:7:3"])
def test_run(shape, backend):
    """A run reaches the optimum to a few tokens, with either dtype and any number of SMs."""
    placement = shape_placement(shape, np.random.default_rng(0))
    balancer = Balancer(placement, backend=backend, device=DEVICE, rank=1)
    for dtype in (torch.int64, torch.int32):
        idx = random_ids(1, placement.n_logical, dtype=dtype)
        out = balancer.run(idx)
        assert out.shape == idx.shape and out.dtype == dtype and out.device == idx.device
        check_answer(balancer, idx, out)
        assert torch.equal(out, balancer.run(idx, n_sms=1))
        assert torch.equal(out, balancer.run(idx, n_sms=200))
    balancer.check()
    assert int(balancer.certified) == int(balancer.solves) == 6 * placement.n_group


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_empty_and_dropped_batches(backend):
    """Batches that are empty or all dropped keep their ids, and are certified."""
    balancer = Balancer(placement_of(), backend=backend, device=DEVICE)
    for shape in ((0,), (0, 8), (3, 0)):
        assert balancer.run(torch.empty(shape, dtype=torch.int64, device=DEVICE)).shape == shape
    dropped = torch.full((5, 8), -1, device=DEVICE)
    assert torch.equal(balancer.run(dropped), dropped)
    assert int(balancer.certified) == int(balancer.solves) == 4


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_non_contiguous_ids(backend):
    """Ids in a view give a contiguous answer, equal to that of a contiguous copy."""
    balancer = Balancer(placement_of(), backend=backend, device=DEVICE)
    idx = random_ids(0, 64)
    for view in (idx.t(), idx[::2], idx[:, 1:]):
        out = balancer.run(view)
        assert out.is_contiguous() and torch.equal(out, balancer.run(view.contiguous()))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_new_placement_of_the_same_sizes(backend):
    """A placement of the same sizes is written in place, and other sizes are refused."""
    balancer = Balancer(placement_of(0), backend=backend, device=DEVICE)
    idx = random_ids(0, 64)
    addresses = {name: view.data_ptr() for name, view in balancer._tables.views.items()}
    balancer.run(idx)
    assert balancer.update_placement(placement_of(1)) is balancer.placement
    out = balancer.run(idx)
    check_answer(balancer, idx, out)
    fresh = Balancer(placement_of(1), backend=backend, device=DEVICE)
    assert torch.equal(out, fresh.run(idx))
    assert addresses == {name: view.data_ptr() for name, view in balancer._tables.views.items()}
    with pytest.raises(ValueError, match="^placement must have n_physical"):
        balancer.update_placement(placement_of(1, slots=2))
    assert torch.equal(balancer.run(idx), out)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.skipif(DEVICE != "cpu", reason="a CPU raises at once")
def test_bad_ids_on_a_cpu(backend):
    """On a CPU, ids out of range are refused at once."""
    balancer = Balancer(placement_of(), backend=backend, device="cpu")
    for bad in (-2, 64):
        with pytest.raises(ValueError, match="^idx"):
            balancer.run(torch.tensor([0, bad]))


def test_snapshots_are_not_live():
    """Writes to the maps that a placement returns do not change later runs."""
    balancer = Balancer(placement_of(), device=DEVICE)
    idx = random_ids(0, 64)
    before = balancer.run(idx)
    for name in ("phy2log", "log2phy", "logcnt", "rank_of_slot"):
        getattr(balancer.placement, name).zero_()
    assert torch.equal(balancer.run(idx), before)


def test_many_layers_share_one_workspace():
    """Balancers of 58 layers share one workspace."""
    layers = [Balancer(placement_of(i), backend="triton", device=DEVICE) for i in range(58)]
    layers[0].run(random_ids(0, 64))
    one = lplb_triton.workspace_bytes(DEVICE)
    for i, layer in enumerate(layers[1:9] if DEVICE == "cpu" else layers):
        check_answer(layer, random_ids(i, 64), layer.run(random_ids(i, 64)))
    assert lplb_triton.workspace_bytes(DEVICE) == one > 0


def test_compiled_by_dynamo_as_one_graph():
    """Dynamo compiles a run into one graph that takes batches of several sizes."""
    balancer = Balancer(placement_of(), device=DEVICE)

    def layer(x):
        return balancer.run(x * 1) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed, rows in enumerate((8, 16, 31)):
        idx = random_ids(seed, 64, (rows, 8))
        assert torch.equal(compiled(idx), balancer.run(idx) + 1)
    assert int(balancer.solves) == 6


def test_op_declares_its_effects():
    """The operators pass torch's checks of their schemas and fake tensors."""
    balancer = Balancer(placement_of(), device=DEVICE)
    idx, counter = random_ids(0, 64), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    ops, checks = torch.ops.lplb_triton, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.balance.default, (idx, balancer._handle, 4), test_utils=checks)
    counted = (idx, counter, balancer._handle, 4)
    torch.library.opcheck(ops.balance_counted.default, counted, test_utils=checks)


def test_a_dropped_balancer_is_named():
    """An operator that is called for a freed balancer raises and says so."""
    balancer = Balancer(placement_of(), device=DEVICE)
    handle = balancer._handle
    del balancer
    gc.collect()
    with pytest.raises(RuntimeError, match="Balancer of this call no longer exists"):
        torch.ops.lplb_triton.balance(random_ids(0, 64), handle, 4)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda b: b.run([1, 2]), TypeError, "idx"),
        (lambda b: b.run(torch.zeros(3, device=b.device)), TypeError, "idx"),
        (lambda b: b.run(torch.zeros(3, dtype=torch.int64, device="meta")), ValueError, "idx"),
        (lambda b: b.run(random_ids(0, 64), n_sms=0), ValueError, "n_sms"),
        (lambda b: b.run(random_ids(0, 64), n_sms=1.5), TypeError, "n_sms"),
        (lambda b: b.solve(torch.zeros(3, device=b.device).int()), ValueError, "counts"),
        (
            lambda b: b.select(
                random_ids(0, 64), torch.zeros(3).int().to(b.device), b.count(random_ids(0, 64))[1]
            ),
            ValueError,
            "cumulative",
        ),
        (lambda b: b.run(random_ids(0, 64), certified=torch.zeros(1)), TypeError, "certified"),
        (lambda b: b.update_placement(3), TypeError, "placement"),
        (lambda b: Balancer(3), TypeError, "placement"),
        (lambda b: Balancer(b.placement, device="cpu", rank=8), ValueError, "rank"),
        (lambda b: Balancer(b.placement, device="cpu", backend="cuda"), ValueError, "backend"),
        (lambda b: Balancer(b.placement, device="cpu", tolerance=0), ValueError, "tolerance"),
        (lambda b: Balancer(b.placement, device="meta"), ValueError, "device"),
        (lambda b: Balancer(b.placement, max_iterations=0), ValueError, "max_iterations"),
    ],
)
def test_arguments_are_named(call, error, name):
    """A wrong argument is refused with a message that begins with its name."""
    balancer = Balancer(placement_of(), device=DEVICE)
    with pytest.raises(error, match=f"^{name}"):
        call(balancer)


def test_repr_says_what_runs():
    """The repr tells the backend, the sync and the number of experts."""
    text = repr(Balancer(placement_of(), device="cpu", backend="torch"))
    assert "backend=torch" in text and "sync=none" in text and "64 experts" in text


@pytest.mark.gpu
class TestOnAGpu:
    def test_bad_ids_raise_at_the_next_call(self):
        """On a GPU, a bad id maps to -1, and the next call raises once."""
        balancer = Balancer(placement_of(), device="cuda")
        idx = random_ids(0, 64)
        clean = balancer.run(idx)
        for bad in (64, -2, 2**40, -(2**40)):
            broken = idx.clone()
            broken[3, 3] = bad
            out = balancer.run(broken)
            assert int(out[3, 3]) == -1
            torch.cuda.synchronize()
            with pytest.raises(RuntimeError, match="outside"):
                balancer.run(idx)
            assert torch.equal(balancer.run(idx), clean)
            balancer.check()

    def test_graph_replayed_on_new_ids(self):
        """A replayed graph follows new ids and placements, and a bad id is reported."""
        balancer = Balancer(placement_of(), device="cuda")
        balancer.warmup()
        static = random_ids(0, 64, (512, 8))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = balancer.run(static)
        for seed in range(1, 6):
            fresh = random_ids(seed, 64, (512, 8))
            static.copy_(fresh)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, balancer.run(fresh))
            check_answer(balancer, fresh, out)
        balancer.update_placement(placement_of(1))
        graph.replay()
        check_answer(balancer, static, out)
        static[0, 0] = 99
        graph.replay()
        with pytest.raises(RuntimeError, match="99"):
            balancer.check()

    def test_run_allocates_its_output_alone_and_never_syncs(self):
        """A run allocates its output alone and never makes the host wait for the GPU."""
        balancer = Balancer(placement_of(), device="cuda")
        idx = random_ids(0, 64, (512, 8))
        balancer.run(idx)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        with warnings.catch_warnings():
            # torch warns that this mode is a prototype.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
            try:
                out = balancer.run(idx)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
        assert after - before == 1 and out.numel() == 4096

    def test_nothing_compiles_after_warmup(self):
        """After a warm-up no batch and no rank makes Triton compile."""
        from lplb_triton.kernels.count import count_kernel, running_sum_kernel
        from lplb_triton.kernels.launch import compiled_kernels
        from lplb_triton.kernels.select import select_kernel
        from lplb_triton.kernels.solve.counts_kernel import solve_counts_kernel

        def compiled():
            kernels = (solve_counts_kernel, count_kernel, running_sum_kernel, select_kernel)
            sizes = [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels]
            return [*sizes, len(compiled_kernels)]

        balancer = Balancer(placement_of(), device="cuda")
        balancer.warmup()
        reference = compiled()
        assert all(reference)
        rng = np.random.default_rng(0)
        counters = [torch.zeros((), dtype=d, device="cuda") for d in (torch.int32, torch.int64)]
        for case in range(200):
            tokens_in_batch = int(rng.integers(0, 3000))
            dtype = (torch.int64, torch.int32)[case % 2]
            idx = random_ids(case, 64, (tokens_in_batch + 2, 8), dtype=dtype)
            view = (idx, idx[1:], idx.reshape(-1)[1:], idx.t())[case % 4]
            balancer.run(view, certified=counters[case // 2 % 2])
            if case < balancer.placement.ep_size:
                Balancer(balancer.placement, device="cuda", rank=case).run(view)
        assert compiled() == reference

    def test_58_layers_two_streams_two_micro_batches(self):
        """Two streams that interleave 58 layers give the answers of one stream."""
        layers = [Balancer(placement_of(i), device="cuda") for i in range(58)]
        batches = [random_ids(seed, 64, (512, 8)) for seed in (0, 1)]
        expected = [[layer.run(idx) for layer in layers] for idx in batches]
        torch.cuda.synchronize()
        one = lplb_triton.workspace_bytes("cuda")
        streams = [torch.cuda.Stream() for _ in batches]
        for _ in range(20):
            outs = [[], []]
            for i, layer in enumerate(layers):
                for which, stream in enumerate(streams):
                    with torch.cuda.stream(stream):
                        outs[which].append(layer.run(batches[which]))
                        if i == 30:
                            torch.cuda._sleep(20000)
            torch.cuda.synchronize()
            for got, want in zip(outs, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert lplb_triton.workspace_bytes("cuda") <= 3 * one

    def test_two_graphs_replayed_at_once(self):
        """Two graphs of one balancer, replayed at once on two streams, give the right ids."""
        balancer = Balancer(placement_of(), device="cuda")
        balancer.warmup()
        batches = [random_ids(seed, 64, (2048, 8)) for seed in (0, 1)]
        expected = [balancer.run(idx) for idx in batches]
        graphs, outs = [], []
        for idx in batches:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outs.append(balancer.run(idx))
            graphs.append(graph)
        streams = [torch.cuda.Stream() for _ in batches]
        torch.cuda.synchronize()
        for _ in range(200):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))

    def test_stress_against_the_twin(self):
        """The kernels and the torch twin pick the same copies under the same plan."""
        rng = np.random.default_rng(0)
        for shape in ("cube", "eplb:64:2", "random:32:4"):
            placement = shape_placement(shape, rng)
            kernel = Balancer(placement, device="cuda", rank=5)
            twin = Balancer(placement, device="cpu", rank=5)
            for case in range(60):
                idx = random_ids(case, placement.n_logical, (int(rng.integers(1, 4000)), 8))
                n_sms = int(rng.integers(1, 300))
                counts, running = kernel.count(idx, n_sms=n_sms)
                solution = kernel.solve(counts)
                cumulative = kernel.cumulative_shares(solution.shares)
                out = kernel.run(idx, n_sms=n_sms)
                expected = twin.select(idx.cpu(), cumulative.cpu(), running.cpu())
                assert torch.equal(out.cpu(), expected)

    @pytest.mark.multigpu
    def test_launches_on_the_gpu_of_its_tensors(self):
        """Kernels are launched on the GPU of their tensors, not on the current one."""
        placement = placement_of()
        balancer = Balancer(placement, device="cuda:1", rank=1)
        idx = random_ids(0, 64, (512, 8)).to("cuda:1")
        assert torch.cuda.current_device() == 0
        twin = Balancer(placement, device="cpu", rank=1)
        for _ in range(2):
            counts, running = balancer.count(idx)
            solution = balancer.solve(counts)
            solution.check()
            cumulative = balancer.cumulative_shares(solution.shares)
            expected = twin.select(idx.cpu(), cumulative.cpu(), running.cpu())
            assert torch.equal(balancer.run(idx).cpu(), expected)
            assert torch.equal(balancer.select(idx, cumulative, running).cpu(), expected)

    # torch's own use of what it has deprecated
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_compiled_with_inductor(self):
        """A run compiled by Inductor gives the same ids as one that is not compiled."""
        balancer = Balancer(placement_of(), device="cuda")
        compiled = torch.compile(lambda x: balancer.run(x * 1) + 1, fullgraph=True)
        idx = random_ids(0, 64)
        assert torch.equal(compiled(idx), balancer.run(idx) + 1)
