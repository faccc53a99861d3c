"""Every family's forward against transformers' own, float32: every row of forward_models.py on one
token, on sequences padded left and right, and on one that is longer than any window or context.

A row runs where the forward reads its config.json. One family:

    pytest -m interop tests/interop/test_forward_transformers.py -k falcon
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from ptq_cli.errors import InputError
from ptq_cli.models.families import FAMILIES, MULTIMODALS, family_of
from ptq_cli.models.family import Family
from tests.interop.forward_models import ALONE, CHANGES, MROPE, ROWS, WITHOUT_A_FORWARD
from tests.interop.forwards import (
    BATCHES,
    LEARNED_POSITIONS,
    PADDED,
    Saved,
    has_forward,
    long,
    ours,
    relative_error,
    saved,
    theirs,
)

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-4

Models = Callable[[str], Saved]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    """The model of a row, made once."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers").logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    with threadpool_limits(1, "blas"):
        yield cache(lambda name: saved(name, tmp_path_factory.mktemp("model")))
    torch.set_num_threads(threads)


def that_runs(models: Models, name: str) -> Saved:
    """The model of a row, if its family has a forward."""
    if not has_forward(models(name)):
        pytest.skip(f"no forward for {name.split()[0]} yet")
    return models(name)


@pytest.mark.parametrize("tokens", BATCHES)
@pytest.mark.parametrize("name", ROWS)
def test_logits_equal_those_of_transformers(models: Models, name: str, tokens: str) -> None:
    if name in ALONE and "padding" in tokens:
        pytest.skip("transformers lets padding reach the tokens behind it")
    error = relative_error(that_runs(models, name), *BATCHES[tokens](name))
    print(f"{name}, {tokens}: {error:.1e}")
    assert error < TOLERANCE


def test_which_model_types_have_no_forward(models: Models) -> None:
    found = {name.split()[0] for name in ROWS if not has_forward(models(name))}
    assert found == WITHOUT_A_FORWARD


def test_every_family_is_there(models: Models) -> None:
    """All but T5, an encoder with a decoder; and each model_type that transformers knows but Aria,
    whose text is of no family here, and PaliGemma, which is not causal."""
    from transformers import CONFIG_MAPPING

    configs = [models(name).config for name in ROWS]
    found = {family.name for config in configs if (family := family_of(config))}
    assert {family.name for family in FAMILIES} - found == {"t5"}
    known = [*(family for family in FAMILIES if family.forward), *MULTIMODALS]
    kinds = {kind for own in known for kind in own.model_types} - {"aria", "paligemma"}
    parts = [part for config in configs for part in (config, config.get("text_config", config))]
    assert kinds & set(CONFIG_MAPPING) <= {part["model_type"] for part in parts}


@pytest.mark.parametrize("name", ROWS)
def test_long_is_longer_than_windows_and_contexts(models: Models, name: str) -> None:
    config = models(name).config
    text = config.get("text_config", config)
    ropes = text.get("rope_parameters") or {}
    nested = [own for own in ropes.values() if isinstance(own, dict)]
    keys = (
        "sliding_window", "attention_chunk_size", "original_max_position_embeddings",
        "max_position_embeddings",
    )  # fmt: skip
    limits = [own.get(key) or 0 for own in (text, ropes, *nested) for key in keys]
    assert max(limits) < long(name) or name.startswith(LEARNED_POSITIONS)


