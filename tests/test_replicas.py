"""Replicas in training: weights, gradients and optimizer state, held against one process."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import N_GPUS
from gloo import run_ranks
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow
from torch import nn
from torch.utils.checkpoint import checkpoint

from lplb_triton import Balancer, Placement, Replicas, topologies
from lplb_triton.training.routes import assign_positions

EXPERTS, RANKS, HIDDEN, INNER = 16, 4, 6, 5
SHAPES = {"w_in": (HIDDEN, INNER), "w_out": (INNER, HIDDEN), "scale": ()}
OWN = EXPERTS // RANKS


def placements():
    """EPLB's, a reordered topology's, one with an expert twice on a rank, an uneven one."""
    rng = np.random.default_rng(5)
    yield (
        "eplb",
        Placement.from_history(
            torch.from_numpy(rng.lognormal(0, 1.5, EXPERTS)), RANKS, redundant_per_rank=2
        ),
    )
    yield "topology", Placement.from_topology(
        topologies.torus(2, 2), EXPERTS + 2 * RANKS, EXPERTS, RANKS,
        workload=torch.from_numpy(rng.random(EXPERTS)),
    )  # fmt: skip
    rows = [[0, 1, 2, 3, 0, 4], [4, 5, 6, 7, 0, 0], [8, 9, 10, 11, 12, 8], [12, 13, 14, 15, 0, 0]]
    yield "twice", Placement(np.array(rows).reshape(-1), RANKS)
    # Six experts with their only copy on rank 0, where there is room for four originals.
    rows = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 6, 7], [10, 11, 12, 13, 6, 7], [14, 15, 6, 7, 8, 9]]
    yield "uneven", Placement(np.array(rows).reshape(-1), RANKS)


def whole(seed=0, dtype=torch.float64):
    """All experts' weights, as one process without replicas has them."""
    rng = np.random.default_rng(seed)
    return {
        name: nn.Parameter(torch.from_numpy(rng.normal(size=(EXPERTS, *shape))).to(dtype))
        for name, shape in SHAPES.items()
    }


def originals(rank, seed=0, dtype=torch.float64):
    """A rank's part of `whole`, in logical order."""
    return {
        name: nn.Parameter(value.detach()[rank * OWN : (rank + 1) * OWN].clone())
        for name, value in whole(seed, dtype).items()
    }


def loss_of(weights, x, index):
    """Sum over tokens of something of every weight of their expert."""
    inner = torch.tanh(torch.einsum("th,thi->ti", x, weights["w_in"][index]))
    out = torch.einsum("ti,tih->th", inner, weights["w_out"][index])
    return (out * weights["scale"][index][:, None]).square().sum()


def batch(placement, seed, tokens=60):
    """Tokens, their experts, and a copy of the expert for each; some experts get nothing."""
    rng = np.random.default_rng(seed)
    expert = rng.integers(0, EXPERTS - 2, tokens)
    log2phy, count = placement.log2phy.numpy(), placement.logcnt.numpy()
    slot = log2phy[expert, rng.integers(0, 1 << 30, tokens) % count[expert]]
    x = torch.from_numpy(rng.normal(size=(tokens, HIDDEN)))
    return x, torch.from_numpy(expert), torch.from_numpy(slot.astype(np.int64))


def backward(replicas, rank, seed):
    """Loss of the tokens that this rank's slots serve; for all ranks together, `loss_of`."""
    placement = replicas.placement
    x, _, slot = batch(placement, seed)
    mine = slot // placement.slots_per_rank == rank
    weights = {name: w.to(x.dtype) for name, w in replicas.weights.items()}
    loss_of(weights, x[mine], slot[mine] % placement.slots_per_rank).backward()


def check_parity(rank, group):
    """Gradient parity: one step and four accumulated ones, every placement, float64."""
    for name, placement in placements():
        for separate in (False, True):
            reference, params = whole(), originals(rank)
            given = params
            if separate:
                given = {n: [nn.Parameter(t.clone()) for t in p] for n, p in params.items()}
            replicas = Replicas(placement, given, group=group)
            mine = replicas.placement.phy2log.long().reshape(RANKS, -1)[rank]
            for n in SHAPES:
                assert torch.equal(replicas.weights[n], reference[n].detach()[mine]), name
                assert replicas.weights[n].is_leaf and replicas.weights[n].is_contiguous()
            for seed in range(4):
                backward(replicas, rank, seed)
                x, expert, _ = batch(placement, seed)
                loss_of(reference, x, expert).backward()
                if seed == 0:  # after one step as well as after four
                    handle = replicas.reduce_grads(async_op=True)
                    with pytest.raises(RuntimeError, match="wait"):
                        replicas.sync_weights()
                    with pytest.raises(RuntimeError, match="wait"):
                        _ = replicas.weights
                    handle.wait()
                    handle.wait()
                    compare_grads(replicas, given, reference)
            replicas.reduce_grads()
            compare_grads(replicas, given, reference)


