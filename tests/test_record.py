"""The recorder: counts, bounds on size, forgotten calls, data that are kept whatever happens."""

import gc
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.recorded import counted, draw, feed

from lplb_triton.traces.record import Recorder
from lplb_triton.traces.trace import load


def assert_holds(path, ids, experts):
    np.testing.assert_array_equal(load(path).counts[:, :, 0], counted(ids, experts))


@pytest.mark.parametrize("flush_every", [1, 3, 64])
def test_counts(tmp_path, flush_every):
    """The file holds all batches' counts, steps and metadata for every `flush_every`."""
    ids = draw(10, 2, 8)
    with Recorder(tmp_path / "t.npz", 8, 2, flush_every=flush_every, meta={"top_k": 2}) as recorder:
        feed(recorder, ids)
    assert_holds(tmp_path / "t.npz", ids, 8)
    trace = load(tmp_path / "t.npz")
    assert trace.steps.tolist() == list(range(10)) and trace.meta["top_k"] == 2


@pytest.mark.parametrize("adds_per_step", [3, None])
def test_micro_batches(tmp_path, adds_per_step):
    """Several calls of `add` for a layer sum up to one batch, empty and int32 ids included."""
    ids = draw(6, 2, 8)
    with Recorder(tmp_path / "t.npz", 8, 2, adds_per_step=adds_per_step) as recorder:
        for batch in ids:
            for part in (batch[:, :5], batch[:, 5:5], batch[:, 5:].int()):
                for layer, topk in enumerate(part):
                    recorder.add(layer, topk)
            recorder.step()
    assert_holds(tmp_path / "t.npz", ids, 8)


@pytest.mark.parametrize("every", [1, 2])
def test_a_discarded_batch_counts_nowhere(tmp_path, every):
    """What was added before `discard` is in no batch, and batches keep their numbers."""
    path, ids = tmp_path / "t.npz", draw(5, 1, 8)
    with Recorder(path, 8, 1, every=every) as recorder:
        recorder.discard()
        for batch in ids:
            recorder.add(0, batch[0] * 0)
            recorder.discard()
            recorder.add(0, batch[0])
            recorder.step()
    assert_holds(path, ids[::every], 8)
    with pytest.raises(RuntimeError, match="closed"):
        recorder.discard()


@pytest.mark.parametrize("every", [1, 2])
def test_a_save_between_and_a_batch_that_was_begun(tmp_path, every):
    """A save leaves out the begun batch, `close` keeps it, and only `save` works afterwards."""
    path, ids = tmp_path / "t.npz", draw(5, 1, 8)
    recorder = Recorder(path, 8, 1, adds_per_step=2, flush_every=2, every=every)
    for number, batch in enumerate(ids):
        recorder.add(0, batch[0, :4])
        if number == 3:
            recorder.save()
            assert_holds(path, ids[:3:every], 8)
        recorder.add(0, batch[0, 4:])
        if number < 4:
            recorder.step()
    recorder.close()
    recorder.close()
    assert_holds(path, ids[::every], 8)
    for call in (recorder.step, lambda: recorder.add(0, ids[0, 0])):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    recorder.save(tmp_path / "again.npz")
    assert_holds(tmp_path / "again.npz", ids[::every], 8)


@pytest.mark.parametrize(("max_batches", "every", "stride"), [(8, 1, 8), (50, 3, 3), (2, 1, 64)])
def test_the_size_is_bounded(tmp_path, max_batches, every, stride):
    """A recorder at its limit doubles its stride, and the file stays below `max_batches`."""
    path, ids = tmp_path / "t.npz", draw(50, 1, 4)
    with Recorder(path, 4, 1, every=every, max_batches=max_batches, flush_every=5) as recorder:
        feed(recorder, ids)
    trace = load(path)
    assert trace.steps.tolist() == list(range(0, 50, stride)) and trace.batches < max_batches
    assert_holds(path, ids[::stride], 4)
    assert trace.meta["recorder"]["every"] == stride and trace.meta["recorder"]["seen"] == 50


