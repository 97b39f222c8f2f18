"""Saving and loading of expert-load traces."""

import json
import os
import zipfile
from importlib import resources

import numpy as np
import pytest

from lplb_triton.bench.balance import find_stretches
from lplb_triton.traces import trace as traces
from lplb_triton.traces.trace import FORMAT_VERSION, Trace, load, packaged, save


def make_trace(shape=(5, 2, 3, 7), high=9, seed=0, dtype=np.int32, **meta):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, high, size=shape).astype(dtype)
    counts.flat[0] = high
    return Trace(counts=counts, steps=np.arange(shape[0], dtype=np.int64) * 3, meta=meta)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 2, 3, 7), (2, 1, 1, 130)])
def test_round_trip(tmp_path, shape, dtype):
    """A saved trace has the same counts, steps and metadata for any dtype and shape."""
    trace = make_trace(shape, high=200 if dtype is np.uint8 else 300, dtype=dtype, model="small")
    save(tmp_path / "a.npz", trace)
    found = load(tmp_path / "a.npz")
    np.testing.assert_array_equal(found.counts, trace.counts)
    np.testing.assert_array_equal(found.steps, trace.steps)
    assert found.counts.dtype == np.int32
    assert found.steps.dtype == np.int64
    assert found.counts.flags.c_contiguous
    assert found.meta == {"model": "small", "format_version": FORMAT_VERSION}
    assert (found.batches, found.layers, found.sources, found.experts) == shape


def test_the_largest_counts(tmp_path):
    """An expert's counts may add up to as much as int32 holds."""
    counts = np.zeros((2, 1, 3, 4), dtype=np.uint64)
    counts[1, 0, :, 2] = (2**31 - 1) // 3
    save(tmp_path / "a.npz", Trace(counts, np.arange(2)))
    found = load(tmp_path / "a.npz")
    assert found.counts.dtype == np.int32
    np.testing.assert_array_equal(found.counts, counts)


@pytest.mark.parametrize("largest", [2**31, 10**10, 2**62, 2**63, 2**64 - 1])
def test_counts_that_ranks_cannot_exchange_are_refused(tmp_path, largest):
    """Counts above int32 are refused in a trace and in files."""
    counts = np.ones((3, 2, 1, 4), dtype=np.uint64)
    counts[2, 1, 0, 3] = largest
    match = f"at most 2147483647 tokens.*int32.*got {largest} or more.*expert 3 of layer 1 in batch"
    with pytest.raises(ValueError, match="counts must " + "give an expert " + match):
        Trace(counts, np.arange(3))
    np.savez(tmp_path / "own.npz", counts=counts)
    with pytest.raises(ValueError, match=f"own.npz: 'counts' must give an expert {match}"):
        load(tmp_path / "own.npz")
    (tmp_path / "own.json").write_text(json.dumps(counts.tolist()))
    with pytest.raises(ValueError, match=r"own\.json: 'counts' must (give an|hold integers of 64)"):
        load(tmp_path / "own.json")


def test_sums_over_sources_count(tmp_path):
    """The limit of int32 is on an expert's sum over all sources."""
    counts = np.full((2, 1, 4, 3), 2**29, dtype=np.uint32)
    with pytest.raises(ValueError, match="got 2147483648 or more for expert 0 of layer 0"):
        Trace(counts, np.arange(2))
    assert Trace(counts - np.uint32(1), np.arange(2)).totals().max() == 2**31 - 4


def test_totals_do_not_overflow():
    """Totals over sources are int64 and exact for uint8 counts."""
    counts = np.full((2, 1, 4, 3), 255, dtype=np.uint8)
    totals = Trace(counts, np.arange(2)).totals()
    assert totals.dtype == np.int64
    np.testing.assert_array_equal(totals, np.full((2, 1, 3), 1020))


def test_file_is_readable_without_this_module(tmp_path):
    """Numpy alone reads a trace's counts, in uint8, and its metadata."""
    trace = make_trace(top_k=8)
    save(tmp_path / "a.npz", trace)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert sorted(archive.files) == ["counts", "format_version", "meta", "sha256", "steps"]
        assert archive["counts"].dtype == np.uint8
        np.testing.assert_array_equal(archive["counts"], trace.counts)
        assert json.loads(archive["meta"].item())["top_k"] == 8


