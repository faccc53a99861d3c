"""Small random models of every family as plain dicts of arrays, and one block in plain NumPy.

The statements are written from transformers' modeling files, not from the tables under test. Rotary
and ALiBi positions are left out: they touch queries, keys and scores, which no fold changes.
"""

from __future__ import annotations

import numpy as np

HIDDEN, HEADS, HEAD_DIM, MLP = 24, 4, 6, 40

GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")
FAMILIES = (*GATED, "opt", "gpt2", "bloom")


def config(family, kv_heads=HEADS):
    """The part of config.json that matters."""
    if family in ("gpt2", "bloom"):
        return {"model_type": family, "n_head": HEADS}
    kind = {"gemma3": "gemma3_text"}.get(family, family)
    return {"model_type": kind, "num_attention_heads": HEADS, "num_key_value_heads": kv_heads}


def tensors(family, rng, kv_heads=HEADS, n_blocks=1):
    """Weights of `n_blocks` blocks and what detection may look at beside them."""
    result = {}
    for i in range(n_blocks):
        prefix = {
            "opt": f"model.decoder.layers.{i}.",
            "gpt2": f"transformer.h.{i}.",
            "bloom": f"transformer.h.{i}.",
        }.get(family, f"model.layers.{i}.")
        inner = MAKERS.get(family, _gated)(family, kv_heads)
        for name, shape in inner.items():
            values = rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else 4)
            is_gain = name.endswith("weight") and len(shape) == 1
            result[prefix + name] = values + (0 if "gemma" in family or not is_gain else 1.5)
    if family == "opt":
        result["model.decoder.final_layer_norm.weight"] = np.ones(HIDDEN)
    vocabulary = 256000 if family == "gemma" else 32
    result["model.embed_tokens.weight"] = np.broadcast_to(np.float64(0), (vocabulary, HIDDEN))
    return result


def _gated(family, kv_heads):
    q, kv = HEADS * HEAD_DIM, kv_heads * HEAD_DIM
    shapes = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    shapes |= {"self_attn.o_proj.weight": (HIDDEN, q), "mlp.down_proj.weight": (HIDDEN, MLP)}
    if family == "phi3":
        shapes["self_attn.qkv_proj.weight"] = (q + 2 * kv, HIDDEN)
        shapes["mlp.gate_up_proj.weight"] = (2 * MLP, HIDDEN)
        return shapes
    for x, rows in (("q", q), ("k", kv), ("v", kv)):
        shapes[f"self_attn.{x}_proj.weight"] = (rows, HIDDEN)
        if family == "qwen2":
            shapes[f"self_attn.{x}_proj.bias"] = (rows,)
    shapes |= {f"mlp.{x}_proj.weight": (MLP, HIDDEN) for x in ("gate", "up")}
    if family in ("qwen3", "gemma3"):
        shapes |= {f"self_attn.{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
    if family in ("gemma2", "gemma3"):
        shapes |= {f"{x}_feedforward_layernorm.weight": (HIDDEN,) for x in ("pre", "post")}
    return shapes


def _with_biases(linears, norms, transposed=False):
    shapes = {}
    for name, (outputs, inputs) in linears.items():
        shapes[f"{name}.weight"] = (inputs, outputs) if transposed else (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)
    return shapes | {f"{norm}.{part}": (HIDDEN,) for norm in norms for part in ("weight", "bias")}


def _opt(family, kv_heads):
    linears = {f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in ("q", "k", "v", "out")}
    linears |= {"fc1": (MLP, HIDDEN), "fc2": (HIDDEN, MLP)}
    return _with_biases(linears, ("self_attn_layer_norm", "final_layer_norm"))


def _gpt2(family, kv_heads):
    linears = {"attn.c_attn": (3 * HIDDEN, HIDDEN), "attn.c_proj": (HIDDEN, HIDDEN)}
    linears |= {"mlp.c_fc": (MLP, HIDDEN), "mlp.c_proj": (HIDDEN, MLP)}
    return _with_biases(linears, ("ln_1", "ln_2"), transposed=True)


def _bloom(family, kv_heads):
    linears = {
        "self_attention.query_key_value": (3 * HIDDEN, HIDDEN),
        "self_attention.dense": (HIDDEN, HIDDEN),
        "mlp.dense_h_to_4h": (MLP, HIDDEN),
        "mlp.dense_4h_to_h": (HIDDEN, MLP),
    }
    return _with_biases(linears, ("input_layernorm", "post_attention_layernorm"))


MAKERS = {"opt": _opt, "gpt2": _gpt2, "bloom": _bloom}


def rms(x, gain):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * gain


def layer_norm(x, gain, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * gain + bias


def gelu(x):
    return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))


