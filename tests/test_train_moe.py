"""The MoE training example: routing, recording and a few small steps on the CPU."""

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.texts import write_text

from lplb_triton.traces import trace as traces

ROOT = Path(__file__).parents[1]


# As when the script is run.
sys.path.append(str(ROOT / "examples"))
moe, corpus_of, experts = map(importlib.import_module, ("train_moe", "moe.corpus", "moe.experts"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def config(text, tmp_path):
    return moe.Config(
        steps=6,
        device="cpu",
        experts=8,
        top_k=2,
        layers=2,
        hidden=16,
        expert_hidden=8,
        vocab=300,
        sources=4,
        tokens_per_source=32,
        seq_len=16,
        warmup=2,
        log_every=3,
        text=text,
        record=str(tmp_path / "t.npz"),
        record_early=2,
        record_late=2,
    )


def quiet(line):
    pass


def test_training_lowers_the_loss_and_conserves_tokens(config):
    """Thirty steps lower the loss, and every token is counted top-k times."""
    lines = []
    result = moe.train(replace(config, steps=30, lr=3e-3), log=lines.append)
    assert result.losses.shape == result.imbalance.shape == (30,)
    assert result.losses[-5:].mean() < result.losses[:5].mean() - 0.1
    assert (result.imbalance >= 1 - 1e-6).all()
    assert sum("tokens/s" in line for line in lines) == 10

    trace = result.trace
    assert trace.counts.shape == (4, 2, 4, 8)
    assert trace.steps.tolist() == [0, 1, 28, 29]
    # Every source rank routes each of its tokens to top_k experts, in every layer.
    np.testing.assert_array_equal(trace.counts.sum(-1), np.full((4, 2, 4), 32 * 2))
    # Distinct experts per token: none can have more assignments than the rank has tokens.
    assert trace.counts.max() <= 32
    assert len({trace.counts[-1, 0, source].tobytes() for source in range(4)}) > 1


def test_recording_does_not_depend_on_the_stretches(config):
    """A recorded batch has the same counts whichever other batches are recorded."""
    whole = moe.train(replace(config, record_early=6, record_late=0), log=quiet).trace
    parts = moe.train(config, log=quiet).trace
    assert whole.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert parts.steps.tolist() == [0, 1, 4, 5]
    np.testing.assert_array_equal(parts.counts, whole.counts[parts.steps])


def test_same_seed_same_run(config):
    """The same seed gives the same losses and counts, and another one does not."""
    first, again = (moe.train(config, log=quiet) for _ in range(2))
    assert torch.equal(first.losses, again.losses)
    np.testing.assert_array_equal(first.trace.counts, again.trace.counts)
    other = moe.train(replace(config, seed=1), log=quiet)
    assert not torch.equal(first.losses, other.losses)


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        ({}, 7, [0, 1, 5, 6]),
        ({}, 3, [0, 1, 2]),
        ({"record_early": 0}, 5, [3, 4]),
        ({"record_late": 0}, 5, [0, 1]),
        ({"record_from": 2}, 9, [2, 3, 7, 8]),
        ({"record_every": 3, "record_from": 1, "steps": 20}, 20, [1, 4, 16, 19]),
    ],
)
def test_recorder_keeps_first_and_last(config, settings, steps, expected):
    """The recorder keeps the first and last batches that are asked for."""
    recorder = moe.Recorder(replace(config, **settings), torch.device("cpu"))
    for step in range(steps):
        recorder.add(step, torch.full((2, 4, 8), step, dtype=torch.int32))
    trace = recorder.trace({"a": 1})
    assert trace.steps.tolist() == expected
    assert trace.counts[:, 1, 2, 3].tolist() == expected


def test_recorder_without_batches(config):
    """A recorder without batches has no trace."""
    recorder = moe.Recorder(config, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        recorder.trace({})


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_route_uses_the_bias_for_selection_only(config, router):
    """A bias decides which experts are chosen, and does not change their weights."""
    torch.manual_seed(0)
    block = moe.MoE(replace(config, router=router), grouped=False)
    x = torch.randn(20, 16)
    block.bias[5] = 10.0
    ids, weights, scores = block.route(x)
    assert weights.dtype == scores.dtype == torch.float32
    assert (ids == 5).any(-1).all()
    assert all(len(set(row)) == 2 for row in ids.tolist())
    torch.testing.assert_close(weights.sum(-1), torch.ones(20))
    torch.testing.assert_close(scores.sum(-1), torch.ones(20))
    chosen = scores.gather(1, ids)
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))


def test_balance_moves_each_bias_towards_an_even_load(config):
    """A bias falls above the mean load, rises below it, and stays at it."""
    block = moe.MoE(config, grouped=False)
    block.balance(torch.tensor([9, 1, 4, 4, 4, 4, 4, 2]), rate=0.25)
    assert block.bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0.25]


