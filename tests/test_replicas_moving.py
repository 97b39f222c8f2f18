"""What moves with experts: each memory once, every dtype, under any settings of the caller."""

from contextlib import contextmanager

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from hypothesis import given, settings
from torch import nn

from lplb_triton import Placement, Replicas
from lplb_triton.training.memory import keep_distinct

EXPERTS, RANKS, OWN = 8, 2, 4
FIRST = Placement(np.array([0, 1, 2, 3, 6, 4, 5, 6, 7, 0]), RANKS)
SECOND = Placement(np.array([6, 1, 4, 3, 0, 5, 2, 7, 0, 6]), RANKS)
DTYPES = ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2", "uint8", "int8"]
DTYPES += ["bool", "int64", "complex64", "complex128", "float16", "float64"]


def table(*shape, seed=0):
    """[EXPERTS, *shape], every row another one."""
    return torch.rand((EXPERTS, *shape), generator=torch.Generator().manual_seed(seed)) + 0.5


def mine(whole, rank):
    """Own rows of a table of all experts, in logical order."""
    return whole[rank * OWN : (rank + 1) * OWN].clone()


def random_bytes(dtype, *shape):
    """[EXPERTS, *shape] of any dtype, any bytes (a bool has 0 and 1)."""
    dtype = getattr(torch, dtype)
    high = 2 if dtype == torch.bool else 256
    n = EXPERTS * int(np.prod(shape)) * dtype.itemsize
    raw = torch.from_numpy(np.random.default_rng(3).integers(high, size=n).astype(np.uint8))
    return raw.view(EXPERTS, -1).view(dtype).view(EXPERTS, *shape)


def same_bytes(one, other):
    return torch.equal(
        one.detach().contiguous().view(-1).view(torch.uint8),
        other.detach().contiguous().view(-1).view(torch.uint8),
    )


def check_aliases(rank, group):
    """Whatever names and views a tensor is given under, it follows the experts once."""
    whole = table(3)
    w = nn.Parameter(mine(whole, rank))
    replicas = Replicas(FIRST, {"a": w, "b": w}, group=group)
    factor = (1 + FIRST.phy2log.view(RANKS, -1)[rank])[:, None]
    weights = replicas.weights
    ((weights["a"] + 3 * weights["b"]) * factor).sum().backward()
    replicas.reduce_grads()
    # Both names' gradients, each once.
    gradient = (4.0 * (1 + torch.arange(EXPERTS)) * FIRST.logcnt)[:, None].expand(-1, 3)
    assert torch.equal(w.grad, gradient[replicas.experts])
    one, two = torch.optim.AdamW([w]), torch.optim.SGD([w], momentum=0.9)
    moments = table(3, seed=1)
    one.state[w] = {"step": torch.tensor(1.0), "exp_avg": moments[replicas.experts]}
    two.state[w] = one.state[w]
    ids = replicas.experts
    also = {
        "alias": w.data,
        "view": w.detach().view(OWN, 3, 1),
        "list": [row.detach() for row in w],
        "grad": w.grad,
        "moments": one.state[w]["exp_avg"].view(OWN, 3),
        "ids": ids,
    }
    for placement in (SECOND, FIRST, SECOND):
        replicas.move(placement, [one, two], also=also)
        assert torch.equal(ids, replicas.experts)
        assert torch.equal(w.detach(), whole[ids])
        assert torch.equal(w.grad, gradient[ids])
        assert torch.equal(one.state[w]["exp_avg"], moments[ids])
        slots = whole[placement.phy2log.view(RANKS, -1)[rank].long()]
        assert torch.equal(replicas.weights["a"].detach(), slots)
        assert torch.equal(replicas.weights["b"].detach(), slots)
    # Rank 1 alone gives an alias: then the ranks would not send the same things.
    other = w.data if rank else torch.zeros(OWN, 3)
    with pytest.raises(ValueError, match=r"also\['x'\] must be the same on all ranks"):
        replicas.move(FIRST, [one, two], also={"x": other})
    block = torch.zeros(OWN + 1, 2)
    with pytest.raises(ValueError, match=r"also\['x'\] and also\['y'\] share memory"):
        replicas.move(FIRST, [one, two], also={"x": block[:-1], "y": block[1:]})
    with replicas.logical_order([one, two], also=also):
        assert torch.equal(w.detach(), mine(whole, rank))
        assert torch.equal(one.state[w]["exp_avg"], mine(moments, rank))
    assert torch.equal(ids, replicas.experts)
    assert torch.equal(w.detach(), whole[ids])


