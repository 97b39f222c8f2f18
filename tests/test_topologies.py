"""lplb_triton.topologies: builders, validation, names, figures and drawings."""

from __future__ import annotations

import doctest
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplb_triton import topologies

NAMES = ["ring:2", "ring:3", "ring:8", "cube", "hypercube", "torus:2x2", "torus:2x4", "torus:4x8"]


@st.composite
def derangements(draw: st.DrawFn) -> torch.Tensor:
    """Draw an r2o matrix: every column a random permutation without fixed point."""
    size = draw(st.integers(2, 14))
    columns = []
    for _ in range(draw(st.integers(1, 4))):
        # Rotating any partition into runs of at least two ranks gives every derangement.
        order = draw(st.permutations(range(size)))
        column = [-1] * size
        while order:
            left = len(order)
            length = draw(st.sampled_from([n for n in range(2, left + 1) if left - n != 1]))
            ring, order = order[:length], order[length:]
            for rank, source in zip(ring, ring[1:] + ring[:1], strict=True):
                column[rank] = source
        columns.append(column)
    return torch.tensor(columns).T


def neighbours(r2o: torch.Tensor) -> list[set[int]]:
    result: list[set[int]] = [set() for _ in range(len(r2o))]
    for rank, sources in enumerate(r2o.tolist()):
        for source in sources:
            result[rank].add(source)
            result[source].add(rank)
    return result


def floyd_warshall(r2o: torch.Tensor, directed: bool = False) -> torch.Tensor:
    """Give steps between ranks; infinite where there is no path."""
    size = len(r2o)
    steps = torch.full((size, size), torch.inf)
    steps.fill_diagonal_(0)
    for rank, sources in enumerate(r2o.tolist()):
        for source in sources:
            steps[source, rank] = 1
            if not directed:
                steps[rank, source] = 1
    for via in range(size):
        steps = torch.minimum(steps, steps[:, via : via + 1] + steps[via])
    return steps


@pytest.mark.parametrize("n", [2, 3, 5, 8, 16])
def test_ring(n: int) -> None:
    """Each rank of a ring copies from the next one."""
    r2o = topologies.ring(n)
    assert r2o.dtype == torch.int32 and r2o.is_contiguous()
    assert r2o.tolist() == [[(i + 1) % n] for i in range(n)]


