"""`ptq check` says three things apart: loaded in our tests, known not to load, not tried."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.formats.runtimes.proven import PROVEN, layout
from ptq_cli.models.families import FAMILIES
from tests.builders import ptq
from tests.cli.tiny_folders import llama, llava, mixtral
from tests.formats.float_weights import float_layer
from tests.formats.ggml_weights import ggml_layer
from tests.interop import test_architectures, test_gguf_families, test_runtimes, test_small_floats

LOADED, UNLOADED, UNTRIED = "loaded in our tests", "known not to load", "not tried"
CT = ("--format", "compressed-tensors", "--group-size", 32)


def verdict(out: str = "out", runtime: str = "transformers") -> tuple[str, str | None]:
    outcome = ptq("check", out, "--runtime", runtime, "--json")
    document = outcome.document
    assert outcome.code == (3 if document["verdict"] == UNLOADED else 0)
    assert document["loads"] is {LOADED: True, UNLOADED: False, UNTRIED: None}[document["verdict"]]
    said = ptq("check", out, "--runtime", runtime).out.splitlines()[-1]
    assert document["verdict"] in said
    return document["verdict"], document["why"]


def quantize(source: Path, *options: object, command: str = "pack") -> tuple[str, ...]:
    """The warnings that it gave for transformers."""
    outcome = ptq(command, source, *options, "--runtime", "transformers", "-o", "out", "--force")
    assert outcome.code == 0, outcome.err
    return tuple(line for line in outcome.warnings if "transformers: " in line)


def test_what_is_proven_is_what_the_interop_tests_load():
    of_cases = defaultdict(lambda: (set(), set()))
    for case in test_runtimes.CASES:
        types, layouts = of_cases[case.client.removesuffix("+gptqmodel"), case.format]
        types.add(case.model)
        layouts.add((case.bits, case.sym, None))
    for key, (types, layouts) in of_cases.items():
        row = PROVEN[key][0]
        assert (set(row.model_types), set(row.layouts)) == (types, layouts), key
    row = PROVEN["transformers", "compressed-tensors"][-1]
    variant = re.compile("^tied_|_stacked$|_v1_1$")
    own = {variant.sub("", name) for name in test_architectures.MODELS}
    assert set(row.model_types) == own - set(test_architectures.REFUSED)
    assert set(row.layouts) == {(4, True, None)}
    others = defaultdict(set)
    for _, name, fmt, client in test_architectures.OTHERS:
        runtime = {"gptqmodel": "transformers", "GPTQModel": "gptqmodel"}.get(client, client)
        others[runtime, fmt] |= {name, "llama"} if name == "llava" else {name}
    for key, types in others.items():
        assert (set(PROVEN[key][-1].model_types), PROVEN[key][-1].layouts) == (
            types,
            {(4, True, None)},
        )
    (heads,) = (row for row in PROVEN["transformers", "compressed-tensors"] if row.kinds)
    assert set(heads.model_types) == set(test_architectures.WITH_HEADS.values())
    floats = {(case.client, case.format) for case in test_small_floats.CASES}
    assert PROVEN.keys() - of_cases.keys() - floats == {("llama.cpp", "gguf")}
    held = [f for f in FAMILIES if f.name in {n.split()[0] for n in test_gguf_families.MODELS}]
    own = {word for f in held for word in (*f.model_types, f.gguf.architecture)}
    assert set(PROVEN["llama.cpp", "gguf"][1].model_types) == own


def test_what_is_proven_of_small_floats_is_what_the_interop_tests_load():
    of_cases = defaultdict(set)
    for case in test_small_floats.CASES:
        own = {layout(float_layer(scheme)) for scheme in case.scheme.split(" and ")}
        model = case.model.split(" ")[0]
        dense = model in ("llama", "qwen2")
        if dense or "and" not in case.scheme:
            of_cases[case.client, case.format, "dense" if dense else model] |= own
    for client in ("transformers", "llama.cpp"):  # tests/interop/test_ggml_types.py
        of_cases[client, "gguf", "llama"] = {layout(ggml_layer(name)) for name in TYPES}
    proven = {}
    for (client, fmt), rows in PROVEN.items():
        for row in rows:
            if any(isinstance(part, str) for own in row.layouts for part in own):
                dense = set(row.model_types) == {"llama", "qwen2"}
                proven[client, fmt, "dense" if dense else row.model_types[0]] = set(row.layouts)
    assert proven == of_cases


def test_loaded(tmp_path):
    assert quantize(llama(tmp_path / "m"), *CT) == ()
    assert verdict() == (LOADED, None)
    assert quantize(mixtral(tmp_path / "x"), *CT) == ()
    assert verdict() == (LOADED, None)
    assert quantize(llava(tmp_path / "v"), *CT) == ()
    assert verdict() == (LOADED, None)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("strange", CT, "a model of type strange"),
        ("mistral", ("--format", "gptq", "--group-size", 32), "a model of type mistral in gptq"),
        ("mistral", (*CT, "--bits", 8), "a mistral with such layers (8 bits, symmetric)"),
        ("qwen2", (*CT, "--include", "lm_head"), "output head, quantized"),
    ],
)
def test_what_no_test_loads_is_not_said_to_load(tmp_path, kind, options, words):
    (warned,) = quantize(llama(tmp_path / "m", kind, tie_word_embeddings=False), *options)
    found, why = verdict()
    assert (found, words in why, f"not tried: {why}" in warned) == (UNTRIED, True, True)


def test_nothing_is_loaded_in_vllm_here(tmp_path):
    quantize(llama(tmp_path / "m"), *CT)
    assert verdict(runtime="vllm") == (UNTRIED, "no test loads compressed-tensors in vllm")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*CT, "--include", "block_sparse_moe.gate"), "is a router"),
        ((*CT, "--ignore", "experts.1"), "is dense, an expert that"),
        (("--format", "gptq", "--group-size", 32), "is an expert, which transformers 5"),
        (("--format", "awq", "--group-size", 32), "is an expert, which transformers 5"),
    ],
)
def test_mixtures_that_would_be_noise(tmp_path, options, words):
    source = mixtral(tmp_path / "m")
    warned = quantize(source, *options)
    found, why = verdict()
    assert found == UNLOADED
    assert words in why
    assert any(words in line for line in warned)


def test_experts_of_different_grids(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[[layers]]\nmatch = "experts.0"\nbits = 8\n')
    quantize(mixtral(tmp_path / "m"), *CT, "--config", recipe)
    found, why = verdict()
    assert (found, "has another grid" in why) == (UNLOADED, True)


def declare(**settings: object) -> None:
    path = Path("out/config.json")
    config = json.loads(path.read_text())
    config["quantization_config"] |= settings
    path.write_text(json.dumps(config))
    Path("out/quantize_config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        # by the checkpoint's names only, as it was written once
        ("compressed-tensors", {"ignore": ["vision_tower.encoder.layers.0.self_attn.q_proj"]}),
        ("gptq", {"modules_in_block_to_quantize": [["self_attn.q_proj", "mlp.up_proj"]]}),
        ("awq", {"modules_to_not_convert": ["lm_head"]}),
    ],
)
def test_a_tower_that_is_dense_and_not_declared_by_its_name_in_the_runtime(
    tmp_path, form, settings
):
    quantize(llava(tmp_path / "m"), "--format", form, "--group-size", 32)
    assert verdict() == (LOADED, None)
    declare(**settings)
    found, why = verdict()
    assert (found, "vision_tower" in why or "packed" in why) == (UNLOADED, True)


def test_what_is_packed_and_declared_dense_by_its_name_in_the_runtime(tmp_path):
    quantize(llava(tmp_path / "m"), *CT)
    config = json.loads(Path("out/config.json").read_text())
    ignore = config["quantization_config"]["ignore"]
    declare(ignore=[*ignore, "model.language_model.layers.0.mlp.up_proj"])
    found, why = verdict()
    assert (found, "mlp.up_proj: is packed" in why) == (UNLOADED, True)


def test_formats_are_offered_only_where_they_hold_the_model(tmp_path):
    unheld = llama(tmp_path / "x", "stablelm")
    sources = ((llama(tmp_path / "m"), True), (mixtral(tmp_path / "y"), True), (unheld, False))
    for source, hint in sources:
        outcome = ptq("pack", source, "-g", 32, "--runtime", "llama.cpp", "-o", "out", "--force")
        assert ("--format gguf" in outcome.err) is hint
        found, why = verdict("out", "llama.cpp")
        assert (found, "--format gguf" in why) == (UNLOADED, hint)