def compare_grads(replicas, params, reference):
    for n, p in params.items():
        grad = torch.stack([t.grad for t in p]) if isinstance(p, list) else p.grad
        expected = reference[n].grad[replicas.experts]
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


def check_training(rank, group):
    """Fifteen steps with a new placement every third, and a detour through logical order."""
    table = itertools.cycle(p for _, p in placements())
    reference, params = whole(), originals(rank)
    settings = {"lr": 0.02, "weight_decay": 0.1}
    plain = torch.optim.AdamW(reference.values(), **settings)
    replicas = Replicas(next(table), params, group=group)
    optimizer = torch.optim.AdamW(params.values(), **settings)
    also = torch.arange(OWN * RANKS, dtype=torch.float32)[replicas.experts].clone()
    for step in range(15):
        if step % 3 == 2:
            replicas.move(next(table), optimizer, also={"ids": also})
            assert torch.equal(also.long(), replicas.experts)
        backward(replicas, rank, step)
        replicas.reduce_grads()
        optimizer.step()
        with pytest.raises(RuntimeError, match="sync_weights"):
            _ = replicas.weights
        replicas.sync_weights(async_op=True).wait()
        optimizer.zero_grad()
        x, expert, _ = batch(replicas.placement, step)
        loss_of(reference, x, expert).backward()
        plain.step()
        plain.zero_grad()
        for n, p in params.items():
            expected = reference[n].detach()[replicas.experts]
            torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-9)
    own = slice(rank * OWN, (rank + 1) * OWN)
    before = replicas.experts
    with replicas.logical_order(optimizer):
        assert torch.equal(replicas.experts, torch.arange(EXPERTS)[own])
        for n, p in params.items():
            for key in ("exp_avg", "exp_avg_sq"):
                state = optimizer.state[p][key]
                assert state.shape == p.shape == (OWN, *SHAPES[n])
                expected = plain.state[reference[n]][key][own]
                torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-12)
            assert optimizer.state[p]["step"] == 15
    assert torch.equal(replicas.experts, before)
    assert replicas.weights["w_in"].shape[0] == replicas.placement.slots_per_rank

    with pytest.raises(OSError, match="disk full"), replicas.logical_order(optimizer):
        raise OSError("disk full")
    assert torch.equal(replicas.experts, torch.arange(EXPERTS)[own])
    replicas.sync_weights()
    mine = replicas.placement.phy2log.long().reshape(RANKS, -1)[rank]
    got = replicas.weights["w_in"].detach()
    torch.testing.assert_close(got, reference["w_in"].detach()[mine], rtol=1e-9, atol=1e-9)


def check_dtypes(rank, group):
    """bfloat16 slots of float32 parameters: gradients accumulate in float32, frozen ones not."""
    placement = dict(placements())["eplb"]
    params = originals(rank, dtype=torch.float32)
    params["scale"].requires_grad_(False)
    replicas = Replicas(placement, params, group=group, dtype=torch.bfloat16)
    weights = replicas.weights
    mine = placement.phy2log.long().reshape(RANKS, -1)[rank]
    reference = whole(dtype=torch.float32)
    assert torch.equal(weights["w_in"], reference["w_in"].detach().bfloat16()[mine])
    assert not weights["scale"].requires_grad
    # 256 + 1 is 256 in bfloat16: accumulation there would lose the small gradients.
    for factor in (256.0, 1.0, 1.0):
        (weights["w_in"].float() * factor).sum().backward()
        (weights["w_out"].float() * (factor + rank)).sum().backward()
    assert weights["w_in"].grad is None
    weights["w_in"].grad = torch.full_like(weights["w_in"], 2)  # as a layer without autograd may
    with pytest.raises(RuntimeError, match="reduce_grads before"):
        replicas.move(placement, None)
    replicas.reduce_grads()
    copies = placement.logcnt[replicas.experts].float().reshape(-1, 1, 1)
    torch.testing.assert_close(params["w_in"].grad, (260 * copies).expand_as(params["w_in"]))
    assert params["scale"].grad is None
    half = {"w": nn.Parameter(torch.ones(OWN, 3, dtype=torch.float16))}
    replicas = Replicas(placement, half, group=group)
    replicas.weights["w"].sum().backward()
    replicas.reduce_grads()
    assert half["w"].grad.dtype == torch.float16
    torch.testing.assert_close(half["w"].grad.float(), copies[:, :, 0].expand(OWN, 3))