def test_published_matrices() -> None:
    """Cube and hypercube are the published matrices."""
    # https://github.com/deepseek-ai/LPLB, README.md and tests/utils.py
    assert topologies.cube().T.tolist() == [[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]
    assert topologies.hypercube().T.tolist() == [
        [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14],
        [12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    ]
    assert torch.equal(topologies.cube(8), topologies.cube())
    assert torch.equal(topologies.hypercube(16), topologies.hypercube())


def test_cube_has_the_edges_of_a_cube_and_its_diagonals() -> None:
    """The cube joins every rank of one half to every rank of the other."""
    # Corners of a 3-cube, two ring positions of opposite corners apart by a diagonal: as a graph
    # it is bipartite with every rank of one half joined to every rank of the other.
    around = neighbours(topologies.cube())
    halves = around[0], around[1]
    assert halves[0] | halves[1] == set(range(8)) and not halves[0] & halves[1]
    assert all(around[rank] == halves[rank not in halves[1]] for rank in range(8))


def test_hypercube_is_a_four_cube() -> None:
    """Neighbours in the hypercube differ in one bit of their Gray code."""
    # Ranks (i, j) of the 4 x 4 grid in Gray code: neighbours differ in exactly one bit.
    gray = [0, 1, 3, 2]
    code = [gray[rank // 4] * 4 + gray[rank % 4] for rank in range(16)]
    for rank, others in enumerate(neighbours(topologies.hypercube())):
        assert len(others) == 4
        assert all((code[rank] ^ code[other]).bit_count() == 1 for other in others)


@pytest.mark.parametrize(("m", "n"), [(2, 2), (2, 5), (4, 8), (3, 3), (8, 2)])
def test_torus(m: int, n: int) -> None:
    """Each rank of a torus copies from the next one in its column and in its row."""
    r2o = topologies.torus(m, n)
    assert r2o.dtype == torch.int32 and r2o.is_contiguous()
    for i in range(m):
        for j in range(n):
            assert r2o[i * n + j].tolist() == [((i + 1) % m) * n + j, i * n + (j + 1) % n]


@pytest.mark.parametrize("name", NAMES)
def test_built_topologies_are_valid(name: str) -> None:
    """Every topology that can be named is valid as it is."""
    r2o = topologies.from_name(name)
    assert torch.equal(topologies.validate(r2o), r2o)


@pytest.mark.parametrize(
    ("builder", "sizes", "error", "message"),
    [
        ("ring", (1,), ValueError, "^n must be at least 2, got 1"),
        ("ring", (2.5,), TypeError, "^n must be an int, got float"),
        ("cube", (16,), ValueError, "^n must be 8 for a cube, got 16"),
        ("hypercube", (8,), ValueError, "^n must be 16 for a hypercube, got 8"),
        ("torus", (1, 4), ValueError, "^m must be at least 2, got 1"),
        ("torus", (4, 0), ValueError, "^n must be at least 2, got 0"),
        ("torus", ("4", 4), TypeError, "^m must be an int, got str"),
    ],
)
def test_builder_errors(
    builder: str, sizes: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    """A wrong size is refused by the name of the builder's argument."""
    with pytest.raises(error, match=message):
        getattr(topologies, builder)(*sizes)


def test_validate_returns_an_independent_canonical_copy() -> None:
    """A validated matrix is a contiguous int32 copy on the CPU."""
    r2o = topologies.cube()
    checked = topologies.validate(r2o)
    checked[0, 0] = 99
    assert r2o[0, 0] == 3
    transposed = torch.tensor([[1, 2, 0], [2, 0, 1]], dtype=torch.int64).T
    checked = topologies.validate(transposed)
    assert checked.dtype == torch.int32 and checked.is_contiguous()
    assert checked.device.type == "cpu"
    assert checked.tolist() == transposed.tolist()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "uint64"])
def test_validate_accepts_integer_tensors_and_arrays(dtype: str) -> None:
    """Tensors and read-only arrays of any integer dtype are valid."""
    values = topologies.cube().tolist()
    array = np.array(values, dtype=dtype)
    array.flags.writeable = False
    assert topologies.validate(array).tolist() == values
    assert topologies.validate(torch.tensor(values, dtype=getattr(torch, dtype))).tolist() == values


@pytest.mark.parametrize(
    ("r2o", "error", "message"),
    [
        ([[1], [0]], TypeError, "^r2o must be a tensor or an array, got list"),
        (None, TypeError, "^r2o must be a tensor or an array, got NoneType"),
        (torch.tensor([[1.0], [0.0]]), TypeError, r"^r2o .* integer dtype, got torch\.float32"),
        (torch.tensor([[True], [False]]), TypeError, r"^r2o .* integer dtype, got torch\.bool"),
        (np.array([["1"], ["0"]]), TypeError, "^r2o must have an integer dtype"),
        (torch.tensor([1, 0]), ValueError, r"^r2o must have 2 dimensions .* shape \[2\]"),
        (torch.zeros(2, 1, 1).int(), ValueError, r"^r2o must have 2 dimensions .* got 3"),
        (torch.zeros(0, 1).int(), ValueError, r"^r2o must have at least one .* \[0, 1\]"),
        (torch.zeros(4, 0).int(), ValueError, r"^r2o must have at least one .* \[4, 0\]"),
        (
            torch.tensor([[1, 1], [0, 2]]),
            ValueError,
            r"^r2o column 1 must hold ranks 0\.\.1, got 2 for rank 1",
        ),
        (
            torch.tensor([[-1], [0]]),
            ValueError,
            r"^r2o column 0 must hold ranks 0\.\.1, got -1 for rank 0",
        ),
        (
            torch.tensor([[2**32 + 1], [0]]),
            ValueError,
            r"^r2o column 0 must hold ranks 0\.\.1, got 4294967297",
        ),
        (
            torch.tensor([[1, 1], [2, 2], [0, 1]]),
            ValueError,
            "^r2o column 1 must be a permutation .*: rank 1 more than once, rank 0 missing",
        ),
        (
            torch.tensor([[1] * 8]).T,
            ValueError,
            "^r2o column 0 .*: rank 1 more than once, ranks 0, 2, 3, 4 and 3 more missing",
        ),
        (
            torch.tensor([[1, 2], [2, 1], [0, 0]]),
            ValueError,
            "^r2o column 1 must not map a rank to itself .* got rank 1 unmoved",
        ),
        (torch.tensor([[0]]), ValueError, "^r2o column 0 must not map a rank to itself"),
    ],
)
@pytest.mark.parametrize("function", ["validate", "inverse", "summary", "draw"])
def test_bad_matrices(function: str, r2o: Any, error: type[Exception], message: str) -> None:
    """Every function refuses a bad matrix and says which column and rank are wrong."""
    with pytest.raises(error, match=message):
        getattr(topologies, function)(r2o)


@given(derangements())
@settings(max_examples=100, deadline=None)
def test_inverse(r2o: torch.Tensor) -> None:
    """The inverse of a matrix undoes each column, and its own inverse is the matrix."""
    o2r = topologies.inverse(r2o)
    assert o2r.dtype == torch.int32 and o2r.is_contiguous() and o2r.shape == r2o.shape
    assert torch.equal(topologies.inverse(o2r), topologies.validate(r2o))
    ranks = torch.arange(len(r2o)).unsqueeze(1).expand_as(r2o)
    assert torch.equal(r2o.gather(0, o2r.long()), ranks)
    assert torch.equal(o2r.long().gather(0, r2o), ranks)


@given(derangements(), st.data())
@settings(max_examples=150, deadline=None)
def test_validate_finds_any_single_change(r2o: torch.Tensor, data: st.DataObject) -> None:
    """Any single entry that changes makes its column invalid."""
    assert torch.equal(topologies.validate(r2o).long(), r2o)
    rank = data.draw(st.integers(0, r2o.shape[0] - 1))
    d = data.draw(st.integers(0, r2o.shape[1] - 1))
    value = data.draw(st.integers(-2, r2o.shape[0] + 1).filter(lambda v: v != int(r2o[rank, d])))
    broken = r2o.clone()
    broken[rank, d] = value
    with pytest.raises(ValueError, match=f"^r2o column {d} must"):
        topologies.validate(broken)


def test_from_name() -> None:
    """A name gives the matrix of its builder."""
    assert torch.equal(topologies.from_name("ring:8"), topologies.ring(8))
    assert torch.equal(topologies.from_name("cube"), topologies.cube())
    assert torch.equal(topologies.from_name("hypercube"), topologies.hypercube())
    assert torch.equal(topologies.from_name("torus:4x8"), topologies.torus(4, 8))


def test_available_names_can_be_built() -> None:
    """Every available form can be built, and `NAMES` has a name of every form."""
    forms = topologies.available()
    assert {"ring:N", "cube", "hypercube", "torus:MxN"} <= set(forms)
    kinds = [form.partition(":")[0] for form in forms]
    assert sorted(set(kinds)) == sorted(kinds)
    assert {name.partition(":")[0] for name in NAMES} == set(kinds)
    for form in forms:
        topologies.from_name(re.sub("[A-Z]", "4", form))


@pytest.mark.parametrize("name", ["star", "", "Cube", ":8", "ring:", "ring", "ring:x", "ring:2x2"])
def test_unknown_names_list_what_is_available(name: str) -> None:
    """The error on an unknown name lists all forms."""
    with pytest.raises(ValueError, match="^name must ") as caught:
        topologies.from_name(name)
    assert repr(name) in str(caught.value)
    assert all(form in str(caught.value) for form in topologies.available())


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("torus:8", ValueError, "^name must have the form 'torus:MxN', got 'torus:8'"),
        ("cube:8", ValueError, "^name must have the form 'cube', got 'cube:8'"),
        ("ring:-3", ValueError, "^name must have the form 'ring:N', got 'ring:-3'"),
        ("ring:1", ValueError, "^name must give sizes of at least 2 .*, got 'ring:1'"),
        ("torus:1x4", ValueError, "^name must give sizes of at least 2 .*'torus:1x4'"),
        (8, TypeError, "^name must be a str, got int"),
    ],
)
def test_from_name_errors(name: Any, error: type[Exception], message: str) -> None:
    """A name of the wrong form, size or type is refused, and the error quotes it."""
    with pytest.raises(error, match=message):
        topologies.from_name(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "ring:8",
            "8 ranks, 1 redundant slot per rank, 8 edges, degree 2..2, diameter 4, connected",
        ),
        (
            "ring:2",
            "2 ranks, 1 redundant slot per rank, 1 edge (1 multiple), degree 1..1, diameter 1, "
            "connected",
        ),
        (
            "cube",
            "8 ranks, 2 redundant slots per rank, 16 edges, degree 4..4, diameter 2, connected",
        ),
        (
            "hypercube",
            "16 ranks, 2 redundant slots per rank, 32 edges, degree 4..4, diameter 4, connected",
        ),
        (
            "torus:4x8",
            "32 ranks, 2 redundant slots per rank, 64 edges, degree 4..4, diameter 6, connected",
        ),
    ],
)
def test_summary_of_known_topologies(name: str, expected: str) -> None:
    """Summaries of named topologies state their edges, degrees and diameters."""
    assert topologies.summary(topologies.from_name(name)) == expected


