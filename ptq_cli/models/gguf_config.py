"""config.json of a model in a GGUF file: `hyperparameters` (models/gguf_keys.py) the other way, by
the same record of its family.

What was made is turned into key-values again and compared with the file's. Keys that change what is
computed and have no word in config.json here are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ptq_cli.core.tensors import FloatArray
from ptq_cli.errors import InputError
from ptq_cli.models.families import FAMILIES
from ptq_cli.models.family import USUAL_KEYS, Family
from ptq_cli.models.forward.rope import KINDS, Rope
from ptq_cli.models.gguf_family import GgufFamily
from ptq_cli.models.gguf_keys import NORM_EPS, SIZES, gguf_settings, hyperparameters, rope_of
from ptq_cli.models.gguf_names import GgufNames

_PLAIN = {  # what changes nothing, where config.json has no word for it
    "expert_count": 0, "rope.scaling.type": "none", "attention.causal": True,
    "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0,
    "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
    **{key: 0.0 for family in FAMILIES if family.gguf for key in family.gguf.factors},
}  # fmt: skip
_HEADS = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
# Tokens that it was trained on before its frequencies were stretched; the usual number first.
_LLAMA3_LENGTHS = (8192, *(2**power for power in range(5, 21)))
_CLOSE = 1e-5  # of numbers that are computed again


def model_config(
    names: GgufNames,
    metadata: Mapping[str, Any],
    vocab_size: int,
    factors: Mapping[str, FloatArray],
) -> dict[str, Any]:
    """config.json by a file's key-values; not `tie_word_embeddings` and biases, which tensors tell.

    vocab_size: rows of the embedding
    factors: what the frequencies are divided by, by the tensors' names, [channels that turn / 2]

    Raises:
        InputError: a key is missing or of the wrong kind, or says what is not covered.
    """
    keys, family = _Keys(metadata), names.family
    config: dict[str, Any] = {
        "architectures": [names.gguf.model_class],
        "model_type": names.model_type,
        "dtype": "bfloat16",
        "vocab_size": vocab_size,
    }
    config |= {_word(family, own): value for own, value in _settings(names, keys).items()}
    if family.names.positions is None:
        config |= _rope(names, config, keys, factors)
    settings = gguf_settings(family, config)
    for own, value in names.gguf.assumed(settings).items():
        if settings.get(own) != value:
            config[_word(family, own)] = value
    _check(names, config, keys)
    for own, key in _TOKENS.items():
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            config[f"{own}_token_id"] = metadata[f"tokenizer.ggml.{key}_token_id"]
    return config


def _word(family: Family, own: str) -> str:
    """config.json's key for a setting."""
    return {**USUAL_KEYS, **family.keys}.get(own, own)


def _settings(names: GgufNames, keys: _Keys) -> dict[str, Any]:
    """What the file says, in our words."""
    family, gguf = names.family, names.gguf
    usual = {key: own for key, own in SIZES.items() if key not in (*_HEADS, "vocab_size")}
    settings: dict[str, Any] = {own: keys.whole(key) for key, own in usual.items()}
    heads = settings["num_attention_heads"]
    settings["num_key_value_heads"] = keys.whole("attention.head_count_kv", heads)
    head_size = settings["hidden_size"] // heads
    settings["head_dim"] = keys.whole("attention.key_length", head_size)
    settings["activation"] = gguf.activations[0]
    settings["norm_eps"] = keys.fraction(NORM_EPS[gguf.layer_norms])
    if family.names.experts is not None:
        settings["num_experts"] = keys.whole("expert_count")
        settings["num_experts_per_tok"] = keys.whole("expert_used_count")
    usual_values = family.settings({})
    for key, own in gguf.sizes.items():
        settings[own] = keys.whole(key, usual_values.get(own))
    for key, own in gguf.factors.items():
        settings[own] = keys.fraction(key, usual_values.get(own))
    if gguf.window_period:
        settings["sliding_window"] = keys.whole("attention.sliding_window")
    elif "sliding_window" in family.defaults:
        settings["sliding_window"] = None
    return settings


