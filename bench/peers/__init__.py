"""Other ways to balance a batch, for comparison; each is written from its published description.

None shares code with the library. Two solve the same programs as the solve kernel. They take
columns with copies on exactly two ranks, as the fixed topologies have them, and return the part of
every column that its first copy takes (the copy on the lower rank).

``AffineScaling``
    What DeepSeek's LPLB does: a few steps of primal affine scaling on the dense standard form
    of the program, from a Big-M start. No bound, so no certificate. Better than there: the step
    is as long as the largest entry of the whole direction allows, and the direction is projected
    twice, without which float32 makes many answers infeasible.
``EdgeBalancing``
    Coloured edge balancing: the two ranks of every column even out their loads, one colour of
    the columns after the other, sweep by sweep. No bound either; how many sweeps are enough
    has to be known beforehand.

One chooses replicas for a batch, as live slots do:

``plan_replicas``
    UltraEP's planner: ranks above a largest load send and ranks below it receive, and a search
    finds the smallest load for which that succeeds.
"""

from lplb_triton.bench.peers.affine_scaling import BIG_M, AffineScaling
from lplb_triton.bench.peers.edge_balancing import EdgeBalancing
from lplb_triton.bench.peers.pairs import color_edges, find_copy_ranks
from lplb_triton.bench.peers.receivers import Replica, ReplicaPlan, plan_replicas

__all__ = [
    "BIG_M",
    "AffineScaling",
    "EdgeBalancing",
    "Replica",
    "ReplicaPlan",
    "color_edges",
    "find_copy_ranks",
    "plan_replicas",
]