def test_summary_of_disconnected_topologies() -> None:
    """A disconnected topology has infinite diameter, and its parts are counted."""
    three_pairs = torch.tensor([[1], [0], [3], [2], [5], [4]])
    assert topologies.summary(three_pairs).endswith(
        "3 edges (3 multiple), degree 1..1, diameter infinite, not connected (3 parts of 2 ranks)"
    )
    unequal = torch.tensor([[1], [0], [3], [4], [2]])
    assert topologies.summary(unequal).endswith("not connected (2 parts of 2..3 ranks)")


@given(derangements())
@settings(max_examples=100, deadline=None)
def test_summary_figures(r2o: torch.Tensor) -> None:
    """Figures of a summary are those of the graph computed by other means."""
    text = topologies.summary(r2o)
    assert "\n" not in text
    around = neighbours(r2o)
    steps = floyd_warshall(r2o)
    connected = bool(steps.isfinite().all())
    pairs = [tuple(sorted((i, s))) for i, row in enumerate(r2o.tolist()) for s in row]
    multiple = sum(pairs.count(pair) > 1 for pair in set(pairs))
    assert text.startswith(f"{r2o.shape[0]} ranks, {r2o.shape[1]} redundant slot")
    assert re.search(rf", {len(set(pairs))} edges?[ ,]", text)
    assert (f"({multiple} multiple)" in text) == (multiple > 0)
    assert f"degree {min(map(len, around))}..{max(map(len, around))}," in text
    diameter = str(int(steps.max())) if connected else "infinite"
    assert f"diameter {diameter}," in text
    assert text.endswith(", connected") == connected


