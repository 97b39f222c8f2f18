"""Calls of `Replicas` that are forgotten or mistaken are named; what only looks like it is not."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lplb_triton import Placement, Replicas

PLACEMENT = Placement(np.array([2, 0, 1, 0, 0, 1]), 1)


def layer(dtype=None):
    """Make a parameter of three experts, a `Replicas` for it, and SGD that would move it."""
    w = nn.Parameter(torch.ones(3, 2))
    return w, Replicas(PLACEMENT, {"w": w}, dtype=dtype), torch.optim.SGD([w], lr=0.1)


def backward(replicas):
    replicas.weights["w"].float().sum().backward()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_forgotten_reduce_grads(dtype):
    """The optimizer's step raises, and so does sync_weights where the optimizer isn't torch's."""
    w, replicas, optimizer = layer(dtype)
    backward(replicas)
    with pytest.raises(RuntimeError, match="slots of w hold.*reduce_grads before the optimizer's"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="reduce_grads before sync_weights"):
        replicas.sync_weights()
    replicas.reduce_grads()
    optimizer.step()
    assert not torch.equal(w, torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="sync_weights"):
        _ = replicas.weights
    replicas.sync_weights()


def test_forgotten_wait_for_gradients():
    """A step before the gradients' wait is refused, and one during a weight sync is not."""
    _, replicas, optimizer = layer()
    backward(replicas)
    handle = replicas.reduce_grads(async_op=True)
    assert repr(handle) == "Handle(reduce_grads, under way)"
    with pytest.raises(RuntimeError, match=r"reduce_grads\(async_op=True\) is under way: wait"):
        optimizer.step()
    handle.wait()
    optimizer.step()
    replicas.sync_weights(async_op=True)
    optimizer.step()  # weights under way were read before


def test_forgotten_sync_weights_with_kept_slot_weights():
    """Who reads `weights` once and keeps the tensors is told by reduce_grads."""
    _, replicas, optimizer = layer()
    weight = replicas.weights["w"]
    weight.sum().backward()
    replicas.reduce_grads()
    optimizer.step()
    weight.sum().backward()
    with pytest.raises(RuntimeError, match="parameters changed since the last sync_weights.* w "):
        replicas.reduce_grads()
    replicas.zero_grad()
    replicas.sync_weights()


def test_steps_that_are_in_order():
    """None of these is a forgotten call."""
    w, replicas, optimizer = layer()
    with torch.no_grad():
        replicas.weights["w"].sum()
    for _ in range(3):  # accumulation, with recomputation
        x = torch.ones(2, requires_grad=True)
        checkpoint(lambda x: replicas.weights["w"] @ x, x, use_reentrant=False).sum().backward()
        optimizer.zero_grad(set_to_none=True)
    dense = nn.Parameter(torch.ones(2))
    other = torch.optim.SGD([dense], lr=0.1)
    dense.sum().backward()
    other.step()
    assert dense.tolist() == pytest.approx([0.9, 0.9])
    replicas.reduce_grads()
    assert w.grad[:, 0].tolist() == [9, 6, 3]
    optimizer.step()
    replicas.sync_weights()
    # A batch without a token for this rank, and one in which the layer is left out.
    replicas.weights["w"][torch.empty(0, dtype=torch.long)].sum().backward()
    replicas.reduce_grads()
    dense.sum().backward()
    optimizer.step()
    replicas.sync_weights()


def test_scaler_that_skips_a_step():
    """A gradient scaler that skips a step leaves the weights, and the next step changes them."""
    w, replicas, optimizer = layer()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (float("inf"), 1.0):
        before = w.detach().clone()
        scaler.scale(replicas.weights["w"].sum() * factor).backward()
        replicas.reduce_grads()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        replicas.sync_weights()
        assert torch.equal(w, before) == (factor != 1)


def test_closure():
    """An optimizer that calls a closure several times trains the weights."""
    w, replicas, _ = layer()
    optimizer = torch.optim.LBFGS([w], max_iter=3)

    def closure():
        optimizer.zero_grad()
        replicas.sync_weights()
        loss = replicas.weights["w"].square().sum()
        loss.backward()
        replicas.reduce_grads()
        return loss

    assert optimizer.step(closure) > closure()


