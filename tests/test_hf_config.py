"""Sizes from Hugging Face configurations, and the table of published models."""

import json
import re
from pathlib import Path

import pytest
from helpers.traces import make_trace

from lplb_triton.bench import advise, cli
from lplb_triton.traces import trace as traces

ROOT = Path(__file__).resolve().parents[1]

# The fields of public configurations that sizes are read from; hidden, inner, experts, top-k and
# layers with experts.
CONFIGS = {
    "mixtral": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_local_experts": 8, "num_experts_per_tok": 2},
        (4096, 14336, 8, 2), 32,
    ),
    "qwen2_moe": (
        {"hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408,
         "num_hidden_layers": 24, "num_experts": 60, "num_experts_per_tok": 4,
         "decoder_sparse_step": 2, "mlp_only_layers": [1]},
        (2048, 1408, 60, 4), 11,
    ),
    "deepseek_v3": (
        {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
         "num_hidden_layers": 61, "n_routed_experts": 256, "n_shared_experts": 1,
         "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1},
        (7168, 2048, 256, 8), 58,
    ),
    "gpt_oss": (
        {"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
         "num_local_experts": 128, "experts_per_token": 4, "num_experts_per_tok": 4},
        (2880, 2880, 128, 4), 36,
    ),
    "olmoe": (
        {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
         "num_experts": 64, "num_experts_per_tok": 8},
        (2048, 1024, 64, 8), 16,
    ),
    "glm4_moe_lite": (
        {"hidden_size": 2048, "moe_intermediate_size": 1536, "intermediate_size": 10240,
         "num_hidden_layers": 4, "n_routed_experts": 64, "num_experts_per_tok": 4,
         "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
        (2048, 1536, 64, 4), 3,
    ),
    "llama4": (
        {"text_config": {"hidden_size": 5120, "intermediate_size": 8192,
                         "intermediate_size_mlp": 16384, "num_hidden_layers": 48,
                         "num_local_experts": 128, "num_experts_per_tok": 1,
                         "interleave_moe_layer_step": 2},
         "vision_config": {"hidden_size": 1408, "num_hidden_layers": 34}},
        (5120, 8192, 128, 1), 24,
    ),
    "minimax_m2": (
        {"hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
         "num_local_experts": 256, "num_experts_per_tok": 8},
        (3072, 1536, 256, 8), 62,
    ),
    "ernie4_5_moe": (
        {"hidden_size": 2560, "intermediate_size": 12288, "moe_intermediate_size": [1536, 1536],
         "num_hidden_layers": 28, "moe_num_experts": 64, "moe_k": 6, "moe_layer_start_index": 1,
         "moe_layer_end_index": 26, "moe_layer_interval": 1},
        (2560, 1536, 64, 6), 26,
    ),
    "jamba": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_experts": 16, "num_experts_per_tok": 2, "expert_layer_period": 2,
         "expert_layer_offset": 1},
        (4096, 14336, 16, 2), 16,
    ),
    "dbrx": (
        {"d_model": 6144, "n_layers": 40,
         "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4}},
        (6144, 10752, 16, 4), 40,
    ),
    "nemotron_h": (
        {"hidden_size": 2688, "moe_intermediate_size": 1856, "n_routed_experts": 128,
         "num_experts_per_tok": 6, "num_hidden_layers": 6, "hybrid_override_pattern": "MEM*ME"},
        (2688, 1856, 128, 6), 2,
    ),
    "hunyuan": (
        {"hidden_size": 4096, "intermediate_size": 3072, "moe_intermediate_size": [3072] * 3,
         "num_hidden_layers": 3, "num_experts": 64, "moe_topk": [8, 8, 8],
         "moe_layer_num_skipped": 0},
        (4096, 3072, 64, 8), 3,
    ),
    "without_layers": (
        {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "moe_topk": 2},
        (64, 32, 4, 2), None,
    ),
}  # fmt: skip


@pytest.fixture
def save(tmp_path):
    """Write a configuration, and return its path."""

    def write(content):
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.mark.parametrize("kind", CONFIGS)
def test_sizes_of_every_family_are_found(save, kind):
    """The width of an expert, not of a dense layer, and the layers with experts are found."""
    content, sizes, layers = CONFIGS[kind]
    path = save({"model_type": kind, **content})
    found = advise.read_config(path)
    assert (tuple(found.sizes), found.layers) == (sizes, layers)
    assert advise.read_config(path.parent) == found
    assert set(found.names) == set(advise.Model._fields)


