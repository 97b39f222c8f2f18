"""Live slots' weights and gradients by messages between four processes, against dense sums."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from torch.utils.checkpoint import checkpoint

from lplb_triton import Balancer, LiveSlots, Placement
from lplb_triton.sync import SyncError

sys.path.append(str(Path(__file__).parents[1] / "examples"))

RANKS, LOCAL, WIDTH, LAYERS = 4, 2, 6, 2
EXPERTS = RANKS * LOCAL
# By layer: experts of each rank's live slots.
PLANS = (
    [[2, 5], [5, -1], [2, 0], [-1, -1]],
    [[-1, 7], [0, -1], [3, 0], [0, 1]],
)


def make_placement(ranks=RANKS, live=2, local=LOCAL):
    load = torch.ones(ranks * local)
    placement = Placement.from_history(load, ranks, redundant_per_rank=0, keep_home=True)
    return placement.with_live_slots(live)


def draw_weights(layers=LAYERS):
    generator = torch.Generator().manual_seed(0)
    shapes = (layers, 2, EXPERTS, WIDTH, WIDTH)
    return torch.randn(shapes, generator=generator, dtype=torch.float64) / WIDTH**0.5


def use(x, weights, plan_row, static):
    """What a rank computes: each of its slots' experts does something of its own."""
    w_in, w_out = weights
    out = sum((x @ w_in[0][i]).tanh() @ w_out[0][i] for i in static)
    for slot, expert in enumerate(plan_row):
        if expert >= 0:
            out = out + (1 + slot) * (x @ w_in[1][slot]).tanh() @ w_out[1][slot]
    return out


def dense_gradients(x, plans, repeats):
    """Gradients of all experts, ``[layers, 2, experts, ...]``, without live slots."""
    weights = draw_weights().requires_grad_()
    for rank in range(RANKS):
        y = x
        for layer, plan in enumerate(plans):
            chosen = [max(expert, 0) for expert in plan[rank]]
            pairs = [(w[rank * LOCAL :], w[chosen]) for w in weights[layer]]
            y = y + use(y, pairs, plan[rank], range(LOCAL))
        (repeats * y.square().sum()).backward()
    return weights.grad


def run_layers(layers, x, plans, rank, checkpointed):
    """The layers' forward pass on one rank."""

    def one(y, layer, plan):
        pull = layer.pull(torch.tensor(plan, dtype=torch.int32))
        weights = pull.wait()
        return pull.attach(use(y, weights, plan[rank], range(LOCAL)))

    y = x
    for layer, plan in zip(layers, plans, strict=True):
        if checkpointed:
            y = y + checkpoint(one, y, layer, plan, use_reentrant=False)
        else:
            y = y + one(y, layer, plan)
    return y.square().sum()


def check_gradients(rank, group):
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = slice(rank * LOCAL, rank * LOCAL + LOCAL)
    expected = dense_gradients(x, PLANS, 3)[:, :, mine]
    for backward, checkpointed in (("pull", False), ("pull", True), ("keep", False)):
        slots = LiveSlots(2, group=group, device="cpu", backward=backward)
        assert slots.transport == "messages"
        params = [[torch.nn.Parameter(w[mine].clone()) for w in two] for two in draw_weights()]
        layers = [slots.add(make_placement(), *two) for two in params]
        run_layers(layers, x, PLANS, rank, checkpointed).backward()
        with torch.no_grad():
            run_layers(layers, x, PLANS[::-1], rank, checkpointed)
        # Two batches are alive at once.
        losses = [run_layers(layers, x, PLANS, rank, checkpointed) for _ in range(2)]
        for loss in losses:
            loss.backward()
        for layer, two in enumerate(params):
            for number, param in enumerate(two):
                wanted = expected[layer, number]
                torch.testing.assert_close(param.grad, wanted, rtol=1e-10, atol=1e-10)
        slots.close()


def check_steps(rank, group):
    """Weights change within `update` only, and the new ones are fetched."""
    slots = LiveSlots(2, group=group, device="cpu")
    weight = torch.nn.Parameter(torch.full((LOCAL, 3), float(rank)))
    scale = torch.full((LOCAL, 1), rank, dtype=torch.uint8)
    layer = slots.add(make_placement(), weight, scale)
    plan = torch.tensor(PLANS[0], dtype=torch.int32)
    for step in range(3):
        (static, live), (_, scales) = layer.pull(plan).wait()
        assert static.data_ptr() == weight.data_ptr() and not scales.requires_grad
        for slot, expert in enumerate(PLANS[0][rank]):
            home = expert // LOCAL
            assert (live[slot] == (home + step if expert >= 0 else 0)).all()
            assert (scales[slot] == max(home, 0)).all()
        with slots.update(), torch.no_grad():
            weight.add_(1)
    pull = layer.pull(plan)
    loss = pull.attach(pull.wait()[0][0].sum())
    with slots.update():
        with pytest.raises(RuntimeError, match="is under way"):
            layer.pull(plan)
    with pytest.raises(RuntimeError, match=r"update\(\) lies between"):
        loss.backward()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="layer 0 changed outside of"):
        layer.pull(plan)
    slots.close()


