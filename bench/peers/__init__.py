"""Two other ways to solve the same programs, for comparison with the solve kernel.

Both are written here from the published descriptions and share no code with the library's
solvers. Both take columns with copies on exactly two ranks, as the fixed topologies have them, and
return the part of every column that its first copy takes (the copy on the lower rank).

``AffineScaling``
    What DeepSeek's LPLB does: a few steps of primal affine scaling on the dense standard form
    of the program, from a Big-M start. No bound, so no certificate. Better than there: the step
    is as long as the largest entry of the whole direction allows, and the direction is projected
    twice, without which float32 makes many answers infeasible.
``EdgeBalancing``
    Coloured edge balancing: the two ranks of every column even out their loads, one colour of
    the columns after the other, sweep by sweep. No bound either; how many sweeps are enough
    has to be known beforehand.
"""

from lplb_triton.bench.peers.affine_scaling import BIG_M, AffineScaling
from lplb_triton.bench.peers.edge_balancing import EdgeBalancing
from lplb_triton.bench.peers.pairs import color_edges, find_copy_ranks

__all__ = [
    "BIG_M",
    "AffineScaling",
    "EdgeBalancing",
    "color_edges",
    "find_copy_ranks",
]