# -- config.json said otherwise ------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LOCAL = {"rope_theta": 5e5, "rope_local_base_freq": 2e3, "sliding_window_pattern": 2,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
LATENT = {"rope_theta": 5e3, "rope_scaling": {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.8,
    "mscale_all_dim": 0.5,
}}  # fmt: skip
# As published files have them; None: they lack that key.
OLD_KEYS: dict[str, dict[str, Any]] = {
    "bamba": {"rope_theta": 5e3},
    "bloom": {"hidden_size": None, "n_embed": 64, "n_head": None, "num_attention_heads": 4},
    "cohere": {"rope_theta": 5e3},
    "cohere2": {"rope_theta": 5e3, "sliding_window_pattern": 2},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "falcon": {"rope_theta": 5e3},
    "gemma3": LOCAL,
    "gemma3_text": LOCAL,
    "glm4": {"rope_theta": 5e3, "partial_rotary_factor": 0.25},
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 5e3},
    "gpt_oss": {"rope_theta": 5e3, "rope_scaling": {**YARN, "truncate": False}},
    "granite": {"rope_theta": 5e3},
    "llama": {"rope_theta": 5e3, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama4": {"rope_theta": 5e3, "no_rope_layers": [], "moe_layers": None},
    "llava": {"rope_theta": 5e3},
    "mistral3": {"rope_theta": 5e3},
    "olmo3": {"rope_theta": 5e5, "rope_scaling": YARN},
    "phi3 partial": {"rope_theta": 5e3, "partial_rotary_factor": 0.75},
    "phi3 phi-4-mini": {
        "rope_theta": 5e3, "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 6, "long_factor": [2.5] * 6},
    },
    "qwen2_5_vl": {"rope_theta": 5e3, **MROPE},
    "qwen3_next": {"rope_theta": 5e3, "partial_rotary_factor": 0.5, "full_attention_interval": 4},
    "smollm3": {"rope_theta": 5e3, "no_rope_layers": None, "no_rope_layer_interval": 2},
    "starcoder2": {"rope_theta": 5e3},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_KEYS)
def test_the_keys_of_config_json_before_transformers_5(
    models: Models, name: str, tmp_path: Path
) -> None:
    saved = that_runs(models, name)
    gone = dict.fromkeys(("rope_parameters", "layer_types", "_sliding_window_pattern"))
    old = saved.read_again(with_change(saved.config, {**gone, **OLD_KEYS[name]}), tmp_path)
    assert relative_error(old, *PADDED) < TOLERANCE


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=str)
def test_what_transformers_makes_of_config_json(
    models: Models, name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    saved = models(name)
    changed = saved.read_again({**saved.config, **change}, tmp_path)
    assert relative_error(changed, *PADDED) < TOLERANCE


# These have a key head for each head.
NO_KEY_HEADS = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite"}


@pytest.mark.parametrize(
    "family", [own for own in FAMILIES if own.forward], ids=lambda own: own.name
)
def test_the_defaults_are_those_of_transformers(family: Family) -> None:
    from transformers import CONFIG_MAPPING

    for kind in {*family.model_types} & {*CONFIG_MAPPING}:
        fields = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[kind])}
        keys = {*family.defaults, "num_key_value_heads"} & {*fields} - {"rope_parameters"}
        if family.name in NO_KEY_HEADS:
            keys -= {"num_key_value_heads"}
        assert {key: family.defaults.get(key) for key in keys} == {key: fields[key] for key in keys}


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl window"])
def test_the_settings_of_the_text_beside_those_of_the_towers(
    models: Models, name: str, tmp_path: Path
) -> None:
    saved = that_runs(models, name)
    config = saved.config
    flat = {**config.pop("text_config"), **config}
    assert relative_error(saved.read_again(flat, tmp_path), *PADDED) < TOLERANCE


