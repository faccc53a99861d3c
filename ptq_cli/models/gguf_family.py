"""What llama.cpp computes for a family of models: the record that a family's file fills in.

Facts about llama.cpp (its loader of each architecture, 2026.10); names of tensors follow from roles
(models/gguf_names.py), and most key-values from config.json (models/gguf_keys.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GgufFamily:
    """A family in GGUF files.

    architecture: `general.architecture`
    permuted: inside each head, the rows of q and k stand there in another order
    layer_norms: norms are LayerNorms, else RMSNorms
    biases: config.json's `attention_bias` and `mlp_bias` may be true
    usual_heads: heads have hidden_size / num_attention_heads channels, whatever `head_dim` says
    activations: config.json's words for the one activation that is computed
    assumed: from config.json's settings, those of which llama.cpp knows one value → that value
    sizes, factors: further keys, after the architecture's name → the setting that they hold, a
        whole number or a float
    window_period: every so manieth block sees all tokens and the others a window; 0: all blocks see
        all, so that the context ends where a window would begin
    partly_rotary: of a head only the first channels may turn
    frequency_factors: a tensor may hold what each frequency is divided by (Llama 3, LongRoPE)
    own_head: the head has to be a tensor of its own (true), must be none (false), or may be (None)
    aliases: other beginnings of names inside a block, and the family's own for them
    model_class: the first of `architectures` in config.json where that is made again of a file
        (models/gguf_config.py), a class of transformers; empty: it is not made
    dropped: ends of names of tensors that are no part of the file
    """

    architecture: str
    permuted: bool = False
    layer_norms: bool = False
    biases: bool = False
    usual_heads: bool = False
    activations: tuple[str, ...] = ("silu",)
    assumed: Callable[[Mapping[str, Any]], Mapping[str, object]] = lambda settings: {}
    sizes: Mapping[str, str] = field(default_factory=dict)
    factors: Mapping[str, str] = field(default_factory=dict)
    window_period: int = 0
    partly_rotary: bool = False
    frequency_factors: bool = False
    own_head: bool | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    model_class: str = ""
    dropped: tuple[str, ...] = (".rotary_emb.inv_freq",)  # computed anew by every loader