def check_frozen(rank, group):
    """Weights that aren't trained, of any dtype and layout, with their scales."""
    columns, fast = table(4, 6, seed=2), table(5, seed=3)
    block = mine(columns, rank)
    whole = {name: random_bytes(name, 3, 4) for name in DTYPES if hasattr(torch, name)}
    whole |= {"scale": table(1, 2), "left": columns[..., :2], "right": columns[..., 2:]}
    whole |= {"fast": fast, "number": table(), "experts": table(2, 2), "none": table(0)}
    params = {name: mine(value, rank) for name, value in whole.items()}
    params |= {"left": block[..., :2], "right": block[..., 2:]}
    params["fast"] = mine(fast, rank).t().contiguous().t()
    params["experts"] = list(params["experts"])
    trained = whole["trained"] = table(2, seed=4)
    params["trained"] = nn.Parameter(mine(trained, rank))
    if rank:  # the order of names must not matter
        params = dict(reversed(params.items()))
    replicas = Replicas(FIRST, params, group=group, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([params["trained"]])
    for placement in (FIRST, SECOND, FIRST, SECOND):
        if placement is not replicas.placement:
            replicas.move(placement, optimizer)
        slots = placement.phy2log.view(RANKS, -1)[rank].long()
        for name, value in whole.items():
            rows, weight = params[name], replicas.weights[name]
            rows = torch.stack(rows) if isinstance(rows, list) else rows
            bits = value.view(torch.uint8) if value.element_size() == 1 else value
            expected = bits[replicas.experts].view(value.dtype)
            assert same_bytes(rows, expected), name
            if name == "trained":
                assert torch.equal(weight.detach(), value[slots].bfloat16())
                continue
            assert weight.dtype == value.dtype and not weight.requires_grad
            assert same_bytes(weight, bits[slots].view(value.dtype)), name
        replicas.weights["trained"].sum().backward()
        replicas.reduce_grads()
        optimizer.step()
        with torch.no_grad():
            params["trained"].copy_(trained[replicas.experts])
        replicas.sync_weights()
    with replicas.logical_order(optimizer):
        assert same_bytes(params["uint8"], mine(whole["uint8"], rank))
    replicas.close(optimizer)
    assert same_bytes(params["scale"], mine(whole["scale"], rank))
    with pytest.raises(RuntimeError, match="closed"):
        _ = replicas.weights
    replicas = Replicas(SECOND, {"scale": params["scale"]}, group=group)
    assert torch.equal(params["scale"], whole["scale"][replicas.experts])
    del replicas
    with pytest.raises(ValueError, match=r"params\['x'\] is not in logical order"):
        Replicas(SECOND, {"x": params["scale"]}, group=group)


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SETTINGS = {
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "default dtype": default_dtype,
}


def check_settings(rank, group):
    """The caller's modes change nothing of what is computed, and leave no tensors unusable."""
    results = {}
    for name in ("none", *SETTINGS):
        w, frozen = nn.Parameter(mine(table(3), rank)), mine(table(2), rank)
        optimizer = torch.optim.AdamW([w], lr=0.1)
        mode = SETTINGS.get(name, torch.enable_grad)
        with mode():
            replicas = Replicas(FIRST, {"w": w, "frozen": frozen}, group=group)
        for placement in (SECOND, FIRST):
            replicas.weights["w"].square().sum().backward()
            with mode():
                replicas.reduce_grads(async_op=True).wait()
            optimizer.step()
            optimizer.zero_grad()
            with mode():
                replicas.sync_weights(async_op=True).wait()
                replicas.move(placement, optimizer)
                with replicas.logical_order(optimizer):
                    pass
        results[name] = [w.detach(), frozen, *(t.detach() for t in replicas.weights.values())]
        assert not any(t.is_inference() for t in (w, frozen, *replicas.weights.values())), name
    for name, result in results.items():
        assert all(torch.equal(a, b) for a, b in zip(results["none"], result, strict=True)), name


def check_inference_tensors(rank, group):
    """Frozen weights that were loaded under inference mode are moved too."""
    with torch.inference_mode():
        scale = mine(table(2), rank)
    replicas = Replicas(SECOND, {"scale": scale}, group=group)
    replicas.move(FIRST, None)
    assert torch.equal(scale, table(2)[replicas.experts])
    slots = FIRST.phy2log.view(RANKS, -1)[rank].long()
    assert torch.equal(replicas.weights["scale"], table(2)[slots])


def check_stale_state(rank, group):
    """An optimizer that has stepped must be given, or its moments would stay behind."""
    w = nn.Parameter(mine(table(3), rank))
    replicas = Replicas(FIRST, {"w": w}, group=group)
    optimizer = torch.optim.AdamW([w])
    replicas.weights["w"].sum().backward()
    replicas.reduce_grads()
    optimizer.step()
    replicas.sync_weights()
    with pytest.raises(ValueError, match=r"optimizer must include the AdamW.*params\['w'\]"):
        replicas.move(SECOND, None)
    fresh = torch.optim.AdamW([w])
    with pytest.raises(ValueError, match=r"optimizer must include the AdamW.*params\['w'\]"):
        replicas.move(SECOND, fresh)
    replicas.move(SECOND, [fresh, optimizer])
    del optimizer
    replicas.move(FIRST, fresh)


def check_groups(rank, group):
    """A group that this rank isn't in, and one of ranks that hold other originals."""
    alone = [dist.new_group([r]) for r in range(RANKS)]
    single = Placement(np.array([0, 1, 1]), 1)
    w = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match="^group must contain this rank"):
        Replicas(single, {"w": w}, group=alone[1 - rank])
    with pytest.raises(ValueError, match="data_parallel_group must contain this rank"):
        Replicas(single, {"w": w}, data_parallel_group=alone[1 - rank])
    with pytest.raises(ValueError, match="give group="):
        Replicas(FIRST, {"w": w})
    own = mine(table(), rank)
    with pytest.raises(ValueError, match="the rank in group must be the same.*data_parallel_group"):
        Replicas(FIRST, {"w": own}, group=group, data_parallel_group=group)
    with pytest.raises(ValueError, match="ep_size, 1, got 2"):
        Replicas(FIRST, {"w": w}, group=alone[rank])
    Replicas(single, {"w": w}, group=alone[rank], data_parallel_group=group)