def check_refusals(rank, group):
    """What is wrong on one rank raises on all."""
    slots = LiveSlots(2, group=group, device="cpu")
    placement = make_placement()
    wrong = torch.zeros(LOCAL, 3, requires_grad=rank == 2)
    with pytest.raises(ValueError, match="sources must be the same on all ranks"):
        slots.add(placement, wrong)
    with pytest.raises(ValueError, match=r"sources\[0\] must have a row for each .* 2 experts"):
        slots.add(placement, torch.zeros(LOCAL + (rank == 1), 3))
    layer = slots.add(placement, torch.zeros(LOCAL, 3))
    with pytest.raises(ValueError, match="like those of the first layer"):
        slots.add(placement, torch.zeros(LOCAL, 4))
    with pytest.raises(ValueError, match="live must be int32"):
        layer.pull(torch.zeros(RANKS, 1, dtype=torch.int32))
    plan = torch.tensor(PLANS[rank == 3], dtype=torch.int32)
    with pytest.raises(SyncError, match="another plan") as caught:
        layer.pull(plan)
    assert caught.value.ranks == (3,)
    with pytest.raises(SyncError, match="another plan"):
        layer.pull(plan)
    slots.close()


def check_absence(rank, group):
    """A rank that doesn't come to a pull is named by those that wait."""
    slots = LiveSlots(2, group=group, device="cpu", timeout=0.3)
    layer = slots.add(make_placement(), torch.zeros(LOCAL, 3))
    plan = torch.tensor(PLANS[0], dtype=torch.int32)
    layer.pull(plan).wait()
    if rank != 3:
        with pytest.raises(SyncError, match=r"ranks \[3\] did not come within 0.3 s") as caught:
            layer.pull(plan)
        assert caught.value.ranks == (3,)
    dist.barrier(group)
    slots.close()


def check_example(rank, group):
    """examples/live_slots.py has the same losses with live slots, and evener ranks."""
    from live_slots import train

    runs = [train(group, torch.device("cpu"), live, 3) for live in (0, 1)]
    for (loss, imbalance), (with_live, evener) in zip(*runs, strict=True):
        assert with_live == pytest.approx(loss, rel=1e-5)
        assert evener <= 1.05 < imbalance


def check_ranks(rank, group):
    check_example(rank, group)
    check_gradients(rank, group)
    check_steps(rank, group)
    check_refusals(rank, group)
    check_absence(rank, group)


def test_four_ranks(tmp_path):
    """Gradients are dense sums, new weights are fetched, misuse raises, absent ranks are named."""
    run_ranks(check_ranks, RANKS, tmp_path)


