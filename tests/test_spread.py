"""Slot weights as a function of originals at home: values, gradients, and who takes part."""

import functools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from helpers.spread import EXPERTS, WIDTH, Case, make_plan
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lplb_triton import Placement, Replicas, SpreadPlan, chain, spread
from lplb_triton.integrations.layers import LayerBalance
from lplb_triton.training.slot_memory import extend_memory
from lplb_triton.training.spread import attach, stack_slots


def check_gradients(rank, group, redundant):
    """Compare every form of the call with sums made without any communication."""
    case = Case(make_plan(group, redundant), rank)
    plan, n = case.plan, case.plan.n_local
    w = case.leaf()
    (slots,) = spread(plan, w)
    torch.testing.assert_close(slots, case.slots, rtol=0, atol=0)
    case.loss(slots).backward()
    torch.testing.assert_close(w.grad, case.gradient, rtol=1e-14, atol=1e-14)

    parts = [row.clone().requires_grad_() for row in case.original]
    (slots,) = spread(plan, parts)
    torch.testing.assert_close(slots, case.slots, rtol=0, atol=0)
    case.loss(slots).backward()
    found = torch.stack([part.grad for part in parts])
    torch.testing.assert_close(found, case.gradient, rtol=1e-14, atol=1e-14)

    w, parts = case.leaf(), [row.clone().requires_grad_() for row in case.original]
    rows, more = spread(plan, w, parts, redundant_only=True)
    torch.testing.assert_close(rows, case.slots[n:], rtol=0, atol=0)
    upstream = case.upstream[rank]
    (
        (w * upstream[:n]).sum() + (rows * upstream[n:]).sum() + (more * upstream[n:]).sum()
    ).backward()
    torch.testing.assert_close(w.grad, case.gradient, rtol=1e-14, atol=1e-14)
    uncopied = set(range(n)) - set(plan.copied.host)
    assert all(parts[i].grad is None for i in uncopied)

    # Two forward passes, then two backward passes, with accumulation: micro-batches in flight.
    w = case.leaf()
    first, second = spread(plan, w)[0], spread(plan, w)[0]
    case.loss(first).backward()
    case.loss(second).backward()
    torch.testing.assert_close(w.grad, 2 * case.gradient, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("ranks", "redundant"), [(2, 1), (2, 6), (4, 2)])
def test_gradients_are_sums_over_copies(tmp_path, ranks, redundant):
    """Stacked, in parts, redundant rows only, accumulated: every gradient is the sum over slots."""
    run_ranks(check_gradients, ranks, tmp_path, redundant)


def check_unused(rank, group):
    """Let rank 1's output depend on no slot."""
    case = Case(make_plan(group), rank)
    for redundant_only in (False, True):
        w, x = case.leaf(), torch.ones(2, dtype=torch.float64, requires_grad=True)
        (slots,) = spread(case.plan, w, redundant_only=redundant_only)
        used = slots if not redundant_only else torch.cat([w, slots])
        output = x * 2 if rank == 1 else x * case.loss(used)
        attach(output, [slots]).sum().backward()
        masked = case.upstream * 2
        masked[1] = 0
        torch.testing.assert_close(w.grad, case.add_up(masked), rtol=1e-14, atol=1e-14)
        assert x.grad is not None


def test_a_rank_without_tokens_takes_part(tmp_path):
    """A rank whose slots are unused joins the exchange of gradients, and nobody waits for it."""
    run_ranks(check_unused, 2, tmp_path)


def check_bfloat16(rank, group):
    """Sums of bfloat16 gradients are rounded once, and come out the same every time."""
    case = Case(make_plan(group, 6), rank, torch.bfloat16)
    found = []
    for _ in range(3):
        w = case.leaf()
        case.loss(spread(case.plan, w)[0]).backward()
        found.append(w.grad)
    assert all(torch.equal(one, found[0]) for one in found)
    exact = case.gradient.float().to(torch.bfloat16)
    torch.testing.assert_close(found[0], exact, rtol=2**-8, atol=1e-6)
    assert float((found[0] == exact).double().mean()) > 0.9  # the order may move a sum over a tie