def test_drawing_of_a_torus() -> None:
    """A torus is recognised in any direction and order of slots, and drawn as a grid."""
    drawing = topologies.draw(topologies.torus(2, 3))
    expected = """
2 x 3 torus: slot 0 along the columns, slot 1 along the rows, both closed to rings
(tokens can move the way the arrows point, from the original to the copy)

  0 <- 1 <- 2 <- (0)
  ^    ^    ^
  3 <- 4 <- 5 <- (3)
  ^    ^    ^
 (0)  (1)  (2)
"""
    assert expected in drawing
    # The other direction, the other order of slots, and the hypercube, which is a 4 x 4 torus.
    turned = topologies.draw(topologies.inverse(topologies.torus(2, 3)).flip(1))
    assert "2 x 3 torus: slot 1 along the columns, slot 0 along the rows" in turned
    assert "  0 -> 1 -> 2 -> (0)\n" in turned
    hypercube = topologies.draw(topologies.hypercube())
    assert "4 x 4 torus" in hypercube and "\n  12 -> 13 -> 14 -> 15 -> (12)\n" in hypercube


def test_drawing_of_rings() -> None:
    """Rings of each slot are drawn in a line, and pairs with double arrows."""
    cube = topologies.draw(topologies.cube())
    assert "slot 0: 2 of 4 ranks\n  0 <- 3 <- 2 <- 1 <- 0    4 <- 7 <- 6 <- 5 <- 4\n" in cube
    assert "slot 1: 2 of 4 ranks\n  0 <- 6 <- 2 <- 4 <- 0    1 <- 7 <- 3 <- 5 <- 1\n" in cube
    assert "torus" not in cube
    pairs = topologies.draw(torch.tensor([[1], [0], [3], [2]]))
    assert "slot 0: 2 of 2 ranks\n  0 <-> 1    2 <-> 3\n" in pairs


