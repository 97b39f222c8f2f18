"""Read the sizes of a model's MoE layers from its Hugging Face ``config.json``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lplb_triton._files import parse_json
from lplb_triton.bench.advise.models import Model

__all__ = ["ConfigSizes", "read_config"]

# Names of each size, the first that is there counts: models with dense layers too have the width of
# an expert under a name of its own, and the others under the name that dense models use.
NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "d_model", "n_embd"),
    "inner": (
        *("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"),
        *("intermediate_size", "ffn_hidden_size"),
    ),
    "experts": (
        *("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
        "num_routed_experts",
    ),
    "top_k": (
        *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk"),
        *("moe_k", "moe_top_k", "top_k_experts", "num_selected_experts"),
    ),
}
# Names of the width of dense layers, and members of models that have dense layers, or experts that
# are shared, beside routed experts of another width.
DENSE_WIDTHS = ("intermediate_size", "ffn_hidden_size")
MIXED = (
    *("n_routed_experts", "first_k_dense_replace", "n_shared_experts"),
    "shared_expert_intermediate_size",
)
LAYER_NAMES = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
# Parts of a configuration that hold the language model's.
SECTIONS = ("text_config", "language_config", "llm_config", "thinker_config", "ffn_config")


class ConfigSizes(NamedTuple):
    """What a configuration says."""

    sizes: Model
    layers: int | None
    """Layers that have routed experts, None if it doesn't say how many layers there are."""
    names: dict[str, str]
    """Name that each size has in the configuration, by name in `Model`."""


def read_config(path: Path, *, inner: int | None = None) -> ConfigSizes:
    """Read a configuration of Mixtral, Qwen, DeepSeek, GLM, gpt-oss, Llama 4 and many others.

    Parameters
    ----------
    path
        The ``config.json``, or the folder that holds it.
    inner
        Inner width of an expert, instead of the one in the configuration.

    Returns
    -------
    ConfigSizes

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If it is no JSON object, the model is dense, or a size is missing or of the wrong kind; the
        message says which names were looked for. So it is where a model with dense layers too
        doesn't say the width of an expert, and ``inner`` is None.
    """
    if path.is_dir():
        path = path / "config.json"
    content = parse_json(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    try:
        return _read_sizes(_choose_section(content), inner)
    except ValueError as error:
        kind = content.get("model_type")
        what = f" (model_type {kind!r})" if isinstance(kind, str) else ""
        raise ValueError(f"{path}{what}: {error}") from error


def _list_sections(content: dict[str, Any], depth: int = 3) -> Iterator[dict[str, Any]]:
    """List a configuration and its sections; a section has what is around it too."""
    yield content
    for name in SECTIONS:
        inner = content.get(name)
        if isinstance(inner, dict) and depth:
            yield from _list_sections({**content, name: None, **inner}, depth - 1)


def _choose_section(content: dict[str, Any]) -> dict[str, Any]:
    """Choose the section that has experts."""
    for section in _list_sections(content):
        for name in NAMES["experts"]:
            found = section.get(name)
            if found is not None and found != 0:
                return section
    raise ValueError(
        f"no routed experts: looked for {', '.join(NAMES['experts'])}, at the top and in "
        f"{', '.join(SECTIONS)}; the model is dense, or names them otherwise: give --experts and "
        "the other sizes instead"
    )


def _read_sizes(section: dict[str, Any], inner: int | None) -> ConfigSizes:
    """Read all sizes of a section."""
    found: dict[str, int] = {}
    used: dict[str, str] = {}
    for field, names in NAMES.items():
        if field == "inner" and inner is not None:
            found[field], used[field] = inner, field
            continue
        name = next((n for n in names if section.get(n) is not None), None)
        if name is None:
            raise ValueError(f"no {field}: looked for {', '.join(names)}")
        if name in DENSE_WIDTHS and any(section.get(mark) is not None for mark in MIXED):
            raise ValueError(
                f"'moe_intermediate_size' is missing, and {name!r} is that of dense layers; give "
                "--inner"
            )
        found[field], used[field] = _take_number(section, name, 1), name
    sizes = Model(**found)
    if sizes.experts == 1:
        raise ValueError(f"{used['experts']!r} is 1: the model is dense")
    if sizes.top_k > sizes.experts:
        raise ValueError(f"{used['top_k']!r} is {sizes.top_k}, of {sizes.experts} experts")
    return ConfigSizes(sizes, _count_layers(section), used)


def _take_number(section: Mapping[str, Any], name: str, least: int) -> int:
    """Return an integer; a list of equal ones counts as one."""
    value = section[name]
    if isinstance(value, list) and value and all(one == value[0] for one in value):
        value = value[0]
    if type(value) is not int or value < least:
        raise ValueError(f"{name!r} must be one integer from {least} on, got {value!r}")
    return value


def _count_layers(section: dict[str, Any]) -> int | None:
    """Count the layers that have experts."""
    listed = _count_listed(section)
    if listed is not None:
        return listed
    name = next((n for n in LAYER_NAMES if section.get(n) is not None), None)
    if name is None:
        return None
    rules = list(_find_rules(section))
    layers = range(_take_number(section, name, 1))
    return sum(all(rule(layer) for rule in rules) for layer in layers)


def _count_listed(section: Mapping[str, Any]) -> int | None:
    """Count the layers with experts of a configuration that lists layers, else return None."""
    for name, kind in (("mlp_layer_types", "sparse"), ("layers_block_type", "moe")):
        kinds = section.get(name)
        if isinstance(kinds, list) and kind in kinds:
            return kinds.count(kind)
    pattern = section.get("hybrid_override_pattern")
    if isinstance(pattern, str) and "E" in pattern:
        return pattern.count("E")
    if isinstance(section.get("moe_layers"), list):
        return len(section["moe_layers"])
    if isinstance(section.get("moe_layers_enum"), str):
        return len([one for one in section["moe_layers_enum"].split(",") if one.strip()])
    frequency = section.get("moe_layer_freq")
    return sum(map(bool, frequency)) if isinstance(frequency, list) else None


def _is_last_of(step: int, layer: int) -> bool:
    """Whether the layer is the last one of a run of ``step`` layers."""
    return (layer + 1) % step == 0


def _find_rules(section: dict[str, Any]) -> Iterator[Callable[[int], bool]]:
    """Find the rules by which a layer, numbered from 0, has experts; all of them hold."""

    def take(name: str, least: int = 1) -> int | None:
        return None if section.get(name) is None else _take_number(section, name, least)

    for name in (
        *("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
        "moe_layer_num_skipped",
    ):
        if (first := take(name, 0)) is not None:
            yield partial(operator.le, first)
    last = take("moe_layer_end_index", -1)
    if last is not None and last >= 0:
        yield partial(operator.ge, last)
    for name in ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"):
        if (step := take(name)) is not None:
            yield partial(_is_last_of, step)
    if (frequency := take("moe_layer_freq")) is not None:
        yield lambda layer: layer % frequency == 0
    if (period := take("expert_layer_period")) is not None:
        offset = take("expert_layer_offset", 0) or 0
        yield lambda layer: layer % period == offset
    dense = section.get("mlp_only_layers")
    if isinstance(dense, list):
        yield lambda layer: layer not in dense