def test_bfloat16_is_summed_in_float32(tmp_path):
    """Gradients in bfloat16 are added up in float32, in a fixed order."""
    run_ranks(check_bfloat16, 2, tmp_path)


def _keep_products(ctx, op, *args, **kwargs):
    products = {torch.ops.aten.mul.Tensor, torch.ops.aten.sin.default}
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


def check_checkpoint(rank, group):
    """Recompute the exchange in the backward pass, by three kinds of checkpointing."""
    case = Case(make_plan(group), rank)
    selective = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    kinds = (
        {"use_reentrant": True},
        {"use_reentrant": False},
        {"use_reentrant": False, "context_fn": selective},
    )
    for only in (False, True):

        def region(w, only=only):
            (slots,) = spread(case.plan, w, redundant_only=only)
            slots = torch.cat([w, slots]) if only else slots
            return (slots * case.upstream[rank]).sin().sum()

        plain = case.leaf()
        region(plain).backward()
        for kind in kinds:
            w = case.leaf()
            checkpoint(region, w, **kind).backward()
            torch.testing.assert_close(w.grad, plain.grad, rtol=1e-14, atol=1e-14)


def test_checkpointing_recomputes_the_exchange(tmp_path):
    """Full and selective activation checkpointing give the gradients that none gives."""
    run_ranks(check_checkpoint, 2, tmp_path)


def check_compiled(rank, group):
    """Trace the call as a whole, forward and backward."""
    case = Case(make_plan(group), rank)
    for only in (False, True):

        def loss(w, only=only):
            (slots,) = spread(case.plan, w, redundant_only=only)
            return case.loss(torch.cat([w, slots]) if only else slots)

        w = case.leaf()
        torch.compile(loss, backend="aot_eager", fullgraph=True)(w).backward()
        torch.testing.assert_close(w.grad, case.gradient, rtol=1e-14, atol=1e-14)


def test_compiled_in_one_graph(tmp_path):
    """torch.compile takes the exchange as one operator, without a graph break."""
    run_ranks(check_compiled, 2, tmp_path)


