"""The Python blocks of each page as one program, with the names that the page assumes.

Each function takes the names of the page's program. Those in `BEFORE` add names ahead of the first
block under a heading; those in `AFTER` check names after each block under it.
"""

import gc
import sys
from types import ModuleType, SimpleNamespace

import pages
import torch
import torch.distributed as dist

import lplb_triton
from lplb_triton import Balancer, Placement, Planner, chain, topologies
from lplb_triton.integrations.sglang import LPLBSolver
from lplb_triton.traces.record import Recorder
from lplb_triton.traces.trace import load as load_trace

# These pages are run by two processes over gloo. A stand-in for a module stays in its process.
GROUP_PAGES = (
    "docs/live-weights.md", "docs/nodes.md", "docs/serving.md", "docs/sync.md", "docs/training.md",
)  # fmt: skip


def stand_in(name, **content):
    """Make a module that imports of other programs find."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    vars(sys.modules[name]).update(content)


def are_copies(physical_ids, logical_ids, phy2log):
    """Whether every id is a slot that holds its expert."""
    return torch.equal(phy2log.cpu().long()[physical_ids.cpu().long()], logical_ids.cpu().long())


def balanced_a_batch(names):
    assert int(names["balancer"].certified) == 1
    phy2log = names["placement"].phy2log
    assert are_copies(names["physical_ids"], names["logical_ids"], phy2log)


def improved_a_batch(names):
    balanced_a_batch(names)
    even, loads = names["even"], names["loads"].double()
    assert int(names["loads"].sum()) == 4096 * 4
    assert float(loads.max() / loads.mean()) < float(even.max() / even.mean())


def planned_a_batch(names):
    assert int(names["counter"]) == 1
    assert are_copies(names["physical_ids"], names["logical_ids"], names["phy2log"])


def solved_counts(names):
    assert names["loads"].shape == (1, 32) and int(names["counts"].sum()) == 32768


def script_that_routes(names):
    names["batches"] = range(2)
    names["route"] = lambda batch: torch.randint(names["experts"], (58, 64, 8))
    names["experts"] = 256


def recorded(names):
    if "router" not in names:
        assert load_trace("trace.npz").counts.shape == (2, 58, 1, 256)
        return
    # The hooks of the page record by whatever recorder there is.
    with Recorder("hooks.npz", 256, len(names["routers"])) as names["recorder"]:
        for router in names["routers"]:
            router(torch.randn(64, 4))
        names["recorder"].step()
    assert load_trace("hooks.npz").counts.sum((0, 2, 3)).tolist() == [64, 64]


class Router(torch.nn.Module):
    def forward(self, x):
        return x[:, :1], x.argmax(1, keepdim=True)


def script_with_routers(names):
    script_that_routes(names)
    names["routers"] = [Router(), Router()]


def traced(names):
    torch.manual_seed(0)
    with Recorder("trace.npz", 256, 2) as recorder:
        for _ in range(4):
            for layer in range(2):
                recorder.add(layer, torch.randint(256, (64, 8)))
            recorder.step()
    names["balancer"] = Balancer(chain(torch.rand(256), 32, redundant_per_rank=2))
    names["batches"] = torch.randint(256, (3, 64, 8)).to(names["balancer"].device)


def read_back(names):
    assert names["same"] == names["placement"] == names["layers"][1]
    assert names["second"] == names["new"] == names["layers"][2]


def loaded(names):
    names["history"] = torch.randint(100, (8, 256)).float()


def placed_at_home(names):
    for name in ("placement", "better"):
        at_home = names[name].phy2log.reshape(32, -1)[:, :8].reshape(-1)
        assert at_home.tolist() == list(range(256))


def placed_across_nodes(names):
    hottest = names["by_source"].sum((0, 1)).topk(3).indices
    for name in ("placement", "better"):
        slots = names[name].log2phy[hottest].long()
        # Every one of the four nodes has 80 slots.
        assert all(len(set((row[row >= 0] // 80).tolist())) == 4 for row in slots)


def placed(names):
    names["old"] = chain(names["history"].double().mean(0), 32)
    names["balancer"] = Balancer(names["old"])


def moved(names):
    assert names["balancer"].placement.phy2log.equal(names["new"].phy2log)
    assert names["plan"].expert.shape == names["plan"].target.shape


def layer(names):
    torch.manual_seed(0)
    w_in, w_out = (torch.nn.Parameter(torch.randn(4, 3, 2)) for _ in range(2))
    placement = Placement.from_history(torch.rand(8), 2, redundant_per_rank=2)

    def forward(physical_ids, weights):
        assert are_copies(physical_ids, names["logical_ids"], placement.phy2log)
        names["before"] = w_in.detach().clone()
        return sum((weight**2).sum() for weight in weights.values())

    names.update(
        w_in=w_in, w_out=w_out, forward=forward, logical_ids=torch.randint(8, (10, 2)),
        balancer=Balancer(placement, group=names["ep_group"]),
        optimizer=torch.optim.AdamW([w_in, w_out]),
    )  # fmt: skip


def stepped(names):
    # Every slot of an expert has the gradient 2 w, and is one of its copies.
    placement, experts = names["balancer"].placement, names["replicas"].experts
    copies = placement.logcnt[experts].view(-1, 1, 1)
    torch.testing.assert_close(names["w_in"].grad, 2 * copies * names["before"])
    assert not names["w_in"].equal(names["before"])
    assert names["replicas"].weights["w_in"].shape == (6, 3, 2)


def at_home(names):
    names["moved"] = names["balancer"]
    placement = Placement.from_history(
        torch.arange(1.0, 9), 2, redundant_per_rank=2, keep_home=True
    )
    names["balancer"] = Balancer(placement, group=names["ep_group"])


def stacked(names):
    for slots, own in (("w_slots", "w_in"), ("v_slots", "w_out")):
        assert names[slots].shape == (6, 3, 2) and torch.equal(names[slots][:4], names[own])
    names["w_slots"].sum().backward()
    names["w_in"].grad = None
    names["balancer"].close()
    names["balancer"] = names["moved"]


def quantized(names):
    names["trained"] = names["replicas"]
    bits = torch.randint(256, (4, 3, 2), dtype=torch.uint8)
    names.update(
        placement=names["balancer"].placement, packed=bits, scales=torch.rand(4),
        block_scales=torch.rand(4, 3).to(torch.float8_e4m3fn),
        adapter=torch.nn.Parameter(torch.randn(4, 2)),
    )  # fmt: skip


def of_any_dtype(names):
    weights, replicas = names["weights"], names["replicas"]
    assert weights["adapter"].dtype == torch.bfloat16
    for name in ("packed", "block_scales", "scales"):
        assert weights[names_of_weights[name]].dtype == names[name].dtype
    replicas.close(None)
    names["replicas"] = names["trained"]


names_of_weights = {"packed": "w_in", "block_scales": "w_in_scale", "scales": "w_in_scale_2"}


def new_load(names):
    other = Placement.from_history(torch.rand(8), 2, redundant_per_rank=3)
    names.update(load=torch.rand(8), ep_size=2, other_placement=other)


def new_placement(names):
    used = names["replicas"].placement
    assert used in (names["balancer"].placement, names["other_placement"])


def savers(names):
    def save(model, optimizer):
        first = 4 * dist.get_rank()
        assert names["replicas"].experts.tolist() == list(range(first, first + 4))
        names["saved"] = model, optimizer

    names.update(save=save, model=None)


def saved(names):
    assert names["saved"] == (None, names["optimizer"])


def script_with_eplb(names):
    stand_in("eplb", rebalance_experts=lplb_triton.rebalance_experts)
    names.update(
        load=torch.arange(1.0, 25).view(3, 8), num_replicas=12, num_groups=1, num_nodes=1,
        num_gpus=2,
    )  # fmt: skip


def ids_of_layers(names):
    for number, phy2log in enumerate(names["phy2log"]):
        ids = torch.randint(8, (50, 2))
        assert are_copies(names["physical_ids"](number, ids), ids, phy2log)


def layers_of_a_group(names):
    placement = Placement.from_history(torch.arange(1.0, 9), 2, redundant_per_rank=1)
    names.update(placement=placement, placements=[placement, placement])


def balanced(names):
    assert "distributed" in repr(names["balancer"])
    names["balancer"].close()
    if "layers" in names:
        assert [type(made) for made in names["layers"]] == [Balancer, Balancer]


def a_planner(names):
    names["planner"] = Planner(topologies.ring(2), 34, 32, ep_size=2, device="cpu")
    names["buffer"] = SimpleNamespace(group=names["ep_group"])


def initialised(names):
    assert names["planner"].ep_group is names["ep_group"]
    names["planner"].close()


def fetched_experts(names):
    placement, plan = names["placement"], names["plan"]
    if "expert_of_slot" not in names:
        assert names["imbalance"]["with live slots"] < names["imbalance"]["static copies"]
        # One rank holds all counts here, and rounds its quotas by less than a token a copy.
        assert int(names["loads"].max()) <= float(plan.max_load) + 1
        return
    expert_of_slot = names["expert_of_slot"]
    assert are_copies(names["physical_ids"], names["logical_ids"], expert_of_slot)
    fetched = placement.phy2log[names["source"]]
    assert len(fetched) and torch.equal(fetched, expert_of_slot[names["target"]])


def layer_with_live_slots(names):
    rank, group = dist.get_rank(), names["ep_group"]
    placement = Placement.from_history(torch.ones(8), 2, redundant_per_rank=0, keep_home=True)
    balancer = Balancer(placement.with_live_slots(1), group=group)
    generator = torch.Generator().manual_seed(0)
    w_in, w_out = (torch.randn(8, 3, 3, generator=generator) for _ in range(2))
    hidden = torch.randn(2, 40, 3, generator=generator)
    # Nearly all tokens of both ranks choose experts of rank 0.
    ids = torch.randint(5, (2, 40, 1), generator=generator)
    names.update(whole=(w_in, w_out, hidden, ids))
    w_in, w_out = (torch.nn.Parameter(w[4 * rank : 4 * rank + 4].clone()) for w in (w_in, w_out))

    def dispatch(hidden, physical_ids):
        parts = [torch.empty(2, 40, n) for n in (3, 1)]
        for part, mine in zip(parts, (hidden, physical_ids.float()), strict=True):
            dist.all_gather(list(part), mine, group=group)
        x, slot = parts[0].flatten(0, 1), parts[1].flatten().long()
        here = slot // 5 == rank
        return x[here], slot[here] % 5

    names.update(
        torch=torch, balancer=balancer, w_in=w_in, w_out=w_out, hidden=hidden[rank],
        logical_ids=ids[rank], dispatch=dispatch, combine=lambda y: y.square(),
        optimizer=torch.optim.SGD([w_in, w_out], lr=0.1),
    )  # fmt: skip


def trained_live_slots(names):
    w_in, w_out, hidden, ids = names["whole"]
    assert (names["balancer"].live.experts >= 0).any()
    first, second = (w.clone().requires_grad_() for w in (w_in, w_out))
    chosen = ids.flatten()
    middle = torch.relu(hidden.flatten(0, 1)[:, None] @ first[chosen])
    (middle @ second[chosen]).square().sum().backward()
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    torch.testing.assert_close(names["w_in"].grad, first.grad[mine], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(names["w_out"].grad, second.grad[mine], rtol=1e-4, atol=1e-4)
    names["slots"].close()
    names["balancer"].close()


def vllm(names):
    stand_in("vllm.distributed.eplb.policy", EPLB_POLICIES={"default": None})


def registered(names):
    from lplb_triton.integrations.vllm import LplbEplbPolicy

    names["register"]()
    policies = sys.modules["vllm.distributed.eplb.policy"].EPLB_POLICIES
    assert policies["default"] is LplbEplbPolicy


def engine_with_a_solver(names):
    phy2log = torch.tensor([0, 1, 2, 3, 2, 3])
    log2phy = torch.tensor([[0, -1], [1, -1], [2, 4], [3, 5]])
    num_valid = torch.tensor([1, 1, 2, 2])
    solver = LPLBSolver(phy2log, log2phy, 2, None, num_valid)
    names.update(
        phy2log=phy2log, log2phy=log2phy, num_valid=num_valid, lid=0, lplb_solver=solver,
        get_global_lplb_solver=lambda lid: solver, topk_ids=torch.tensor([[0, 2], [1, 3]]),
        num_token_non_padded=None, _mask_topk_ids_padded_region=lambda ids, valid: None,
    )  # fmt: skip


def solved(names):
    assert names["lplb_solver"].balancer.placement.phy2log.equal(names["phy2log"].int())
    assert int(names["topk_ids"].max()) < 6


def nearer(names):
    traffic = names["traffic"]
    assert 0 < float(traffic.after) <= float(traffic.before) <= float(traffic.total)
    physical_ids, placement = names["physical_ids"], names["placement"]
    assert are_copies(physical_ids, names["logical_ids"], placement.phy2log)


BEFORE = {
    ("docs/placement.md", "Loads"): traced,
    ("docs/live-weights.md", "A script"): layer_with_live_slots,
    ("docs/placement.md", "Experts at home"): loaded,
    ("docs/placement.md", "Moves"): placed,
    ("docs/serving.md", "vLLM"): vllm,
    ("docs/serving.md", "SGLang: the solver"): engine_with_a_solver,
    ("docs/sync.md", "Load sync"): layers_of_a_group,
    ("docs/sync.md", "With DeepEP"): a_planner,
    ("docs/traces.md", "From your script to a report"): script_with_routers,
    ("docs/training.md", "Training"): layer,
    ("docs/training.md", "Experts that stay at home: `spread`"): at_home,
    ("docs/training.md", "Frozen and quantized weights"): quantized,
    ("docs/training.md", "A new placement"): new_load,
    ("docs/training.md", "Checkpoints"): savers,
    ("docs/training.md", "In a script that uses EPLB"): script_with_eplb,
}
AFTER = {
    ("README.md", "lplb_triton"): balanced_a_batch,
    ("docs/live-weights.md", "A script"): trained_live_slots,
    ("docs/live.md", "A script"): fetched_experts,
    ("docs/live.md", "The weights"): fetched_experts,
    ("docs/nodes.md", "Across nodes: tokens that stay near"): nearer,
    ("docs/placement.md", "Files"): read_back,
    ("docs/placement.md", "Experts at home"): placed_at_home,
    ("docs/placement.md", "Moves"): moved,
    ("docs/placement.md", "Across nodes"): placed_across_nodes,
    ("docs/quickstart.md", "A first script"): improved_a_batch,
    ("docs/quickstart.md", "A script that uses EPLB or LPLB"): planned_a_batch,
    ("docs/quickstart.md", "The linear program alone"): solved_counts,
    ("docs/serving.md", "vLLM"): registered,
    ("docs/serving.md", "SGLang: the solver"): solved,
    ("docs/sync.md", "Load sync"): balanced,
    ("docs/sync.md", "With DeepEP"): initialised,
    ("docs/traces.md", "From your script to a report"): recorded,
    ("docs/training.md", "Training"): stepped,
    ("docs/training.md", "Experts that stay at home: `spread`"): stacked,
    ("docs/training.md", "Frozen and quantized weights"): of_any_dtype,
    ("docs/training.md", "A new placement"): new_placement,
    ("docs/training.md", "Checkpoints"): saved,
    ("docs/training.md", "In a script that uses EPLB"): ids_of_layers,
}


def run_page(page, group=None):
    """Run a page's Python blocks one after the other, as one program."""
    names, heading = {"ep_group": group}, None
    for block in pages.in_language(page, "python"):
        key = page, block.heading
        if block.heading != heading and key in BEFORE:
            BEFORE[key](names)
        heading = block.heading
        if block.not_run is None:
            # The traceback of an error shows the line of the page.
            exec(compile("\n" * block.line + block.text, str(pages.ROOT / page), "exec"), names)
            if key in AFTER:
                AFTER[key](names)


def check_pages(rank, group):
    for page in GROUP_PAGES:
        run_page(page, group)
        gc.collect()