def check_all(rank, group):
    for check in (
        check_aliases, check_frozen, check_settings, check_inference_tensors, check_stale_state,
        check_groups,
    ):  # fmt: skip
        try:
            check(rank, group)
        except BaseException as error:
            raise RuntimeError(f"{check.__name__} failed on rank {rank}") from error
        dist.barrier()


def test_two_ranks_over_gloo(tmp_path):
    """On two ranks every tensor, alias and state of an expert moves with it once."""
    run_ranks(check_all, RANKS, tmp_path)


@pytest.mark.multigpu
def test_two_ranks_over_nccl(tmp_path):
    """Weights of every dtype move over NCCL bit for bit, with a list of trained tensors."""
    run_ranks(check_on_gpus, RANKS, tmp_path)


def check_on_gpus(rank, _):
    """Every dtype over NCCL; optimizer state in a list whose steps are counted on the CPU."""
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    whole = {name: random_bytes(name, 3, 4) for name in DTYPES if hasattr(torch, name)}
    params = {name: mine(value, rank).cuda() for name, value in whole.items()}
    trained = [nn.Parameter(row) for row in mine(table(3), rank).cuda()]
    replicas = Replicas(FIRST, {**params, "trained": trained}, group=group)
    optimizer = torch.optim.AdamW(trained, lr=0)
    for placement in (SECOND, FIRST):
        replicas.weights["trained"].sum().backward()
        replicas.reduce_grads()
        optimizer.step()
        replicas.sync_weights()
        replicas.move(placement, optimizer)
        slots = placement.phy2log.view(RANKS, -1)[rank].long()
        for name, value in whole.items():
            bits = value.view(torch.uint8) if value.element_size() == 1 else value
            assert same_bytes(params[name].cpu(), bits[replicas.experts].view(value.dtype)), name
            assert same_bytes(replicas.weights[name].cpu(), bits[slots].view(value.dtype)), name
    replicas.close(optimizer)
    dist.destroy_process_group(group)


