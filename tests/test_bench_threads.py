"""The command and the search for placements use one thread, and leave the process as it was."""

import sys

import numpy as np
import pytest
import torch
from helpers.traces import make_trace

from lplb_triton import _threads, place
from lplb_triton.bench import cli
from lplb_triton.bench.balance import replay
from lplb_triton.placement import cut_search
from lplb_triton.traces import trace as traces


def threads():
    """Threads of torch and of every OpenBLAS in the process."""
    return [torch.get_num_threads(), *(count() for count, _ in _threads._openblas())]


@pytest.fixture
def two_threads():
    pools = [(torch.get_num_threads, torch.set_num_threads), *_threads._openblas()]
    before = [count() for count, _ in pools]
    for _, change in pools:
        change(2)
    yield
    for (_, change), count in zip(pools, before, strict=True):
        change(count)


def test_openblas_is_found(two_threads):
    """The wheels of numpy and SciPy bring one each; other builds may bring none."""
    if "openblas" not in np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]:
        pytest.skip("this numpy has another BLAS")
    assert len(threads()) >= 2 and set(threads()) == {2}


def test_one_thread_inside_and_as_before_afterwards(two_threads):
    """Inside the context there is one thread; afterwards the numbers are as before."""
    before = threads()
    with _threads.one_thread():
        assert set(threads()) == {1}
        with _threads.one_thread():
            assert set(threads()) == {1}
        assert set(threads()) == {1}
    assert threads() == before
    with pytest.raises(KeyError), _threads.one_thread():
        raise KeyError
    assert threads() == before


def test_commands_use_one_thread(tmp_path, monkeypatch, two_threads):
    """A command solves with one thread, and leaves the number of threads as it was."""
    seen, before, solve = [], threads(), replay.solve

    def watched(*args, **kwargs):
        seen.append(set(threads()))
        return solve(*args, **kwargs)

    monkeypatch.setattr(replay, "solve", watched)
    traces.save(tmp_path / "t.npz", make_trace(batches=4, layers=1))
    common = ["--trace", str(tmp_path / "t.npz"), "--device", "cpu", "--out", str(tmp_path / "o")]
    assert cli.main(["balance", "--ep", "4", *common]) == cli.OK
    assert seen and all(found == {1} for found in seen)
    assert cli.main(["balance", "--ep", "5", *common]) == cli.USAGE
    with pytest.raises(SystemExit):
        cli.main(["balance", "--ep", "x"])
    assert threads() == before


def test_a_search_uses_one_thread(monkeypatch, two_threads):
    """A search for a placement uses one thread and restores the number of threads."""
    seen, before, run = [], threads(), cut_search.CutSearch.run

    def watched(self, trials):
        seen.append(set(threads()))
        return run(self, trials)

    monkeypatch.setattr(cut_search.CutSearch, "run", watched)
    place(torch.tensor([[8.0, 1.0, 1.0, 2.0]]).repeat(9, 1), 2, trials=5)
    assert seen and all(found == {1} for found in seen)
    assert threads() == before


def test_without_proc_only_torch_is_kept_to_one(monkeypatch, two_threads):
    """Without /proc, no OpenBLAS is found, and torch alone is kept to one thread."""
    monkeypatch.setattr(_threads, "Path", lambda name: sys)
    monkeypatch.setattr(sys, "read_text", lambda errors: open("/no/such"), raising=False)
    assert _threads._openblas() == []
    with _threads.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
