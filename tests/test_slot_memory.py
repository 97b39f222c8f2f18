"""Memory of stacked slots: shared with the parameter, or stacked again for the backward pass."""

import pytest
import torch
from gloo import run_ranks
from helpers.spread import EXPERTS, WIDTH, Case, make_plan
from torch.multiprocessing.reductions import StorageWeakRef

from lplb_triton import spread
from lplb_triton.training.slot_memory import extend_memory, is_extended, keep_redundant_rows
from lplb_triton.training.spread import stack_slots


def check_stacking(rank, group):
    """Stack into the parameter's own memory, and keep only redundant rows otherwise."""
    case = Case(make_plan(group), rank)
    plan = case.plan
    w = torch.nn.Parameter(case.original.clone())
    buffer = extend_memory(w, plan.n_redundant)
    assert is_extended(w, buffer) and not is_extended(case.original, buffer)
    assert torch.equal(w, case.original)
    for count in (1, 2):  # the second forward pass writes while the first graph is alive
        w.grad = None
        losses = [
            (stack_slots(plan, [w], buffers=[buffer], reuse_gradients=True)[0] ** 2).mul(
                case.upstream[rank]
            )
            for _ in range(count)
        ]
        assert losses[0].shape[0] == plan.placement.slots_per_rank
        for loss in losses:
            loss.sum().backward()
        expected = torch.nn.Parameter(case.original.clone())
        (spread(plan, expected)[0] ** 2).mul(case.upstream[rank]).sum().backward()
        torch.testing.assert_close(w.grad, count * expected.grad, rtol=1e-14, atol=1e-14)
    with torch.no_grad():
        w.mul_(2)
    (slots,) = stack_slots(plan, [w], buffers=[buffer])
    assert slots.data_ptr() == w.data_ptr()
    torch.testing.assert_close(slots, 2 * case.slots, rtol=0, atol=0)

    w = case.leaf()
    (slots,) = stack_slots(plan, [w])
    with keep_redundant_rows(plan, [w], [slots]):
        product = slots**2 * case.upstream[rank]
    saved = product.grad_fn.next_functions[0][0]
    del slots
    assert saved._saved_self.shape[0] == plan.placement.slots_per_rank
    product.sum().backward()
    torch.testing.assert_close(w.grad, expected.grad, rtol=1e-14, atol=1e-14)


def test_stacking_without_a_second_copy(tmp_path):
    """Slots share the parameter's memory, or are stacked again for the backward pass."""
    run_ranks(check_stacking, 2, tmp_path)


def test_only_redundant_rows_are_kept():
    """What autograd keeps does not hold the stacked tensor alive."""
    plan = make_plan(None, redundant=3)
    w = torch.randn(EXPERTS, WIDTH, requires_grad=True)
    (slots,) = stack_slots(plan, [w])
    memory = StorageWeakRef(slots.untyped_storage())
    with keep_redundant_rows(plan, [w], [slots]):
        product = slots.sin()
    assert not memory.expired()
    del slots
    assert memory.expired()
    product.sum().backward()
    assert w.grad is not None


def test_changed_parameters_are_noticed():
    """A write between forward and backward raises where slots share or rebuild the memory."""
    plan = make_plan(None, redundant=3)
    w = torch.nn.Parameter(torch.randn(EXPERTS, WIDTH))
    buffer = extend_memory(w, plan.n_redundant)
    x = torch.randn(WIDTH, requires_grad=True)
    (slots,) = stack_slots(plan, [w], buffers=[buffer])
    loss = (slots * x).sum()
    with torch.no_grad():
        w.mul_(100)
    with pytest.raises(RuntimeError, match="parameters changed between a forward pass"):
        loss.backward()
    (slots,) = stack_slots(plan, [w])
    with keep_redundant_rows(plan, [w], [slots]):
        loss = (slots * x).sum()
    del slots
    with torch.no_grad():
        w.mul_(100)
    with pytest.raises(RuntimeError, match="parameters changed between a forward pass"):
        loss.backward()


def test_other_views_of_slots_are_kept_as_they_are():
    """What an operation saves in another dtype comes back in that, also where hooks are off."""
    plan = make_plan(None, redundant=3)
    w = torch.randn(EXPERTS, WIDTH, requires_grad=True)
    x = torch.ones(EXPERTS + 3, WIDTH, requires_grad=True)
    (slots,) = stack_slots(plan, [w])
    with keep_redundant_rows(plan, [w], [slots]):
        product = x * slots.detach().view(torch.int32)
    product.sum().backward()
    torch.testing.assert_close(x.grad, slots.detach().view(torch.int32).float())
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        (slots,) = stack_slots(plan, [w])
        with keep_redundant_rows(plan, [w], [slots]):
            (slots**2).sum().backward()
    assert w.grad is not None
