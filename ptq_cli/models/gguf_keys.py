"""The key-values of a model in a GGUF file: what llama.cpp computes, from config.json.

Keys come without the architecture's name before them; a value's type says GGUF's (`int` U32,
`float` F32). What llama.cpp would compute otherwise than config.json says is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ptq_cli.core.tensors import FloatArray
from ptq_cli.core.text import TWO_STEPS
from ptq_cli.errors import InputError
from ptq_cli.models.family import Config, Family
from ptq_cli.models.forward.rope import KINDS, Rope, read_rope
from ptq_cli.models.gguf_family import GgufFamily
from ptq_cli.models.gguf_names import GgufNames

SIZES = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim",
    "vocab_size": "vocab_size",
}  # fmt: skip
_ASSUMED = {
    "use_windows": False, "use_bidirectional_attention": False, "local_rope_type": "default",
}  # fmt: skip
NORM_EPS = {
    True: "attention.layer_norm_epsilon", False: "attention.layer_norm_rms_epsilon",
}  # fmt: skip
_SCALINGS = ("linear", "yarn")  # of every architecture; others divide frequencies by a tensor


def hyperparameters(names: GgufNames, config: Config) -> dict[str, Any]:
    """All keys of a model of this family.

    Raises:
        InputError: config.json says what llama.cpp does not compute.
        KeyError, TypeError, ValueError: it lacks or garbles a setting.
    """
    gguf, settings = names.gguf, gguf_settings(names.family, config)
    _check(gguf, settings)
    keys: dict[str, Any] = {key: int(settings[own]) for key, own in SIZES.items()}
    keys |= _window(gguf, settings)
    keys[NORM_EPS[gguf.layer_norms]] = float(settings["norm_eps"])
    if names.family.names.experts is not None:
        keys["expert_count"] = int(settings["num_experts"])
        keys["expert_used_count"] = int(settings["num_experts_per_tok"])
    keys |= {key: int(settings[own]) for key, own in gguf.sizes.items()}
    keys |= {key: float(settings[own]) for key, own in gguf.factors.items()}
    if names.family.names.positions is None:
        keys |= _rope_keys(gguf, rope_of(gguf, settings), settings)
        frequency_factors(names, config)  # refuses what they cannot be made of
    numbers = {key: value for key, value in keys.items() if not isinstance(value, str)}
    with np.errstate(over="ignore"):
        odd = [key for key, value in numbers.items() if not np.isfinite(np.float32(value))]
    if odd:
        raise ValueError(f"a number: {odd[0]} is {keys[odd[0]]}")
    return keys


def frequency_factors(names: GgufNames, config: Config) -> dict[str, FloatArray]:
    """What the frequencies of rotary embeddings are divided by, as tensors by their names in the
    file: float32 [channels that turn / 2]."""
    if names.family.names.positions is not None:
        return {}
    rope = rope_of(names.gguf, gguf_settings(names.family, config))
    plain = KINDS["default"](rope, 0)
    lengths = {"llama3": {"rope_freqs": 0}}
    lengths["longrope"] = {"rope_factors_long": rope.original_length + 1, "rope_factors_short": 0}
    with np.errstate(all="ignore"):
        found = {
            f"{name}.weight": (plain / KINDS[rope.kind](rope, length)).astype(np.float32)
            for name, length in lengths.get(rope.kind, {}).items()
        }
    if not all(np.isfinite(values).all() for values in found.values()):
        raise _uncovered("rope_type", rope.kind, "its factors give frequencies of 0")
    return found


def gguf_settings(family: Family, config: Config) -> dict[str, Any]:
    """config.json's settings in our words, with those that follow from others."""
    settings = family.settings(config)
    hidden, heads = int(settings["hidden_size"]), int(settings["num_attention_heads"])
    settings["num_key_value_heads"] = settings.get("num_key_value_heads") or heads
    settings["head_dim"] = settings.get("head_dim") or hidden // heads
    settings["intermediate_size"] = settings.get("intermediate_size") or 4 * hidden
    settings["activation"] = settings.get("activation") or settings.get("hidden_act")
    local = (settings.get("rope_parameters") or {}).get("sliding_attention")
    if local:
        settings["local_rope_theta"] = float(local["rope_theta"])
        settings["local_rope_type"] = local.get("rope_type")
    if family.gguf is not None and family.gguf.own_head is not None:
        settings.setdefault("tie_word_embeddings", False)
    return settings