def _rope(
    names: GgufNames, config: Mapping[str, Any], keys: _Keys, factors: Mapping[str, FloatArray]
) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and what belongs to them."""
    head_size, found = config["head_dim"], {"rope_theta": keys.fraction("rope.freq_base", 10000.0)}
    dims = keys.whole("rope.dimension_count", head_size)
    if names.gguf.partly_rotary and dims < head_size:
        found["partial_rotary_factor"] = dims / head_size
    if factors and not names.gguf.frequency_factors:
        raise InputError(f"tensor {min(factors)!r} is not understood in a {names.model_type}")
    kind = "longrope" if "rope_factors_long.weight" in factors else ""
    kind = kind or keys.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in factors:
        return found | _llama3(factors["rope_freqs.weight"], found["rope_theta"], dims)
    if kind not in ("linear", "yarn", "longrope"):
        return found  # a word that is not known is refused, as it does not come back
    scaling: dict[str, Any] = {"rope_type": kind}
    if kind == "longrope":
        scaling |= _longrope(factors, dims)
    else:
        scaling["factor"] = keys.fraction("rope.scaling.factor")
    if kind != "linear":
        original = {
            "original_max_position_embeddings": keys.whole("rope.scaling.original_context_length")
        }
        outside = "original_max_position_embeddings" in names.family.defaults
        (found if outside else scaling).update(original)
        _set_amplitude(names.gguf, gguf_settings(names.family, {**config, **found}), scaling, keys)
    return {**found, "rope_scaling": scaling}


def _set_amplitude(
    gguf: GgufFamily, settings: Mapping[str, Any], scaling: dict[str, Any], keys: _Keys
) -> None:
    """`attention_factor`, where it is not the usual one. llama.cpp multiplies cos and sin of yarn
    by 1 + 0.1 ln(factor) besides."""
    amplitude = keys.fraction("rope.scaling.attn_factor", 1.0)
    if scaling["rope_type"] == "yarn" and scaling["factor"] > 1:
        amplitude *= 1 + 0.1 * math.log(scaling["factor"])
    usual = rope_of(gguf, {**settings, "rope_scaling": scaling}).amplitude
    if not math.isclose(amplitude, usual, rel_tol=_CLOSE):
        scaling["attention_factor"] = amplitude


def _longrope(factors: Mapping[str, FloatArray], dims: int) -> dict[str, Any]:
    found = {}
    for own in ("long", "short"):
        name = f"rope_factors_{own}.weight"
        if name not in factors:
            raise InputError(f"tensor {name!r} is missing")
        values = factors[name]
        if values.shape != (dims // 2,) or not (np.isfinite(values) & (values > 0)).all():
            raise InputError(f"tensor {name!r} does not hold {dims // 2} positive numbers")
        found[f"{own}_factor"] = [_shortest(value) for value in values]
    return found


def _llama3(factors: FloatArray, theta: float, dims: int) -> dict[str, Any]:
    """`rope_scaling` where frequencies are divided by Llama 3's factors."""
    for length in _LLAMA3_LENGTHS:
        scaling = {
            "rope_type": "llama3", "factor": float(factors.max(initial=0)),
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": length,
        }  # fmt: skip
        rope = Rope(dims, theta, factor=scaling["factor"], original_length=length)
        with np.errstate(all="ignore"):
            expected = KINDS["default"](rope, 0) / KINDS["llama3"](rope, 0)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4):
            return {"rope_scaling": scaling}
    raise InputError("tensor 'rope_freqs.weight' does not hold the factors of a Llama 3")


def _check(names: GgufNames, config: Mapping[str, Any], keys: _Keys) -> None:
    """Raises InputError where the file says what config.json does not."""
    try:
        made = hyperparameters(names, config)
    except InputError as error:
        message = f"its key-values do not become a config.json: {error.message}"
        raise InputError(message) from None  # what to do instead is for those who write a file
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{keys.name('')}… is garbled: {error}") from None
    for key, value in made.items():
        found = keys.get(key, value)
        if key != "vocab_size" and not _is_same(found, value):
            what = f"a {names.model_type} has {value} there"
            raise InputError(f"{keys.name(key)} is {found!r}, which is not covered: {what}")
    for key, plain in _PLAIN.items():
        if key not in made and (found := keys.get(key, plain)) != plain:
            raise InputError(f"{keys.name(key)} is {found!r}, which is not covered")
    window = keys.get("attention.sliding_window", 0)
    length = config[_word(names.family, "max_position_embeddings")]
    hides = window != 0 and (type(window) is not int or window < length)
    if hides and "attention.sliding_window" not in made:
        name = keys.name("attention.sliding_window")
        raise InputError(f"{name} is {window!r}, which is not covered")


def check_shapes(
    names: GgufNames, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises InputError where a weight has another shape than config.json says.

    shapes: by the names in the file, [out_features, in_features], behind the number of experts
    """
    settings = gguf_settings(names.family, config)
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    queries, keys = (
        settings["head_dim"] * count for count in (heads, settings["num_key_value_heads"])
    )
    inner, experts = settings["intermediate_size"], settings.get("num_experts")
    expert_size = settings.get("expert_size") or inner
    wanted = {
        "token_embd": (settings["vocab_size"], hidden), "attn_q": (queries, hidden),
        "attn_k": (keys, hidden), "attn_v": (keys, hidden),
        "attn_qkv": (queries + 2 * keys, hidden), "attn_output": (hidden, queries),
        "ffn_down": (hidden, inner), "ffn_down_exps": (experts, hidden, expert_size),
        "ffn_up_exps": (experts, expert_size, hidden),
        "ffn_gate_exps": (experts, expert_size, hidden), "ffn_gate_inp": (experts, hidden),
    }  # fmt: skip
    for name, shape in shapes.items():
        module, _, ending = name.rpartition(".")
        stated = wanted.get(module.rpartition(".")[2], shape)
        if ending == "weight" and shape != stated:
            raise InputError(
                f"tensor {name!r} is {list(shape)}, not {list(stated)} as the key-values say"
            )


def _is_same(found: object, value: object) -> bool:
    if isinstance(found, float) and isinstance(value, int | float):
        return math.isclose(found, value, rel_tol=_CLOSE)
    return found == value


class _Keys:
    """The key-values that begin with the architecture's name."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self._architecture = str(metadata.get("general.architecture"))

    def name(self, key: str) -> str:
        return f"{self._architecture}.{key}"

    def get(self, key: str, default: Any) -> Any:
        return self._metadata.get(self.name(key), default)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise self._wrong(key, value, "a whole number above 0")
        return value

    def fraction(self, key: str, default: float | None = None) -> float:
        """A float32 as the shortest decimal number that tells it: 1e-05, as config.json had it."""
        value = self.get(key, default)
        if type(value) is not float or not 0 < value < math.inf:
            raise self._wrong(key, value, "a positive number")
        return _shortest(value)

    def _wrong(self, key: str, value: Any, wanted: str) -> InputError:
        stated = "is missing" if value is None else f"is {str(value)[:40]}, not {wanted}"
        return InputError(f"{self.name(key)} {stated}")


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))
