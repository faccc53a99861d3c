"""The type of every tensor in every mix: this tool's rules against llama.cpp's own quantizer.

    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-*.tgz
    python benchmarks/gguf_mixes.py package/bins/linux-x64

The folder holds libllama and ggml. Small models of several architectures, with and without experts
and shared heads, of widths that 256 divides or not, are quantized by `llama_model_quantize` in
every mix, pure or not, with and without an importance matrix, and its files' types are compared
with `ptq_cli.plan.mixes`. Needs the library gguf, which writes the models.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from ptq_cli.plan.mixes import MIXES, NEEDS_IMPORTANCE, ModelFacts, is_rounded, mix_types
from ptq_cli.storage.gguf_file import read_gguf_header

WIDTHS = ((256, 512), (288, 256), (544, 288))
Shapes = dict[str, tuple[int, ...]]
_PURE, _IMATRIX = 19, 24  # places in the quantizer's parameters
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class Model(NamedTuple):
    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    experts: int = 0
    tied: bool = False


MODELS = (
    Model("llama", 17, 8, 2), Model("llama", 9, 8, 2, 8), Model("llama", 10, 8, 4, 8, True),
    Model("llama", 80, 8, 2), Model("llama", 80, 8, 8), Model("qwen2", 80, 8, 8, 0, True),
    Model("qwen3moe", 9, 8, 4, 128), Model("falcon", 33, 8, 1), Model("falcon", 18, 8, 8, 0, True),
    Model("mistral3", 9, 8, 4),
)  # fmt: skip


class _Parameters(ctypes.Structure):
    """Passed by value at first; longer than any version of it."""

    _fields_ = [("bytes", ctypes.c_uint8 * 256)]


class _Importance(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


def library(folder: Path) -> Any:
    """libllama, with ggml loaded before it."""
    for pattern in ("libggml-base*.so", "libggml-cpu-x64*.so", "libggml.*.so"):
        (path,) = folder.glob(pattern)
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    (path,) = folder.glob("libllama.*.so")
    llama = ctypes.CDLL(str(path))
    llama.llama_model_quantize_default_params.restype = _Parameters
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
    llama.llama_log_set(_SILENT, None)
    return llama


def quantized(
    llama: Any, source: Path, file_type: int, important: Shapes, pure: bool
) -> dict[str, str]:
    """The types that llama.cpp gives. important: tensors that it gets an importance matrix for"""
    parameters = llama.llama_model_quantize_default_params()
    words = ctypes.cast(parameters.bytes, ctypes.POINTER(ctypes.c_int32))
    words[0], words[1] = 1, file_type  # threads, mix
    parameters.bytes[_PURE] = pure
    if important:
        ones = np.ones(max(map(np.prod, important.values())), np.float32)
        entries = (_Importance * (len(important) + 1))()
        for entry, (name, shape) in zip(entries, important.items(), strict=False):
            experts = shape[0] if len(shape) > 2 else 1
            entry.name, entry.data = name.encode(), ones.ctypes.data
            entry.size = shape[-1] * experts
        place = ctypes.addressof(parameters) + _IMATRIX
        ctypes.cast(place, ctypes.POINTER(ctypes.c_void_p))[0] = ctypes.addressof(entries)
    out = source.with_name("out.gguf")
    names = (str(source).encode(), str(out).encode())
    if llama.llama_model_quantize(*names, ctypes.byref(parameters)) != 0:
        raise RuntimeError(f"llama_model_quantize refuses file type {file_type}")
    header = read_gguf_header(out)
    assert header.metadata["general.file_type"] == file_type
    return {tensor.spec.name: tensor.spec.dtype for tensor in header.tensors}


def shapes_of(model: Model, columns: int, inner: int) -> Shapes:
    shapes: Shapes = {"token_embd.weight": (32, columns), "output_norm.weight": (columns,)}
    shapes |= {} if model.tied else {"output.weight": (32, columns)}
    falcon, experts = model.architecture == "falcon", (model.experts,) if model.experts else ()
    qkv = ("attn_qkv",) if falcon else ("attn_q", "attn_k", "attn_v")
    ending = "_exps" if experts else ""
    for block in range(model.blocks):
        own: Shapes = dict.fromkeys((*qkv, "attn_output"), (8, columns))
        own |= {f"ffn_{x}{ending}": (*experts, 2, columns) for x in ("up", "gate")[: 2 - falcon]}
        own |= {f"ffn_down{ending}": (*experts, 2, inner), "attn_norm": (columns,)}
        own |= {"ffn_gate_inp": (model.experts, columns)} if experts else {}
        shapes |= {f"blk.{block}.{name}.weight": shape for name, shape in own.items()}
    return shapes


def write(path: Path, model: Model, shapes: Shapes, columns: int, inner: int) -> None:
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_block_count(model.blocks)
    writer.add_context_length(64)
    writer.add_embedding_length(columns)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("no_vocab")
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(2)
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(llama: Any, path: Path, model: Model, shapes: Shapes) -> tuple[int, int]:
    """Tensors compared, and those whose types differ."""
    compared = wrong = 0
    rounded = {name: shape for name, shape in shapes.items() if is_rounded(name, shape)}
    for mix, own in MIXES.items():
        for important in (True,) if mix in NEEDS_IMPORTANCE else (False, True):
            facts = ModelFacts(*model[:5], important)
            for pure in (False, True):
                needed = rounded if important else {}
                theirs = quantized(llama, path, own.file_type, needed, pure)
                ours = mix_types(mix, facts, shapes, pure)
                differing = [x for x in shapes if ours.get(x, "F32") != theirs[x]]
                compared, wrong = compared + len(shapes), wrong + len(differing)
                for name in differing[:3]:
                    print(f"{model} {mix}: {name} is {theirs[name]}, not {ours.get(name)}")
    return compared, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    llama, compared, wrong = library(parser.parse_args().folder), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.gguf")
        for model in MODELS:
            for columns, inner in WIDTHS:
                shapes = shapes_of(model, columns, inner)
                write(path, model, shapes, columns, inner)
                found = compare(llama, path, model, shapes)
                compared, wrong = compared + found[0], wrong + found[1]
            print(f"{model}: {compared} tensors so far, {wrong} differ", flush=True)


if __name__ == "__main__":
    main()
