"""Balance one batch of an MoE layer from a history of loads: ``python examples/quickstart.py``."""

import torch

from lplb_triton import Balancer, Placement

EXPERTS, RANKS, TOP_K, TOKENS = 64, 8, 4, 4096


def draw_ids(load: torch.Tensor) -> torch.Tensor:
    """Draw int64 [TOKENS, TOP_K] logical expert ids, distinct in each row."""
    return torch.multinomial(load.expand(TOKENS, -1), TOP_K)


def measure_imbalance(ids: torch.Tensor, slots: int) -> float:
    """Return the largest over the mean rank load when ``slots`` lie in order over the ranks."""
    loads = torch.bincount(ids.flatten().cpu(), minlength=slots).view(RANKS, -1).sum(1).double()
    return float(loads.max() / loads.mean())


torch.manual_seed(0)
# The history counts tokens per logical expert; a few experts are hot.
history = torch.randn(EXPERTS).exp()
# EPLB decides which experts get a second copy and on which rank each copy lies.
placement = Placement.from_history(history, RANKS, redundant_per_rank=1)
balancer = Balancer(placement)  # on the GPU where there is one, else on the CPU

# The batch differs from the history, as batches do.
logical_ids = draw_ids(history * torch.randn(EXPERTS).mul(0.3).exp()).to(balancer.device)
physical_ids = balancer.run(logical_ids)  # every id becomes the slot of one of its copies

print(f"first token: experts {logical_ids[0].tolist()} -> slots {physical_ids[0].tolist()}")
counts = torch.bincount(logical_ids.flatten().cpu(), minlength=EXPERTS)
even = placement.even_loads(counts)[0]  # rank loads if an expert's copies share its tokens evenly
print(f"imbalance before: {measure_imbalance(logical_ids, EXPERTS):.3f}, without copies")
print(f"imbalance, even split: {float(even.max() / even.mean()):.3f}")
print(f"imbalance after:  {measure_imbalance(physical_ids, placement.n_physical):.3f}, by the LP")