def test_drawing_marks_several_copies_of_one_rank() -> None:
    """A rank pair with more than one slot is marked by a star."""
    both = topologies.draw(torch.tensor([[1, 1, 2], [2, 0, 0], [0, 2, 1]])[:, [0, 0, 2]])
    assert "(*: more than one slot)" in both
    assert re.search(r"^0  \\ \* 2$", both, flags=re.MULTILINE)


def test_drawing_of_a_large_group_leaves_the_matrix_out() -> None:
    """Above 40 ranks a drawing has no matrix and shortens the reach."""
    small, large = topologies.draw(topologies.ring(40)), topologies.draw(topologies.ring(41))
    assert "row i, column j" in small and "row i, column j" not in large
    assert max(map(len, (small + "\n" + large).splitlines())) <= 96
    reach = "load: 2 ranks in 1 move, 3 in 2, 4 in 3, 5 in 4, ..., 41 in 40\n"
    assert reach in large


@given(derangements())
@settings(max_examples=100, deadline=None)
def test_drawing_tells_the_whole_matrix(r2o: torch.Tensor) -> None:
    """A drawing's table and matrix hold every entry of the topology."""
    drawing = topologies.draw(r2o)
    assert drawing.isascii() and not drawing.endswith("\n")
    assert all(line == line.rstrip() for line in drawing.splitlines())
    assert drawing.startswith(topologies.summary(r2o) + "\n")
    size, n_slots = r2o.shape
    o2r, around = topologies.inverse(r2o).tolist(), neighbours(r2o)
    table = drawing[drawing.index("rank  slot 0 from") :].split("\n\n")[0].splitlines()[1:]
    rows = [[int(word) for word in line.split()] for line in table]
    assert len(rows) == size
    for rank, row in enumerate(rows):
        assert row[0] == rank
        assert row[1 : 1 + n_slots] == r2o[rank].tolist()
        assert row[1 + n_slots : 1 + 2 * n_slots] == o2r[rank]
        assert row[1 + 2 * n_slots :] == sorted(around[rank])
    for rank, line in enumerate(drawing.splitlines()[-size:]):
        first, *marks = line.split()
        assert int(first) == rank
        for source, mark in enumerate(marks):
            slots = [d for d in range(n_slots) if int(r2o[rank, d]) == source]
            expected = "*" if len(slots) > 1 else str(slots[0]) if slots else "."
            assert mark == ("\\" if source == rank else expected)


@given(derangements())
@settings(max_examples=60, deadline=None)
def test_drawing_states_the_reach(r2o: torch.Tensor) -> None:
    """The reach is the fewest ranks that any rank's load can get to in so many moves."""
    moves = floyd_warshall(r2o, directed=True)
    line = topologies.draw(r2o).splitlines()[1]
    assert line.startswith("spread of one rank's load: ")
    stated = re.findall(r"(\d+)(?: ranks)? in (\d+)", line)
    last = int(moves[moves.isfinite()].max())
    assert int(stated[-1][1]) == last
    for count, limit in stated:
        assert int(count) == int((moves <= int(limit)).sum(1).min())


def test_random_large_topology_draws_within_the_width() -> None:
    """A ring of 144 ranks in random order is drawn within 96 characters."""
    rnd = random.Random(0)
    order = list(range(144))
    rnd.shuffle(order)
    r2o = torch.empty(144, 1, dtype=torch.int64)
    r2o[order, 0] = torch.tensor(order[1:] + order[:1])
    drawing = topologies.draw(r2o)
    assert "slot 0: 1 of 144 ranks" in drawing
    assert max(map(len, drawing.splitlines())) <= 96


def test_docstring_examples() -> None:
    """The examples in docstrings of the module are right."""
    failed, tried = doctest.testmod(topologies)
    assert tried > 0 and failed == 0