def check_errors(rank, group):
    """One rank's mistake is every rank's error, and the group works afterwards."""
    good = dict(placements())["eplb"]
    other = dict(placements())["twice"]
    params = originals(rank)
    odd = rank == 2

    def fails(kind, match, placement=good, given=params, **options):
        with pytest.raises(kind, match=match):
            Replicas(placement, given, group=group, **options)

    without = {n: p for n, p in params.items() if n != "w_out"} if odd else params
    fails(ValueError, r"params\['w_out'\].*nothing on rank 2", given=without)
    wide = dict(params, w_in=nn.Parameter(torch.zeros(OWN, HIDDEN, INNER + odd).double()))
    fails(ValueError, r"params\['w_in'\].*6, 6.*on rank 2", given=wide)
    short = dict(params, w_in=nn.Parameter(torch.zeros(OWN - odd, HIDDEN, INNER).double()))
    fails(
        ValueError,
        r"params\['w_in'\] must have a row for each.*4 experts.*\(3, 6, 5\)",
        given=short,
    )
    fails(ValueError, "placement must be the same", placement=other if odd else good)
    halved = Placement.from_history(torch.ones(EXPERTS), 2, redundant_per_rank=1)
    fails(ValueError, "ep_size, 4, got 2", placement=halved if odd else good)
    fails(ValueError, "dtype.*rank 2", dtype=torch.bfloat16 if odd else None)
    still = {n: p.detach() if odd and n == "scale" else p for n, p in params.items()}
    fails(ValueError, r"params\['scale'\] must be the same.*trained on rank 0", given=still)
    apart = dict(params, scale=[nn.Parameter(p) for p in params["scale"].detach()])
    fails(ValueError, "a tensor for each expert.*rank 2", given=apart if odd else params)
    packed = nn.Parameter(torch.ones(OWN, 3).to(torch.float8_e5m2), requires_grad=odd)
    fails((ValueError, TypeError), "requires_grad=False", given=dict(params, w_in=packed))
    fails(TypeError, "placement must be a Placement", placement=3)

    replicas = Replicas(good, params, group=group)
    optimizer = torch.optim.AdamW(params.values())
    with pytest.raises(ValueError, match="placement must be the same"):
        replicas.move(other if odd else good, optimizer)
    with pytest.raises(ValueError, match="ep_size"):
        replicas.move(halved if odd else good, optimizer)
    fewer = Placement.from_history(torch.ones(EXPERTS), RANKS, redundant_per_rank=1)
    with pytest.raises(ValueError, match="n_physical 24, got 20"):
        replicas.move(fewer if odd else good, optimizer)
    for p in params.values():
        optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p)}
    if odd:  # as if this rank's state were sharded once more
        optimizer.state[params["w_in"]]["exp_avg"] = torch.zeros(1, HIDDEN, INNER)
    with pytest.raises(ValueError, match=r"w_in'\]\]\['exp_avg'\] must have a row.*sharded"):
        replicas.move(other, optimizer)
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="optimizer does not update"):
        replicas.move(other, stranger if odd else None)
    optimizer.state[params["w_in"]]["exp_avg"] = torch.zeros_like(params["w_in"])
    replicas.move(other, optimizer)
    backward(replicas, rank, 0)
    replicas.reduce_grads()


