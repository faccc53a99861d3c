"""config.json of a GGUF file: metadata.py's `model_metadata` the other way.

Keys that change what is computed and have no word in config.json here are refused. Llama 3's
frequencies stand in the file as a tensor, what each is divided by: they are told by its values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ptq_cli.core.tensors import FloatArray
from ptq_cli.errors import InputError

# config.json's key → what follows the architecture's name in the file's
_SIZES = {
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}  # fmt: skip
_PLAIN = {  # what changes nothing
    "expert_count": 0, "rope.scaling.type": "none", "attention.sliding_window": 0,
    "attention.causal": True, "attention.scale": 0.0, "logit_scale": 0.0, "residual_scale": 0.0,
    "embedding_scale": 0.0, "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0,
}  # fmt: skip
_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def model_config(
    metadata: Mapping[str, Any],
    model_type: str,
    vocab_size: int,
    rope_factors: FloatArray | None = None,
) -> dict[str, Any]:
    """config.json by a file's key-values; not `tie_word_embeddings` and biases, which tensors tell.

    vocab_size: rows of the embedding
    rope_factors: what the frequencies are divided by, [head_dim / 2]; None: nothing

    Raises:
        InputError: a key is missing or of the wrong kind, or says what is not covered.
    """
    keys = _Keys(metadata)
    for key, plain in _PLAIN.items():
        if (found := keys.get(key, plain)) != plain:
            raise InputError(f"{keys.name(key)} is {found!r}, which is not covered")
    sizes = {own: keys.whole(key) for own, key in _SIZES.items()}
    heads = sizes["num_attention_heads"]
    head_size = keys.whole("attention.key_length", sizes["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := keys.whole(key, head_size)) != head_size:
            raise InputError(f"{keys.name(key)} is {found}, but heads have {head_size} channels")
    theta = keys.fraction("rope.freq_base", 10000.0)
    return {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "dtype": "bfloat16",
        **sizes,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_size,
        "hidden_act": "silu",
        "rms_norm_eps": keys.fraction("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        **_scaling(rope_factors, theta, head_size),
        "vocab_size": vocab_size,
        **{
            f"{own}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"]
            for own, key in _TOKENS.items()
            if f"tokenizer.ggml.{key}_token_id" in metadata
        },
    }


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
        return float(str(np.float32(value)))

    def _wrong(self, key: str, value: Any, wanted: str) -> InputError:
        stated = "is missing" if value is None else f"is {str(value)[:40]}, not {wanted}"
        return InputError(f"{self.name(key)} {stated}")


def _scaling(factors: FloatArray | None, theta: float, head_size: int) -> dict[str, Any]:
    """`rope_scaling` where frequencies are divided by Llama 3's factors, or by none."""
    if factors is None:
        return {}
    slow, fast, length, factor = 1.0, 4.0, 8192, float(factors.max())
    frequencies = theta ** -(np.arange(0, head_size, 2) / head_size)
    kept = np.clip((length * frequencies / (2 * math.pi) - slow) / (fast - slow), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise InputError("tensor 'rope_freqs.weight' does not hold the factors of a Llama 3")
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": slow,
        "high_freq_factor": fast, "original_max_position_embeddings": length,
    }  # fmt: skip
    return {"rope_scaling": scaling}