GOOD = CONFIGS["deepseek_v3"][0]
LLAMA = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LLAMA, r"\(model_type 'llama'\): no routed experts: looked for n_routed_experts, num_exp"),
        ({**LLAMA, "num_experts": 0}, "no routed experts"),
        ({**GOOD, "n_routed_experts": 1}, "'n_routed_experts' is 1: the model is dense"),
        ({**GOOD, "n_routed_experts": "many"}, "'n_routed_experts' must be one integer"),
        ({**GOOD, "num_experts_per_tok": None}, "no top_k: looked for num_experts_per_tok, "),
        ({**GOOD, "num_experts_per_tok": 500}, "'num_experts_per_tok' is 500, of 256 experts"),
        ({**GOOD, "hidden_size": True}, "'hidden_size' must be one integer"),
        ({**GOOD, "moe_intermediate_size": [1, 2]}, "'moe_intermediate_size' must be one integer"),
        ({**GOOD, "moe_intermediate_size": None, "intermediate_size": 18432},
         "'moe_intermediate_size' is missing, and 'intermediate_size' is that of dense layers; "
         "give --inner"),
        ({**LLAMA, "num_experts": 8, "num_experts_per_tok": 2,
          "shared_expert_intermediate_size": 64}, "'moe_intermediate_size' is missing"),
        ({**GOOD, "first_k_dense_replace": "x"}, "'first_k_dense_replace' must be one integer"),
        ([], "expected an object, got list"),
        ("{", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
    ],
)  # fmt: skip
def test_what_has_no_sizes_is_refused_with_what_was_looked_for(save, capsys, content, message):
    """A dense, unknown or broken configuration is refused by the command, which says why."""
    path = save(content)
    with pytest.raises(ValueError, match=message):
        advise.read_config(path)
    assert cli.main(["advise", "--gemm", "table", "--hf-config", str(path)]) == cli.USAGE
    assert re.search(f"argument --hf-config: .*config.json.*{message}", capsys.readouterr().err)


def test_the_command_takes_a_configuration(save, tmp_path, capsys):
    """`advise --hf-config` says which field each size comes from, and options replace some."""
    path = save({**GOOD, "n_routed_experts": 32})
    common = ["advise", "--gemm", "table", "--ep", "8", "--slots", "1"]
    command = [*common, "--hf-config", str(path)]
    assert cli.main([*command, "--top-k", "4", "--json", "-"]) == cli.OK
    shown = capsys.readouterr()
    found = json.loads(shown.out)["options"]
    assert tuple(found["model"].values()) == (7168, 2048, 32, 4) and found["layers"] == 58
    assert found["sizes_from"]["inner"] == "config.json: moe_intermediate_size"
    assert found["sizes_from"]["top_k"] == "--top-k"
    assert "one of 58 such layers" in " ".join(shown.err.split())
    traces.save(tmp_path / "t.npz", make_trace(experts=64, layers=1))
    assert cli.main([*command, "--trace", str(tmp_path / "t.npz")]) == cli.USAGE
    message = "argument --hf-config: config.json has experts 32, the trace t.npz 64"
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--model", "deepseek-v3"])
    assert cli.main([*common, "--hf-config", "nope"]) == cli.USAGE
    assert "argument --hf-config: no such file: 'nope'" in capsys.readouterr().err
    path = save({**GOOD, "n_routed_experts": 32, "moe_intermediate_size": None})
    assert cli.main([*command, "--inner", "512", "--json", "-"]) == cli.OK
    found = json.loads(capsys.readouterr().out)["options"]
    assert found["model"]["inner"] == 512 and found["sizes_from"]["inner"] == "--inner"


# Parameters of each model in all, in thousand millions, as published.
PARAMETERS = {
    "deepseek-v3": 671, "kimi-k2": 1026, "glm-4.5": 355, "minimax-m2": 230,
    "qwen3-235b-a22b": 235, "qwen3-next-80b-a3b": 80, "gpt-oss-120b": 117,
    "llama-4-maverick": 400, "mixtral-8x7b": 46.7, "olmoe-1b-7b": 6.9,
}  # fmt: skip


def test_published_sizes_make_up_the_published_parameters():
    """Experts are most of a model: 92 to 100 % of the parameters that each is published with."""
    assert set(PARAMETERS) == set(advise.PUBLISHED)
    for name, (sizes, layers, _) in advise.PUBLISHED.items():
        weights = 3 * sizes.hidden * sizes.inner * sizes.experts * layers / 1e9
        assert 0.92 < weights / PARAMETERS[name] <= 1, name


def test_the_documented_table_is_the_one_in_use():
    """docs/cli.md has each published model with its sizes, layers and repository."""
    rows = re.findall(r"^\| `([\w.-]+)` \| (.+) \|$", (ROOT / "docs/cli.md").read_text(), re.M)
    shown = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    for name, (sizes, layers, repository) in advise.PUBLISHED.items():
        numbers = sizes.experts, sizes.top_k, sizes.hidden, sizes.inner, layers
        url = f"https://huggingface.co/{repository}/blob/main/config.json"
        assert shown[name] == [*map(str, numbers), f"[{repository}]({url})"]