def check_dtensor(rank, group):
    """Give parameters as expert parallelism shards them, and as nothing should."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    group = dist.new_group(list(range(group.size())))  # torch keeps a mesh's group for good
    mesh = DeviceMesh.from_group(group, "cpu")
    case = Case(make_plan(group), rank)
    w = torch.nn.Parameter(DTensor.from_local(case.original.clone(), mesh, [Shard(0)]))
    case.loss(spread(case.plan, w)[0]).backward()
    torch.testing.assert_close(w.grad.to_local(), case.gradient, rtol=1e-14, atol=1e-14)
    wide = DTensor.from_local(torch.ones(4, 2), mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"originals\[0\] is a DTensor whose experts are sharded"):
        spread(case.plan, wide)
    narrow = DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="row for each of this rank's 4 experts"):
        spread(case.plan, narrow)


def test_dtensors_that_hold_whole_experts(tmp_path):
    """A DTensor sharded by experts works and gets a DTensor as gradient; others are refused."""
    run_ranks(check_dtensor, 2, tmp_path)


def check_retired(rank, group):
    """Change the placement between a forward pass and its backward pass."""
    plan = make_plan(group)
    case = Case(plan, rank)
    for only in (False, True):
        w = case.leaf()
        (slots,) = spread(plan, w, redundant_only=only)
        plan.retire()
        with pytest.raises(RuntimeError, match="placement changed between a forward pass"):
            slots.sum().backward()
        with pytest.raises(RuntimeError, match="placement changed"):
            spread(plan, w)
        plan = make_plan(group)


def test_a_changed_placement_is_noticed(tmp_path):
    """A backward pass through a retired plan raises on every rank, and none waits."""
    run_ranks(check_retired, 2, tmp_path)


def check_disagreement(rank, group):
    """Give different placements, and one that moves experts."""
    with pytest.raises(ValueError, match="placement must be the same on all ranks"):
        make_plan(group, seed=rank)
    load = torch.tensor([1.0, 9, 1, 1, 9, 1, 1, 1])
    moved = Placement.from_history(load, 2, redundant_per_rank=1)
    with pytest.raises(ValueError, match="placement must keep every expert at home"):
        given = moved if rank == 1 else chain(load, 2, keep_home=True)
        SpreadPlan(given, group=group, device="cpu")


def test_plans_are_checked_on_all_ranks(tmp_path):
    """Ranks with different or unusable placements all raise."""
    run_ranks(check_disagreement, 2, tmp_path)


@pytest.mark.parametrize(
    ("original", "error", "match"),
    [
        (torch.ones(7, 2), ValueError, r"originals\[0\] must have a row for each"),
        (torch.ones(()), ValueError, r"originals\[0\] must have a row for each"),
        ([torch.ones(2)] * 7, ValueError, r"originals\[0\] must hold a tensor for each"),
        ([torch.ones(2)] * 7 + [torch.ones(3)], ValueError, "of one shape and dtype"),
        ([1.0] * 8, TypeError, r"originals\[0\]\[0\] must be a tensor, got float"),
        (3, TypeError, r"originals\[0\] must be a tensor or a sequence"),
        (torch.ones(8, 2, device="meta"), ValueError, "on the plan's device, cpu, got meta"),
    ],
)
def test_bad_originals_are_refused(original, error, match):
    """Every original that doesn't fit is named."""
    with pytest.raises(error, match=match):
        spread(make_plan(None), original)


def test_other_bad_arguments_are_refused():
    """A plan is needed, its placement is at home, and it isn't pickled."""
    plan = make_plan(None)
    with pytest.raises(TypeError, match="plan must be a SpreadPlan, got Placement"):
        spread(plan.placement, torch.ones(8, 2))
    with pytest.raises(TypeError, match="can't be pickled"):
        plan.__reduce_ex__(4)
    with pytest.raises(ValueError, match="give group="):
        SpreadPlan(chain(torch.ones(8), 2, keep_home=True))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.int8, torch.float16, torch.complex64, torch.bool]
)
def test_every_dtype_is_sent(dtype):
    """Frozen originals of any dtype are copied bit for bit."""
    plan = make_plan(None, redundant=3)
    bits = torch.arange(EXPERTS * 8, dtype=torch.uint8).view(EXPERTS, 8) % 2
    original = bits.view(dtype) if dtype.itemsize <= 8 else bits
    (rows,) = spread(plan, original, redundant_only=True)
    experts = plan.placement.phy2log[EXPERTS:].long()
    assert torch.equal(rows.view(torch.uint8), bits[experts])


def check_replicas(rank, group):
    """Train one step with leaf slots that hold the copies only."""
    plan = make_plan(group)
    case = Case(plan, rank)
    n = plan.n_local
    for stacked in (True, False):
        rows = [row.clone().requires_grad_() for row in case.original]
        w = torch.nn.Parameter(case.original.clone()) if stacked else rows
        replicas = Replicas(plan.placement, {"w": w}, group=group, redundant_only=True)
        for _ in range(2):
            copies = replicas.weights["w"]
            assert copies.shape == (plan.n_redundant, WIDTH)
            torch.testing.assert_close(copies, case.slots[n:], rtol=0, atol=0)
            own = w if stacked else torch.stack(w)
            case.loss(torch.cat([own, copies])).backward()
        replicas.reduce_grads()
        grad = w.grad if stacked else torch.stack([row.grad for row in w])
        torch.testing.assert_close(grad, 2 * case.gradient, rtol=1e-14, atol=1e-14)
        assert replicas.experts.tolist() == list(range(rank * n, (rank + 1) * n))
        other = make_plan(group, seed=5).placement
        replicas.move(other, None)
        theirs = other.phy2log.long().view(group.size(), -1)[rank, n:]
        gathered = [torch.empty_like(case.original) for _ in range(group.size())]
        dist.all_gather(gathered, case.original)
        assert torch.equal(replicas.weights["w"], torch.cat(gathered)[theirs])
        replicas.close(None)


