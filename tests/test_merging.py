"""Files that a recorder writes on every rank, merged into one."""

import os

import numpy as np
import pytest
import torch
from gloo import run_ranks
from helpers.recorded import counted, draw, feed

from lplb_triton.bench import cli
from lplb_triton.traces.record import Recorder, merge, rank_path
from lplb_triton.traces.trace import Trace, load, save


def write_ranks(path, ids, lengths):
    for rank, length in enumerate(lengths):
        with Recorder(path, 8, 2, rank=rank, world_size=len(lengths)) as recorder:
            feed(recorder, ids[rank][:length])
    return [rank_path(path, rank) for rank in range(len(lengths))]


def rewrite(path, **changes):
    """Change what the recorder wrote of itself."""
    trace = load(path)
    meta = {**trace.meta, "recorder": {**trace.meta["recorder"], **changes}}
    save(path, Trace(trace.counts, trace.steps, meta))


@pytest.fixture
def drawn():
    return [draw(6, 2, 8, seed) for seed in range(3)]


def test_merging(tmp_path, capsys, drawn):
    """Files of all ranks merge into one trace with a source for each rank."""
    path = tmp_path / "t.npz"
    files = write_ranks(path, drawn, (6, 6, 6))
    command = ["record", "--merge", str(path), *map(str, reversed(files))]
    assert cli.main(command) == cli.OK
    out, err = capsys.readouterr()
    assert "6 batches (steps 0 to 5), 2 layers, 3 sources, 8 experts" in out and not err
    for rank in range(3):
        np.testing.assert_array_equal(load(path).counts[:, :, rank], counted(drawn[rank], 8))
    assert cli.main(["record", str(files[0])]) == cli.OK
    assert "6 batches" in capsys.readouterr().out
    assert cli.main(["record", str(tmp_path / "none.npz")]) == cli.USAGE


def test_what_can_not_be_merged(tmp_path, drawn):
    """Files that are missing, repeated, merged or of another run are refused."""
    path = tmp_path / "t.npz"
    files = write_ranks(path, drawn, (6, 6, 6))
    save(path, merge(files))
    for match, paths in (
        ("missing: 1", [files[0], files[2]]),
        ("missing: 0", []),
        ("rank00000.npz: rank 0 is there twice", [files[0], files[0]]),
        (r"t\.npz: merged already", [path, *files[1:]]),
    ):
        with pytest.raises(ValueError, match=match):
            merge(paths)
    with pytest.raises(TypeError, match="paths must be a sequence of paths, got str"):
        merge(str(files[0]))
    for match, change in (
        ("rank must be below world_size 3, got 3", {"rank": 3}),
        ("rank must be an int", {"rank": "2"}),
        ("world_size must be at least 1", {"world_size": 0}),
        ("other ranks, layers or experts", {"world_size": 10**15}),
        ("of another run than", {"run": "another"}),
    ):
        write_ranks(path, drawn, (6, 6, 6))
        rewrite(files[2], **change)
        with pytest.raises(ValueError, match=match) as raised:
            merge(files)
        assert "rank00002.npz" in str(raised.value)
    rewrite(files[0], rank=0, world_size=10**15)
    with pytest.raises(ValueError, match=r"missing: 1, 2, 3, 4, 5, 6, 7, 8, \.\.\."):
        merge(files[:1])


@pytest.mark.parametrize("lengths", [(6, 5, 6), (5, 5, 4)])
def test_ranks_that_ended_at_different_batches_are_named(tmp_path, capsys, drawn, lengths):
    """Batches that are not in all files are left out, with a warning that names the ranks."""
    path, n = tmp_path / "t.npz", min(lengths)
    files = write_ranks(path, drawn, lengths)
    said = (
        "1 batches are not in all files and left out; the ranks ended after so many batches: "
        f"rank 0: {lengths[0]}, rank 1: {lengths[1]}, rank 2: {lengths[2]}. If a rank skipped"
    )
    with pytest.warns(UserWarning, match=said):
        trace = merge(files)
    for rank in range(3):
        np.testing.assert_array_equal(trace.counts[:, :, rank], counted(drawn[rank][:n], 8))
    assert cli.main(["record", "--merge", str(path), *map(str, files)]) == cli.OK
    out, err = capsys.readouterr()
    assert f"{n} batches" in out and err.startswith(f"lplb-bench: warning: {said}")


def test_merging_never_overwrites_an_input(tmp_path, monkeypatch, capsys, drawn):
    """A merge that would overwrite an input is refused, whatever path leads to it."""
    monkeypatch.chdir(tmp_path)
    files = write_ranks(tmp_path / "t.npz", drawn, (6, 6, 6))
    before = [path.read_bytes() for path in files]
    os.symlink(files[1], "symbolic.npz")
    os.link(files[1], "hard.npz")
    (tmp_path / "folder").mkdir()
    for target in (
        files[0],
        "t.rank00002.npz",
        "folder/../t.rank00001.npz",
        "symbolic.npz",
        "hard.npz",
    ):
        assert cli.main(["record", "--merge", str(target), *map(str, files)]) == cli.USAGE
        said = capsys.readouterr().err
        assert f"{target} would overwrite" in said and "one of the files to merge" in said
    # A glob that takes in the result of the last time.
    assert cli.main(["record", "--merge", "t.npz", *map(str, files)]) == cli.OK
    assert cli.main(["record", "--merge", "t.npz", "t.npz", *map(str, files)]) == cli.USAGE
    assert cli.main(["record", "--merge", "new/t.json", *map(str, files)]) == cli.USAGE
    assert "the merged trace must end in .npz, got 'new/t.json'" in capsys.readouterr().err
    assert cli.main(["record", "--merge", "new/t.npz", str(files[0])]) == cli.USAGE
    assert not (tmp_path / "new").exists()
    assert [path.read_bytes() for path in files] == before


def check_recorders(rank, group, folder):
    with pytest.raises(FileNotFoundError, match="path: no such folder: .*none'"):
        Recorder(folder / "none" / "t.npz", 4, 1)
    with Recorder(folder / "t.npz", 4, 1) as recorder:
        for _ in range(3):
            recorder.add(0, torch.full((5, 1), rank))
            recorder.step()


def test_two_processes(tmp_path):
    """Files of two processes of one run merge, and a file of another run is refused."""
    path = tmp_path / "t.npz"
    run_ranks(check_recorders, 2, tmp_path, tmp_path)
    files = [rank_path(path, rank) for rank in range(2)]
    trace = merge(files)
    assert trace.counts[0, 0].tolist() == [[5, 0, 0, 0], [0, 5, 0, 0]]
    assert len(trace.meta["recorder"]["run"]) == 32
    # The file of another run, of as many ranks, under the name of rank 1.
    with Recorder(path, 4, 1, rank=1, world_size=2) as recorder:
        recorder.add(0, torch.ones(5, 1, dtype=torch.int64))
        recorder.step()
    with pytest.raises(ValueError, match="rank00001.npz: of another run than .*rank00000.npz"):
        merge(files)