def test_bias_rate_zero_leaves_the_bias_alone(config):
    """Biases stay 0 if their rate is 0, and change otherwise."""
    assert not moe.train(replace(config, bias_rate=0.0), log=quiet).bias.any()
    assert moe.train(config, log=quiet).bias.any()


@pytest.mark.parametrize("grouped", [False, True])
def test_moe_equals_a_loop_over_tokens(config, grouped):
    """Outputs, gradients, counts and the auxiliary loss are those of a loop over tokens."""
    if grouped and experts.find_grouped_mm() is None:
        pytest.skip("this torch has no grouped matrix product")
    torch.manual_seed(0)
    block = moe.MoE(config, grouped)
    x = torch.randn(128, 16, requires_grad=True)
    y, counts, aux = block(x)

    ids, weights, scores = block.route(x)
    rows = []
    for token in range(128):
        row = 0
        for choice in range(2):
            expert = ids[token, choice]
            gate, value = (x[token] @ block.w_in[expert]).chunk(2)
            row = row + weights[token, choice] * (
                (torch.nn.functional.silu(gate) * value) @ block.w_out[expert]
            )
        rows.append(row)
    expected = torch.stack(rows)
    # bfloat16 rounds inputs, weights and both products to 8 bits.
    tolerance = {"rtol": 0.05, "atol": 0.03} if grouped else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y, expected, **tolerance)

    factor = torch.randn(128, 16)
    leaves = [x, block.router, block.w_in, block.w_out]
    got = torch.autograd.grad((y * factor).sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad((expected * factor).sum(), leaves)
    for found, reference in zip(got, wanted, strict=True):
        error = (found - reference).norm() / reference.norm()
        assert error < (0.02 if grouped else 1e-4)

    by_hand = torch.zeros(4, 8, dtype=torch.int32)
    for token in range(128):
        for expert in ids[token]:
            by_hand[token // 32, expert] += 1
    assert torch.equal(counts, by_hand)
    share = by_hand.sum(0) / by_hand.sum()
    torch.testing.assert_close(aux, 8 * (share * scores.mean(0)).sum())


def test_experts_without_rows(config):
    """Experts without tokens have no gradient."""
    torch.manual_seed(0)
    block = moe.MoE(config, grouped=False)
    block.bias[:2] = 10.0
    y, counts, _ = block(torch.randn(128, 16))
    assert counts[:, :2].sum() == 256
    assert counts[:, 2:].sum() == 0
    y.sum().backward()
    assert block.w_in.grad[:2].any()
    assert not block.w_in.grad[2:].any()


def test_check_grouped():
    """The grouped product of this torch passes its check."""
    if experts.find_grouped_mm() is None:
        pytest.skip("this torch has no grouped matrix product")
    moe.check_grouped(torch.device("cpu"))


def test_check_grouped_finds_a_wrong_product(monkeypatch):
    """A wrong grouped product is found, and the error names the loop to use."""

    def wrong(x, weight, offs):
        return x @ weight[0]

    monkeypatch.setattr(experts, "find_grouped_mm", lambda: wrong)
    with pytest.raises(RuntimeError, match="expert-matmul loop"):
        moe.check_grouped(torch.device("cpu"))


def test_rank_imbalance():
    """Imbalance is the largest rank load over the mean load, averaged over layers."""
    counts = torch.zeros(2, 3, 64, dtype=torch.int32)
    counts[:] = 1
    assert moe.measure_imbalance(counts).item() == 1
    # All of layer 1 on one of 32 ranks: (1 + 32) / 2.
    counts[1] = 0
    counts[1, :, 0] = 5
    assert moe.measure_imbalance(counts).item() == 16.5


def test_corpus_gives_each_source_its_own_text(config):
    """Sources divide the tokens among them, and there are fewer tokens than bytes."""
    corpus = moe.build_corpus(config)
    assert corpus.starts.tolist() == (corpus.lengths.cumsum(0) - corpus.lengths).tolist()
    assert corpus.lengths.sum() == corpus.tokens.numel()
    assert corpus.lengths.min() > config.seq_len
    assert corpus.tokens.max() < config.vocab
    assert corpus.tokens.min() >= 0
    # Enough tokens for the longer pieces: far fewer tokens than bytes.
    assert corpus.tokens.numel() < corpus.size / 1.5


def test_bytes_only_vocabulary_keeps_every_byte(config, tmp_path):
    """With a vocabulary of 256 tokens are the file's bytes."""
    content = bytes(range(256)) * 40
    (tmp_path / "a.bin").write_bytes(content)
    settings = replace(config, text=str(tmp_path / "a.bin"), vocab=256, sources=1)
    corpus = moe.build_corpus(settings)
    assert bytes(corpus.tokens.tolist()) == content


def test_standard_library_is_the_default_text():
    """Without a text the standard library is read, in an order given by the seed."""
    documents = corpus_of.read_documents(None, 50_000, seed=0)
    assert sum(map(len, documents)) == 50_000
    assert documents == corpus_of.read_documents(None, 50_000, seed=0)
    assert documents != corpus_of.read_documents(None, 50_000, seed=1)


def test_text_errors(config, tmp_path):
    """A text that is missing or too short is refused."""
    with pytest.raises(FileNotFoundError, match="text: no such file or folder"):
        moe.build_corpus(replace(config, text=str(tmp_path / "none")))
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="text must give each of the 4 sources at least"):
        moe.build_corpus(replace(config, text=str(tmp_path / "short.txt")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"top_k": 9}, r"top_k must be at most experts \(8\), got 9"),
        ({"hidden": 12}, "hidden must be a multiple of 8, got 12"),
        ({"seq_len": 24}, r"tokens_per_source must be a multiple of seq_len \(24\), got 32"),
        ({"router": "hash"}, "router must be sigmoid or softmax, got 'hash'"),
        ({"bias_rate": -1.0}, "bias_rate must be finite and at least 0"),
        ({"lr": float("nan")}, "lr must be finite and above 0"),
        ({"vocab": 255}, "vocab must be from 256 to 65536"),
        ({"record": "t.txt"}, r"record must be a path ending in \.npz"),
        ({"record": "no-such-folder/t.npz"}, "record must be a path in an existing folder"),
        ({"record_early": 0, "record_late": 0}, "record_early must be at least 1 unless"),
        ({"record_from": 6}, r"record_from must be below steps \(6\), got 6"),
        ({"expert_matmul": "fast"}, "expert_matmul must be auto, grouped or loop"),
        ({"time_limit": 0.0}, "time_limit must be above 0 seconds"),
    ],
)
def test_config_rejects(config, settings, message):
    """A wrong setting is refused by name."""
    with pytest.raises(ValueError, match=message):
        replace(config, **settings)


