"""The recorder: counts, bounds on size, several ranks, and bad calls."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from lplb_triton.bench import cli
from lplb_triton.bench.record import Recorder, merge, rank_path
from lplb_triton.bench.trace import load


def draw(batches, layers, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, experts, (batches, layers, 16, 2), generator=generator)


def feed(recorder, ids):
    for batch in ids:
        for layer, topk in enumerate(batch):
            recorder.add(layer, topk[:7])
            recorder.add(layer, topk[7:].int())
        recorder.step()


def counted(ids, experts):
    flat = ids.reshape(*ids.shape[:2], -1)
    return np.stack([(flat == e).sum(2).numpy() for e in range(experts)], axis=-1)


@pytest.mark.parametrize("flush_every", [1, 3, 64])
def test_counts(tmp_path, flush_every):
    ids = draw(10, 2, 8)
    with Recorder(tmp_path / "t.npz", 8, 2, flush_every=flush_every, meta={"top_k": 2}) as recorder:
        feed(recorder, ids)
    trace = load(tmp_path / "t.npz")
    np.testing.assert_array_equal(trace.counts[:, :, 0], counted(ids, 8))
    assert trace.steps.tolist() == list(range(10)) and trace.meta["top_k"] == 2


def test_a_save_between_and_a_batch_that_was_begun(tmp_path):
    path, ids = tmp_path / "t.npz", draw(3, 1, 8)
    recorder = Recorder(path, 8, 1, flush_every=2)
    feed(recorder, ids[:1])
    recorder.add(0, ids[1, 0, :4])
    recorder.save()
    assert load(path).batches == 1
    recorder.add(0, ids[1, 0, 4:])
    recorder.step()
    recorder.add(0, ids[2, 0])
    recorder.close()
    recorder.close()
    np.testing.assert_array_equal(load(path).counts[:, :, 0], counted(ids, 8))
    for call in (recorder.step, lambda: recorder.add(0, ids[0, 0])):
        with pytest.raises(RuntimeError, match="closed"):
            call()


@pytest.mark.parametrize(("max_batches", "every", "stride"), [(8, 1, 8), (50, 3, 3), (2, 1, 64)])
def test_the_size_is_bounded(tmp_path, max_batches, every, stride):
    path, ids = tmp_path / "t.npz", draw(50, 1, 4)
    with Recorder(path, 4, 1, every=every, max_batches=max_batches, flush_every=5) as recorder:
        feed(recorder, ids)
    trace = load(path)
    assert trace.steps.tolist() == list(range(0, 50, stride)) and trace.batches < max_batches
    np.testing.assert_array_equal(trace.counts[:, :, 0], counted(ids[::stride], 4))
    assert trace.meta["recorder"]["every"] == stride and trace.meta["recorder"]["seen"] == 50


@pytest.mark.parametrize("bad", [8, 2**40, -2])
def test_ids_out_of_range_raise_when_they_come_to_the_host(tmp_path, bad):
    recorder = Recorder(tmp_path / "t.npz", 8, 2, flush_every=2)
    recorder.add(1, torch.tensor([3, -1, bad]))
    recorder.step()
    with pytest.raises(ValueError, match=r"topk_ids must be in \[-1, 8\); 1 of layer 1 in batch 0"):
        recorder.step()


def test_wrong_arguments(tmp_path):
    path = tmp_path / "t.npz"
    for error, match, arguments in (
        (ValueError, "path must end in .npz", {"path": tmp_path / "t.bin"}),
        (ValueError, "n_experts", {"n_experts": 0}),
        (ValueError, "max_batches", {"max_batches": 1}),
        (TypeError, "every", {"every": 1.5}),
        (ValueError, "rank must be below world_size", {"rank": 2, "world_size": 2}),
        (ValueError, "together", {"rank": 2}),
    ):
        with pytest.raises(error, match=match):
            Recorder(**{"path": path, "n_experts": 4, "layers": 1, **arguments})
    recorder = Recorder(path, 4, 1)
    with pytest.raises(ValueError, match="layer must be in"):
        recorder.add(1, torch.tensor([0]))
    with pytest.raises(TypeError, match="topk_ids must be a torch.Tensor"):
        recorder.add(0, [0])
    with pytest.raises(TypeError, match="topk_ids must be int32 or int64"):
        recorder.add(0, torch.tensor([0.5]))
    with pytest.raises(ValueError, match="no batch was recorded"):
        recorder.save()
    with pytest.raises(KeyError), Recorder(path, 4, 1):
        raise KeyError
    assert not path.exists()
    with pytest.raises(KeyError), Recorder(path, 4, 1) as recorder:
        feed(recorder, draw(2, 1, 4))
        raise KeyError
    assert load(path).batches == 2


def write_ranks(path, ids, lengths):
    for rank, length in enumerate(lengths):
        with Recorder(path, 8, 2, rank=rank, world_size=len(lengths)) as recorder:
            feed(recorder, ids[rank][:length])
    return [rank_path(path, rank) for rank in range(len(lengths))]


def test_merging(tmp_path, capsys):
    path = tmp_path / "t.npz"
    ids = [draw(6, 2, 8, seed) for seed in range(3)]
    files = write_ranks(path, ids, (6, 5, 6))
    command = ["record", "--merge", str(path), *map(str, reversed(files))]
    assert cli.main(command) == cli.OK
    assert "5 batches (steps 0 to 4), 2 layers, 3 sources, 8 experts" in capsys.readouterr().out
    trace = load(path)
    for rank in range(3):
        np.testing.assert_array_equal(trace.counts[:, :, rank], counted(ids[rank][:5], 8))
    with pytest.raises(ValueError, match="missing: 1"):
        merge([files[0], files[2]])
    with pytest.raises(ValueError, match="rank 0 is there twice"):
        merge([files[0], files[0]])
    assert cli.main(["record", str(files[0])]) == cli.OK
    assert "6 batches" in capsys.readouterr().out
    assert cli.main(["record", str(tmp_path / "none.npz")]) == cli.USAGE


SCRIPT = """
import sys, torch, torch.distributed as dist
from lplb_triton.bench.record import Recorder
dist.init_process_group("gloo")
with Recorder(sys.argv[1], n_experts=4, layers=1) as recorder:
    for batch in range(3):
        recorder.add(0, torch.full((5, 1), dist.get_rank()))
        recorder.step()
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    path = tmp_path / "t.npz"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, str(script), str(path)], check=True, timeout=200, env=environment)
    trace = merge([rank_path(path, 0), rank_path(path, 1)])
    assert trace.counts[0, 0].tolist() == [[5, 0, 0, 0], [0, 5, 0, 0]]


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_between_two_copies(tmp_path):
    ids = draw(6, 2, 8)
    recorder = Recorder(tmp_path / "t.npz", 8, 2)
    on_gpu = ids.cuda()
    recorder.add(0, on_gpu[0, 0, :0])
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        # torch warns that this mode is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            feed(recorder, on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    recorder.close()
    np.testing.assert_array_equal(load(tmp_path / "t.npz").counts[:, :, 0], counted(ids, 8))