def with_change(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """config.json with other settings of the language model, without those that are None."""
    if "text_config" in config:
        return {**config, "text_config": with_change(config["text_config"], change)}
    new = {**config, **change}
    return {key: value for key, value in new.items() if value is not None or key not in change}


def with_partial_factor(config: dict[str, Any], where: str) -> dict[str, Any]:
    """config.json that asks for half of each head's channels, itself or in its `rope_parameters`
    (Gemma 3 has some for each type of block)."""
    if where == "config.json":
        return {**config, "partial_rotary_factor": 0.5}
    given = config["rope_parameters"]
    if "rope_theta" in given:
        return {**config, "rope_parameters": {**given, "partial_rotary_factor": 0.5}}
    each = {kind: {**own, "partial_rotary_factor": 0.5} for kind, own in given.items()}
    return {**config, "rope_parameters": each}


@pytest.mark.parametrize("where", ["config.json", "rope_parameters"])
@pytest.mark.parametrize(
    "name",
    ["llama", "mistral window", "qwen2", "qwen3", "gemma2", "gemma3_text types, cap",
     "phi3 window", "mixtral", "qwen3_moe"],
)  # fmt: skip
def test_a_partial_factor_counts_where_transformers_reads_it(
    models: Models, name: str, where: str, tmp_path: Path
) -> None:
    saved = models(name)
    changed = saved.read_again(with_partial_factor(saved.config, where), tmp_path)
    assert relative_error(changed, *PADDED) < TOLERANCE


@pytest.mark.parametrize("name", ["llama linear", "llama dynamic", "llama llama3", "qwen2 yarn"])
def test_a_partial_factor_that_transformers_cannot_run(
    models: Models, name: str, tmp_path: Path
) -> None:
    saved = models(name)
    changed = saved.read_again({**saved.config, "partial_rotary_factor": 0.5}, tmp_path)
    with pytest.raises(RuntimeError, match="size of tensor"):
        theirs(changed, *PADDED)
    with pytest.raises(InputError, match="partial_rotary_factor"):
        ours(tmp_path, *PADDED)


PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
ALL_SEEN = {"sliding_window": 1000}
MATTERS: list[tuple[str, dict[str, Any]]] = [
    *((name, PLAIN) for name in ROWS if name.split()[-1] in ("linear", "dynamic", "llama3")),
    *((name, PLAIN) for name in ROWS if "yarn" in name or "longrope" in name),
    *((name, ALL_SEEN) for name in ROWS if "window" in name),
    *((name, ALL_SEEN) for name in ("gemma2", "gemma3_text", "mixtral", "cohere2", "olmo3")),
    *((name, ALL_SEEN) for name in ("gpt_oss", "gemma3n_text", "mistral3", "gemma3")),
    ("bamba biases, groups, limits", {"time_step_limit": [0.0, 100.0]}),
    ("bloom residual behind the norm", {"apply_residual_connection_post_layernorm": False}),
    ("cohere", {"logit_scale": 1.0}),
    ("deepseek_v2", {"topk_method": "greedy"}),
    ("deepseek_v2", {"routed_scaling_factor": 1.0}),
    ("deepseek_v2 lite", PLAIN),
    ("deepseek_v3", PLAIN),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("deepseek_v3", {"topk_group": 4}),
    ("deepseek_v3", {"routed_scaling_factor": 1.0}),
    ("deepseek_v3 lite", {"rope_interleave": True}),
    ("falcon new decoder", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    ("falcon rw", {"alibi": False}),
    ("gemma2", {"attn_logit_softcapping": 1000.0}),
    ("gemma2", {"final_logit_softcapping": 1000.0}),
    ("gemma2", {"query_pre_attn_scalar": 32}),
    ("gemma3_text", {**PLAIN}),
    ("gemma3_text types, cap", {"layer_types": ["sliding_attention"] * 3}),
    ("gemma3n_text sparse", {"activation_sparsity_pattern": [0.0] * 4}),
    ("glm4", {"rope_parameters": {**PLAIN["rope_parameters"], "partial_rotary_factor": 1.0}}),
    ("gpt2 scale, gelu", {"scale_attn_by_inverse_layer_idx": False}),
    ("gpt_neox", {"rope_parameters": {**PLAIN["rope_parameters"], "partial_rotary_factor": 1.0}}),
    ("gpt_neox in sequence", {"use_parallel_residual": True}),
    ("gpt_oss", PLAIN),
    ("gpt_oss", {"swiglu_limit": 7.0}),
    *(("granite", {key: 1.0}) for key in ("embedding_multiplier", "attention_multiplier")),
    *(("granite", {key: 1.0}) for key in ("residual_multiplier", "logits_scaling")),
    ("llama4_text", {"attention_chunk_size": 1000}),
    ("llama4_text", {"attn_temperature_tuning": False}),
    ("phi3 partial", PLAIN),
    ("phi3 phi-4-mini", PLAIN),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_next", {"norm_topk_prob": False}),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
]


@pytest.mark.parametrize(("name", "change"), MATTERS)
def test_each_setting_matters_within_these_tokens(
    models: Models, name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    saved = that_runs(models, name)
    changed = saved.beside(with_change(saved.config, change), tmp_path)
    before, after = ours(saved.folder, *PADDED), ours(changed, *PADDED)
    difference = np.abs(after - before)[PADDED[1] == 1].max()
    assert difference > 1e-3 * np.abs(before).max()