def test_same_trace_gives_same_bytes(tmp_path):
    """Equal traces give files with equal bytes."""
    for name in ("a.npz", "b.npz"):
        save(tmp_path / name, make_trace(top_k=8))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_skewed_counts_take_at_most_half_a_byte_each(tmp_path):
    """A file takes less than half a byte for each skewed count."""
    # Gamma-Poisson counts, mean 4, as 128 tokens x top-8 give over 256 experts.
    rng = np.random.default_rng(1)
    popularity = rng.lognormal(0, 1, (1, 2, 1, 256))
    popularity /= popularity.mean()
    rate = 4 * popularity * rng.gamma(2, 0.5, (20, 2, 16, 256))
    counts = np.minimum(rng.poisson(rate), 255)
    save(tmp_path / "a.npz", Trace(counts, np.arange(20)))
    assert (tmp_path / "a.npz").stat().st_size < counts.size / 2


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    """A save that fails leaves the old file and no temporary one."""
    path = tmp_path / "a.npz"
    save(path, make_trace(seed=0))
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, make_trace(seed=1))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.npz"]


def test_save_replaces_an_existing_file(tmp_path):
    """A save replaces an existing file and leaves no other."""
    path = tmp_path / "a.npz"
    save(path, make_trace(seed=0))
    save(path, make_trace(seed=1))
    np.testing.assert_array_equal(load(path).counts, make_trace(seed=1).counts)
    assert os.listdir(tmp_path) == ["a.npz"]


def test_save_rejects_wrong_arguments(tmp_path):
    """A wrong path, trace or metadata is refused, and no file is written."""
    with pytest.raises(ValueError, match=r"path must end in \.npz"):
        save(tmp_path / "a.json", make_trace())
    with pytest.raises(TypeError, match="trace must be a Trace, got ndarray"):
        save(tmp_path / "a.npz", np.zeros((1, 1, 1, 1)))
    trace = make_trace()
    trace.meta["rate"] = float("nan")
    with pytest.raises(ValueError, match=r"trace\.meta"):
        save(tmp_path / "a.npz", trace)
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "missing" / "a.npz", make_trace())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"counts": [[[[1]]]]}, TypeError, "counts must be a numpy array, got list"),
        ({"counts": np.ones((2, 3), int)}, ValueError, r"counts must have the axes .*\(2, 3\)"),
        ({"counts": np.ones((2, 1, 1, 3))}, TypeError, "counts must hold integers, got .*float64"),
        ({"counts": np.ones((2, 1, 1, 3), bool)}, TypeError, "counts must hold integers"),
        ({"counts": np.ones((0, 1, 1, 3), int)}, ValueError, "counts must hold at least one batch"),
        ({"counts": np.full((2, 1, 1, 3), -4)}, ValueError, "counts must not be negative, got -4"),
        ({"steps": [0, 1]}, TypeError, "steps must be an int64 numpy array, got list"),
        ({"steps": np.zeros(2, np.int32)}, TypeError, "steps must be an int64.*got int32"),
        ({"steps": np.zeros(3, np.int64)}, ValueError, r"steps must have shape \(2,\)"),
        ({"steps": np.array([-1, 0])}, ValueError, "steps must not be negative"),
        ({"meta": None}, TypeError, "meta must be a dict, got NoneType"),
        ({"meta": {1: 2}}, TypeError, "meta must have string keys, got 1"),
        ({"meta": {"a": np.int64(1)}}, ValueError, "meta must be something JSON can hold"),
    ],
)
def test_trace_rejects(changes, error, message):
    """A trace's wrong counts, steps or metadata are refused by name."""
    arguments = {"counts": np.ones((2, 1, 1, 3), int), "steps": np.arange(2), "meta": {}}
    with pytest.raises(error, match=message):
        Trace(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 6), (4, 1, 1, 6)),
        ((4, 3, 6), (4, 3, 1, 6)),
        ((4, 3, 2, 6), (4, 3, 2, 6)),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "json list", "json object"])
def test_own_files(tmp_path, shape, expected, kind):
    """Counts of two, three or four axes load from npz and JSON."""
    counts = np.random.default_rng(0).integers(0, 50, shape)
    if kind == "npz":
        path = tmp_path / "own.npz"
        np.savez(path, counts=counts, top_k=2, requests=np.ones(4, int))
    else:
        path = tmp_path / "own.json"
        content = counts.tolist()
        if kind == "json object":
            content = {"counts": content, "top_k": 2}
        path.write_text(json.dumps(content))
    trace = load(path)
    assert trace.counts.shape == expected
    np.testing.assert_array_equal(trace.counts.reshape(shape), counts)
    np.testing.assert_array_equal(trace.steps, np.arange(4))
    assert trace.meta == ({} if kind == "json list" else {"top_k": 2})


