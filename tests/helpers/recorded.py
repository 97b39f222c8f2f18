"""Ids for a recorder, and what it should count of them."""

import numpy as np
import torch


def draw(batches, layers, experts, seed=0):
    """Draw ids [batches, layers, 16 tokens, 2], -1 for dropped ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, experts, (batches, layers, 16, 2), generator=generator)


def feed(recorder, ids):
    """Record ids batch by batch and layer by layer."""
    for batch in ids:
        for layer, topk in enumerate(batch):
            recorder.add(layer, topk)
        recorder.step()


def counted(ids, experts):
    """Return how many ids [batches, layers, experts] each expert has."""
    flat = ids.reshape(*ids.shape[:2], -1)
    return np.stack([(flat == e).sum(2).numpy() for e in range(experts)], axis=-1)