def test_several_layers_and_optimizers():
    """A step is refused only if a parameter of its optimizer has gradients in slots."""
    (v, first, one), (w, second, two) = layer(), layer()
    both = torch.optim.SGD([v, w], lr=0.1)
    backward(first)
    backward(second)
    first.reduce_grads()
    one.step()
    with pytest.raises(RuntimeError, match="slots of w hold"):
        two.step()
    first.sync_weights()
    with pytest.raises(RuntimeError, match="slots of w hold"):
        both.step()
    # An optimizer of other parameters of the same Replicas.
    a, b = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    third = Replicas(PLACEMENT, {"a": a, "b": b})
    third.weights["a"].sum().backward()
    torch.optim.SGD([b], lr=0.1).step()
    with pytest.raises(RuntimeError, match="slots of a hold"):
        torch.optim.SGD([a], lr=0.1).step()


def test_slot_weights_given_to_an_optimizer():
    """A step of an optimizer that was given slot weights is refused."""
    _, replicas, _ = layer()
    optimizer = torch.optim.SGD(replicas.weights.values(), lr=0.1)
    backward(replicas)
    with pytest.raises(RuntimeError, match=r"not Replicas.weights\['w'\]"):
        optimizer.step()


def test_nothing_is_kept_alive():
    """Hooks hold neither the Replicas nor parameters, slots or optimizers."""
    w, replicas, optimizer = layer(torch.bfloat16)
    backward(replicas)
    replicas.reduce_grads()
    optimizer.step()
    backward_of = weakref.ref(replicas.sync_weights() and replicas.weights["w"])
    alive = [weakref.ref(thing) for thing in (w, replicas, optimizer)] + [backward_of]
    del replicas
    gc.collect()
    assert alive[1]() is None and alive[3]() is None
    optimizer.step()  # nothing is left to object
    del w, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_dropped_gradients():
    """zero_grad gives a step up; without it the slots' gradients go into the next step."""
    w, replicas, optimizer = layer(torch.bfloat16)
    (replicas.weights["w"].float() * float("nan")).sum().backward()
    replicas.zero_grad()
    optimizer.step()
    backward(replicas)
    replicas.reduce_grads()
    assert w.grad[:, 0].tolist() == [3, 2, 1]


def test_frozen_for_a_while():
    """A parameter can be frozen and trained again, but not while slots hold its gradients."""
    w, replicas, optimizer = layer(torch.bfloat16)
    w.requires_grad_(False)
    assert not replicas.weights["w"].requires_grad
    replicas.reduce_grads()
    assert w.grad is None
    w.requires_grad_()
    backward(replicas)
    assert replicas.weights["w"].grad is None  # it went to the sum in float32
    w.requires_grad_(False)
    with pytest.raises(RuntimeError, match="^w got frozen while slots hold gradients"):
        replicas.reduce_grads()
    w.requires_grad_()
    replicas.reduce_grads()
    assert w.grad[:, 0].tolist() == [3, 2, 1] and w.grad.dtype == torch.float32
    optimizer.step()
    frozen = torch.ones(3, 2)
    replicas = Replicas(PLACEMENT, {"x": frozen})
    frozen.requires_grad_()
    with pytest.raises(RuntimeError, match=r"^params\['x'\] was frozen when the Replicas was made"):
        _ = replicas.weights


def test_parameters_whose_data_are_exchanged():
    """New data of a parameter need a sync, and data of another dtype are refused."""
    w, replicas, _ = layer()
    w.data = torch.full((3, 2), 5.0)
    with pytest.raises(RuntimeError, match="parameters changed"):
        _ = replicas.weights
    replicas.sync_weights()
    assert (replicas.weights["w"] == 5).all()
    w.data = w.data.double()
    for call in (replicas.sync_weights, replicas.reduce_grads, lambda: replicas.weights):
        with pytest.raises(RuntimeError, match=r"^params\['w'\] was torch.float32 .*torch.float64"):
            call()


def test_parameters_belong_to_one_replicas():
    """A parameter serves one `Replicas` at a time, and a close sets it free."""
    w, replicas, optimizer = layer()
    with pytest.raises(ValueError, match=r"^params\['x'\] belongs to another Replicas: close"):
        Replicas(PLACEMENT, {"x": w})
    with replicas.logical_order(optimizer):
        for call in (replicas.close, lambda o: replicas.move(PLACEMENT, o)):
            with pytest.raises(RuntimeError, match="inside logical_order"):
                call(optimizer)
    replicas.close(optimizer)
    for call in (replicas.sync_weights, replicas.reduce_grads, lambda: replicas.weights):
        with pytest.raises(RuntimeError, match="this Replicas was closed"):
            call()
    Replicas(Placement(np.array([2, 0, 1, 1]), 1), {"x": w})


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 2))
        self.replicas = Replicas(PLACEMENT, {"w": self.w}, dtype=torch.bfloat16)