def bytes_of(tensor):
    """Addresses of a tensor's bytes."""
    places = {0}
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        step = stride * tensor.element_size()
        places = {place + i * step for place in places for i in range(size)}
    return {tensor.data_ptr() + p + i for p in places for i in range(tensor.element_size())}


@st.composite
def views(draw):
    """A view of some of a buffer of 96 bytes: 2 rows, in 1 to 3 dimensions."""
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32]))
    shape = [2, *draw(st.lists(st.integers(1, 3), max_size=2))]
    strides = [draw(st.integers(1, 9)) for _ in shape]
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    last = 96 // dtype.itemsize - span
    return dtype, shape, strides, draw(st.integers(0, max(last, 0))), last >= 0


@settings(max_examples=300)
@given(views(), views())
def test_shared_memory_is_found(one, two):
    """Against sets of addresses, byte by byte."""
    if not (one[-1] and two[-1]):
        return
    buffer = torch.zeros(96, dtype=torch.uint8)
    a, b = (buffer.view(d).as_strided(n, s, o) for d, n, s, o, _ in (one, two))
    (a0, a1), (b0, b1) = ([bytes_of(row) for row in view] for view in (a, b))
    same = a.stride() == b.stride() and a.shape == b.shape and a.dtype == b.dtype
    same = same and a.data_ptr() == b.data_ptr()
    apart = not (a0 & a1 or b0 & b1 or (a0 | a1) & (b0 | b1))
    try:
        kept, same_as = keep_distinct({"a": a, "b": b})
    except ValueError as error:
        assert not apart
        assert any(word in str(error) for word in ("a and b", "b and a", "a must", "b must"))
        return
    if same_as:
        assert same_as == {"b": "a"} and list(kept) == ["a"]
        assert a0 == b0 and a1 == b1 and not a0 & a1
    else:
        assert apart and list(kept) == ["a", "b"]
        assert not same


def test_rows_in_another_order_are_refused():
    """Tensors that share memory are merged if their rows agree, and refused otherwise."""
    w = torch.zeros(4, 3)
    kept, same_as = keep_distinct({"w": w, "rows": list(w), "view": w.view(4, 1, 3)})
    assert list(kept) == ["w"] and same_as == {"rows": "w", "view": "w"}
    with pytest.raises(ValueError, match="^r and w share memory without|^w and r share memory"):
        keep_distinct({"w": w, "r": list(w)[::-1]})
    with pytest.raises(ValueError, match="share memory"):
        keep_distinct({"w": w, "r": [*list(w)[:3], torch.zeros(3)]})
    with pytest.raises(ValueError, match="^r must hold memory of its own for each expert"):
        keep_distinct({"r": [w[0], w[1], w[0]]})