@pytest.mark.parametrize("every", [1, 2])
def test_a_forgotten_step_is_found(tmp_path, every):
    """A layer that is added too often in a batch raises, or warns if any number is allowed."""
    path, ids = tmp_path / "t.npz", draw(3, 2, 8)
    recorder = Recorder(path, 8, 2, every=every)
    feed(recorder, ids[:1])
    for layer in range(2):
        recorder.add(layer, ids[1, layer])
    with pytest.raises(RuntimeError, match=r"twice for layer 0 in batch 1: call step\(\) after"):
        recorder.add(0, ids[2, 0])
    recorder.step()
    feed(recorder, ids[2:])
    recorder.close()
    assert_holds(path, ids[::every], 8)

    recorder = Recorder(path, 8, 1, adds_per_step=2)
    for _ in range(2):
        recorder.add(0, ids[0, 0])
    with pytest.raises(RuntimeError, match=r"3 times for layer 0 in batch 0.*by adds_per_step"):
        recorder.add(0, ids[0, 0])

    recorder = Recorder(path, 8, 1, adds_per_step=None)
    for _ in range(2):
        recorder.add(0, ids[0, 0])
    with pytest.warns(UserWarning, match=r"step\(\) was never called"):
        recorder.close()
    np.testing.assert_array_equal(load(path).counts[0, 0], 2 * counted(ids[:1, :1], 8)[0])


@pytest.mark.parametrize("every", [1, 2])
def test_layers_without_add_are_named(tmp_path, every):
    """A batch that lacks calls of `add` names its layers and is left out."""
    path, ids = tmp_path / "t.npz", draw(3, 12, 8)
    recorder = Recorder(path, 8, 12, every=every)
    with pytest.raises(RuntimeError, match=r"step\(\) without add in batch 0"):
        recorder.step()
    feed(recorder, ids[:1])
    recorder.add(1, ids[1, 1])
    few = r"batch 1 had no call of add for layers 0, 2, 3, 4, 5, 6, 7, 8, \.\.\.: .* empty tensor"
    with pytest.raises(RuntimeError, match=few):
        recorder.step()
    for layer in {*range(12)} - {1}:
        recorder.add(layer, ids[1, layer])
    recorder.step()
    recorder.add(11, ids[2, 11])
    with pytest.warns(UserWarning, match=r"batch 2 had no call .* 0, 1, .* and is left out"):
        recorder.close()
    assert_holds(path, ids[:2:every], 8)

    recorder = Recorder(path, 8, 2, adds_per_step=2)
    recorder.add(0, ids[0, 0])
    with pytest.raises(RuntimeError, match="batch 0 had fewer than 2 calls of add for layers 0, 1"):
        recorder.step()
    with pytest.raises(ValueError, match="no batch was recorded: batch 0 had fewer than 2 calls"):
        recorder.close()


def test_layers_that_were_never_added_are_warned_of(tmp_path):
    """With any number of calls, layers never added count 0 and are warned of at the end."""
    path, ids = tmp_path / "t.npz", draw(3, 3, 8)
    with (
        pytest.warns(UserWarning, match="add was never called for layers 0, 2: they count 0"),
        Recorder(path, 8, 3, adds_per_step=None) as recorder,
    ):
        recorder.step()
        recorder.add(1, ids[1, 1])
        recorder.step()
    expected = np.zeros((2, 3, 8))
    expected[1, 1] = counted(ids, 8)[1, 1]
    np.testing.assert_array_equal(load(path).counts[:, :, 0], expected)


@pytest.mark.parametrize("bad", [8, 2**40, 2**63 - 1, -2, -(2**63)])
def test_ids_out_of_range_raise_and_cost_their_batch_only(tmp_path, bad):
    """An id out of range is reported with its layer, and only its batch is lost."""
    path, ids = tmp_path / "t.npz", draw(5, 2, 8)
    recorder = Recorder(path, 8, 2, flush_every=3)
    ids[1, 1, 0, 0] = bad
    match = r"topk_ids must be in \[-1, 8\); 1 of layer 1 in batch 1 were not \(1 of the last 3"
    with pytest.raises(ValueError, match=match):
        feed(recorder, ids[:3])
    feed(recorder, ids[3:4])
    ids[4, 0, 0, 0] = bad
    feed(recorder, ids[4:])
    with pytest.raises(ValueError, match="1 of layer 0 in batch 4 were not"):
        recorder.close()
    assert load(path).steps.tolist() == [0, 2, 3]
    assert_holds(path, ids[[0, 2, 3]], 8)


def test_counts_have_room(tmp_path):
    """A call that could overflow a batch's counts is refused, and earlier counts stay."""
    recorder = Recorder(tmp_path / "t.npz", 4, 1, adds_per_step=None)
    recorder.add(0, torch.tensor([1]))
    with pytest.raises(ValueError, match="topk_ids of layer 0 in batch 0 are more than 214"):
        recorder.add(0, torch.zeros(1, dtype=torch.int32).expand(2**31 - 1))
    recorder.close()
    assert load(tmp_path / "t.npz").counts[0, 0].tolist() == [[0, 1, 0, 0]]