def test_replicas_of_redundant_slots_only(tmp_path):
    """Replicas that hold only copies give the same gradients, and follow a new placement."""
    run_ranks(check_replicas, 4, tmp_path)


def test_replicas_refuse_what_they_would_get_wrong():
    """Redundant rows alone need experts at home; a main_grad would not get the gradients."""
    load = torch.tensor([1.0, 9, 1, 1])
    placement = Placement.from_history(load, 1, redundant_per_rank=1)
    moved = Placement([1, 0, 2, 3, 1], 1)
    with pytest.raises(ValueError, match="placement must keep every expert at home"):
        Replicas(moved, {"w": torch.ones(4, 2)}, redundant_only=True)
    with pytest.raises(TypeError, match="redundant_only"):
        Replicas(placement, {"w": torch.ones(4, 2)}, redundant_only=1)
    w = torch.nn.Parameter(torch.ones(4, 2))
    w.main_grad = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"params\['w'\] has a main_grad"):
        Replicas(placement, {"w": w})


def check_late(rank, group):
    """Leave rank 0 alone in the exchange."""
    plan = make_plan(dist.new_group([0, 1], timeout=timedelta(seconds=2)))
    if rank == 0:
        with pytest.raises(RuntimeError):
            spread(plan, torch.ones(4, 2))
    else:
        import time

        time.sleep(4)


def test_a_missing_rank_is_waited_for_no_longer_than_the_timeout(tmp_path):
    """The exchange's wait is bounded by the group's time-out."""
    run_ranks(check_late, 2, tmp_path)