def test_own_steps_and_meta(tmp_path):
    """Steps and metadata of a user's own file are kept."""
    np.savez(tmp_path / "a.npz", counts=np.ones((2, 3), np.uint16), steps=np.array([7, 9], "u2"))
    trace = load(tmp_path / "a.npz")
    assert trace.steps.dtype == np.int64
    np.testing.assert_array_equal(trace.steps, [7, 9])
    content = {"counts": [[1, 2], [3, 4]], "steps": [5, 6], "meta": {"model": "mine"}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    trace = load(str(tmp_path / "a.json"))
    np.testing.assert_array_equal(trace.steps, [5, 6])
    assert trace.meta == {"model": "mine"}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"count": np.ones((2, 3), int)}, r"a\.npz: key 'counts' is missing; the file has 'count'"),
        ({"counts": np.ones(3, int)}, r"'counts' must be \[batches, experts\].*got shape \(3,\)"),
        ({"counts": np.ones((1,) * 5, int)}, r"'counts' must be .*\(1, 1, 1, 1, 1\)"),
        ({"counts": np.ones((2, 3))}, "'counts' must hold integers, got dtype float64"),
        ({"counts": np.array(["a"])}, "'counts' must hold integers"),
        ({"counts": np.full((2, 3), -1)}, "'counts' must not be negative"),
        ({"counts": np.ones((2, 3), int), "steps": np.full(2, 2**63, np.uint64)}, "'steps' must"),
        ({"counts": np.ones((0, 3), int)}, "'counts' must hold at least one batch"),
        ({"counts": np.ones((2, 3), int), "steps": np.ones(2)}, "'steps' must be an int64"),
        ({"counts": np.ones((2, 3), int), "steps": np.arange(3)}, "'steps' must have shape"),
        ({"counts": np.ones((2, 3), int), "meta": np.array("{")}, "'meta': not valid JSON"),
        ({"counts": np.ones((2, 3), int), "meta": np.array("[]")}, "'meta' must be a dict"),
        ({"counts": np.ones((2, 3), int), "meta": np.ones(2)}, "'meta' must be a JSON string"),
        ({"counts": np.ones((2, 3), int), "format_version": np.array(0)}, "positive integer"),
    ],
)
def test_load_rejects_arrays(tmp_path, arrays, message):
    """Wrong arrays in an npz file are refused with the key's name."""
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"a\.json: not valid JSON"),
        ("3", "expected nested lists or an object with the key 'counts', got int"),
        ("{}", "key 'counts' is missing; the file has none"),
        ('{"counts": {"a": 1}}', "'counts' must be nested lists, got dict"),
        ("[[1, 2], [3]]", "'counts' must be nested lists of integers, of equal length"),
        ("[[1, 2.5]]", "'counts' must hold integers"),
        ("[]", "'counts' must hold"),
        ("[[1, 18446744073709551616]]", "'counts' must hold integers of 64 bits, got one of 65"),
        ("[[1, 9223372036854775808]]", "'counts' must hold integers of 64 bits, got one of 64"),
        ('{"counts": [[1]], "steps": 0}', "'steps' must be nested lists"),
        ('{"counts": [[1]], "meta": "x"}', "'meta' must be a dict, got str"),
        ('{"counts": [[1]], "format_version": 99}', "'format_version' is 99"),
    ],
)
def test_load_rejects_json(tmp_path, text, message):
    """Wrong JSON is refused, and the error says what it must be."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.json")


def test_deep_nesting_is_refused(tmp_path):
    """JSON nested too deeply is refused when it is read and when it is saved."""
    deep, path = "[" * 10**5 + "]" * 10**5, tmp_path / "a.json"
    for text in (deep, '{"counts": [[1]], "meta": {"a": ' + deep + "}}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json: JSON is nested too deeply to be read"):
            load(path)
    np.savez(tmp_path / "a.npz", counts=np.ones((2, 3), int), meta=np.array('{"a": ' + deep + "}"))
    with pytest.raises(ValueError, match=r"a\.npz: 'meta': JSON is nested too deeply"):
        load(tmp_path / "a.npz")
    meta = {}
    for _ in range(10**5):
        meta = {"a": meta}
    with pytest.raises(ValueError, match="^meta must be something JSON can hold: nested too"):
        Trace(np.ones((2, 1, 1, 3), int), np.arange(2), meta)
    trace = make_trace()
    trace.meta["deep"] = meta
    with pytest.raises(ValueError, match=r"trace\.meta must be something JSON can hold: nested"):
        save(tmp_path / "b.npz", trace)
    del trace.meta["deep"]
    while meta:
        # Or Python's own stack ends when it is deleted.
        meta = meta["a"]


def test_newer_format_is_refused_before_its_other_members_are_read(tmp_path):
    """A newer format asks for an upgrade, even if the rest can't be read."""
    path = tmp_path / "a.npz"
    np.savez(path, format_version=np.array(FORMAT_VERSION + 1))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("counts.npy", b"something this version cannot parse")
    with pytest.raises(ValueError, match=f"'format_version' is {FORMAT_VERSION + 1}.*upgrade"):
        load(path)