def test_inference_mode_and_training_take_turns(tmp_path):
    """Calls inside and outside of inference mode record into one file."""
    path, ids = tmp_path / "t.npz", draw(6, 1, 8)
    with Recorder(path, 8, 1, flush_every=2) as recorder:
        for number, batch in enumerate(ids):
            with torch.inference_mode(number % 3 == 0):
                recorder.add(0, batch[0] + 0)
            with torch.inference_mode(number == 3):
                recorder.step()
    assert_holds(path, ids, 8)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "path must end in .npz", {"path": "t.bin"}),
        (FileNotFoundError, "path: no such folder: .*none'", {"path": "none/t.npz"}),
        (FileNotFoundError, "path: no such folder", {"path": "file/t.npz"}),
        (IsADirectoryError, "path is a folder", {"path": "folder.npz"}),
        (OSError, "path: can't write .* in .*", {"path": 250 * "x" + ".npz"}),
        (ValueError, "n_experts", {"n_experts": 0}),
        (ValueError, "adds_per_step", {"adds_per_step": 0}),
        (TypeError, "adds_per_step", {"adds_per_step": 1.0}),
        (ValueError, "max_batches", {"max_batches": 1}),
        (TypeError, "every", {"every": 1.5}),
        (ValueError, "rank must be below world_size", {"rank": 2, "world_size": 2}),
        (ValueError, "together", {"rank": 2, "world_size": None}),
        (ValueError, "meta must be something JSON can hold", {"meta": {"a": torch.ones(1)}}),
        (TypeError, "meta must have string keys", {"meta": {1: 2}}),
        (ValueError, "meta must not have the key 'recorder'", {"meta": {"recorder": {}}}),
    ],
)
@pytest.mark.parametrize("ranks", [{}, {"rank": 0, "world_size": 2}], ids=["alone", "rank"])
def test_wrong_arguments_are_refused_at_the_start(
    tmp_path, monkeypatch, error, match, arguments, ranks
):
    """A wrong argument is refused by name when a recorder is made, and no file is left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "folder.rank00000.npz").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match):
        Recorder(**{"path": "t.npz", "n_experts": 4, "layers": 1, **ranks, **arguments})
    Recorder("t.npz", 4, 1)
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_calls(tmp_path):
    """A wrong layer or wrong ids are refused by name, and so is a save without a batch."""
    recorder = Recorder(tmp_path / "t.npz", 4, 1)
    for error, match, layer, ids in (
        (ValueError, "layer must be in", 1, torch.tensor([0])),
        (ValueError, "layer must be", -1, torch.tensor([0])),
        (TypeError, "layer must be an int", 0.0, torch.tensor([0])),
        (TypeError, "topk_ids must be a torch.Tensor", 0, [0]),
        (TypeError, "topk_ids must be int32 or int64", 0, torch.tensor([0.5])),
    ):
        with pytest.raises(error, match=match):
            recorder.add(layer, ids)
    with pytest.raises(ValueError, match="no batch was recorded: call add"):
        recorder.save()
    recorder.add(0, torch.tensor([0]))
    recorder.step()
    with pytest.raises(ValueError, match="topk_ids is on meta, earlier ones were on cpu"):
        recorder.add(0, torch.empty(1, dtype=torch.int64, device="meta"))


def test_a_relative_path_is_of_the_folder_at_the_start(tmp_path, monkeypatch):
    """A relative path means the folder that was current when the recorder was made."""
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with Recorder("t.npz", 8, 1) as recorder:
        feed(recorder, draw(1, 1, 8))
        monkeypatch.chdir(tmp_path / "other")
    assert load(tmp_path / "t.npz").batches == 1


@pytest.mark.parametrize("complete", [False, True])
def test_an_error_in_the_block_keeps_the_batches_before_it(tmp_path, caplog, complete):
    """An error in the block still writes the complete batches and logs how many."""
    path, ids = tmp_path / "t.npz", draw(3, 2, 8)
    with pytest.raises(KeyError), Recorder(path, 8, 2):
        raise KeyError
    assert not path.exists() and not caplog.records
    with pytest.raises(KeyError), Recorder(path, 8, 2) as recorder:
        feed(recorder, ids[:2])
        for layer in range(1 + complete):
            recorder.add(layer, ids[2, layer])
        raise KeyError
    assert_holds(path, ids[: 2 + complete], 8)
    assert f"recording ended by KeyError: {path} has {2 + complete} batches" in caplog.text
    assert ("for layers 1 and is left out" in caplog.text) != complete
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    with pytest.raises(RuntimeError, match="closed"):
        recorder.step()

    # With any number of calls nobody knows whether the batch was complete.
    with pytest.raises(KeyError), Recorder(path, 8, 1, adds_per_step=None) as recorder:
        feed(recorder, ids[:1, :1])
        recorder.add(0, ids[1, 0])
        raise KeyError
    assert_holds(path, ids[:1, :1], 8)


def test_what_can_not_be_read_from_the_device_costs_only_itself(tmp_path, caplog):
    """Counts that the device can't return are lost alone, and the rest is written."""
    path, ids = tmp_path / "t.npz", draw(3, 1, 8)

    class Broken:
        device = torch.device("cpu")

        def __getitem__(self, index):
            raise RuntimeError("CUDA error")

    with pytest.raises(KeyError), Recorder(path, 8, 1, flush_every=2) as recorder:
        feed(recorder, ids)
        recorder._buffer = Broken()
        raise KeyError
    assert_holds(path, ids[:2], 8)
    assert "counts of 1 batches could not be read from the device: CUDA error" in caplog.text


