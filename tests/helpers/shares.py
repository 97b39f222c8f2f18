"""Cumulative shares of copies, drawn at random."""

import numpy as np
import torch

# Units of a whole share.
ONE = 1 << 24


def structure_tensors(placement):
    """Return the arrays of a placement's structure as tensors, by name."""
    s = placement.structure
    return {name: torch.tensor(getattr(s, name)) for name in s._fields}


def random_cumulative(rng, placement):
    """Cumulative shares of arbitrary plans, some copies with nothing, some with everything."""
    t = structure_tensors(placement)
    out = []
    for length in t["copy_start"].diff().tolist():
        part = rng.dirichlet(np.full(length, rng.choice([0.05, 1.0])))
        part[rng.random(length) < 0.2] = 0
        part = part / part.sum() if part.sum() > 0 else np.eye(length)[0]
        units = np.floor(np.cumsum(part) * ONE).astype(np.int64)
        units[-1] = ONE
        out.append(units)
    return torch.from_numpy(np.minimum(np.concatenate(out), ONE)).int()
