"""Random maps and ids for solvers with SGLang's interface."""

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_maps(seed, ranks, slots, experts):
    """Any placement: several copies, several on one rank; rows and padding in random order."""
    rng = np.random.default_rng(seed)
    n_physical = ranks * slots
    hot = rng.integers(0, experts, max(1, experts // 3))
    extra = rng.choice(np.concatenate([hot, np.arange(experts)]), n_physical - experts)
    phy2log = rng.permutation(np.concatenate([np.arange(experts), extra]))
    width = int(np.bincount(phy2log).max()) + int(rng.integers(0, 3))
    log2phy = np.full((experts, width), -1)
    for expert in range(experts):
        found = rng.permutation(np.flatnonzero(phy2log == expert))
        log2phy[expert, rng.permutation(width)[: len(found)]] = found
    return torch.from_numpy(phy2log).to(DEVICE), torch.from_numpy(log2phy).to(DEVICE)


def random_ids(seed, tokens, experts, top_k=4):
    rng = np.random.default_rng(seed)
    ids = (rng.random((tokens, top_k)) ** 3 * (experts + 1)).astype(np.int32) - 1
    return torch.from_numpy(ids).to(DEVICE)


def padded(rows, width=24):
    return torch.nn.functional.pad(rows, (0, width - rows.shape[-1]), value=-1)