def test_pick_device_rejects():
    """A device that is unknown or missing is refused by name."""
    for name in ("tpu-please", "meta"):
        with pytest.raises(ValueError, match="device must be auto, cpu, cuda"):
            moe.pick_device(name)
    with pytest.raises(ValueError, match="device must exist, got 'cuda:99'"):
        moe.pick_device("cuda:99")


def test_time_limit_stops_at_a_progress_line(config):
    """A run out of time ends at its next progress line with its trace."""
    lines = []
    result = moe.train(replace(config, time_limit=1e-9), log=lines.append)
    assert len(result.losses) == 3
    assert result.trace.steps.tolist() == [0, 1, 2]
    assert "time limit" in lines[-1]


def test_command_line_writes_a_trace(text, tmp_path, capsys):
    """The command writes a trace, which tells nothing of folders."""
    path = tmp_path / "t.npz"
    arguments = (
        f"--device cpu --steps 4 --experts 8 --top-k 2 --layers 1 --hidden 16 --expert-hidden 8 "
        f"--vocab 300 --sources 2 --tokens-per-source 16 --seq-len 16 --aux-loss 0.01 "
        f"--router softmax --record {path} --text {text}"
    )
    assert moe.main(arguments.split()) == 0
    assert "recorded 4 x 1 x 2 x 8 counts" in capsys.readouterr().out
    trace = traces.load(path)
    assert trace.counts.shape == (4, 1, 2, 8)
    assert trace.meta["top_k"] == 2
    assert trace.meta["tokens_per_source"] == 16
    assert trace.meta["steps_done"] == 4
    # The trace may be published: nothing in it tells where it was made.
    described = json.dumps(trace.meta)
    assert str(tmp_path) not in described
    assert text not in described


def test_documented_command_made_the_packaged_trace(monkeypatch):
    """The settings in the packaged trace are those of the documented command."""
    monkeypatch.chdir(ROOT)  # the command names a folder below it
    commands = moe.__doc__.replace("\\\n", " ").splitlines()
    (command,) = [line for line in commands if "bench/data/moe256.npz" in line and "--" in line]
    documented = asdict(moe.parse_arguments(command.split()[2:]))
    meta = traces.packaged().meta
    # A time limit that was not reached changes nothing.
    assert meta["steps_done"] == documented["steps"]
    recorded = {key: value for key, value in meta["settings"].items() if key != "time_limit"}
    assert recorded == {key: documented[key] for key in recorded}


def test_command_line_errors(tmp_path, capsys):
    """A wrong setting, text or path ends the command before the training."""
    with pytest.raises(SystemExit) as stopped:
        moe.main(["--top-k", "300"])
    assert stopped.value.code == 2
    assert "top_k must be at most experts (256)" in capsys.readouterr().err
    assert moe.main(["--device", "cpu", "--text", str(tmp_path / "none")]) == 1
    assert "error: text: no such file" in capsys.readouterr().err
    # Tried before the training, not after it.
    (tmp_path / "folder.npz").mkdir()
    assert moe.main(["--device", "cpu", "--record", str(tmp_path / "folder.npz")]) == 1
    assert "error: path is a folder" in capsys.readouterr().err