def test_one_rank_alone():
    """A group of one rank copies its own experts; resident slots are memory of the layer."""
    placement = make_placement(1, 1, 4)
    slots = LiveSlots(1, device="cpu", resident=True)
    weight = slots.empty((4, 5), torch.float32)
    weight.copy_(torch.arange(20.0).view(4, 5))
    layers = [slots.add(placement, weight) for _ in range(2)]
    first = layers[0].pull(torch.tensor([[3]], dtype=torch.int32)).wait()
    layers[1].pull(torch.tensor([[1]], dtype=torch.int32)).wait()
    assert torch.equal(first[0][1][0], weight[3])
    # Rows of 20 bytes take 32.
    assert slots.memory()["live"] == 2 * 32 and slots.memory()["staged"] == 0
    trained = LiveSlots(1, device="cpu", resident=True)
    layer = trained.add(placement, torch.nn.Parameter(weight))
    with pytest.raises(RuntimeError, match="resident live slots are for inference"):
        layer.pull(torch.tensor([[3]], dtype=torch.int32))
    with torch.no_grad():
        layer.pull(torch.tensor([[3]], dtype=torch.int32))
    trained.close()
    with pytest.raises(RuntimeError, match="is closed"):
        layer.pull(torch.tensor([[3]], dtype=torch.int32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"live_per_rank": 0}, "live_per_rank must be"),
        ({"live_per_rank": 1, "transport": "nccl"}, "transport must be"),
        ({"live_per_rank": 1, "transport": "symmetric"}, "needs a group and GPUs"),
        ({"live_per_rank": 1, "backward": "none"}, "backward must be"),
        ({"live_per_rank": 1, "n_sms": 2000}, "n_sms must be at most 1024"),
        ({"live_per_rank": 1, "n_sms": -1}, "n_sms must be"),
        ({"live_per_rank": 1, "timeout": -1.0}, "timeout must be"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    """Arguments that don't fit raise a ValueError that names them."""
    with pytest.raises(ValueError, match=message):
        LiveSlots(**arguments, device="cpu")


def test_wrong_layers_are_named():
    """Placements and weights that don't fit the slots raise, naming what is wrong."""
    slots = LiveSlots(1, device="cpu")
    placement = make_placement(1, 1, 4)
    weight = torch.zeros(4, 6)
    for given, message in (
        ((make_placement(1, 2, 4), weight), "2 live slots a rank"),
        ((make_placement(2, 1), weight), "2 ranks, the group has 1"),
        ((placement,), "at least one tensor"),
        ((placement, weight.t().contiguous().t()), "must be contiguous"),
        ((placement, torch.zeros(4, 0)), "must not be empty"),
    ):
        with pytest.raises(ValueError, match=message):
            slots.add(*given)
    with pytest.raises(TypeError, match="balancer must be a Balancer"):
        slots.add(None, weight)
    complex_weight = torch.zeros(4, 6, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match="only float16, bfloat16, float32"):
        slots.add(placement, complex_weight)
    with pytest.raises(RuntimeError, match="zero"), slots.update():
        raise RuntimeError("zero")
    with pytest.raises(RuntimeError, match="an exception ended it"):
        slots.add(placement, weight)


def test_homes_may_not_move():
    """A new placement is followed while experts stay at home, and refused when they move."""

    class Owner:
        placement = make_placement(1, 1, 4)

    slots, owner = LiveSlots(1, device="cpu"), Owner()
    weight = torch.arange(4.0)[:, None]
    layer = slots.add(owner, weight)
    plan = torch.tensor([[2]], dtype=torch.int32)
    owner.placement = make_placement(1, 1, 4)
    assert float(layer.pull(plan).wait()[0][1]) == 2
    with pytest.raises(TypeError, match="live must be given: the layer was added with Owner"):
        layer.pull()
    moved = torch.tensor([1, 0, 2, 3])
    owner.placement = Placement(moved, ep_size=1).with_live_slots(1)
    with pytest.raises(RuntimeError, match="other homes of experts"):
        layer.pull(plan)


def test_a_pull_takes_the_last_plan_of_its_balancer():
    """Without a plan, a layer that was added with a balancer pulls what that planned last."""
    balancer = Balancer(make_placement(1, 1, 4), device="cpu", backend="torch", rank=0)
    slots = LiveSlots(1, device="cpu")
    layer = slots.add(balancer, torch.arange(4.0)[:, None])
    with pytest.raises(RuntimeError, match="no batch has been planned yet"):
        layer.pull()
    balancer.run(torch.tensor([[0, 1]]))
    balancer._backend.live_out[0] = 3
    assert balancer.live.experts.tolist() == [[3]]
    assert float(layer.pull().wait()[0][1]) == 3


def test_a_pull_that_was_overtaken_is_an_error():
    """Weights of another pull, or of a backward pass, are never taken for those of this one."""
    slots = LiveSlots(1, device="cpu")
    placement = Placement.from_history(torch.ones(4), 1, redundant_per_rank=0, keep_home=True)
    placement = placement.with_live_slots(1)
    weights = [torch.nn.Parameter(torch.full((4, 2), float(i))) for i in range(2)]
    layers = [slots.add(placement, weight) for weight in weights]
    plan = torch.zeros(1, 1, dtype=torch.int32)
    early = layers[0].pull(plan)
    ((_, live),) = layers[1].pull(plan).wait()
    assert live[0].tolist() == [1.0, 1.0]
    with pytest.raises(RuntimeError, match="has followed since this pull began"):
        early.wait()
    pull = layers[0].pull(plan)
    ((_, live),) = pull.wait()
    output = pull.attach(live.sum())
    layers[1].pull(plan).wait()
    ahead = layers[1].pull(plan)
    output.backward()
    with pytest.raises(RuntimeError, match="has followed since this pull began"):
        ahead.wait()
    with pytest.raises(ValueError, match=r"live must hold experts in \[0, 4\), or -1 .* 9\.\.9"):
        layers[0].pull(plan + 9)


def test_training_follows_an_evaluation_in_inference_mode():
    """A layer whose first pull was in inference mode is trained by later ones."""
    slots = LiveSlots(1, device="cpu")
    weight = torch.nn.Parameter(torch.ones(2, 4))
    layer = slots.add(make_placement(1, 1), weight)
    plan = torch.tensor([[1]], dtype=torch.int32)
    with torch.inference_mode():
        assert not layer.pull(plan).wait()[0][1].requires_grad
    pull = layer.pull(plan)
    ((static, live),) = pull.wait()
    factor = torch.ones(4, requires_grad=True)
    pull.attach((static * factor).sum() + 2 * (live * factor).sum()).backward()
    assert weight.grad.tolist() == [[1.0] * 4, [3.0] * 4] and factor.grad.tolist() == [4.0] * 4