def test_a_second_derivative_is_refused():
    """Where a graph of the backward pass is wanted, its use raises: it would miss the copies."""
    plan = make_plan(None, redundant=3)
    for only in (False, True):
        w = torch.randn(EXPERTS, WIDTH, requires_grad=True)
        (slots,) = spread(plan, w, redundant_only=only)
        (grad,) = torch.autograd.grad((slots**3).sum(), w, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate|differentiated twice"):
            grad.sum().backward()


def test_frozen_copies_notice_another_placement():
    """Frozen slots have no backward pass, so the output's raises if the plan was retired."""
    plan = make_plan(None, redundant=3)
    x = torch.randn(WIDTH, requires_grad=True)
    (slots,) = spread(plan, torch.randn(EXPERTS, WIDTH))
    output = attach((slots * x).sum(), [slots], plan)
    plan.retire()
    with pytest.raises(RuntimeError, match="placement changed"):
        output.backward()


def test_an_attached_output_can_be_written():
    """A layer may add to the output in place, as for shared experts."""
    plan = make_plan(None, redundant=3)
    w, x = torch.randn(EXPERTS, WIDTH, requires_grad=True), torch.ones(3, requires_grad=True)
    (slots,) = spread(plan, w)
    output = attach(slots.sum(0) * x, [slots])
    output += 2 * x
    output.sum().backward()
    torch.testing.assert_close(x.grad, slots.detach().sum(0) + 2)


def check_trained_somewhere(rank, group):
    """Freeze the originals of one rank."""
    plan = make_plan(group)
    w = torch.randn(4, WIDTH, requires_grad=rank == 1)
    message = r"requires_grad of originals\[0\] must be the same on all ranks"
    with pytest.raises(ValueError, match=message):
        spread(plan, w)
    with pytest.raises(ValueError, match="must have the same shapes and dtypes on all ranks"):
        spread(plan, torch.ones(4, 3 + rank))
    for frozen in ({0, 1, 2, 3} if rank == 0 else set(), {0, 2}, {1} if rank == 1 else {0, 1, 2}):
        case = Case(make_plan(group), rank)  # what is trained is agreed on once per plan
        parts = [row.clone().requires_grad_(i not in frozen) for i, row in enumerate(case.original)]
        fixed = list(torch.randn(4, WIDTH).unbind())
        slots, more = spread(case.plan, parts, fixed)
        assert not spread(case.plan, fixed)[0].requires_grad
        attach(case.loss(slots), [slots, more]).backward()
        for i, part in enumerate(parts):
            if i in frozen:
                assert part.grad is None
            else:
                torch.testing.assert_close(part.grad, case.gradient[i], rtol=1e-14, atol=1e-14)


def test_trained_by_some_ranks_only(tmp_path):
    """Experts may be frozen one by one, on any ranks; what can't be is refused everywhere."""
    run_ranks(check_trained_somewhere, 2, tmp_path)


def check_on_gpus(rank, _):
    """Train a layer over NCCL: ids rewritten, tokens and weights sent, gradients returned."""
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    device = torch.device("cuda", rank)
    layer = LayerBalance(EXPERTS, group=group, device=device, redundant=2)
    n, width = EXPERTS // 2, 64
    generator = torch.Generator(device).manual_seed(0)
    everything = torch.randn(EXPERTS, width, generator=generator, device=device)
    w = torch.nn.Parameter(everything[rank * n : (rank + 1) * n].bfloat16().clone())
    buffer = extend_memory(w, layer.plan.n_redundant)
    compiled = torch.compile(lambda plan, w: spread(plan, w)[0] * 2)
    for step in range(6):
        ids = torch.randint(EXPERTS, (512, 2), generator=generator, device=device)
        found = []
        for form in ("stacked", "in place", "redundant", "compiled"):
            slots = layer.route(ids)
            plan = layer.plan
            if form == "in place":
                (rows,) = stack_slots(plan, [w], buffers=[buffer], reuse_gradients=True)
            elif form == "redundant":
                rows = torch.cat([w, spread(plan, w, redundant_only=True)[0]])
            elif form == "compiled":
                rows = compiled(plan, w) / 2
            else:
                (rows,) = spread(plan, w)
            mine = (slots // plan.placement.slots_per_rank == rank) & (slots >= 0)
            local = slots[mine] % plan.placement.slots_per_rank
            count = torch.bincount(local, minlength=len(rows)).to(rows.dtype)
            output = torch.zeros(1, device=device, dtype=rows.dtype, requires_grad=True) * 1
            if len(local):
                output = output + (rows.float() ** 2 * count[:, None].float()).sum().bfloat16()
            attach(output, [rows]).sum().backward()
            found.append(w.grad.clone())
            w.grad = None
        every = torch.bincount(ids.flatten(), minlength=EXPERTS)[rank * n : (rank + 1) * n]
        # Both ranks hold the same ids, and each serves those that the plan gives it: all of them,
        # once, up to what each rank rounds by itself.
        expected = 2 * w.detach().float() * every[:, None].float()
        for grad in found:
            torch.testing.assert_close(grad, found[0], rtol=2**-6, atol=1e-2)
            torch.testing.assert_close(
                grad.float(), expected, rtol=0.1, atol=6 * float(w.abs().max())
            )
        with torch.no_grad():
            w.add_(1)
        if step % 2:
            layer.rebalance()
    dist.destroy_process_group(group)


@pytest.mark.multigpu
@pytest.mark.parametrize("connections", ["1", "32"])
def test_two_gpus_over_nccl(tmp_path, monkeypatch, connections):
    """All forms agree over NCCL, also where one hardware queue orders all launches."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    run_ranks(check_on_gpus, 2, tmp_path)
