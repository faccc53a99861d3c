"""The families' records: each is whole, and nothing of a family stands outside its file."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

import ptq_cli
from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.formats.fused import FUSED
from ptq_cli.models.block_sites import kinds
from ptq_cli.models.families import FAMILIES, TOLD_BY_NAMES, text_type
from ptq_cli.models.forward.architecture import read_architecture
from ptq_cli.models.forward.attention import pack
from ptq_cli.models.gguf_names import names_of_file, names_of_model
from ptq_cli.models.linears import group_modules, left_alone
from tests.models.blocks import FAMILIES as FOLDED

PACKAGE = Path(ptq_cli.__file__).parent
EACH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "n_embd": 32, "intermediate_size": 48, "n_layer": 2,
    "num_hidden_layers": 2, "num_attention_heads": 4, "n_head": 4, "num_experts": 3,
    "num_local_experts": 3, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "shared_expert_intermediate_size": 16, "mamba_n_heads": 8, "mamba_d_head": 8,
    "attn_layer_indices": [1], "moe_layers": [1], "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
}  # fmt: skip


def inner_names(family):
    """The linears of a block, by what shares an input; experts are those of number 0."""
    names, experts = family.names, family.names.experts
    groups = [names.qkv, (names.output,), names.mlp_in, (names.mlp_out,)]
    if experts is not None:
        own = experts.expert.format(0)
        groups += [tuple(f"{own}.{name}" for name in experts.inputs), (f"{own}.{experts.output}",)]
    return [group for group in groups if group and group[0]]


def path_of(family, name):
    return f"{family.names.prefixes[0]}{family.names.blocks}.0.{name}"


def test_every_file_is_one_family_of_its_name():
    files = {path.stem for path in (PACKAGE / "models/families").glob("*.py")} - {"__init__"}
    assert files == {family.name for family in FAMILIES} | {"llava"}  # towers, of any text model
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    assert len(kinds) == len(set(kinds))
    assert sorted(FOLDED) == sorted(family.name for family in TOLD_BY_NAMES)


@EACH
def test_sites_are_all_linears_of_a_block_behind_its_norms(family):
    for kind in kinds(family):
        linears = [linear for pattern in kind for linear in pattern.linears]
        assert len(linears) == len(set(linears))
        for pattern in kind:
            assert not (pattern.norm and pattern.after)
            assert pattern.norm or pattern.after or pattern.reason
            assert (pattern.plus_one, pattern.transposed) == (family.plus_one, family.transposed)
    found = {
        linear.replace("{}", "0") for kind in kinds(family) for p in kind for linear in p.linears
    }
    assert found >= {name for group in inner_names(family) for name in group}


@EACH
def test_every_block_of_the_forward_has_the_linears_and_norms_of_a_kind_of_the_record(family):
    kind = text_type({"model_type": family.model_types[0]})
    if family.forward is None:
        with pytest.raises(InputError, match="no forward"):
            read_architecture({"model_type": kind, **SIZES})
        return
    arch, names, packing = (
        read_architecture({"model_type": kind, **SIZES}),
        family.names,
        pack((1, 2)),
    )
    linears = [{linear for site in kind for linear in site.linears} for kind in kinds(family)]
    norms = [
        {name for role, name in kind.items() if role not in ("q", "k")}
        for kind in (names.norms, *family.folds.norms)
    ]
    for number, block in enumerate(arch.blocks):
        path = f"{names.prefixes[0]}{names.blocks}.{number}."
        steps = [*block.mixer.steps(packing, None), *block.feed_forward.steps(packing, None)]
        found = {name for step in steps for group in step.sites.values() for name in group}
        inside = {re.sub(r"(?<=experts\.)\d+", "{}", name.removeprefix(path)) for name in found}
        assert inside in linears
        assert {norm.name.removeprefix(path) for norm in block.norms.values()} in norms
        assert {norm.offset for norm in block.norms.values()} == {float(family.plus_one)}
    assert arch.transposed == family.transposed


@EACH
def test_gguf_names_every_tensor_once(family):
    if family.gguf is None:
        with pytest.raises(InputError, match=r"is not known, only cohere2, .* qwen3_moe"):
            names_of_model({"model_type": family.model_types[0]})
        return
    gguf, names = names_of_model({"model_type": family.model_types[0]}), family.names
    prefix = names.prefixes[0]
    modules = [f"{prefix}{names.embedding}", f"{prefix}{names.final_norm}"]
    modules += [names.head] if family.gguf.own_head is not False else []
    inside = [name for group in inner_names(family) for name in group]
    if names.experts is not None:
        inside = [name for name in inside if name not in (*names.mlp_in, names.mlp_out)]
    modules += [path_of(family, name) for name in (*inside, *names.norms.values())]
    modules = list(dict.fromkeys(modules))  # one norm may have two roles
    stored = [gguf.tensor_name(f"{module}.weight") for module in modules]
    assert [gguf.module_of(name) for name in stored] == modules
    assert len(set(stored)) == len(stored)
    if family.gguf.model_class:
        found = names_of_file(
            family.gguf.architecture, names.experts is not None, family.gguf.window_period > 0
        )
        assert found == replace(gguf, towers=())


@EACH
def test_linears_are_quantized_and_the_rest_is_left_alone(family):
    names = family.names
    linears = [path_of(family, name) for group in inner_names(family) for name in group]
    prefix = names.prefixes[0]
    others = [f"{prefix}{names.embedding}", f"{prefix}{names.final_norm}", names.head]
    others += [path_of(family, name) for name in names.norms.values()]

    others += [path_of(family, name) for name in names.routers]
    others = list(dict.fromkeys(others))  # one norm may have two roles
    specs = {f"{m}.weight": TensorSpec(f"{m}.weight", "F32", (8, 8)) for m in linears + others}
    found = left_alone(specs, {"model_type": family.model_types[0]})
    assert sorted(found) == sorted(f"{module}.weight" for module in others)


@EACH
def test_linears_that_share_an_input_are_grouped_by_names_alone(family):
    named = [tuple(path_of(family, name) for name in group) for group in inner_names(family)]
    modules = [module for group in named for module in group]
    assert group_modules(modules[::-1]) == named[::-1]


def test_what_runtimes_fuse_are_linears_that_share_an_input():
    """Runtimes know their own words of these names, so a format holds them; experts are fused by
    other means."""
    groups = {
        tuple(name.rpartition(".")[2] for name in group)
        for family in FAMILIES
        for group in (family.names.qkv, family.names.mlp_in)
        if len(group) > 1
    }
    assert groups == set(FUSED)


# What is no family's name where it stands: a GGUF tokenizer's kind, and llama.cpp's words of
# architectures that its mixes are made for; what vLLM fuses, and how
# experts are stored as one tensor, in any model; parameters of transformers' modules; what tests
# load.
ELSEWHERE = {
    *("formats/gguf/metadata.py", "formats/gguf/tokenizer.py", "formats/fused.py"),
    *("models/experts.py", "calibration/torch_experts.py", "formats/runtimes/proven.py"),
    "plan/mixes.py",
}


def test_nothing_of_a_family_stands_outside_its_file():
    words = set()
    for family in FAMILIES:
        linears = {name for group in inner_names(family) for name in group if "expert" not in name}
        words |= {family.name, *family.model_types, *linears, *family.names.norms.values()}
        words |= {name.rpartition(".")[2] for name in linears}
        words |= set(family.keys.values())
    # BLOOM's, Mixtral's and OLMo 3's, but everybody's words too
    words -= {"dense", "intermediate_size", "rope_theta"}
    found = {}
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        if place.startswith("models/families/") or place in ELSEWHERE:
            continue
        nodes = ast.walk(ast.parse(path.read_text()))
        texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
        found[place] = texts & words
    assert {place: said for place, said in found.items() if said} == {}
