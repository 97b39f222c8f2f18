"""Masks of which ranks hold a column, for tests of the torch twins."""

import numpy as np
import torch

DOUBLE = torch.float64
# Relative error of HiGHS.
SLACK = 1e-7


def hold(ranks, sets):
    """Mask [1, ranks, len(sets)] of columns that lie on these sets of ranks."""
    mask = np.zeros((1, ranks, len(sets)), dtype=np.bool_)
    for column, held in enumerate(sets):
        mask[0, list(held), column] = True
    return mask


def draw_sets(rng, ranks, n, fewest, most):
    """Draw n sets of ``fewest`` to ``most`` ranks out of a list of ranks."""
    sizes = rng.integers(fewest, most + 1, n)
    return [rng.choice(ranks, size, replace=False) for size in sizes]


def draw_mask(shape, rng):
    """Mask [1, G, C] of a named shape."""
    if shape == "pairs":
        return hold(16, draw_sets(rng, 16, 32, 2, 2))
    if shape == "path":
        return hold(33, [(i, i + 1) for i in range(32)])
    if shape == "few copies":
        return hold(16, draw_sets(rng, 16, 24, 1, 4))
    if shape == "2 to 60 copies":
        return hold(64, draw_sets(rng, 64, 40, 2, 60))
    if shape == "5 to 60 copies":
        return hold(61, draw_sets(rng, 61, 6, 5, 60))
    if shape == "disconnected":
        # The last rank holds nothing.
        parts = draw_sets(rng, np.arange(7), 9, 2, 3), draw_sets(rng, np.arange(7, 18), 12, 2, 6)
        return hold(19, sum(parts, []))
    if shape == "one column":
        return hold(5, [(0, 2, 4)])
    if shape == "one copy each":
        return hold(4, [(0,), (1,), (1,), (3,)])
    if shape == "one rank":
        return hold(1, [(0,), (0,)])
    assert shape == "no columns"
    return hold(6, [])


SHAPES = (
    "pairs",
    "path",
    "few copies",
    "2 to 60 copies",
    "5 to 60 copies",
    "disconnected",
    "one column",
    "one copy each",
    "one rank",
    "no columns",
)