def no_space(monkeypatch, refused):
    """Let files be refused, as by a full disk, in folders for which ``refused`` holds."""
    from lplb_triton.traces import record

    def save(path, trace, save=record.save):
        if refused(Path(path).parent):
            raise OSError(28, "No space left on device")
        save(path, trace)

    monkeypatch.setattr(record, "save", save)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """If the disk is full, batches stay in memory and in a rescued file, and can be saved later."""
    path, ids, temporary = tmp_path / "t.npz", draw(2, 1, 8), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    recorder = Recorder(path, 8, 1)
    with monkeypatch.context() as patch:
        no_space(patch, lambda folder: folder == tmp_path)
        feed(recorder, ids[:1])
        with pytest.raises(OSError, match="No space left.*stay in memory: call save") as raised:
            recorder.save()
        assert raised.value.errno == 28 and not list(temporary.iterdir())
        feed(recorder, ids[1:])
        with pytest.raises(OSError, match=r"No space left.* 2 batches are in .*/t\.npz and in mem"):
            recorder.close()
    (rescued,) = temporary.glob("*/t.npz")
    assert_holds(rescued, ids, 8)
    with monkeypatch.context() as patch:
        no_space(patch, lambda folder: True)
        with pytest.raises(OSError, match="2 batches are in memory only: call close"):
            recorder.close()
    with pytest.raises(FileNotFoundError, match="path: no such folder"):
        recorder.save(tmp_path / "none" / "t.npz")
    recorder.save(tmp_path / "other.npz")
    recorder.close()
    for name in ("other.npz", "t.npz"):
        assert_holds(tmp_path / name, ids, 8)


def test_a_recorder_that_was_not_closed_says_what_is_lost(tmp_path, caplog):
    """A recorder deleted without a close logs how many batches are lost."""
    recorder = Recorder(tmp_path / "t.npz", 8, 1)
    feed(recorder, draw(3, 1, 8))
    recorder.save()
    feed(recorder, draw(2, 1, 8))
    del recorder
    gc.collect()
    assert "t.npz was not closed: 2 batches are lost" in caplog.text
    caplog.clear()
    recorder = Recorder(tmp_path / "t.npz", 8, 1)
    feed(recorder, draw(3, 1, 8))
    recorder.close()
    del recorder
    gc.collect()
    assert not caplog.records


def test_a_recorder_made_before_the_process_group(tmp_path, monkeypatch):
    """A recorder made before the process group must be told its rank and world size."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="rank and world_size must be given.*WORLD_SIZE is 2"):
        Recorder(tmp_path / "t.npz", 8, 1)
    Recorder(tmp_path / "t.npz", 8, 1, rank=0, world_size=1)
    monkeypatch.delenv("WORLD_SIZE")
    early = Recorder(tmp_path / "t.npz", 8, 1)
    said = Recorder(tmp_path / "t.npz", 8, 1, rank=0, world_size=1)
    for recorder in (early, said):
        recorder.add(0, torch.tensor([0]))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    said.step()
    with pytest.raises(RuntimeError, match="initialised after the recorder was made"):
        early.step()
    said.close()


def test_compiled_layers(tmp_path):
    """A compiled layer records without recompiling if `add` is disabled for the compiler."""
    path, ids = tmp_path / "t.npz", draw(12, 1, 8)
    with Recorder(path, 8, 1) as recorder:
        add = torch.compiler.disable(recorder.add)

        @torch.compile(backend="eager")
        def layer(topk_ids):
            add(0, topk_ids)
            return topk_ids + 1

        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in ids:
                layer(batch[0])
                recorder.step()
    assert_holds(path, ids, 8)


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_between_two_copies(tmp_path):
    """Recording on a GPU does not synchronise between two copies to the host."""
    ids = draw(6, 2, 8)
    recorder = Recorder(tmp_path / "t.npz", 8, 2, adds_per_step=None)
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
    assert_holds(tmp_path / "t.npz", ids, 8)