def check_copies(rank, group):
    """Two EP groups of two, data parallel: agreement is checked over the copies too."""
    columns = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    copies = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    ep, dp = columns[rank // 2], copies[rank % 2]
    first = Placement.from_history(torch.arange(8), 2, redundant_per_rank=1)
    second = Placement.from_history(torch.arange(8).flip(0), 2, redundant_per_rank=1)
    params = {"w": nn.Parameter(torch.ones(4, 3))}
    with pytest.raises(ValueError, match="placement must be the same"):
        Replicas(first if rank < 2 else second, params, group=ep, data_parallel_group=dp)
    with pytest.raises((TypeError, ValueError), match="must be a Placement"):
        Replicas(None if rank == 3 else first, params, group=ep, data_parallel_group=dp)
    replicas = Replicas(first, params, group=ep, data_parallel_group=dp)
    replicas.weights["w"].sum().backward()
    replicas.reduce_grads()
    dist.all_reduce(params["w"].grad, group=dp)
    expected = 2.0 * first.logcnt[replicas.experts][:, None].expand(4, 3)
    torch.testing.assert_close(params["w"].grad, expected)


CHECKS = {
    "parity": check_parity,
    "training": check_training,
    "dtypes": check_dtypes,
    "errors": check_errors,
    "copies": check_copies,
}


def check_all(rank, group):
    for name, check in CHECKS.items():
        try:
            check(rank, group)
        except BaseException as error:
            raise RuntimeError(f"check_{name} failed on rank {rank}") from error
        dist.barrier()


def test_four_ranks_over_gloo(tmp_path):
    """On four ranks weights, gradients and optimizer state follow those of a single process."""
    run_ranks(check_all, RANKS, tmp_path)


def held(placement):
    """[n_logical, ep_size]: whether a rank holds a copy of an expert."""
    table = np.zeros((placement.n_logical, placement.ep_size), dtype=bool)
    table[placement.phy2log.numpy(), placement.rank_of_slot.numpy()] = True
    return table


def most_at_home(placement):
    """Originals that can be on a rank with a copy, by maximum flow."""
    n, ep_size = placement.n_logical, placement.ep_size
    source, sink = n + ep_size, n + ep_size + 1
    capacity = np.zeros((sink + 1, sink + 1), dtype=np.int32)
    capacity[source, :n] = 1
    capacity[:n, n : n + ep_size] = held(placement)
    capacity[n : n + ep_size, sink] = n // ep_size
    return maximum_flow(csr_matrix(capacity), source, sink).flow_value


@pytest.mark.parametrize("seed", range(6))
def test_originals_are_even_and_beside_a_copy(seed):
    """As many originals as possible are on a rank that holds a copy, in equal numbers."""
    rng = np.random.default_rng(seed)
    slots = np.concatenate([np.arange(24), rng.integers(0, 24, 12)])
    placement = Placement(rng.permutation(slots), 6, n_logical=24)
    positions = assign_positions(placement, rng.permutation(24))
    assert sorted(positions) == list(range(24))
    at_home = held(placement)[np.arange(24), positions // 4].sum()
    assert at_home == most_at_home(placement)


def test_originals_stay_or_follow_the_topology():
    """Assigning positions again changes nothing, nor does a topology in logical order."""
    placement = dict(placements())["topology"]
    positions = assign_positions(placement, np.arange(EXPERTS))
    again = assign_positions(placement, positions)
    np.testing.assert_array_equal(positions, again)
    in_order = Placement.from_topology(topologies.torus(2, 2), EXPERTS + 8, EXPERTS, RANKS)
    np.testing.assert_array_equal(
        assign_positions(in_order, np.arange(EXPERTS)), np.arange(EXPERTS)
    )
    assert most_at_home(dict(placements())["uneven"]) < EXPERTS


def test_one_rank_with_many_copies():
    """On one rank copies share a gradient, and a parameter changed during a sync is found."""
    placement = Placement(np.array([2, 0, 1, 0, 0, 1]), 1)
    params = {"w": nn.Parameter(torch.arange(6.0).reshape(3, 2))}
    replicas = Replicas(placement, params)
    assert repr(replicas).endswith("w, rank=0)")
    assert torch.equal(
        replicas.weights["w"].detach(), params["w"].detach()[placement.phy2log.long()]
    )
    (replicas.weights["w"] * torch.arange(6.0)[:, None]).sum().backward()
    replicas.reduce_grads()
    replicas.reduce_grads()  # nothing new: nothing added
    assert params["w"].grad[:, 0].tolist() == [1 + 3 + 4, 2 + 5, 0]
    handle = replicas.sync_weights(async_op=True)
    with torch.no_grad():
        params["w"].mul_(2)  # too early: what is under way is out of date
    handle.wait()
    with pytest.raises(RuntimeError, match="parameters changed"):
        _ = replicas.weights


def test_bad_arguments_without_a_group():
    """Wrong arguments, optimizer states and gradients are refused by name without a group."""
    placement = Placement(np.array([0, 1, 1]), 1)
    w = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match="^placement is for 3 ranks.*give group="):
        Replicas(Placement(np.array([0, 1, 1]), 3), {"w": w})
    with pytest.raises(TypeError, match="^params must be a mapping"):
        Replicas(placement, [w])
    with pytest.raises(ValueError, match="at least one"):
        Replicas(placement, {})
    with pytest.raises(ValueError, match="leaves"):
        Replicas(placement, {"w": w * 2})
    with pytest.raises(ValueError, match="one shape"):
        Replicas(placement, {"w": [torch.ones(2), torch.ones(3)]})
    with pytest.raises(TypeError, match="^dtype"):
        Replicas(placement, {"w": w}, dtype=torch.int8)
    with pytest.raises(TypeError, match="^optimizer"):
        Replicas(placement, {"w": w}, optimizer=3)
    replicas = Replicas(placement, {"w": w})
    with pytest.raises(TypeError, match=r"also\['x'\]"):
        replicas.move(placement, None, also={"x": 1})
    with pytest.raises(ValueError, match=r"also\['x'\]"):
        replicas.move(placement, None, also={"x": torch.ones(3)})
    stateful = torch.optim.AdamW([w])
    stateful.state[w] = {"blocks": [torch.ones(3)]}
    with pytest.raises(
        ValueError, match=r"^optimizer.state\[params\['w'\]\]\['blocks'\] is neither a tensor"
    ):
        replicas.move(placement, stateful)
    lists = {"w": [nn.Parameter(torch.ones(3)) for _ in range(2)]}
    replicas = Replicas(placement, lists)
    lists["w"][0].grad = torch.ones(3)
    with pytest.raises(ValueError, match="some of its tensors only"):
        replicas.move(placement, None)


def test_documented_change_to_a_script():
    """Both versions of the script in docs/training.md run; ids name the right experts."""
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    section = text.partition("## In a script that uses EPLB")[2].partition("\n## ")[0]
    before, after = (part.partition("```")[0] for part in section.split("```python\n")[1:])
    assert "import eplb" in before
    before = before.replace("import eplb", "from lplb_triton import eplb")
    load = torch.rand(2, 8)
    names = {
        "load": load, "num_replicas": 12, "num_groups": 1, "num_nodes": 1, "num_gpus": 4,
        "ep_group": None,
    }  # fmt: skip
    ids = torch.randint(8, (40, 2))
    for script, device in ((before, "cpu"), (after, "cuda" if N_GPUS else "cpu")):
        space = dict(names)
        exec(script, space)
        physical = space["physical_ids"](1, ids.to(device)).cpu()
        assert torch.equal(space["phy2log"][1][physical], ids)


def test_recomputation_gives_the_same_ids():
    """Activation checkpointing runs the balancer again: the same ids to the bit."""
    placement = Placement.from_history(torch.arange(1.0, 9.0), 1, redundant_per_rank=4)
    balancer = Balancer(placement, device="cpu")
    params = {"w": nn.Parameter(torch.randn(8, 4, 4, dtype=torch.float64))}
    replicas = Replicas(placement, params)
    x = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    logical = torch.randint(8, (50,))
    seen = []

    def layer(x):
        seen.append(balancer.run(logical))
        return torch.einsum("th,thi->ti", x, replicas.weights["w"][seen[-1]]).relu()

    grads = []
    for reentrant in (None, False, True):
        x.grad = params["w"].grad = None
        if reentrant is None:
            layer(x).square().sum().backward()
        else:
            checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        replicas.reduce_grads()
        grads.append((x.grad, params["w"].grad))
    assert len(seen) == 5 and all(torch.equal(ids, seen[0]) for ids in seen)
    assert len(set(seen[0].tolist())) == 12
    assert all(
        torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True)
    )
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.gpu
def test_on_a_gpu():
    """bfloat16 slots, a fused optimizer, graph-free: weights and gradients as on the CPU."""
    placement = Placement(np.array([2, 0, 1, 0, 0, 1]), 1)
    w = nn.Parameter(torch.randn(3, 64, device="cuda"))
    replicas = Replicas(placement, {"w": w}, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([w], fused=True)
    factor = torch.arange(1.0, 7.0, device="cuda")[:, None]
    for _ in range(2):
        (replicas.weights["w"].float() * factor).sum().backward()
        replicas.reduce_grads(async_op=True).wait()
        expected = torch.tensor([2.0 + 4 + 5, 3 + 6, 1], device="cuda")
        torch.testing.assert_close(w.grad, expected[:, None].expand_as(w))
        optimizer.step()
        optimizer.zero_grad()
        replicas.sync_weights(async_op=True).wait()
        slots = w.detach().bfloat16()[placement.phy2log.long().cuda()]
        assert torch.equal(replicas.weights["w"].detach(), slots)
    replicas.move(Placement(np.array([0, 1, 2, 2, 2, 2]), 1), optimizer)
    with replicas.logical_order(optimizer):
        assert torch.equal(replicas.experts, torch.arange(3))