def _check(gguf: GgufFamily, settings: Mapping[str, Any]) -> None:
    """Raises InputError for a setting that is not what llama.cpp computes."""
    assumed = {**_ASSUMED, **gguf.assumed(settings)}
    if not gguf.biases:
        assumed |= {"attention_bias": False, "mlp_bias": False}
    if gguf.usual_heads:
        assumed["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
    if gguf.own_head is not None:
        assumed["tie_word_embeddings"] = not gguf.own_head
    for key, value in assumed.items():
        found = settings.get(key)
        if found is not None and found != value:
            raise _uncovered(key, found, f"in a {gguf.architecture} llama.cpp takes it for {value}")
    if settings["activation"] not in gguf.activations:
        raise _uncovered("activation", settings["activation"], f"not {gguf.activations[0]!r}")


def _uncovered(key: str, value: object, why: str) -> InputError:
    return InputError(f"gguf: {key} {value!r} in config.json is not covered: {why}", hint=TWO_STEPS)


def _window(gguf: GgufFamily, settings: Mapping[str, Any]) -> dict[str, int]:
    """How many tokens blocks with a window see; where none can have one, the context ends where the
    window would begin to hide tokens."""
    window = settings.get("sliding_window")
    if not gguf.window_period:
        if window is None or not settings.get("use_windows", True):
            return {}
        return {"context_length": min(int(settings["max_position_embeddings"]), int(window))}
    period, blocks = gguf.window_period, range(1, int(settings["num_hidden_layers"]) + 1)
    expected = ["sliding_attention" if b % period else "full_attention" for b in blocks]
    kinds = settings.get("layer_types") or expected
    given = settings.get("sliding_window_pattern") or settings.get("_sliding_window_pattern")
    if kinds != expected or given not in (None, period) or window is None:
        why = f"every block but each {period}th has a window in a {gguf.architecture}"
        raise _uncovered("layer_types", settings.get("layer_types"), why)
    return {"attention.sliding_window": int(window)}


def rope_of(gguf: GgufFamily, settings: Mapping[str, Any]) -> Rope:
    """The rotary embeddings, of blocks that see all tokens where others have some of their own."""
    given = settings.get("rope_parameters") or {}
    by_type = settings.get("local_rope_theta") is not None
    nested = given.get("full_attention") or ({} if by_type else given)
    parameters = dict(settings.get("rope_scaling") or nested)
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = settings["rope_theta"]
    parameters.setdefault("partial_rotary_factor", settings.get("partial_rotary_factor") or 1.0)
    if parameters["partial_rotary_factor"] != 1 and not gguf.partly_rotary:
        value = parameters["partial_rotary_factor"]
        raise _uncovered("partial_rotary_factor", value, "whole heads turn")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in (*KINDS, "su", "none"):
        raise _uncovered("rope_type", kind, f"known are {', '.join(KINDS)}")
    length = int(settings["max_position_embeddings"])
    original = settings.get("original_max_position_embeddings")
    return read_rope(parameters, int(settings["head_dim"]), length, original)


def _rope_keys(gguf: GgufFamily, rope: Rope, settings: Mapping[str, Any]) -> dict[str, Any]:
    local = settings.get("local_rope_theta")
    if local not in (None, rope.theta) and "local_rope_theta" not in gguf.factors.values():
        raise _uncovered(
            "rope_theta", local, f"blocks with a window have that of others: {rope.theta}"
        )
    keys: dict[str, Any] = {"rope.dimension_count": rope.dims, "rope.freq_base": rope.theta}
    by_tensor = rope.kind in ("llama3", "longrope") and gguf.frequency_factors
    if rope.kind not in ("default", *_SCALINGS) and not by_tensor:
        raise _uncovered("rope_type", rope.kind, f"it has no place in a {gguf.architecture}")
    if rope.kind in _SCALINGS:
        keys |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": rope.factor}
    if rope.kind in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = rope.original_length
    if rope.kind == "longrope":
        keys |= {"rope.scaling.type": rope.kind, "rope.scaling.attn_factor": rope.amplitude}
    if rope.kind == "yarn":
        keys |= _yarn(rope)
    return keys


def _yarn(rope: Rope) -> dict[str, float]:
    """llama.cpp multiplies cos and sin by 1 + 0.1 ln(factor) by itself."""
    usual = 1 + 0.1 * float(np.log(rope.factor)) if rope.factor > 1 else 1.0
    for key, value in {"truncate": True, "beta_fast": 32, "beta_slow": 1}.items():
        if (found := rope.parameters.get(key, value)) != value:
            raise _uncovered(key, found, f"llama.cpp takes it for {value}")
    return {"rope.scaling.attn_factor": rope.amplitude / usual}
