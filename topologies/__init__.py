"""Fixed replication topologies: which rank of a group holds copies of which rank's experts.

A topology is an integer matrix `r2o` (redundant to original) of shape
``[group_size, num_redundants]``: the ``d``-th redundant slot of rank ``i`` holds a copy of the
``d``-th replicated expert of rank ``r2o[i, d]``. Each column is a permutation of the ranks in
which no rank maps to itself. Every copy is an edge over which rank ``r2o[i, d]`` can pass tokens
to rank ``i``, so the graph of these edges says how far the load of one rank can spread.

Any matrix with that property works everywhere in the package; :func:`validate` checks it. The
builders give the usual ones:

>>> from lplb_triton import topologies
>>> topologies.ring(4).tolist()
[[1], [2], [3], [0]]
>>> print(topologies.summary(topologies.from_name("torus:2x4")))
8 ranks, 2 redundant slots per rank, 12 edges (4 multiple), degree 3..3, diameter 3, connected

(in a ring of two, both ranks hold a copy from the other: one edge with two copies). :func:`draw`
gives a picture and the figures that matter for choosing one.
"""

from ._builders import available, cube, from_name, hypercube, ring, torus
from ._describe import draw, summary
from ._validate import inverse, validate

__all__ = [
    "available",
    "cube",
    "draw",
    "from_name",
    "hypercube",
    "inverse",
    "ring",
    "summary",
    "torus",
    "validate",
]