def test_copies():
    """A model's copy has slots of its own that follow its own parameters."""
    model = Model()
    backward(model.replicas)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.w.mul_(2)
    twin.replicas.sync_weights()
    # 256 + 1 is 256 in bfloat16: the copy must accumulate in float32 as well.
    for factor in (256.0, 1.0):
        (twin.replicas.weights["w"].float() * factor).sum().backward()
    twin.replicas.reduce_grads()
    assert twin.w.grad[:, 0].tolist() == [771, 514, 257]
    assert (twin.replicas.weights["w"] == 2).all() and (model.replicas.weights["w"] == 1).all()
    model.replicas.reduce_grads()
    assert model.w.grad[:, 0].tolist() == [3, 2, 1]
    for call in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="a Replicas can't be pickled.*logical_order"):
            call(model.replicas)
    with pytest.raises(TypeError, match="a Replicas can't be pickled"):
        pickle.dumps(model)


BAD = {
    "a number": (3, TypeError, "must be a tensor or a sequence of tensors, got int"),
    "no tensors": ([1, 2, 3], TypeError, "must be a tensor, got int"),
    "too few": (torch.full((2, 2), 7.25), ValueError, r"3 experts, got shape \(2, 2\)"),
    "no rows": (torch.tensor(7.25), ValueError, r"3 experts, got shape \(\)"),
    "too few tensors": ([torch.full((2,), 7.25)] * 2, ValueError, "3 experts, got 2"),
    "two shapes": (
        [torch.full((n,), 7.25) for n in (2, 2, 3)], ValueError,
        r"one shape.*float32 of shape \(2,\) on cpu and .*\(3,\)",
    ),
    "expanded": (torch.full((3, 1), 7.25).expand(3, 2), ValueError, "must not be expanded"),
    "sparse": (torch.full((3, 2), 7.25).to_sparse(), TypeError, "must be a dense tensor"),
    "lazy": (torch.full((3, 2), 7.25j).conj(), ValueError, "must be resolved"),
    "meta": (torch.empty(3, 2, device="meta"), ValueError, "is on the meta device"),
    "float8": (
        nn.Parameter(torch.full((3, 2), 7.25).to(torch.float8_e4m3fn)), TypeError,
        "must have requires_grad=False.*float8_e4m3fn of shape",
    ),
    "twice": ([torch.full((2,), 7.25)] * 3, ValueError, "must hold memory of its own"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_named_not_printed(case):
    """A bad tensor is refused by name, and the message shows none of its values."""
    value, kind, message = BAD[case]
    with pytest.raises(kind, match=r"^params\['x'\] (.* )?" + message) as caught:
        Replicas(PLACEMENT, {"x": value})
    assert "7.25" not in str(caught.value)
    if case == "float8":
        return
    _, replicas, optimizer = layer()
    with pytest.raises(kind, match=r"^also\['x'\] (.* )?" + message) as caught:
        replicas.move(PLACEMENT, optimizer, also={"x": value})
    assert "7.25" not in str(caught.value)


def test_bad_arguments():
    """A bad group, dtype, optimizer or `also` is refused by name."""
    w, replicas, optimizer = layer()
    x = torch.ones(3, 2)
    with pytest.raises(TypeError, match="^group must be a ProcessGroup or None, got str"):
        Replicas(PLACEMENT, {"x": x}, group="world")
    with pytest.raises(TypeError, match="^data_parallel_group must be a ProcessGroup"):
        Replicas(PLACEMENT, {"x": x}, data_parallel_group=3)
    with pytest.raises(TypeError, match="^dtype must be a torch.dtype or None, got str"):
        Replicas(PLACEMENT, {"x": x}, dtype="bfloat16")
    with pytest.raises(TypeError, match="^dtype must be float16, bfloat16, .* got torch.float8"):
        Replicas(PLACEMENT, {"x": x}, dtype=torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"^optimizer\[1\] must be a torch.optim.Optimizer"):
        replicas.move(PLACEMENT, [optimizer, 3])
    with pytest.raises(TypeError, match="^also must be a mapping or None, got list"):
        replicas.move(PLACEMENT, optimizer, also=[w])
    with torch.inference_mode():
        made = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"^params\['x'\] was made under torch.inference_mode"):
        Replicas(PLACEMENT, {"x": made})
    some = [torch.ones(2, requires_grad=i == 1) for i in range(3)]
    with pytest.raises(ValueError, match=r"^params\['x'\] must be trained .* all experts or none"):
        Replicas(PLACEMENT, {"x": some})
    assert "tensor" not in repr(replicas)