def attend(q, k, v):
    """q [tokens, heads, head_dim]; k, v [tokens, kv heads, head_dim] → [tokens, hidden]"""
    tokens, heads, width = q.shape
    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(width)
    scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
    mixed = np.exp(scores - scores.max(-1, keepdims=True))
    mixed /= mixed.sum(-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", mixed, v).reshape(tokens, heads * width)


def block(family, t, x):
    """The output of one block [tokens, hidden], and the inputs of every linear by its name.

    t: the block's tensors by their inner names
    """
    seen = {}

    def linear(name, inputs):
        seen[name] = inputs
        weight = t[f"{name}.weight"]
        outputs = inputs @ (weight if family == "gpt2" else weight.T)
        return outputs + t.get(f"{name}.bias", 0)

    statement = {"opt": _opt_block, "gpt2": _gpt2_block, "bloom": _bloom_block}
    return statement.get(family, _gated_block)(family, t, x, linear), seen


def _gated_block(family, t, x, linear):
    one = 1 if "gemma" in family else 0
    sandwich = family in ("gemma2", "gemma3")

    def norm(name, values):
        return rms(values, t[f"{name}.weight"] + one)

    h = norm("input_layernorm", x)
    if family == "phi3":
        qkv = linear("self_attn.qkv_proj", h)
        kv = (qkv.shape[1] - HIDDEN) // 2
        q, k, v = np.split(qkv, [HIDDEN, HIDDEN + kv], axis=1)
    else:
        q, k, v = (linear(f"self_attn.{name}_proj", h) for name in "qkv")
    q, k, v = (y.reshape(len(x), -1, HEAD_DIM) for y in (q, k, v))
    if family in ("qwen3", "gemma3"):
        q, k = norm("self_attn.q_norm", q), norm("self_attn.k_norm", k)
    h = linear("self_attn.o_proj", attend(q, k, v))
    x = x + (norm("post_attention_layernorm", h) if sandwich else h)
    h = norm("pre_feedforward_layernorm" if sandwich else "post_attention_layernorm", x)
    if family == "phi3":
        gate, up = np.split(linear("mlp.gate_up_proj", h), 2, axis=1)
    else:
        gate, up = linear("mlp.gate_proj", h), linear("mlp.up_proj", h)
    h = linear("mlp.down_proj", gelu(gate) * up)
    return x + (norm("post_feedforward_layernorm", h) if sandwich else h)


def _opt_block(family, t, x, linear):
    h = layer_norm(x, t["self_attn_layer_norm.weight"], t["self_attn_layer_norm.bias"])
    q, k, v = (linear(f"self_attn.{n}_proj", h).reshape(len(x), HEADS, HEAD_DIM) for n in "qkv")
    x = x + linear("self_attn.out_proj", attend(q, k, v))
    h = layer_norm(x, t["final_layer_norm.weight"], t["final_layer_norm.bias"])
    return x + linear("fc2", np.maximum(linear("fc1", h), 0))


def _gpt2_block(family, t, x, linear):
    qkv = linear("attn.c_attn", layer_norm(x, t["ln_1.weight"], t["ln_1.bias"]))
    q, k, v = (y.reshape(len(x), HEADS, HEAD_DIM) for y in np.split(qkv, 3, axis=1))
    x = x + linear("attn.c_proj", attend(q, k, v))
    h = linear("mlp.c_fc", layer_norm(x, t["ln_2.weight"], t["ln_2.bias"]))
    return x + linear("mlp.c_proj", gelu(h))


def _bloom_block(family, t, x, linear):
    h = layer_norm(x, t["input_layernorm.weight"], t["input_layernorm.bias"])
    qkv = linear("self_attention.query_key_value", h).reshape(len(x), HEADS, 3, HEAD_DIM)
    x = x + linear("self_attention.dense", attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]))
    h = layer_norm(x, t["post_attention_layernorm.weight"], t["post_attention_layernorm.bias"])
    return x + linear("mlp.dense_4h_to_h", gelu(linear("mlp.dense_h_to_4h", h)))