def test_load_rejects_paths_and_damage(tmp_path):
    """Missing, misnamed and damaged files are refused by path."""
    for name in ("none.npz", "none.json"):
        with pytest.raises(FileNotFoundError, match="path: no such file"):
            load(tmp_path / name)
    with pytest.raises(ValueError, match=r"path must end in \.npz or \.json"):
        load(tmp_path / "a.csv")

    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"text\.npz: not an \.npz archive"):
        load(tmp_path / "text.npz")

    save(tmp_path / "good.npz", make_trace((40, 2, 3, 16)))
    content = bytearray((tmp_path / "good.npz").read_bytes())
    (tmp_path / "short.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"short\.npz"):
        load(tmp_path / "short.npz")
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    (tmp_path / "hole.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"hole\.npz: key 'counts' cannot be read"):
        load(tmp_path / "hole.npz")


@pytest.mark.parametrize("method", ["STORED", "DEFLATED", "BZIP2", "LZMA"])
def test_damage_under_every_compression_names_file_and_key(tmp_path, method):
    """Damage under any compression is refused with file and key."""
    path = tmp_path / "hole.npz"
    with zipfile.ZipFile(path, "w", getattr(zipfile, f"ZIP_{method}")) as archive:
        with archive.open("counts.npy", "w") as member:
            np.lib.format.write_array(member, make_trace((40, 2, 3, 16)).counts)
    assert load(path).counts.shape == (40, 2, 3, 16)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(byte ^ 0xFF for byte in content[middle : middle + 40])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"hole\.npz: key 'counts' cannot be read: .") as raised:
        load(path)
    assert raised.value.__cause__ is not None


def test_pickled_arrays_are_never_unpickled(tmp_path):
    """A pickled array in a file is refused."""
    np.savez(tmp_path / "a.npz", counts=np.array([[1, None]], dtype=object))
    with pytest.raises(ValueError, match="key 'counts' cannot be read"):
        load(tmp_path / "a.npz")


def test_packaged_reads_the_packaged_file(tmp_path, monkeypatch):
    """`packaged` reads the package's own file, and says so if there is none."""
    monkeypatch.setattr(traces.resources, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"moe256\.npz is not part of this installation"):
        packaged()
    (tmp_path / "data").mkdir()
    save(tmp_path / "data" / "moe256.npz", make_trace())
    np.testing.assert_array_equal(packaged().counts, make_trace().counts)


def test_packaged_trace_keeps_its_promises():
    """The packaged trace has top-8 counts of 32 sources, early and late in training."""
    # Without the file this fails: a package without its trace is not complete.
    trace = packaged()
    file = resources.files("lplb_triton.bench").joinpath("data", "moe256.npz")
    assert len(file.read_bytes()) < 2_000_000
    assert trace.experts == 256
    assert trace.layers >= 4
    assert trace.batches >= 200
    assert trace.sources == 32
    assert repr(trace).startswith("Trace(") and len(repr(trace)) < 80 and "[" not in repr(trace)
    assert (np.diff(trace.steps) > 0).all()

    # Every source rank sends each of its tokens to eight different experts, in every layer.
    tokens, top_k = trace.meta["tokens_per_source"], trace.meta["top_k"]
    assert top_k == 8
    np.testing.assert_array_equal(trace.counts.sum(axis=3), tokens * top_k)
    assert trace.counts.max() <= tokens

    # One stretch of early and one of late training, the late one up to the end of the run.
    early, late = (trace.steps[part.start : part.stop] for part in find_stretches(trace.steps, 0.5))
    done = trace.meta["steps_done"]
    assert min(len(early), len(late)) >= 100
    assert early[-1] < done / 3
    assert late[0] > 2 * done / 3
    assert late[-1] == done - 1


@pytest.mark.parametrize("key", ["counts", "steps", "meta", "sha256"])
def test_a_changed_or_missing_member_is_found(tmp_path, key):
    """A changed or missing member of a trace file is refused."""
    path = tmp_path / "a.npz"
    save(path, make_trace(top_k=8))
    with np.load(path) as archive:
        members = {name: archive[name] for name in archive.files}
    np.savez(path, **members)
    assert load(path).meta["top_k"] == 8
    changed = dict(members)
    if members[key].dtype.kind == "U":
        changed[key] = np.array(str(members[key]).replace("8", "9"))
    else:
        changed[key] = members[key] + members[key].dtype.type(1)
    np.savez(path, **changed)
    with pytest.raises(ValueError, match="'sha256' does not match"):
        load(path)
    del changed[key]
    np.savez(path, **changed)
    with pytest.raises(ValueError, match=f"'{key}' is missing"):
        load(path)
