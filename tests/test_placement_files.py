"""Placements in files: they round-trip, and a wrong file is refused for what is wrong with it."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from helpers.traces import make_trace

from lplb_triton import Placement, chain, load_placements, place, save_placements, topologies
from lplb_triton.traces import trace as traces

LOAD = torch.linspace(1, 9, 16)


def kinds():
    """Placements that differ in all that a placement has."""
    return {
        0: Placement.from_history(LOAD, 4, redundant_per_rank=2),
        1: chain(LOAD, 4, redundant_per_rank=1, ranks_per_domain=2),
        2: chain(LOAD, 4, keep_home=True).with_live_slots(2),
        5: Placement.from_topology(topologies.ring(2), 24, 16, 4, workload=LOAD),
        7: Placement(np.arange(16), 4, n_logical=16, max_columns=9),
    }


def sign(content):
    """Give a content the checksum that docs/placement.md describes."""
    covered = {name: value for name, value in content.items() if name != "sha256"}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return content


def test_every_kind_of_placement_round_trips(tmp_path):
    """One file holds many layers, and each placement in it equals the one that was saved."""
    path, made = tmp_path / "p.json", kinds()
    save_placements(path, dict(reversed(made.items())), note="hand-made: ü")
    assert load_placements(path) == made
    assert list(load_placements(path)) == sorted(made)
    for layer, placement in made.items():
        assert Placement.load(path, layer=layer) == placement
        placement.save(tmp_path / "one.json", layer=layer, note="x")
        assert Placement.load(tmp_path / "one.json") == placement
        assert load_placements(tmp_path / "one.json") == {layer: placement}
    content = json.loads(path.read_text())
    assert content["note"] == "hand-made: ü" and content["created_by"].startswith("lplb_triton ")
    assert sign(dict(content)) == content
    assert sorted(os.listdir(tmp_path)) == ["one.json", "p.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    """A file is replaced in one step: where that fails, the old one stays and nothing else."""
    path = tmp_path / "p.json"
    kinds()[0].save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        kinds()[2].save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["p.json"]


def wrong_contents():
    """Each way in which a file can be wrong, with what the message says."""

    def changed(**members):
        return lambda content: sign({**content, **members})

    def entry(**members):
        return lambda content: sign(
            {**content, "placements": [{**content["placements"][0], **members}]}
        )

    def without(name):
        return lambda content: {k: v for k, v in content.items() if k != name}

    return [
        (lambda content: [], "'format' must be"),
        (changed(format="other"), "'format' must be"),
        (changed(format_version=2), "'format_version' is 2, .*up to 1; upgrade"),
        (changed(format_version="1"), "'format_version' must be a positive integer"),
        (changed(format_version=True), "'format_version' must be a positive integer"),
        (without("sha256"), "lacks 'sha256'"),
        (without("placements"), "lacks 'placements'"),
        (changed(extra=1), "unknown members: 'extra'"),
        (lambda content: {**content, "note": "changed"}, "'sha256' does not match"),
        (changed(placements=[]), "'placements' must be a list that is not empty"),
        (changed(placements=[3]), r"'placements'\[0\] must be an object"),
        (entry(phy2log=3), r"'placements'\[0\]: phy2log must be a list"),
        (entry(phy2log=[0, 0.5]), r"'placements'\[0\]: phy2log must hold integers"),
        (entry(phy2log=[0, 99]), r"'placements'\[0\]: "),
        (entry(phy2log=[2**70]), r"'placements'\[0\]: phy2log must hold integers"),
        (entry(ep_size="4"), r"'placements'\[0\]: ep_size"),
        (entry(layer=-1), r"'placements'\[0\]: layer"),
        (entry(live_per_rank=7), r"'placements'\[0\]: live_per_rank"),
        (
            lambda content: sign({**content, "placements": content["placements"] * 2}),
            r"'placements'\[1\]: layer 0 is there twice",
        ),
    ]


@pytest.mark.parametrize(("change", "message"), wrong_contents())
def test_a_wrong_file_is_refused_for_what_is_wrong(tmp_path, change, message):
    """The error is a ValueError that names the file and what is wrong with it."""
    path = tmp_path / "p.json"
    kinds()[0].save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    for read in (Placement.load, load_placements):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)


def test_files_that_are_no_json_and_arguments_that_do_not_fit_are_refused(tmp_path):
    """Other files, missing files and wrong arguments are refused by name."""
    path = tmp_path / "p.json"
    for content in (b"", b"\xff\xfe", b"{", b"[" * 100_000, b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="JSON"):
            Placement.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Placement.load(tmp_path / "none.json")
    save_placements(path, kinds())
    with pytest.raises(ValueError, match="layers 0, 1, 2, 5, 7: give layer"):
        Placement.load(path)
    with pytest.raises(ValueError, match="layer must be one of those in .*, got 3"):
        Placement.load(path, layer=3)
    with pytest.raises(TypeError, match="mapping"):
        save_placements(path, [kinds()[0]])
    with pytest.raises(ValueError, match="at least one"):
        save_placements(path, {})
    with pytest.raises(TypeError, match="hold Placements, got int"):
        save_placements(path, {0: 3})
    with pytest.raises(TypeError, match="note must be a str"):
        kinds()[0].save(path, note=3)
    with pytest.raises(ValueError, match="layer"):
        kinds()[0].save(path, layer=-1)


def test_loads_of_a_trace_go_into_every_way_of_placing():
    """`Trace.loads` is what all three take; a batch counts equally, whatever its total."""
    trace = make_trace(batches=12, layers=2, experts=16)
    loads = trace.loads(1)
    assert loads.dtype == torch.float64
    assert torch.equal(loads, torch.from_numpy(trace.totals()[:, 1]).double())
    mean = (loads / loads.sum(1, keepdim=True)).mean(0)
    uneven = torch.cat([loads * torch.arange(1.0, 13.0)[:, None], torch.zeros(2, 16)])
    for keep_home in (False, True):
        for make in (chain, Placement.from_history):
            assert make(loads, 4, keep_home=keep_home) == make(mean, 4, keep_home=keep_home)
            assert make(uneven, 4, keep_home=keep_home) == make(mean, 4, keep_home=keep_home)
    assert place(loads, 4, trials=1).n_logical == 16
    with pytest.raises(ValueError, match="layer must be given for a trace of 2 layers"):
        trace.loads()
    with pytest.raises(ValueError, match=r"layer must be in \[0, 2\), got 2"):
        trace.loads(2)
    assert torch.equal(make_trace(layers=1).loads(), make_trace(layers=1).loads(0))
    with pytest.raises(ValueError, match="finite and non-negative"):
        Placement.from_history(-loads, 4)


def test_a_trace_is_told_from_a_placement(tmp_path):
    """A trace, in either format, is refused with the command that makes placements of it."""
    recorded = make_trace(batches=2, layers=1, experts=4)
    traces.save(tmp_path / "t.npz", recorded)
    (tmp_path / "t.json").write_text(json.dumps(recorded.counts.tolist()))
    (tmp_path / "o.json").write_text(json.dumps({"counts": recorded.counts.tolist()}))
    for name in ("t.npz", "t.json", "o.json"):
        with pytest.raises(ValueError, match=f"{name}: .* like a trace: `lplb-bench place` makes"):
            Placement.load(tmp_path / name)
